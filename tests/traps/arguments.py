"""Arguments change between two calls."""

import dataclasses
import enum
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fxckpt import tree
from traps import (
    ARGUMENTS,
    DTYPE,
    EITHER,
    IDENTITY,
    REQUIRES_GRAD,
    SHAPE,
    STRIDES,
    STRUCTURE,
    Guard,
    Stage,
    Trap,
    function,
    rows,
    same,
    wanted,
)


class Level(enum.Enum):
    """Two values."""

    LOW, HIGH = 1, 2


@dataclasses.dataclass
class Setting:
    """Compares by value."""

    scale: float
    name: str = "a"


class Slotted:
    """Has no `__dict__`."""

    __slots__ = ("scale",)

    def __init__(self, scale: float) -> None:
        self.scale = scale


class Scaler:
    """A function with a state."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.scale


def calls(name: str, guard: Guard, forward: Callable[..., Any], *batches: Any) -> Trap:
    """Each batch (a function of nothing to arguments) one after the other, twice."""

    def play(stage: Stage) -> None:
        for batch in batches * 2:
            args = batch()
            stage.step(**args) if isinstance(args, dict) else stage.step(*args)

    return Trap(name, lambda: same(function(forward), play), guard)


def static(name: str, read: Callable[[Any], Any], *values: Any) -> Trap:
    """Another static argument at each call."""
    batches = [lambda v=v: (rows(), v) for v in values]
    return calls(f"static: {name}", STRUCTURE, lambda m, x, s: x @ m.weight * read(s), *batches)


def changed(
    name: str,
    value: Callable[[], Any],
    read: Any,
    change: Any,
    warns: str = "",
    guard: Guard = STRUCTURE,
) -> Trap:
    """The same object at each call, changed after three calls, and again."""

    def play(stage: Stage) -> None:
        held = value()
        for steps in (3, 1, 1, 3):
            for _ in range(steps):
                stage.step(rows(), held)
            change(held)

    make = function(lambda m, x, o: x @ m.weight * read(o))
    return Trap(f"changed: {name}", lambda: same(make, play, warns=warns), guard)


def modules_accepted(patch: pytest.MonkeyPatch) -> None:
    """A module among the arguments is a static leaf."""
    real = tree._flatten

    def flatten(value: Any, *args: Any) -> tree.Spec:
        if isinstance(value, nn.Module):
            return tree.Spec("static", type(value), id(value), (), value)
        return real(value, *args)

    patch.setattr(tree, "_flatten", flatten)


def grow(held: Any) -> None:
    """A larger number in an object."""
    held.scale += 1


TRAPS = [
    calls("batch size", SHAPE, lambda m, x: (x @ m.weight).sin() / x.shape[0],
          lambda: (rows(3),), lambda: (rows(5),)),
    calls("zero rows", SHAPE, lambda m, x: (x @ m.weight).sum() / max(1, len(x)),
          lambda: (rows(2),), lambda: (rows(0),)),
    calls("rank", ARGUMENTS, lambda m, x: (x @ m.weight).sum() * x.dim(),
          lambda: (rows(4),), lambda: (rows(4).view(2, 2, 4),)),
    calls("dtype", DTYPE, lambda m, x: x.float() @ m.weight * (2 if x.dtype.itemsize == 4 else 3),
          lambda: (rows(),), lambda: (rows().double(),)),
    calls("strides", STRIDES, lambda m, x: (x @ m.weight) * x.stride(0),
          lambda: (rows(4),), lambda: (rows(4).t(),), lambda: (rows(8)[::2],)),
    calls("channels last", STRIDES, lambda m, x: x.flatten(0, 2) @ m.weight * x.stride(1),
          lambda: (rows(24).view(2, 3, 4, 4),),
          lambda: (rows(24).view(2, 3, 4, 4).to(memory_format=torch.channels_last),)),
    calls("gradient of an input", REQUIRES_GRAD, lambda m, x: (x @ m.weight).sin(),
          lambda: (rows(),), lambda: (wanted(),)),
    calls("one tensor or two", IDENTITY, lambda m, x, y: x @ m.weight * (2 if x is y else 3),
          lambda: (rows(),) * 2, lambda: (rows(), rows())),
    calls("None or a tensor", ARGUMENTS,
          lambda m, x, y=None: x @ m.weight * (2 if y is None else y),
          lambda: (rows(), None), lambda: (rows(), rows()), lambda: (rows(),)),
    calls("position or keyword", STRUCTURE, lambda m, x, y=2, **o: x @ m.weight * y + len(o),
          lambda: (rows(), 3), lambda: {"x": rows(), "y": 4}, lambda: {"x": rows(), "z": 4}),
    calls("length of a list", STRUCTURE, lambda m, xs: sum(xs) @ m.weight / len(xs),
          lambda: ([rows()],), lambda: ([rows(), 3],), lambda: ([rows(), 3, 4],)),
    calls("keys of a dictionary", STRUCTURE, lambda m, d: d["x"] @ m.weight * len("".join(d)),
          lambda: ({"x": rows(), "a": 1},), lambda: ({"x": rows(), "aaa": 1},)),
    static("int", lambda n: n, 2, 3),
    static("int, bool, float", lambda n: len(type(n).__name__), 1, True, 1.0),
    static("string", len, "a", "aa"),
    static("enum", lambda e: e.value, Level.LOW, Level.HIGH),
    static("nan", lambda n: 2 if n != n else 3, float("nan"), 1.0),
    static("zeros", lambda n: len(str(n)), 0.0, -0.0),
    static("complex", lambda n: n.imag, 1j, 2j),
    static("list", sum, [1, 2], [1, 3]),
    static("dictionary", lambda d: d["a"]["b"][0], {"a": {"b": [1]}}, {"a": {"b": [2]}}),
    static("set", sum, {1, 2}, {1, 3}),
    static("array", lambda a: float(a.sum()), np.array([1.0]), np.array([2.0])),
    static("shape of an array", lambda a: a.ndim, np.ones((2, 1)), np.ones(2)),
    static("numpy scalar", float, np.float32(2), np.float32(3)),
    static("dataclass", lambda o: o.scale, Setting(1.0), Setting(2.0)),
    static("namespace", lambda o: o.a[0], SimpleNamespace(a=[1]), SimpleNamespace(a=[2])),
    static("slots", lambda o: o.scale, Slotted(1.0), Slotted(2.0)),
    static("slice", lambda s: s.stop, slice(0, 1), slice(0, 2)),
    static("size", lambda s: s[0], torch.Size([2]), torch.Size([3])),
    static("ellipsis", lambda e: 2 if e is ... else 3, ..., None),
    static("range", len, range(2), range(3)),
    static("class", lambda t: len(t.__name__), nn.Linear, nn.GELU),
    static("function", lambda f: f(2.0), abs, float.__neg__),
    static("dtype", lambda d: d.itemsize, torch.float32, torch.float64),
    changed("list", lambda: [1], sum, lambda o: o.append(2)),
    changed("dictionary", lambda: {"a": 1}, lambda o: o["a"], lambda o: o.update(a=o["a"] + 1)),
    changed("set", lambda: {1}, sum, lambda o: o.add(len(o) + 1)),
    changed("array", lambda: np.ones(2), lambda o: float(o.sum()), lambda o: o.__iadd__(1)),
    changed("dataclass", lambda: Setting(1.0), lambda o: o.scale, grow),
    changed("nested", lambda: SimpleNamespace(a=[{"b": Setting(1.0)}]),
            lambda o: o.a[0]["b"].scale, lambda o: grow(o.a[0]["b"])),
    changed("bytearray", lambda: bytearray(b"a"), len, lambda o: o.append(1)),
    changed("slots", lambda: Slotted(1.0), lambda o: o.scale, grow, EITHER),
    changed("callable object", lambda: Scaler(1.0), lambda o: o(rows()), grow, EITHER),
    changed("number of a module", lambda: nn.Dropout(0.5), lambda o: o.p,
            lambda o: setattr(o, "p", o.p / 2), "is a module", modules_accepted),
    changed("mode of a module", lambda: nn.Dropout(0.5), lambda o: 2 if o.training else 3,
            lambda o: o.train(not o.training), "is a module", modules_accepted),
    changed("weight of a module", lambda: nn.Linear(4, 4), lambda o: o(rows()),
            lambda o: setattr(o, "weight", nn.Parameter(rows(4))), "is a module",
            modules_accepted),
]  # fmt: skip
