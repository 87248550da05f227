"""What has run again by a moment of backward, and waits, as columns and rows; pure numbers.

NOTE [What waits]

The program of `solve` knows how long a value is read, not how long it waits for that. Both follow
from what has run again by a moment t of backward, so each moment that binds gets variables of its
own (of what is far from it, little is to be known):

    e(o) <= r(o)                            o has run again by then
    e(o) >= 1 - s(v) - s(u)                 for results u of o that make v, which is read by then
    e(o) >= e(c) - s(u)                     for results u of o that c reads, which has run by then
    e(o) <= sum of e(c) over readers c      nothing runs before it is asked for
    w(u) >= e(o) - s(u) - g(o)              u is read later: it waits, or o runs once more
    q(c) >= e(c) - s(v) - w(v)              c has to run once more to make v, which is read later
    q(c) >= q(d) - s(v) - w(v)              so it does for d if backward does not read v
    w(u) >= q(c) - s(u) - g(o)              u, which backward does not read, waits for that

All decisions satisfy these, and those of `moment`, so the optimum remains a bound.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from fxckpt.columns import Columns, Rows

Sum = list[tuple[int, float]]  # columns, and by what they are multiplied


class Waiting:
    """The columns and rows of one moment of backward.

    Chains are followed for `depth` steps, and to one operation, if there is one. With `far`, what
    lies behind has variables, too: it is known when it may have run, not when it must have. For
    what is `proven`, rows hold for all decisions, and say all that is known; plans are found sooner
    with fewer, where an operation is taken to run when it is asked for.
    """

    def __init__(
        self,
        columns: Columns,
        rows: Rows,
        moment: int,
        depth: int,
        operation: int = -1,
        *,
        far: bool = False,
        proven: bool = True,
    ) -> None:
        self._columns, self._rows, self._proven = columns, rows, proven
        self._moment, self._operation = moment, operation
        # For each operation, the column that says whether it has run.
        self._run = self._near(depth, operation)
        self._chains = dict.fromkeys(self._run)
        self._through = self._gates()
        self._waits: dict[int, int] = {}
        if far:
            self._far()
        self._link()

    def _near(self, depth: int, operation: int) -> dict[int, int]:
        """e(o): that of what is read already is r(o)."""
        columns, rows, problem = self._columns, self._rows, self._columns.problem
        n = columns.n
        run = {int(o): n + int(o) for o in np.flatnonzero(columns.asked <= self._moment)}
        edge = list(run)
        while edge and (depth > 0 or (operation >= 0 and operation not in run)):
            depth -= 1
            behind = dict.fromkeys(
                int(problem.producer[u]) for o in edge for u in problem.operands[o]
            )
            edge = [o for o in behind if o not in run]
            run.update((o, rows.column()) for o in edge)
        self._edge = edge
        return run

    def _far(self) -> None:
        """e(o) of all others: when they may have run is known, when they must have is not."""
        columns, rows = self._columns, self._rows
        for o in range(columns.m - 1, -1, -1):
            if o not in self._run and self._readers(o):
                from_edge = self._has_run(o)
                self._run[o] = rows.column()
                if o not in self._through:
                    rows.add([(self._run[o], 1), *from_edge])
                self._ask_for(o)

    def _readers(self, o: int) -> list[int]:
        columns = self._columns
        return sorted({c for v in columns.results[o] for c in columns.readers[v]} - {o})

    def _has_run(self, o: int) -> Sum:
        """Columns of which at least one is 1 if an operation has run, all negative.

        What is far away has only run if what leads there from the end of a chain has.
        """
        while o not in self._run and o in self._through:
            o = self._through[o]
        if o in self._run:
            return [(self._run[o], -1.0)]
        return [(self._run[e], -1.0) for e in self._edge if self._columns.behind[e] >> o & 1]

    def _gates(self) -> dict[int, int]:
        """For operations that only run early if a certain later one does, the first such one.

        These are immediate dominators (Cooper, Harvey and Kennedy 2001) of the graph from readers
        to operands, which is entered at what is read already.
        """
        columns = self._columns
        gate: dict[int, int] = {}
        for o in range(columns.m - 1, -1, -1):
            readers = self._readers(o)
            if columns.asked[o] <= self._moment or not readers:
                continue
            common: int | None = readers[-1]
            for reader in readers:
                other: int | None = reader
                while common != other and common is not None and other is not None:
                    if common < other:
                        common = gate.get(common)
                    else:
                        other = gate.get(other)
                common = common if common == other else None
            if common is not None:
                gate[o] = common
        return gate

    def _is_early(self, o: int) -> bool:
        return o in self._chains and self._columns.asked[o] > self._moment

    def _link(self) -> None:
        columns, rows, run = self._columns, self._rows, self._run
        problem = columns.problem
        for o in self._chains:
            for u in dict.fromkeys(problem.operands[o]):
                p = int(problem.producer[u])
                if not self._is_early(p) or p == o:
                    continue
                if self._is_early(o):
                    rows.add([(run[o], 1), (run[p], -1), (u, -1)])
                for v in columns.results[o]:
                    if columns.first[v] <= self._moment:
                        rows.add([(run[p], -1), (v, -1), (u, -1)], -1)
        for o in filter(self._is_early, self._chains):
            self._ask_for(o)
            self._wait_for(o)
        self._wait_for_others()
        self._wait_besides()

    def _ask_for(self, o: int) -> None:
        """Nothing runs before it is asked for."""
        rows, run = self._rows, self._run[o]
        rows.add([(run, 1), (self._columns.n + o, -1)])
        if o in self._through:
            rows.add([(run, 1), *self._has_run(self._through[o])])
        asking = dict(entry for c in self._readers(o) for entry in self._has_run(c))
        rows.add([(run, 1), *((c, f) for c, f in asking.items() if c != run)])

    def _wait_for(self, o: int) -> None:
        """What is read later waits, or is computed once more."""
        columns, rows = self._columns, self._rows
        more = columns.n + columns.m + o
        for u in columns.results[o]:
            if columns.first[u] > self._moment and columns.problem.sizes[u]:
                self._waits[u] = rows.column()
                if columns.last[u] >= 0:
                    kept = [(u, -1)] if len(columns.results[o]) > 1 else []  # else it is not saved
                    rows.add([(self._run[o], 1), *kept, (more, -1), (self._waits[u], -1)])

    def _wait_for_others(self) -> None:
        """So does one of several results of which another was read earlier."""
        columns, moment = self._columns, self._moment
        for u in columns.several:
            o = int(columns.problem.producer[u])
            if not columns.asked[o] <= moment < columns.first[u] or columns.last[u] < 0:
                continue
            self._waits[u] = self._rows.column()
            there = [(u, -1), (columns.n + columns.m + o, -1), (self._waits[u], -1)]
            for v in columns.results[o]:
                if columns.first[v] <= moment:
                    self._rows.add([(v, -1), *there], -1)

    def _wait_besides(self) -> None:
        """So does what backward does not read, for what has to run once more."""
        columns, problem, rows = self._columns, self._columns.problem, self._rows
        due: dict[int, list[Sum]] = {}
        for c in sorted(filter(self._is_early, self._chains), reverse=True):
            due[c] = [*self._due(c, due)]
            for u in dict.fromkeys(problem.operands[c]):
                if u in self._waits and columns.last[u] < 0:
                    more = columns.n + columns.m + int(problem.producer[u])
                    for entries in due[c]:
                        rows.add([*entries, (u, -1), (more, -1), (self._waits[u], -1)])

    def _due(self, c: int, due: dict[int, list[Sum]]) -> Iterable[Sum]:
        """Sums that are 1 only if an operation has run, and has to run once more, later."""
        columns, rows, column = self._columns, self._rows, None
        for v in filter(self._waits.__contains__, columns.results[c]):
            missing = [(v, -1.0), (self._waits[v], -1.0)]
            if columns.last[v] >= 0:
                yield [(self._run[c], 1.0), *missing]
                continue
            for entries in (each for d in columns.readers[v] for each in due.get(d, ())):
                column = rows.column() if column is None else column
                rows.add([*entries, *missing, (column, -1)])
        if column is not None:
            yield [(column, 1.0)]
