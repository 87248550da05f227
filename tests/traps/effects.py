"""What forward does besides computing, and what steers it from outside of the model."""

import collections
import contextlib
import itertools
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fxckpt import invisible, state
from traps import (
    EITHER,
    Guard,
    Stage,
    Trap,
    all_of,
    constant,
    function,
    rows,
    same,
)

# --- what forward changes -------------------------------------------------------------------------


def effect(
    name: str,
    forward: Callable[..., Any],
    *,
    warns: str = "",
    guard: Guard | None = None,
    **attributes: Callable[[], Any],
) -> Trap:
    """Five steps of a forward that does something besides computing."""

    def play(stage: Stage) -> None:
        for _ in range(5):
            stage.step(rows())
            held = repr(getattr(stage.model, "it", None))
            stage.note("attribute", held if " at 0x" not in held else "")

    return Trap(name, lambda: same(function(forward, **attributes), play, warns=warns), guard)


def then(change: Callable[[Any], Any], read: Callable[[Any], Any]) -> Callable[..., Tensor]:
    """A forward that changes `m.it` or `m`, and then reads a number."""

    def forward(m: Any, x: Tensor) -> Tensor:
        change(m)
        return x @ m.weight * read(m)

    return forward


def flip(holder: list[int]) -> None:
    holder[0] = 3 - holder[0]


def counter() -> Callable[[], int]:
    """Counts its calls: like a clock, or anything else that is another one each time."""
    number = 0

    def count() -> int:
        nonlocal number
        number += 1
        return number

    return count


def filled(m: Any) -> Any:
    """Computed at the first call, kept for the others."""
    if m.it is None:
        m.it = 3
    return m.it


# Attributes that change are not refused, and the change is undone after the capture.
CHANGES = constant(state._Contents, "assignments", ())

EFFECTS = [
    effect("counter in an attribute", then(lambda m: setattr(m, "it", m.it + 1), lambda m: m.it),
           it=lambda: 1, warns="attribute", guard=CHANGES),
    effect("counter in a list", then(lambda m: m.it.append(1), lambda m: len(m.it)),
           it=list, warns="container", guard=CHANGES),
    effect("counter in a dictionary", then(lambda m: m.it.update(a=m.it["a"] + 1),
           lambda m: m.it["a"]), it=lambda: collections.Counter("a"), warns="container",
           guard=CHANGES),
    effect("counter in a tensor", then(lambda m: m.it.add_(1), lambda m: m.it),
           it=lambda: torch.ones(4)),
    effect("number kept", lambda m, x: x @ m.weight * filled(m), it=lambda: None, warns=EITHER),
    effect("switch in an object", then(lambda m: flip(m.it.a), lambda m: m.it.a[0]),
           it=lambda: SimpleNamespace(a=[1]), warns=EITHER),
    effect("switch in a nested list", then(lambda m: flip(m.it[0]), lambda m: m.it[0][0]),
           it=lambda: [[1]], warns=EITHER),
    effect("array", then(lambda m: m.it.__iadd__(1), lambda m: float(m.it[0])),
           it=lambda: np.ones(1), warns=EITHER),
    effect("iterator", lambda m, x: x @ m.weight * next(m.it), it=itertools.count, warns=EITHER),
    effect("counter in a closure", lambda m, x: x @ m.weight * m.it(), it=counter, warns=EITHER),
    effect("deque", then(lambda m: m.it.append(1), lambda m: len(m.it)), it=collections.deque,
           warns=EITHER),
]  # fmt: skip

# --- random numbers -------------------------------------------------------------------------------


def forked(m: Any, x: Tensor) -> Tensor:
    """The same noise at each call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        noise = torch.rand(4)
    return x @ m.weight * noise


def replayed(m: Any, x: Tensor) -> Tensor:
    """One mask twice, as reversible networks do."""
    before = torch.get_rng_state()
    y = F.dropout(x @ m.weight, 0.5)
    torch.set_rng_state(before)
    return y + F.dropout(x, 0.5)


def seeded(m: Any, x: Tensor) -> Tensor:
    torch.manual_seed(0)
    return F.dropout(x @ m.weight, 0.5)


def undone(m: Any, x: Tensor) -> Tensor:
    """Draws a number, and puts the generator back."""
    before = random.getstate()
    number = random.random()
    random.setstate(before)
    return x @ m.weight * number


def times(draw: Callable[[Any], Any]) -> Callable[..., Tensor]:
    return lambda m, x: x @ m.weight * draw(m)


SEEDS = constant(invisible, "side_effects_refused", contextlib.nullcontext())
DRAWS = constant(invisible, "unchanged_random_states", contextlib.nullcontext())

RANDOM = [
    effect("random", times(lambda m: random.random()), warns="`random`", guard=DRAWS),
    effect("numpy.random", times(lambda m: float(np.random.rand())), warns="`numpy.random`",
           guard=DRAWS),
    effect("generator of an attribute", times(lambda m: m.it.random()),
           it=lambda: random.Random(1), warns=EITHER),
    effect("generator of numpy", times(lambda m: float(m.it.random())),
           it=lambda: np.random.default_rng(1), warns=EITHER),
    effect("generator of torch", times(lambda m: torch.rand(4, generator=m.it)),
           it=lambda: torch.Generator().manual_seed(1), warns="torch.Generator"),
    effect("seed in forward", seeded, warns="random number generator",
           guard=all_of(DRAWS, SEEDS)),
    effect("fork in forward", forked, warns=EITHER),
    effect("state set in forward", replayed, warns=EITHER),
]  # fmt: skip

TRAPS = EFFECTS + RANDOM
