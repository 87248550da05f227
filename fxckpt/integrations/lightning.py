"""A callback for the `Trainer` of Lightning."""

from __future__ import annotations

from typing import Any

from torch import nn

from fxckpt.errors import FxckptError
from fxckpt.integrations.rewriting import Rewriting, needs

with needs("lightning"):
    from lightning.pytorch import Callback, LightningModule


class FxckptCallback(Callback):
    """Rewrites the model of a Lightning `Trainer` while it is fitted.

    The model is rewritten in place when fitting begins, and is restored when fitting is done or
    raises. Losses, parameters and checkpoints are those of a run without the callback, bit for bit.

    Args:
        policy: What to recompute, as for `fxckpt.rewrite`.
        module: The path of the module to rewrite, such as "model" or "net.encoder": one that
            `training_step` calls. `""` is the LightningModule, for a `training_step` that calls
            `self(...)`.
        options: What else `fxckpt.rewrite` takes: `budget=`, `plan=`, `save=`, `strict=`, ...

    Raises:
        PolicyError: if the policy or a selector makes no sense.
        BudgetError: if the budget means nothing.
        FxckptError: when fitting begins, if there is no such module, if it has no forward, or if
            it is rewritten already.

    Example:
        >>> from fxckpt.integrations.lightning import FxckptCallback
        >>> callback = FxckptCallback("block", module="model")  # Trainer(callbacks=[callback])
    """

    def __init__(self, policy: Any = None, *, module: str = "", **options: Any) -> None:
        self._path, self._rewriting = module, Rewriting(policy, options)

    def on_fit_start(self, trainer: Any, pl_module: LightningModule) -> None:
        """Rewrites the module."""
        self._rewriting.begin(self._found(pl_module))

    def on_train_batch_end(self, *args: Any) -> None:
        """Warns if the module was not called."""
        self._rewriting.require_call(
            "Say which module it calls, as in FxckptCallback(..., module='model')"
        )

    def on_fit_end(self, trainer: Any, pl_module: LightningModule) -> None:
        """Restores the module."""
        self._rewriting.end()

    def on_exception(
        self, trainer: Any, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Restores the module."""
        self._rewriting.end()

    def _found(self, model: Any) -> nn.Module:
        call = f"FxckptCallback(..., module={self._path!r})"
        children = ", ".join(repr(name) for name, _ in model.named_children())
        if not self._path and type(model).forward is LightningModule.forward:
            raise FxckptError(
                f"{call}: {type(model).__name__} defines no forward. "
                f"Say which module training_step calls; there are {children}"
            )
        try:
            return model.get_submodule(self._path)
        except AttributeError:
            raise FxckptError(
                f"{call}: {type(model).__name__} has no such module; there are {children}"
            ) from None
