"""What lives while an operation runs again for a moment of backward, see `moment`; pure numbers.

Operands and results are there, and what has run before it. For plans, it is taken to run right
before the moment. For a bound, that is only so if it has not run earlier:

    n(o) >= e(o, t) - e(o, t - 1)       o runs right before t
    n(o) >= g(o) - s(v)                 so does what was let go, when its result v is read first
    held(u) >= n(o) - kept(u) - p(u)    operands are there, unless the result takes their place,
    sum of p(u) <= 1                    which is that of one of them
"""

from __future__ import annotations

from fxckpt.moment import Moment


class Running(Moment):
    """The columns and rows of one operation that runs again for a moment: see `Waiting`."""

    def live(self) -> list[tuple[int, float]]:
        """Columns and bytes of what lives while it runs, besides what lives in any case."""
        columns, rows, moment, o = self._columns, self._rows, self._moment, self._operation
        problem, sizes = columns.problem, columns.problem.sizes
        first, last, again = columns.first, columns.last, columns.again
        runs, kept, replaced = self._runs_now(), self._kept(), []
        found = [(column, float(sizes[v])) for v, column in kept.items()]
        operands = set(problem.operands[o])
        for v in range(columns.n):
            earlier = problem.producer[v] < o
            if first[v] < moment <= last[v] or (
                first[v] == moment and earlier and v not in operands
            ):
                found.append((int(again[v]), float(sizes[v])))
            elif v in operands and sizes[v]:
                held = rows.column()
                found.append((held, float(sizes[v])))
                there = [(kept[v], -1.0)] if v in kept else []
                if v in problem.taken[o]:
                    replaced.append(rows.column())
                    there.append((replaced[-1], -1.0))
                rows.add([(runs, 1), *there, (held, -1)])
                if v in self._waits:
                    rows.add([(self._waits[v], 1), (held, -1)])
            elif earlier and v in self._waits:
                found.append((self._waits[v], float(sizes[v])))
        if replaced:
            rows.add([(column, 1) for column in replaced], len(columns.results[o]))
        found += [(runs, float(sizes[v])) for v in columns.results[o]]
        return [*found, *self._gone(columns.gaps)]

    def _runs_now(self) -> int:
        """The column that says that it runs right before the moment."""
        columns, rows, o = self._columns, self._rows, self._operation
        is_asked = columns.asked[o] == self._moment
        if not (self._proven or is_asked):
            return self._run[o]
        runs = rows.column()
        before = [(self._before(), -1.0)] if self._proven else []
        if not is_asked:
            rows.add([(self._run[o], 1), *before, (runs, -1)])
        for v in columns.results[o]:
            if columns.first[v] == self._moment:
                rows.add([(v, -1), *before, (runs, -1)], -1)
                if len(columns.results[o]) == 1:
                    rows.add([(columns.n + columns.m + o, 1), (v, -1), (runs, -1)])
        return runs

    def _before(self) -> int:
        """The column that says that it had run by the moment before."""
        columns, rows, moment, o = self._columns, self._rows, self._moment, self._operation
        had = {o} if columns.asked[o] >= moment else set()
        edge = [*had]
        while edge:
            behind = {c for each in edge for c in self._readers(each)}
            edge = [c for c in behind - had if columns.asked[c] >= moment]
            had.update(edge)
        found: dict[int, int] = {}
        for c in sorted(had, reverse=True):
            found[c] = rows.column()
            asking = [(found.get(d, columns.n + d), -1.0) for d in self._readers(c)]
            rows.add([(found[c], 1), (columns.n + c, -1)])
            rows.add([(found[c], 1), *asking])
        return found.get(o, columns.n + o)
