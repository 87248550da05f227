"""Which decision each block of a step takes; pure numbers.

NOTE [The peak of a step]

A step is a sequence of moments. At each, some calls of blocks wait for their backward, and either
one call runs its forward or its backward, or something outside of the blocks runs:

    bytes = those outside + sum of what the waiting calls keep + what the running call needs
                          + the outputs that only these calls hold

which is a sum over calls whatever is chosen for each. So with one variable x(c, e) for each call c
and entry e of its menu, the fastest choice is an integer program:

    minimise    sum of seconds(e) x(c, e)
    subject to  sum over e of x(c, e) = 1           for each call c
                bytes(t) <= budget                  at each moment t

Few moments bind, so nearly all variables are integers in the relaxation, and the solver needs no or
little branching. What it returns counts once it is added up in whole bytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint
from scipy.sparse import csr_matrix, lil_matrix

from fxckpt import highs

OUTSIDE, FORWARD, BACKWARD = "outside", "forward", "backward"
_NODES, _ENOUGH = 500, 1e-3  # of branching: how often at most, and what counts as the optimum

Chosen = tuple[int, ...]  # for each call, the entry of its menu


class Option(NamedTuple):
    """What a call of a block comes to with one of the decisions: bytes and seconds.

    Attributes:
        kept: Between forward and backward, but for outputs.
        outputs: Of outputs that backward reads.
        forward: The most while forward runs, outputs included.
        backward: The most while backward runs, if somebody else holds the outputs.
        backward_alone: Likewise if nobody does.
        seconds: What runs again.
    """

    kept: int
    outputs: int
    forward: int
    backward: int
    backward_alone: int
    seconds: float


class Moment(NamedTuple):
    """Part of a step.

    Attributes:
        phase: What runs: OUTSIDE of the blocks, or FORWARD or BACKWARD of one.
        call: The call of a block that runs; -1 outside.
        outside: Bytes that live outside of the blocks at most meanwhile; at the start, if one runs.
        waiting: The calls whose backward is still to come, but for the one that runs.
        alone: The calls whose outputs nobody else holds any more.
        operation: What ran at the most, if that is known.
    """

    phase: str
    call: int
    outside: int
    waiting: tuple[int, ...]
    alone: tuple[int, ...] = ()
    operation: str = ""


@dataclasses.dataclass(frozen=True)
class Found:
    """A choice, and the seconds that every choice within the budget takes at least."""

    chosen: Chosen
    bound: float


class Composition:
    """The choices for one step.

    Args:
        moments: The step.
        menus: What each call can be.
    """

    def __init__(self, moments: Sequence[Moment], menus: Sequence[Sequence[Option]]) -> None:
        self.moments, self.menus = moments, menus
        self._starts = np.cumsum([0, *map(len, menus)])
        rows: dict[Hashable, Moment] = {}
        for moment in moments:  # of those that differ in nothing else, the one with most outside
            key = moment.phase, moment.call, moment.waiting, moment.alone
            rows[key] = max(moment, rows.get(key, moment), key=lambda m: m.outside)
        self._rows = [*rows.values()]
        self._matrix = self._bytes_of(self._rows)
        self._outside = np.array([m.outside for m in self._rows], dtype=float)
        self._seconds = np.array([o.seconds for menu in menus for o in menu])

    def live(self, chosen: Sequence[int]) -> list[int]:
        """The bytes at each moment."""
        return [
            m.outside + sum(self.kept(m, c, chosen) for c in m.waiting) + self._own(m, chosen)
            for m in self.moments
        ]

    def kept(self, moment: Moment, call: int, chosen: Sequence[int]) -> int:
        """The bytes that a call that waits keeps at a moment."""
        option = self.menus[call][chosen[call]]
        return option.kept + (option.outputs if call in moment.alone else 0)

    def peak(self, chosen: Sequence[int]) -> int:
        """The most at any moment."""
        return max(self.live(chosen), default=0)

    def seconds(self, chosen: Sequence[int]) -> float:
        """What runs again."""
        return float(sum(menu[i].seconds for menu, i in zip(self.menus, chosen, strict=True)))

    def fastest(self, budget: int) -> Found | None:
        """The fastest choice that is found to fit a budget; None if none does."""
        unlimited = tuple(_first(menu, key=lambda o: o.seconds) for menu in self.menus)
        if self.peak(unlimited) <= budget:
            return Found(unlimited, self.seconds(unlimited))
        if not self.menus:
            return None
        chosen, bound = self._solved(budget)
        if chosen is None or self.peak(chosen) > budget:
            chosen = self.least()
        if self.peak(chosen) > budget:
            return None
        return Found(chosen, min(bound, self.seconds(chosen)))

    def least(self) -> Chosen:
        """The choice that is found to need least; of those, the fastest that is found."""
        start = tuple(_first(menu, key=lambda o: (o.kept, o.backward)) for menu in self.menus)
        if not self.menus:
            return start
        scale = max(self.peak(start), 1)
        columns = len(self._seconds)
        rows = csr_matrix(
            np.hstack([self._matrix.toarray() / scale, -np.ones((len(self._rows), 1))])
        )
        limits = LinearConstraint(rows, -np.inf, -self._outside / scale)
        found = highs.branched(
            np.append(1e-6 * self._seconds / max(self._seconds.sum(), 1e-12), 1.0),
            [limits, self._one_each(columns + 1)],
            np.append(np.ones(columns), 0),
            nodes=_NODES,
            bounds=Bounds(np.zeros(columns + 1), np.append(np.ones(columns), np.inf)),
        )
        candidates = [start] + ([] if found.x is None else [self._rounded(found.x[:columns])])
        return min(candidates, key=lambda c: (self.peak(c), self.seconds(c)))

    def _solved(self, budget: int) -> tuple[Chosen | None, float]:
        """A choice, which may be over the budget by rounding, and a bound for all of them."""
        columns = len(self._seconds)
        limits = LinearConstraint(self._matrix / budget, -np.inf, 1 - self._outside / budget)
        scale = max(self._seconds.max(initial=0.0), 1e-12)
        found = highs.branched(
            self._seconds / scale,
            [limits, self._one_each(columns)],
            np.ones(columns),
            nodes=_NODES,
            gap=_ENOUGH,
        )
        bound = found.mip_dual_bound if found.mip_dual_bound is not None else 0.0
        return (None if found.x is None else self._rounded(found.x)), max(float(bound) * scale, 0.0)

    def _rounded(self, x: NDArray[np.float64]) -> Chosen:
        parts = np.split(x, self._starts[1:-1])
        return tuple(int(part.argmax()) for part in parts)

    def _one_each(self, columns: int) -> LinearConstraint:
        """Each call takes one entry."""
        rows = lil_matrix((len(self.menus), columns))
        for c, (start, end) in enumerate(zip(self._starts, self._starts[1:], strict=False)):
            rows[c, start:end] = 1.0
        return LinearConstraint(csr_matrix(rows), 1.0, 1.0)

    def _bytes_of(self, moments: Sequence[Moment]) -> csr_matrix:
        """The bytes that each entry adds at moments."""
        if not self.menus:
            return csr_matrix((len(moments), 0))
        rows = np.zeros((len(moments), self._starts[-1]))
        options = [o for menu in self.menus for o in menu]
        kept = np.array([o.kept for o in options], dtype=float)
        outputs = np.array([o.outputs for o in options], dtype=float)
        for row, moment in zip(rows, moments, strict=True):
            for c in moment.waiting:
                row[self._of(c)] = kept[self._of(c)]
            for c in {*moment.alone} & {*moment.waiting}:
                row[self._of(c)] += outputs[self._of(c)]
            if moment.phase != OUTSIDE:
                row[self._of(moment.call)] = [_own(moment, o) for o in self.menus[moment.call]]
        return csr_matrix(rows)

    def _own(self, moment: Moment, chosen: Sequence[int]) -> int:
        if moment.phase == OUTSIDE:
            return 0
        return _own(moment, self.menus[moment.call][chosen[moment.call]])

    def _of(self, call: int) -> slice:
        return slice(self._starts[call], self._starts[call + 1])


def _own(moment: Moment, option: Option) -> int:
    if moment.phase == FORWARD:
        return option.forward
    return option.backward_alone if moment.call in moment.alone else option.backward


def _first(menu: Sequence[Option], key: Callable[[Option], Any]) -> int:
    return min(range(len(menu)), key=lambda i: key(menu[i]))
