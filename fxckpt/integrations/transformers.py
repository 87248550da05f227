"""A callback for `transformers.Trainer`."""

from __future__ import annotations

from typing import Any

from fxckpt.errors import FxckptError
from fxckpt.integrations.rewriting import Rewriting, needs

with needs("transformers"):
    from transformers import TrainerCallback
    from transformers.training_args import ParallelMode


class FxckptCallback(TrainerCallback):
    """Rewrites the model of a `transformers.Trainer` while it is trained.

    The model is rewritten in place when training begins, and is restored when training is done.
    Losses, parameters and checkpoints are those of a run without the callback, bit for bit. With
    `torch_compile=True` they are those of eager, up to rounding by Inductor: dropout has the masks
    of eager.

    Args:
        policy: What to recompute, as for `fxckpt.rewrite`.
        options: What else `fxckpt.rewrite` takes: `budget=`, `plan=`, `save=`, `strict=`, ...

    Raises:
        PolicyError: if the policy or a selector makes no sense.
        BudgetError: if the budget means nothing.
        FxckptError: when training begins, if the model is rewritten already, or the arguments of
            the trainer ask for what makes the original forward run.

    Example:
        >>> from fxckpt.integrations.transformers import FxckptCallback
        >>> callback = FxckptCallback(budget="8GiB")  # Trainer(..., callbacks=[callback])
    """

    def __init__(self, policy: Any = None, **options: Any) -> None:
        self._rewriting = Rewriting(policy, options)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Rewrites the model."""
        _require_eager(args)
        self._rewriting.begin(kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Warns if the model was not called."""
        self._rewriting.require_call("Rewrite what compute_loss calls by fxckpt.rewrite_")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restores the model."""
        self._rewriting.end()


def _require_eager(args: Any) -> None:
    """Refuses what would make the callback useless."""
    unsuitable = {
        "gradient_checkpointing=True": (
            args.gradient_checkpointing,
            "layers would be recomputed twice; leave it out",
        ),
        "several devices in one process": (
            args.parallel_mode is ParallelMode.NOT_DISTRIBUTED,
            "the replicas of DataParallel run the original forward; start a process per device",
        ),
        "fsdp": (
            args.fsdp,
            "parameters of a whole model are gathered block by block; see docs/training.md",
        ),
    }
    for what, (is_set, advice) in unsuitable.items():
        if is_set:
            raise FxckptError(f"FxckptCallback with {what} in TrainingArguments: {advice}")
