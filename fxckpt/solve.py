"""What to save, as a linear program; pure numbers.

NOTE [The program]

Every value v that could be saved gets a variable s(v), every forward operation o a variable r(o):
v is saved, o runs again.

    minimise    sum of seconds(o) r(o)
    subject to  s(v) + r(o) >= 1        for each v, result of o, that backward reads
                r(o) <= s(u) + r(p)     for each operand u, result of p, that o reads
                live(t) <= budget       at each moment t of forward and of backward

What lives at a moment, besides what lives in any case: in forward, what is saved and was made
before; in backward, what is saved up to the last time that backward reads it, and what is computed
again from the first to the last time. No decision can do with less.

Decisions may need more. What is saved as an operand of something that runs again waits for that,
and what is computed again for something else waits for its own readers. This program counts that
first by rule, and then as it shows when plans are replayed (see `search`), which is what `Lives`
are for. So its optimum is no bound (see `exact` for one), but nearly right for plans, and quickly
found. It has one more variable for each value,

    g(v) <= r(o)            v, result of o, does not wait: it is let go, and computed once more

which costs seconds(o), and takes back what v holds while it waits, from the moment after the first.
And large ones that are not read all the time have another, for what is let go between its readers:

    f(v) <= r(o)            v is computed once more, and not there while nobody reads it

Rows of moments are added only when a solution would violate them (cutting planes): of thousands, a
few dozen matter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix, vstack

from fxckpt import highs

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

_MOST_CUTS = 24  # rows that one round of cutting planes adds
_MOST_NODES, _ENOUGH = 1, 5e-3  # of branching: how often, and what counts as the optimum
_TOLERANCE = 1e-6  # of the budget
_NEAR = 4  # operations away


@dataclasses.dataclass(frozen=True)
class Problem:
    """The numbers of a joint graph. Values and operations are counted in forward order.

    Attributes:
        sizes: Bytes of each value.
        producer: The operation that computes each value.
        seconds: Of each operation, if it runs again.
        operands: The values that each operation reads.
        reads: The values that each moment of backward reads.
        replaceable: Those of them that, computed again, make room for the result if they are read
            for the last time.
        last: The last moment of forward at which each value lives in any case.
        forward: Bytes that live at each moment of forward, whatever is decided.
        backward: Likewise.
        before: Likewise right before each moment of backward.
        taken: For each operation, the operands of which its result may take the place of one.
        gaps: For each moment of backward the values that could be let go between their readers.
    """

    sizes: Floats
    producer: Ints
    seconds: Floats
    operands: Sequence[Sequence[int]]
    reads: Sequence[Sequence[int]]
    replaceable: Sequence[Sequence[int]]
    last: Ints
    forward: Floats
    backward: Floats
    before: Floats
    taken: Sequence[Sequence[int]]
    gaps: Sequence[Sequence[int]]

    def breakable(self) -> list[int]:
        """The values that could be let go between their readers."""
        return sorted({v for values in self.gaps for v in values})

    def given_up(self) -> list[list[int]]:
        """Those that need not be there at each moment of backward.

        A result may take the place of what is let go right after it.
        """
        found = [[*values] for values in self.gaps]
        for values, replaceable, gone in zip(found, self.replaceable, self.gaps[1:], strict=False):
            values += sorted({*replaceable} & {*gone})
        return found

    def needs(self) -> tuple[Ints, Ints]:
        """The first and the last moment at which backward reads each value."""
        first = np.full(len(self.sizes), len(self.backward))
        last = np.full(len(self.sizes), -1)
        for moment, values in enumerate(self.reads):
            for v in values:
                first[v] = min(first[v], moment)
                last[v] = moment
        return first, last

    def replaced_at(self) -> Ints:
        """The last moment at which each value lives if it is computed again."""
        _, last = self.needs()
        until: Ints = last.copy()
        for moment, values in enumerate(self.replaceable):
            for v in values:
                if last[v] == moment:
                    until[v] = moment - 1
        return until

    def roles(self) -> list[int]:
        """A number for each value: the same where all that is `_NEAR` is the same.

        So it is in equal layers, apart from the ends of a stack (Weisfeiler and Leman 1968).
        """
        makes, count = self.producer, len(self.sizes)
        readers: list[list[int]] = [[] for _ in range(count)]
        for o, operands in enumerate(self.operands):
            for u in operands:
                readers[u].append(o)
        results: list[list[int]] = [[] for _ in self.seconds]
        for v, o in enumerate(makes):
            results[o].append(v)
        read = np.bincount([v for at in self.reads for v in at], minlength=count)
        values = _numbered(zip(self.sizes, read, strict=True))
        for _ in range(_NEAR):
            operations = _numbered(
                (*(values[u] for u in operands), *(-1 - values[v] for v in made), self.seconds[o])
                for o, (operands, made) in enumerate(zip(self.operands, results, strict=True))
            )
            values = _numbered(
                (values[v], operations[makes[v]], *sorted(operations[o] for o in readers[v]))
                for v in range(count)
            )
        return values

    def in_two_moments(self) -> Problem:
        """The same with two moments for each of backward: before it, and at it."""

        def at_odd(values: Sequence[Sequence[int]]) -> list[Sequence[int]]:
            return [each for at in values for each in ((), at)]

        return dataclasses.replace(
            self,
            reads=at_odd(self.reads),
            replaceable=at_odd(self.replaceable),
            gaps=[values for values in self.gaps for _ in range(2)],
            backward=np.stack([self.before, self.backward], 1).ravel(),
        )


@dataclasses.dataclass(frozen=True)
class Solution:
    """An optimum, fractions allowed.

    Attributes:
        saved: s(v).
        let_go: g(v).
        fleeting: f(v).
        seconds: Of what runs again; of a solution of `exact` without fractions, what no other can
            be below.
    """

    saved: Floats
    let_go: Floats
    fleeting: Floats
    seconds: float


@dataclasses.dataclass
class Lives:
    """Where each value lives in backward, as far as is known: moments, both ends included.

    Attributes:
        until: The last moment, if it is saved.
        begin: The first moment, if it is computed again.
        end: Likewise the last.
    """

    until: Ints
    begin: Ints
    end: Ints


class Program:
    """The program of one problem; the moments that matter are kept for the next budget.

    Args:
        problem: The numbers.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._values, self._operations = len(problem.sizes), len(problem.seconds)
        self._first, self._last = problem.needs()
        self._again_until = problem.replaced_at()
        # What is one of several results is taken to be there only if its operation runs again and
        # it is not saved itself: a variable of its own.
        results = np.bincount(problem.producer, minlength=self._operations)
        several = np.flatnonzero((results[problem.producer] > 1) & (self._last >= 0))
        self._again = self._values + problem.producer.copy()
        self._again[several] = self._values + self._operations + np.arange(len(several))
        self._let_go = self._values + self._operations + len(several)  # where g begins
        self._breakable = problem.breakable()
        self._fleeting = self._let_go + self._values  # where f begins
        self._columns = self._fleeting + len(self._breakable)
        self._gaps = at_moments(problem.gaps, self._breakable)
        self._several = several
        self._scale = max(float(problem.seconds.max(initial=0.0)), 1e-12)
        self._logic, self._logic_bounds = self._logic_rows()
        self._objective, self._whole = self._costs(), np.ones(self._columns)
        self._cuts: set[int] = set()  # moments, those of forward first

    def lives(self) -> Lives:
        """What is known before any decision is replayed."""
        return Lives(self._waited_for(), self._first.copy(), self._again_until.copy())

    def solve(
        self, budget: float, lives: Lives | None = None, *, whole: bool = False
    ) -> Solution | None:
        """The optimum for a budget in bytes; None if nothing fits.

        Args:
            budget: Bytes.
            lives: Where values live; by default, as is known before any decision is replayed.
            whole: Without fractions. After some branching, what is found is returned: it need not
                be the optimum then, or is None although something fits.
        """
        problem = self.problem
        lives = lives or self.lives()
        fixed = np.concatenate([problem.forward, problem.backward])
        if fixed.max(initial=0.0) > budget:
            return None
        while True:
            chosen = sorted(self._cuts)
            rows = [self._row(t, lives) / budget for t in chosen]
            matrix = vstack([self._logic, *rows], format="csr")
            bounds = np.append(self._logic_bounds, (budget - fixed[chosen]) / budget)
            found = highs.relaxed(self._objective, matrix, bounds)
            if found.x is None:
                return None
            cut = self._cut(found.x, lives, budget)
            if whole and not cut:
                found = highs.near(
                    self._objective, matrix, bounds, self._whole, nodes=_MOST_NODES, gap=_ENOUGH
                )
                if found.x is None:
                    return None
                cut = self._cut(found.x, lives, budget)
            if not cut:
                return self._solution(found)

    def _solution(self, found: Any) -> Solution:
        again = found.x[self._values : self._values + self._operations]
        seconds = float(self.problem.seconds @ again)
        fleeting = np.zeros(self._values)
        fleeting[self._breakable] = found.x[self._fleeting :]
        let_go = found.x[self._let_go : self._fleeting]
        return Solution(found.x[: self._values], let_go, fleeting, seconds)

    def _cut(self, x: Floats, lives: Lives, budget: float) -> bool:
        """Adds rows for the moments that are over most; whether there are any."""
        over = self._live(x, lives) - budget
        left, right = np.append(-np.inf, over[:-1]), np.append(over[1:], -np.inf)
        tops = np.flatnonzero((over > _TOLERANCE * budget) & (over >= left) & (over >= right))
        new = [int(t) for t in tops if int(t) not in self._cuts]
        new.sort(key=lambda t: -over[t])
        self._cuts.update(new[:_MOST_CUTS])
        return bool(new)

    def _live(self, x: Floats, lives: Lives) -> Floats:
        """Bytes at each moment, those of forward first."""
        problem, sizes = self.problem, self.problem.sizes
        saved, again = sizes * x[: self._values], sizes * x[self._again]
        ahead, behind = len(problem.forward), len(problem.backward)
        forward = sums(ahead, problem.last + 1, np.full(self._values, ahead), saved)
        backward = sums(behind, np.zeros(self._values, int), lives.until + 1, saved)
        backward += sums(behind, lives.begin, lives.end + 1, again)
        gone = sizes * x[self._let_go : self._fleeting]
        begin, read = lives.begin + 1, np.maximum(lives.begin + 1, self._first)
        backward -= sums(behind, begin, lives.end + 1, gone)
        backward += sums(behind, read, self._again_until + 1, gone)
        backward -= self._gaps @ (sizes[self._breakable] * x[self._fleeting :])
        return np.concatenate([problem.forward + forward, problem.backward + backward])

    def _row(self, moment: int, lives: Lives) -> csr_matrix:
        problem, sizes = self.problem, self.problem.sizes
        row = np.zeros(self._columns)
        t = moment - len(problem.forward)
        there = problem.last < moment if t < 0 else lives.until >= t
        row[: self._values][there] = sizes[there]
        if t >= 0:
            there = (lives.begin <= t) & (t <= lives.end)
            np.add.at(row, self._again[there], sizes[there])
            read = (self._first <= t) & (t <= self._again_until)
            row[self._let_go : self._fleeting] = -sizes * (there & ~read & (lives.begin < t))
            row[self._fleeting :] = -sizes[self._breakable] * self._gaps[t]
        return csr_matrix(row)

    def _waited_for(self) -> Ints:
        """When the last operation that reads each value would run again, if it is later."""
        problem, until = self.problem, self._last.copy()
        own = np.full(self._operations, len(problem.backward))  # when results are read first
        for v, o in enumerate(problem.producer):
            own[o] = min(own[o], self._first[v])
        waiting = np.full(self._operations, -1)  # or else, when readers run last
        for o in range(self._operations - 1, -1, -1):
            when = int(own[o]) if own[o] < len(problem.backward) else int(waiting[o])
            for u in problem.operands[o]:
                p = int(problem.producer[u])
                waiting[p] = max(waiting[p], when)
                until[u] = max(until[u], when)
        return until

    def _logic_rows(self) -> tuple[csr_matrix, Floats]:
        """The rows that do not concern memory, as matrix x <= bounds."""
        rows = [*self._logic_row()]
        entries = [(i, c, f) for i, (row, _) in enumerate(rows) for c, f in row]
        i, c, f = zip(*entries, strict=True) if entries else ((), (), ())
        matrix = csr_matrix((f, (i, c)), shape=(len(rows), self._columns))
        return matrix, np.array([bound for _, bound in rows])

    def _logic_row(self) -> Iterator[tuple[list[tuple[int, float]], float]]:
        problem, n = self.problem, self._values
        for v in np.flatnonzero(self._last >= 0):
            yield [(int(v), -1.0), (n + int(problem.producer[v]), -1.0)], -1.0
        for o, operands in enumerate(problem.operands):
            for u in operands:
                p = int(problem.producer[u])
                if p != o:
                    yield [(n + o, 1.0), (u, -1.0), (n + p, -1.0)], 0.0
        for v in self._several:
            o = int(problem.producer[v])
            yield [(n + o, 1.0), (int(v), -1.0), (int(self._again[v]), -1.0)], 0.0
        for u in range(n):
            yield [(self._let_go + u, 1.0), (int(self._again[u]), -1.0)], 0.0
        for i, u in enumerate(self._breakable):
            yield [(self._fleeting + i, 1.0), (int(self._again[u]), -1.0)], 0.0

    def _costs(self) -> Floats:
        """Seconds; and so little for each byte saved that it decides only between equals.

        The largest is 1: HiGHS has absolute tolerances, of more than what an operation takes.
        """
        problem = self.problem
        costs = np.zeros(self._columns)
        costs[self._values : self._values + self._operations] = problem.seconds
        weight = 1e-6 * problem.seconds.sum() / max(problem.sizes.sum(), 1.0)
        costs[: self._values] = weight * problem.sizes
        more = problem.seconds[problem.producer] + weight
        costs[self._let_go : self._fleeting] = more
        costs[self._fleeting :] = more[self._breakable]
        return costs / self._scale


def _numbered(things: Iterable[Any]) -> list[int]:
    """Equal numbers for what is equal."""
    numbers: dict[Any, int] = {}
    return [numbers.setdefault(thing, len(numbers)) for thing in things]


def at_moments(values: Sequence[Sequence[int]], some: Sequence[int]) -> Floats:
    """For each moment, and each of some values, 1 where it is among those of the moment."""
    columns = {v: i for i, v in enumerate(some)}
    found = np.zeros((len(values), len(some)))
    for moment, at in enumerate(values):
        found[moment, [columns[v] for v in at]] = 1
    return found


def sums(count: int, begin: Ints, end: Ints, amounts: Floats) -> Floats:
    """At each moment, the sum of the amounts that have begun and not ended."""
    change = np.zeros(count + 1)
    present = begin < end
    np.add.at(change, begin[present], amounts[present])
    np.add.at(change, end[present], -amounts[present])
    return np.cumsum(change[:-1])
