"""What the callbacks have in common: rewriting a model for as long as it is trained."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

from torch import nn

from fxckpt.errors import FallbackWarning, FxckptError
from fxckpt.installation import runner_of
from fxckpt.module import is_rewritten, restore_, rewrite_


@contextlib.contextmanager
def needs(package: str) -> Iterator[None]:
    """Around the imports from an optional package: says which one to install.

    Raises:
        ModuleNotFoundError: if the package is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != package:
            raise
        raise ModuleNotFoundError(
            f"fxckpt.integrations.{package} needs the package {package}, which is not installed. "
            f"Install it: pip install {package}",
            name=package,
        ) from error


class Rewriting:
    """Rewrites a model when training begins, and restores it when training is done.

    Args:
        policy: What `fxckpt.rewrite` takes.
        options: The keyword arguments that it takes.

    Raises:
        PolicyError, BudgetError, TypeError: at once, if these make no sense.
    """

    def __init__(self, policy: Any, options: dict[str, Any]) -> None:
        checked = {k: v for k, v in options.items() if k != "example_inputs"}
        rewrite_(nn.Identity(), policy, **checked)
        self._policy, self._options = policy, options
        self._model: nn.Module | None = None
        self._told = False

    def begin(self, model: nn.Module) -> None:
        """Rewrites the model in place.

        Raises:
            FxckptError: if somebody else has rewritten it.
        """
        if model is self._model:  # training was cut off before
            return
        if is_rewritten(model):
            raise FxckptError(
                f"FxckptCallback: this {type(model).__name__} is rewritten already. "
                "Leave out the callback, or the call of fxckpt.rewrite_"
            )
        self.end()
        rewrite_(model, self._policy, **self._options)
        self._model, self._told = model, False

    def require_call(self, advice: str) -> None:
        """Warns, once, if a training step did not call the forward of the model."""
        if self._model is None or self._told or runner_of(self._model).called:
            return
        self._told = True
        warnings.warn(
            f"FxckptCallback: the training step does not call the forward of "
            f"{type(self._model).__name__}, so it runs eagerly. {advice}",
            FallbackWarning,
            stacklevel=2,
        )

    def end(self) -> None:
        """Restores the model, if it was rewritten here."""
        if self._model is not None:
            model, self._model = self._model, None
            restore_(model)
