"""What forward returns: views, the same tensor twice, inputs, no gradients, numbers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import leaves
from torch import Tensor

from fxckpt import capture
from fxckpt.runtime import Captured
from fxckpt.tape import Result
from traps import EITHER, Guard, Stage, Trap, function, rows, same, wanted


def tensors_of(tree: Any) -> list[Tensor]:
    return [leaf for _, leaf in leaves(tree) if isinstance(leaf, Tensor)]


def loss_of(tree: Any) -> Tensor:
    """Of everything differentiable, each with another weight."""
    parts = [t for t in tensors_of(tree) if t.is_floating_point() or t.is_complex()]
    weighted = ((i + 1) * t.abs().pow(2).sum().float() for i, t in enumerate(parts))
    return sum(weighted, torch.zeros(()))


def relations(stage: Stage, inputs: list[Tensor], results: list[Tensor]) -> None:
    """Records which tensors are the same, share memory, or are views."""
    others = [*inputs, *stage.model.parameters(), *stage.model.buffers(), *results]
    stage.note("same", [[a is b for b in others] for a in results])
    stage.note("shared", [[_memory(a) == _memory(b) for b in others] for a in results])
    stage.note("views", [(t._is_view(), t.storage_offset()) for t in results])


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def returns(
    name: str,
    forward: Callable[..., Any],
    batch: Callable[[], Any] = rows,
    guard: Guard | None = None,
    **options: Any,
) -> Trap:
    """Three steps that look at the results in every way."""

    def play(stage: Stage) -> None:
        for _ in range(3):
            stage.steps += 1
            x = batch()
            result = stage.model(x)
            stage.note("result", result)
            relations(stage, [x], tensors_of(result))
            loss = loss_of(result)
            if loss.requires_grad:
                loss.backward()
            leaves_ = [t for t in tensors_of(result) if t.is_leaf]
            stage.note("gradients", (x.grad, [t.grad for t in leaves_]))
            stage.update()

    return Trap(name, lambda: same(function(forward), play, **options), guard)


def without_views(patch: pytest.MonkeyPatch) -> None:
    """Results are copies of what the graph returns."""
    patch.setattr(Result, "taken_from", lambda result, tensor, sizes: tensor.clone())


def without_bases(patch: pytest.MonkeyPatch) -> None:
    """Nobody looks for what a result is a view of."""
    patch.setattr(capture, "_base_and_views", lambda recorder, tensor: (tensor, ()))


def unmarked(patch: pytest.MonkeyPatch) -> None:
    """Autograd is not told which outputs have no gradient."""
    patch.setattr(Captured, "without_gradient", lambda *_: [])


def without_grad(function: Callable[[], Any]) -> Any:
    with torch.no_grad():
        return function()


CONSTANT = torch.ones(4)

TRAPS = [
    returns("input", lambda m, x: x, wanted, graph=0),
    returns("input, too", lambda m, x: (x, x @ m.weight), wanted, without_views),
    returns("view of an input", lambda m, x: (x[0], x.t(), x @ m.weight), wanted, without_views),
    returns("view of an input without a gradient", lambda m, x: (x[0], x @ m.weight),
            guard=without_views),
    returns("detached input", lambda m, x: (x.detach(), x @ m.weight), wanted, without_views),
    returns("parameter", lambda m, x: (m.weight, x @ m.weight), guard=without_views),
    returns("parameter alone", lambda m, x: m.weight, graph=0),
    returns("view of a parameter", lambda m, x: (m.weight[0], x @ m.weight),
            guard=without_views),
    returns("detached parameter", lambda m, x: (m.weight.data, x @ m.weight),
            guard=without_views),
    returns("buffer", lambda m, x: (m.seen, m.seen[:2], x @ m.weight), guard=without_views),
    returns("one tensor twice", lambda m, x: (y := (x @ m.weight).sin(), y, [y])),
    returns("views of one", lambda m, x: (y := (x @ m.weight).sin(), y.t(), y[0], y.view(-1)),
            guard=without_views),
    returns("overlapping views", lambda m, x: ((y := (x @ m.weight).sin())[:2], y[1:]),
            guard=without_bases),
    returns("windows", lambda m, x: (x @ m.weight).unfold(1, 2, 1), guard=without_views),
    returns("strided", lambda m, x: (x @ m.weight).as_strided((2, 2), (4, 1), 1),
            guard=without_views),
    returns("expanded", lambda m, x: (x @ m.weight).sum().expand(3, 4), guard=without_views),
    returns("diagonal", lambda m, x: (x @ m.weight).diagonal(), guard=without_views),
    returns("chunks", lambda m, x: (x @ m.weight).chunk(2, 1), guard=without_views),
    returns("rows", lambda m, x: (*(x @ m.weight).unbind(0), *x.split(1)), guard=without_views),
    returns("integers", lambda m, x: (x.argmax(1), x > 0.8, x @ m.weight)),
    returns("without gradients", lambda m, x: (x * 2, x.argmax(1), (x @ m.weight)),
            guard=unmarked),
    returns("nothing with a gradient", lambda m, x: (x * 2, x.argmax(1)), graph=0),
    returns("no tensors", lambda m, x: (None, 1, "a", x.shape, x.dtype, [], {}, x @ m.weight)),
    returns("detached", lambda m, x: (y := (x @ m.weight).sin(), y.detach()),
            guard=without_bases),
    returns("made without gradients",
            lambda m, x: (without_grad(lambda: x @ m.weight), x @ m.weight), guard=unmarked),
    returns("viewed without gradients",
            lambda m, x: (y := (x @ m.weight).sin(), without_grad(lambda: y[0]))),
    returns("input viewed without gradients",
            lambda m, x: (x @ m.weight, without_grad(lambda: x[0])), wanted),
    returns("parameter viewed without gradients",
            lambda m, x: (x @ m.weight, without_grad(lambda: m.weight[0]))),
    returns("attribute viewed without gradients", lambda m, x: (
        y := (x @ m.weight).sin(), setattr(m, "kept", without_grad(lambda: y[0])), m.kept)[::2]),
    returns("attribute", lambda m, x: (setattr(m, "kept", y := x @ m.weight), y, m.kept[0])[1:]),
    returns("new leaf", lambda m, x: (z := torch.ones(4, requires_grad=True), x @ m.weight * z),
            warns=EITHER),
    returns("real part", lambda m, x: torch.complex(x @ m.weight, x).real, guard=without_views),
    returns("conjugate", lambda m, x: torch.complex(x @ m.weight, x).conj()),
    returns("pairs of a complex", lambda m, x: torch.view_as_real(torch.complex(x @ m.weight, x)),
            guard=without_views),
    returns("bits", lambda m, x: ((x @ m.weight).detach().view(torch.int32), x @ m.weight)),
    returns("empty", lambda m, x: (x[:0] @ m.weight, x @ m.weight)),
    returns("scalar", lambda m, x: ((x @ m.weight).sum(), x.sum())),
    returns("constant", lambda m, x: (CONSTANT, CONSTANT[:2], x @ m.weight)),
    returns("literal", lambda m, x: (torch.tensor([1.0, 2.0]), torch.arange(3)[1:], x @ m.weight)),
    returns("several of one operation", lambda m, x: (x @ m.weight).max(1)),
]  # fmt: skip
