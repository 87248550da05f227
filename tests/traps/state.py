"""What modules hold in attributes changes between two calls."""

import collections
import copy
import dataclasses
import enum
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from fxckpt.values import Guard as ValueGuard
from traps import (
    CONTENTS,
    EITHER,
    STATE,
    Guard,
    Stage,
    Trap,
    constant,
    forgetful,
    function,
    rows,
    same,
)


def changes(
    name: str,
    make: Callable[[], nn.Module],
    *changes: Callable[[Any], Any],
    guard: Guard | None = STATE,
    again: bool = False,
    **options: Any,
) -> Trap:
    """Two steps, then each change followed by two steps."""

    def play(stage: Stage) -> None:
        for change in (lambda m: None, *changes):
            change(stage.model)
            if again:
                stage.again()
            stage.step(rows())
            stage.step(rows().sin())

    return Trap(name, lambda: same(make, play, **options), forgetful if again else guard)


def holds(
    name: str,
    value: Callable[[], Any],
    read: Callable[[Any], Any],
    *change: Any,
    guard: Guard | None = CONTENTS,
    **options: Any,
) -> Trap:
    """Forward reads `model.it`, which is changed in between: anew, or by a function of it."""
    make = function(lambda m, x: x @ m.weight * read(m.it), it=value)
    return changes(name, make, *change, guard=guard, **options)


def to(value: Any) -> Callable[[Any], None]:
    """Another value of the attribute; made, if it is a lambda or a class."""
    made = value if isinstance(value, type) or type(value) is type(to) else lambda: value
    return lambda m: setattr(m, "it", made())


def at(key: Any, value: Any) -> Callable[[Any], None]:
    """Another value at a key of the attribute."""
    return lambda m: m.it.__setitem__(key, copy.deepcopy(value))


def of(name: str, value: Any) -> Callable[[Any], None]:
    """Another value of an attribute of the attribute."""
    return lambda m: setattr(m.it, name, copy.deepcopy(value))


@dataclasses.dataclass
class Config:
    """Compares by value."""

    scale: float = 2.0
    inner: Any = None

    def scaled(self, x: Any) -> Any:
        return x * self.scale


class Slotted:
    """Has no `__dict__`."""

    __slots__ = ("scale",)

    def __init__(self) -> None:
        self.scale: Any = 2.0


class Point(NamedTuple):
    """A tuple with a list."""

    a: float
    b: list[float]


class Level(enum.Enum):
    """Two values."""

    LOW, HIGH = 1, 2


def nested(value: Any, depth: int) -> list[Any]:
    """A list in a list in a list."""
    return [value if depth == 1 else nested(value, depth - 1)]


def inner_list(value: Any) -> list[Any]:
    return inner_list(value[0]) if isinstance(value[0], list) else value


def innermost(value: Any) -> Any:
    return inner_list(value)[0]


def ones(*shape: int) -> Any:
    return lambda: torch.ones(*(shape or (4,)))


def threes() -> torch.Tensor:
    return torch.full((4,), 3.0)


def kind(value: Any) -> int:
    """A number for the type of a value."""
    return len(type(value).__name__)


def scale(value: Any) -> float:
    return value.scale


def first(value: Any) -> Any:
    return next(iter(value))


def applied(value: Any) -> Any:
    """What a hidden module makes of a batch."""
    return first(value)(rows())


def doubled(module: Any, args: Any, out: Any) -> Any:
    return out * 2


VALUES = constant(ValueGuard, "holds", True)

TRAPS = [
    holds("int", lambda: 2, float, to(3)),
    holds("int, then bool", lambda: 1, kind, to(True)),
    holds("int, then float", lambda: 1, kind, to(1.0)),
    holds("zero, then minus zero", lambda: 0.0, lambda v: len(str(v)), to(-0.0)),
    holds("string", lambda: "a", len, to("aa")),
    holds("None", lambda: None, lambda v: v or 1, to(3), to(None)),
    holds("enum", lambda: Level.LOW, lambda v: v.value, to(Level.HIGH)),
    holds("numpy scalar", lambda: np.float32(2), float, to(np.float32(3))),
    holds("activation", lambda: F.gelu, lambda f: f(rows()), to(lambda: F.relu)),
    holds("list", lambda: [2], sum, at(0, 3), lambda m: m.it.append(5)),
    holds("list, other type", lambda: [1], lambda v: kind(v[0]), at(0, True)),
    holds("new list, changed", lambda: [2], sum, to(lambda: [3]), at(0, 4), at(0, 5)),
    holds("equal list, changed", lambda: [2], sum, to(lambda: [2]), at(0, 4), at(0, 5)),
    holds("inner list, changed", lambda: [[2]], lambda v: v[0][0], at(0, [3]),
          lambda m: m.it[0].__setitem__(0, 4)),
    holds("number, then a list", lambda: 2, lambda v: v if v == 2 else v[0],
          to(lambda: [3]), at(0, 4)),
    holds("dictionary", lambda: {"a": 2}, lambda v: v["a"], at("a", 3), at("b", 4)),
    holds("key of a dictionary", lambda: {"a": 2}, lambda v: len(first(v)),
          lambda m: m.it.__setitem__("aaa", m.it.pop("a"))),
    holds("order of a dictionary", lambda: {"a": 2, "bb": 2}, lambda v: len(first(v)),
          lambda m: m.it.__setitem__("a", m.it.pop("a"))),
    holds("set", lambda: {2}, sum, lambda m: m.it.add(3), lambda m: m.it.discard(2)),
    holds("tuple of lists", lambda: ([2],), lambda v: v[0][0], lambda m: m.it[0].insert(0, 3)),
    holds("namedtuple", lambda: Point(1.0, [2]), lambda v: v.a * v.b[0],
          lambda m: m.it.b.insert(0, 3), to(lambda: Point(4.0, [2]))),
    holds("deque", lambda: collections.deque([2]), sum, lambda m: m.it.append(3)),
    holds("bytearray", lambda: bytearray(b"a"), len, lambda m: m.it.append(3)),
    holds("too deep", lambda: nested(2, 12), innermost, lambda m: inner_list(m.it).insert(0, 3),
          again=True),
    holds("config", lambda: SimpleNamespace(a=Config()), lambda v: v.a.scale,
          lambda m: setattr(m.it.a, "scale", 3)),
    holds("new config, changed", Config, scale, to(lambda: Config(3)), of("scale", 4)),
    holds("equal config, changed", Config, scale, to(Config), of("scale", 4), of("scale", 5)),
    holds("dictionary in a config", lambda: Config(inner={"a": [2]}), lambda v: v.inner["a"][0],
          lambda m: m.it.inner["a"].insert(0, 3)),
    holds("slots", Slotted, scale, of("scale", 3.0)),
    holds("partial", lambda: functools.partial(F.gelu, approximate="none"), lambda f: f(rows()),
          lambda m: m.it.keywords.update(approximate="tanh")),
    holds("method of an object", lambda: Config().scaled, lambda f: f(2),
          lambda m: setattr(m.it.__self__, "scale", 3)),
    holds("array", lambda: np.ones(4), lambda v: torch.tensor(v).float(),
          to(lambda: np.ones(4) * 2)),
    holds("array in place", lambda: np.ones(4), lambda v: float(v[0]), lambda m: m.it.fill(2)),
    holds("memory of an array in place", lambda: np.ones(4, np.float32), torch.from_numpy,
          lambda m: m.it.fill(2), guard=None),
    holds("tensor", ones(), lambda v: v, to(threes), guard=None),
    holds("tensor in place", ones(), lambda v: v, lambda m: m.it.fill_(3), guard=None),
    holds("data of a tensor", ones(), lambda v: v, of("data", threes()), guard=None),
    holds("gradient of a tensor", ones(), lambda v: v * (2 if v.requires_grad else 3),
          lambda m: m.it.requires_grad_(), guard=STATE),
    holds("shape of a tensor", ones(), lambda v: v.sum() * v.dim(), to(ones(2, 2)), guard=STATE),
    holds("dtype of a tensor", ones(), lambda v: v.sum() * v.element_size(),
          to(lambda: threes().double()), guard=STATE),
    holds("tensor, then a number", ones(), lambda v: v * 2, to(2), to(threes), to(3)),
    holds("tensor, then None", ones(), lambda v: 3 if v is None else v, to(None), to(threes),
          guard=STATE),
    holds("tensor in a config", lambda: Config(inner=[torch.ones(4)]), lambda v: v.inner[0],
          lambda m: m.it.inner.__setitem__(0, threes())),
    holds("tensor in a set", lambda: {torch.ones(4)}, first,
          lambda m: (m.it.clear(), m.it.add(threes()))),
    holds("tensor in a deque", lambda: collections.deque([torch.ones(4)]), first, at(0, threes())),
    holds("tensor in slots", Slotted, scale, of("scale", threes())),
    holds("integer tensor", lambda: torch.tensor(2), int, lambda m: m.it.add_(1),
          to(lambda: torch.tensor(4)), guard=VALUES),
    holds("number of a hidden module", lambda: [nn.Dropout(0.5)], applied,
          lambda m: setattr(m.it[0], "p", 0.25)),
    holds("mode of a hidden module", lambda: [nn.Dropout(0.5)], applied, lambda m: m.it[0].eval()),
    holds("weight of a hidden module", lambda: [nn.Linear(4, 4)], applied,
          lambda m: setattr(m.it[0], "weight", nn.Parameter(rows(4)))),
    holds("hidden module frozen", lambda: [nn.Linear(4, 4)], applied,
          lambda m: m.it[0].requires_grad_(False), guard=None),
    holds("hidden module in a config", lambda: Config(inner=nn.Dropout(0.5)),
          lambda v: v.inner(rows()), lambda m: m.it.inner.eval()),
    holds("another hidden module", lambda: [nn.Tanh()], applied, at(0, nn.GELU())),
    holds("hook of a hidden module", lambda: [nn.Tanh()], applied,
          lambda m: m.it[0].register_forward_hook(doubled), warns=EITHER),
]  # fmt: skip
