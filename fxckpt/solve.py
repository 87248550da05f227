"""What to save, as a linear program; pure numbers.

NOTE [The program]

Every value v that could be saved gets a variable s(v), every forward operation o a variable r(o),
both between 0 and 1: v is saved, o runs again.

    minimise    sum of seconds(o) r(o)
    subject to  s(v) + r(o) >= 1        for each v = result of o that backward reads
                r(o) <= s(u) + r(p)     for each operand u = result of p that o reads
                live(t) <= budget       at each moment t of forward and of backward

What lives at a moment is linear in s and r once it is known when each value would be there (its
`Spans`). That depends a little on the decisions themselves: an operand that is computed again is
there from the moment at which the first operation that runs again needs it. There are two ways:

    direct spans    from the first to the last time that backward itself reads it. No decision can
                    do with less, so the optimum of this program is a bound for all of them.
    spans of a plan as they are under given decisions. The next program, with these spans and with
                    the difference to the exact replay at each moment taken off the budget, is right
                    about all plans that are like this one; so a few rounds settle.

Rows of moments are added only when a solution would violate them (cutting planes): a few dozen of
thousands matter. Solved by HiGHS through `scipy.optimize`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.sparse import csr_matrix, vstack

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

_MOST_ROUNDS, _MOST_ROWS = 40, 24  # of cutting planes, and how many are added in each


@dataclasses.dataclass(frozen=True)
class Problem:
    """The numbers of a joint graph. Values and operations are counted in forward order.

    Attributes:
        sizes: Bytes of each value.
        producer: The operation that computes each value.
        seconds: Of each operation, if it runs again.
        operands: The values that each operation reads.
        reads: The values that each moment of backward reads.
        made: The moment of forward at which each value is made.
        last: The last moment of forward that reads it.
        forward: Bytes that live at each moment of forward, whatever is decided.
        backward: Likewise.
    """

    sizes: Floats
    producer: Ints
    seconds: Floats
    operands: Sequence[Sequence[int]]
    reads: Sequence[Sequence[int]]
    made: Ints
    last: Ints
    forward: Floats
    backward: Floats


@dataclasses.dataclass(frozen=True)
class Spans:
    """Moments of backward: how long a value is there if it is saved, and if it is computed again.

    A value that is not there at all ends before it begins.
    """

    saved_until: Ints
    again_from: Ints
    again_until: Ints


def direct_spans(problem: Problem) -> Spans:
    """What backward itself reads: no decision can do with less."""
    count, end = len(problem.sizes), len(problem.backward)
    first, last = np.full(count, end), np.full(count, -1)
    for moment, values in enumerate(problem.reads):
        for v in values:
            first[v] = min(first[v], moment)
            last[v] = moment
    return Spans(last, first, last)


def spans_under(problem: Problem, saved: Sequence[bool]) -> Spans:
    """The spans if `saved` is saved, each for itself if its own decision were another one."""
    direct = direct_spans(problem)
    first, last = direct.again_from.copy(), direct.again_until.copy()
    saved_until = direct.saved_until.copy()
    needed = np.zeros(len(problem.seconds), bool)  # operations that run again
    earliest = np.full(len(problem.seconds), len(problem.backward))  # and when, if they do
    results: list[list[int]] = [[] for _ in problem.seconds]
    for v, o in enumerate(problem.producer):
        results[o].append(v)
    for o in range(len(problem.seconds) - 1, -1, -1):
        for v in results[o]:
            earliest[o] = min(earliest[o], first[v])
            needed[o] |= not saved[v] and last[v] >= 0
        if needed[o]:
            for u in problem.operands[o]:
                first[u] = min(first[u], earliest[o])
                last[u] = max(last[u], earliest[o])
                saved_until[u] = max(saved_until[u], earliest[o])
    return Spans(saved_until, first, last)


@dataclasses.dataclass(frozen=True)
class Solution:
    """An optimum of the program.

    Attributes:
        saved: s(v).
        again: r(o).
        seconds: What it minimised.
    """

    saved: Floats
    again: Floats
    seconds: float


class Program:
    """The linear program for one problem and one set of spans."""

    def __init__(self, problem: Problem, spans: Spans) -> None:
        self.problem, self.spans = problem, spans
        self._values, self._operations = len(problem.sizes), len(problem.seconds)
        self._logic, self._logic_bounds = self._logic_rows()
        self._rows: dict[int, csr_matrix] = {}  # of moments, forward first

    def solve(self, budgets: Floats, tie: float = 1e-6) -> Solution | None:
        """The optimum, or None if nothing fits.

        Args:
            budgets: Bytes for each moment, those of forward first.
            tie: Seconds for all bytes saved: the weight of saving less, all else being equal.
        """
        problem = self.problem
        total = max(problem.sizes.sum(), 1.0)
        weight = tie * max(problem.seconds.sum(), 1e-12) / total
        objective = np.concatenate([weight * problem.sizes, problem.seconds])
        fixed = np.concatenate([problem.forward, problem.backward])
        room = budgets - fixed
        if (room < -1e-9 * np.maximum(budgets, 1)).any():
            return None
        for _ in range(_MOST_ROUNDS):
            chosen = sorted(self._rows)
            matrix = vstack([self._logic, *(self._rows[t] for t in chosen)], format="csr")
            scale = np.maximum(budgets[chosen], 1) if chosen else np.empty(0)
            bounds = np.concatenate([self._logic_bounds, room[chosen] / scale])
            if chosen:
                matrix = self._scaled(matrix, len(self._logic_bounds), scale)
            found = linprog(objective, matrix, bounds, bounds=(0, 1), method="highs")
            if found.x is None:
                return None
            s, r = found.x[: self._values], found.x[self._values :]
            over = self.live(s, r) - budgets
            if not self._add_rows(over, 1e-6 * np.maximum(budgets, 1)):
                break
        return Solution(s, r, float(problem.seconds @ r))

    @staticmethod
    def _scaled(matrix: csr_matrix, start: int, scale: Floats) -> csr_matrix:
        factors = np.concatenate([np.ones(start), 1 / scale])
        scaled = matrix.copy()
        scaled.data = scaled.data * np.repeat(factors, np.diff(scaled.indptr))
        return scaled

    def live(self, s: Floats, r: Floats) -> Floats:
        """Bytes at each moment, those of forward first."""
        problem, spans, sizes = self.problem, self.spans, self.problem.sizes
        forward = _sums(len(problem.forward), problem.last + 1, None, sizes * s)
        backward = _sums(len(problem.backward), None, spans.saved_until, sizes * s)
        again = sizes * r[problem.producer]
        backward += _sums(len(problem.backward), spans.again_from, spans.again_until, again)
        return np.concatenate([problem.forward + forward, problem.backward + backward])

    # -- rows

    def _logic_rows(self) -> tuple[csr_matrix, Floats]:
        """The rows that do not concern memory, as matrix x <= bounds."""
        problem, n = self.problem, self._values
        entries: list[tuple[int, int, float]] = []
        bounds: list[float] = []
        for v in sorted({v for values in problem.reads for v in values}):
            row = len(bounds)
            entries += [(row, v, -1.0), (row, n + int(problem.producer[v]), -1.0)]
            bounds.append(-1.0)
        for o, operands in enumerate(problem.operands):
            for u in operands:
                p = int(problem.producer[u])
                if p != o:
                    row = len(bounds)
                    entries += [(row, n + o, 1.0), (row, u, -1.0), (row, n + p, -1.0)]
                    bounds.append(0.0)
        rows, columns, data = zip(*entries, strict=True) if entries else ((), (), ())
        shape = (len(bounds), n + self._operations)
        return csr_matrix((data, (rows, columns)), shape=shape), np.asarray(bounds)

    def _add_rows(self, over: Floats, tolerance: Floats) -> bool:
        """Adds rows for the moments that a solution violates most; whether there were any."""
        left, right = np.append(-np.inf, over[:-1]), np.append(over[1:], -np.inf)
        tops = np.flatnonzero((over > tolerance) & (over >= left) & (over >= right))
        new = [int(t) for t in tops if int(t) not in self._rows]
        new.sort(key=lambda t: -over[t])
        for t in new[:_MOST_ROWS]:
            self._rows[t] = self._row(t)
        return bool(new)

    def _row(self, moment: int) -> csr_matrix:
        problem, spans, sizes = self.problem, self.spans, self.problem.sizes
        row = np.zeros(self._values + self._operations)
        t = moment - len(problem.forward)
        if t < 0:
            there = problem.last < moment
            row[: self._values][there] = sizes[there]
            return csr_matrix(row)
        there = spans.saved_until >= t
        row[: self._values][there] = sizes[there]
        there = (spans.again_from <= t) & (t <= spans.again_until)
        np.add.at(row, self._values + problem.producer[there], sizes[there])
        return csr_matrix(row)


def _sums(count: int, first: Ints | None, last: Ints | None, amounts: Floats) -> Floats:
    """Sums of amounts that are there from their first to their last moment, at each moment."""
    change = np.zeros(count + 1)
    start = np.zeros(len(amounts), int) if first is None else np.minimum(first, count)
    end = np.full(len(amounts), count) if last is None else np.minimum(last + 1, count)
    present = start < end
    np.add.at(change, start[present], amounts[present])
    np.add.at(change, end[present], -amounts[present])
    return np.cumsum(change[:-1])
