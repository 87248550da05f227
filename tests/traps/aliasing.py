"""Forward changes memory in place: of inputs, parameters, buffers, views; or what is not memory."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxckpt import capture
from traps import EITHER, IDENTITY, constant, rows, wanted
from traps.inputs import overlapping, separate
from traps.uses import nonleaf, quietly, uses


def doubles(m: Any, x: Tensor) -> Tensor:
    """Changes its input."""
    x.mul_(2)
    return (x @ m.weight).sin()


def changing(change: Callable[[Any, Tensor], Any]) -> Callable[..., Tensor]:
    """A forward that changes something before it computes."""

    def forward(m: Any, x: Tensor, *more: Tensor) -> Tensor:
        change(m, x)
        return (sum(more, x).reshape(-1, 4) @ m.weight).sin() + m.seen

    return forward


def twins() -> tuple[Tensor, Tensor]:
    x = rows()
    return x, x


def chained(m: Any, x: Tensor) -> Any:
    """Changes views of views."""
    y = (x @ m.weight) * 1
    y[0].mul_(2)
    y[:, 1].add_(y[:, 2])
    flipped = y.t()
    flipped[0].sin_()
    return y * flipped.t(), flipped[1]


def saved_then_changed(m: Any, x: Tensor) -> Tensor:
    """Eager's backward raises."""
    y = (x @ m.weight).exp()
    quietly(lambda: y.mul_(2))
    return y.sin()


UNSAFE = constant(capture._Session, "_refuse_unsafe_writes")

TRAPS = [
    uses("input", doubles),
    uses("input that is a view", doubles, lambda: rows(4).t()),
    uses("input that repeats itself", doubles, lambda: rows(1).expand(3, 4), warns=EITHER),
    uses("leaf", doubles, wanted, graph=0),
    uses("input with a history", doubles, nonleaf, warns=EITHER),
    uses("view of an input", changing(lambda m, x: x[0].add_(1))),
    uses("element of an input", changing(lambda m, x: x.__setitem__((slice(None), 0), 5.0))),
    uses("input as out=", changing(lambda m, x: torch.sin(x, out=x))),
    uses("input, then returned", lambda m, x: (x.add_(1), x[0], x @ m.weight)),
    uses("input, after it was saved", lambda m, x: ((x @ m.weight).sin(), x.add_(1)),
         warns=EITHER),
    uses("input under no_grad", changing(lambda m, x: quietly(lambda: x.mul_(2))), wanted,
         warns="under a gradient", guard=UNSAFE),
    uses("detached input", changing(lambda m, x: x.detach().mul_(2)), wanted,
         warns="under a gradient", guard=UNSAFE),
    uses("data of an input", changing(lambda m, x: x.data.mul_(2)), wanted,
         warns="under a gradient", guard=UNSAFE),
    uses("parameter", changing(lambda m, x: quietly(lambda: m.weight.mul_(1.5))),
         warns="under a gradient", guard=UNSAFE),
    uses("data of a parameter", changing(lambda m, x: m.weight.data.mul_(1.5)),
         warns="under a gradient", guard=UNSAFE),
    uses("buffer", changing(lambda m, x: m.seen.add_(x.detach().sum(0)))),
    uses("view of a buffer", changing(lambda m, x: m.seen[1:].add_(x.detach().sum()))),
    uses("buffer with a gradient", lambda m, x: m.seen.add_((x @ m.weight).sum(0)) + x,
         warns=EITHER),
    uses("buffer, after it was saved", lambda m, x: (x @ m.weight * m.seen, m.seen.add_(1))[0],
         warns=EITHER),
    uses("one input twice", lambda m, x, y: (x.mul_(2), y @ m.weight)[1], twins, separate,
         guard=IDENTITY),
    uses("inputs that overlap", lambda m, x, y: (x.mul_(2), (y @ m.weight).sin())[1],
         overlapping, warns="overlaps"),
    uses("inputs that overlap later", lambda m, x, y: (x.mul_(2), (y @ m.weight).sin())[1],
         separate, overlapping, separate, warns=EITHER),
    uses("integers", lambda m, x, i: (i.add_(1), m.weight[i] * x[i])[1],
         lambda: (rows(), torch.tensor([0, 1]))),
    uses("integer that is read", lambda m, x, i: (i.add_(1), x @ m.weight * int(i[0]))[1],
         lambda: (rows(), torch.tensor([0, 1])), warns=EITHER),
    uses("views of views", chained),
    uses("what backward reads", saved_then_changed, warns=EITHER),
    uses("data of what backward reads",
         lambda m, x: (y := (x @ m.weight).exp(), y.data.mul_(2), y.sin())[2], warns=EITHER),
    uses("activations",
         lambda m, x: F.dropout(F.relu(x @ m.weight, True) * 2, 0.5, inplace=True)),
    uses("shape of an input", changing(lambda m, x: x.unsqueeze_(0)), warns=EITHER),
    uses("strides of an input", changing(lambda m, x: x.t_()), lambda: rows(4), warns=EITHER),
    uses("size of an input", changing(lambda m, x: x.resize_(2, 4)), warns="changes the shape"),
    uses("memory of an input", changing(lambda m, x: setattr(x, "data", rows(2))),
         warns="replaces the memory"),
    uses("input begins to want a gradient", changing(lambda m, x: x.requires_grad_()),
         warns=EITHER),
    uses("input wants no gradient any more", changing(lambda m, x: x.requires_grad_(False)),
         wanted, warns=EITHER),
    uses("input loses its history", changing(lambda m, x: x.detach_()), nonleaf, warns=EITHER),
    uses("gradient of an input", changing(lambda m, x: setattr(x, "grad", torch.ones(3, 4))),
         wanted, warns=EITHER),
    uses("attribute of an input", changing(lambda m, x: setattr(x, "tag", 1)), warns=EITHER,
         use=lambda stage, args, out: stage.note("tag", getattr(args[0], "tag", None))),
]  # fmt: skip
