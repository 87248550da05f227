"""A model is used with some arguments, and everything that can be seen of it is recorded."""

from collections.abc import Callable
from typing import Any

import torch
from helpers import leaves
from torch import Tensor

from traps import Guard, Stage, Trap, function, rows, same
from traps.results import loss_of

Use = Callable[[Stage, tuple[Any, ...], Any], Any]


def backward(stage: Stage, args: tuple[Any, ...], result: Any) -> None:
    """What callers do with a result, unless a trap says otherwise."""
    loss = loss_of(result)
    if loss.requires_grad:
        loss.backward()


def uses(
    name: str,
    forward: Callable[..., Any],
    *batches: Callable[[], Any],
    use: Use = backward,
    guard: Guard | None = None,
    **options: Any,
) -> Trap:
    """Each batch (a function of nothing to arguments) twice, with all that can be seen of it."""

    def play(stage: Stage) -> None:
        for batch in (batches or (rows,)) * 2:
            stage.steps += 1
            args = batch()
            args = args if isinstance(args, tuple) else (args,)
            try:
                result = stage.model(*args)
                stage.note("result", result)
                use(stage, args, result)
            except RuntimeError as error:
                stage.note("error", _kind_of(str(error)))
            inputs = [t for _, t in leaves(args) if isinstance(t, Tensor)]
            stage.note("inputs", [(t, t._version, t.grad if t.is_leaf else None) for t in inputs])
            stage.update()

    return Trap(name, lambda: same(function(forward), play, **options), guard)


def _kind_of(error: str) -> str:
    """The part of an error that is the same for eager and ours."""
    known = (
        "a second time",
        "modified by an inplace",
        "is a view",
        "leaf Variable",
        "single memory",
    )
    return next((part for part in known if part in error), error)


def nonleaf() -> Tensor:
    return rows().requires_grad_() * 1


def quietly(change: Callable[[], Any]) -> Any:
    """Without gradients."""
    with torch.no_grad():
        return change()
