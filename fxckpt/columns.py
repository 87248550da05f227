"""What follows from the numbers of `solve`, and the columns and rows of `exact`; pure numbers."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from operator import or_

import numpy as np

from fxckpt.solve import Problem, at_moments

OFTEN = 8.0  # how often more than three times an operation may run again


class Columns:
    """What follows from a problem; moments are those of backward.

    Attributes:
        problem: The numbers.
        n: Values; their columns, s(v), come first.
        m: Operations; those of r(o), g(o) and h(o) come next.
        first: The first moment that reads each value.
        last: Likewise the last.
        until: The last moment at which each value lives if it is computed again.
        reads: All moments that read each value.
        results: The values that each operation makes.
        readers: The operations that read each value.
        asked: The first moment that reads a result of each operation.
        latest: The last of the moments that first read what each operation is needed for.
        behind: For each operation those that it depends on, as bits.
        several: The values that are one of several results.
        again: The column that says that a value is computed again.
        breakable: The values that could be let go between their readers.
        fleeting: The columns that say that they are.
        gaps: For each moment and each of these, 1 where it is not read.
        given_up: Likewise where it need not be there.
        often: Where the columns begin that say that an operation runs again more than three times.
        count: Columns.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.n, self.m = len(problem.sizes), len(problem.seconds)
        self.first, self.last = problem.needs()
        self.until = problem.replaced_at()
        self.reads: list[list[int]] = [[] for _ in problem.sizes]  # moments
        for moment, values in enumerate(problem.reads):
            for v in values:
                self.reads[v].append(moment)
        self.results: list[list[int]] = [[] for _ in problem.seconds]
        self.readers: list[list[int]] = [[] for _ in problem.sizes]
        for v, o in enumerate(problem.producer):
            self.results[o].append(v)
        for o, operands in enumerate(problem.operands):
            for u in dict.fromkeys(operands):
                self.readers[u].append(o)
        never = len(problem.backward)
        self.asked = np.array(
            [min((self.first[v] for v in r), default=never) for r in self.results]
        )
        self.latest = np.full(self.m, -1)
        for o in range(self.m - 1, -1, -1):
            for v in self.results[o]:
                asking = [self.latest[c] for c in self.readers[v] if c != o]
                own = self.first[v] if self.last[v] >= 0 else -1
                self.latest[o] = max([self.latest[o], own, *asking])
        self.behind: list[int] = []  # for each operation those that it depends on, as bits
        for operands in problem.operands:
            makers = {int(problem.producer[u]) for u in operands}
            self.behind.append(functools.reduce(or_, (self.behind[p] | 1 << p for p in makers), 0))
        n, m = self.n, self.m
        self.several = several = [v for v in range(n) if len(self.results[problem.producer[v]]) > 1]
        self.again = n + problem.producer.copy()
        self.again[several] = n + 3 * m + np.arange(len(several))
        self.breakable = problem.breakable()
        self.fleeting = n + 3 * m + len(several) + np.arange(len(self.breakable))
        self.often = n + 3 * m + len(several) + len(self.breakable)
        self.count = self.often + m
        self.gaps = at_moments(problem.gaps, self.breakable)
        self.given_up = at_moments(problem.given_up(), self.breakable)

    def runs_when_asked(self, o: int) -> bool:
        """Whether an operation of which the result was let go runs when that is asked for."""
        return len(self.results[o]) == 1 and bool(self.asked[o] < len(self.problem.backward))


class Rows:
    """Rows `entries @ x <= bound`, and columns that only they have."""

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self.i: list[int] = []
        self.j: list[int] = []
        self.x: list[float] = []
        self.bounds: list[float] = []

    def column(self) -> int:
        """Adds a column."""
        self.columns += 1
        return self.columns - 1

    def add(self, entries: Iterable[tuple[int, float]], bound: float = 0.0) -> None:
        """Adds a row."""
        for column, factor in entries:
            self.i.append(len(self.bounds))
            self.j.append(column)
            self.x.append(factor)
        self.bounds.append(bound)
