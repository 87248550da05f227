"""What lives at a moment of backward, as columns and rows of the program of `exact`; pure numbers.

What waits to be read (see `waiting`), and what was read and stays for what runs later:

    l(c) >= r(c) - e(c), g(c)               c, which backward reads later, runs later, or once more
    l(c) >= l(d) + g(c) - 1                 c was read; if it was let go, it runs again for d
    z(u) >= l(c) - (u is computed again)    u is saved for c, which runs later
    z(u) >= l(c) + e(o) - g(o) - h(o) - w(u) - (u is computed again)    or made again, and stays
    f(v) <= r(o), h(o)                      v is not there between its readers: o runs once more
    y(u) >= f(v) - h(p) - (u is there)      so does p, unless its result u, which o reads, waits

With these, what is said of decisions that let nothing go between its readers is what their replays
show, to the byte. What they do not contain are the bytes while something runs again, see `running`.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Iterable

import numpy as np

from fxckpt.solve import Floats
from fxckpt.waiting import Sum, Waiting

_CLOSE = 3  # steps back from what is let go between its readers


class Moment(Waiting):
    """The columns and rows of one moment of backward: see `Waiting`."""

    def live(self) -> Sum:
        """Columns and bytes of what lives at the moment, besides what lives in any case."""
        columns, moment, sizes = self._columns, self._moment, self._columns.problem.sizes
        read = np.flatnonzero((columns.first <= moment) & (moment <= columns.until))
        again = [(int(columns.again[v]), float(sizes[v])) for v in read]
        waiting = ((w, float(sizes[v])) for v, w in self._waits.items())
        kept = ((column, float(sizes[v])) for v, column in self._kept().items())
        gone = self._gone(columns.given_up)
        return [*kept, *self._not_replaced(), *again, *waiting, *gone, *self._waiting_for_gone()]

    @functools.cached_property
    def _later(self) -> dict[int, list[Sum]]:
        """For each operation sums of which one is 1 only if it has yet to run, or once more."""
        columns, rows, moment = self._columns, self._rows, self._moment
        later: dict[int, list[Sum]] = {}
        for c in map(int, np.flatnonzero(columns.latest > moment)[::-1]):
            more = columns.n + columns.m + c
            later[c] = []
            if columns.asked[c] > moment:
                later[c].append([(columns.n + c, 1.0), *self._has_run(c)])
                if columns.runs_when_asked(c):
                    later[c].append([(more, 1.0)])
            due = [sum_ for d in self._readers_of_gone(c) for sum_ in later.get(d, [])]
            if due:
                column = rows.column()
                for sum_ in later[c]:
                    rows.add([*sum_, (column, -1)])
                for sum_ in due:
                    rows.add([*sum_, (more, 1), (column, -1)], 1)
                later[c] = [[(column, 1.0)]]
        return later

    def _readers_of_gone(self, c: int) -> list[int]:
        """What reads a result for which an operation runs again, if it was let go."""
        columns = self._columns
        is_over = all(columns.until[v] < self._moment for v in columns.results[c])
        is_near = c in self._chains and len(columns.results[c]) == 1
        return self._readers(c) if self._proven and is_over and is_near else []

    def _kept(self) -> dict[int, int]:
        """The columns of the values that may be saved and still there."""
        columns, rows, sizes = self._columns, self._rows, self._columns.problem.sizes
        kept = {int(v): int(v) for v in np.flatnonzero(columns.last >= self._moment)}
        for v in map(int, np.flatnonzero((columns.last < self._moment) & (sizes > 0))):
            sums = self._sums_later(v)
            if not sums:
                continue
            kept[v] = rows.column()
            for sum_ in sums:
                there = [(int(columns.again[v]), -1.0), (kept[v], -1.0)]
                rows.add([*sum_, *there])
                if self._is_made(v):
                    rows.add([*sum_, *there, *self._made(v)])
        return kept

    def _sums_later(self, v: int) -> list[Sum]:
        """Sums of which one is 1 only if what reads a value has yet to run, or once more."""
        readers = (c for c in self._columns.readers[v] if c != self._columns.problem.producer[v])
        return [sum_ for c in readers for sum_ in self._later.get(c, [])]

    def _not_replaced(self) -> Iterable[tuple[int, float]]:
        """What no result takes the place of, as something that runs later reads it."""
        columns, rows, moment = self._columns, self._rows, self._moment
        for v in map(int, np.flatnonzero((columns.last == moment) & (columns.until < moment))):
            if (sums := self._sums_later(v)) and self._is_made(v):
                column = rows.column()
                for sum_ in sums:
                    rows.add([*sum_, *self._made(v), (column, -1)], 1)
                yield column, float(columns.problem.sizes[v])

    def _is_made(self, v: int) -> bool:
        p = int(self._columns.problem.producer[v])
        return p in self._run and len(self._columns.results[p]) == 1

    def _made(self, v: int) -> Sum:
        """1 if a value that is read later was made, is not let go, and not counted as waiting."""
        columns = self._columns
        p = int(columns.problem.producer[v])
        made = [(self._run[p], 1.0), (columns.n + columns.m + p, -1.0)]
        if v in columns.breakable:
            made.append((columns.n + 2 * columns.m + p, -1.0))
        if v in self._waits:
            made.append((self._waits[v], -1.0))
        return made

    def _waiting_for_gone(self) -> Iterable[tuple[int, float]]:
        """What waits to make those once more that are let go between their readers."""
        columns, rows, t = self._columns, self._rows, self._moment
        problem, h = columns.problem, columns.n + 2 * columns.m
        fleeting = zip(columns.breakable, columns.fleeting, strict=True)
        stack = [(v, v, int(f), _CLOSE) for v, f in fleeting if v in problem.gaps[t]]
        while stack:
            v, made, runs, steps = stack.pop()
            until = columns.reads[v][bisect.bisect(columns.reads[v], t)]
            for u in dict.fromkeys(problem.operands[problem.producer[made]]):
                p, reads = int(problem.producer[u]), columns.reads[u]
                comes = bisect.bisect(reads, t) < bisect.bisect(reads, until)
                if comes or p == problem.producer[made]:
                    continue  # it is made for something else
                waits, more = rows.column(), rows.column()
                rows.add([(runs, 1), (waits, -1), (more, -1), *self._there(u)])
                rows.add([(more, 1), (h + p, -1)])
                if steps > 1:
                    stack.append((v, u, more, steps - 1))
                yield waits, float(problem.sizes[u])

    def _there(self, u: int) -> Sum:
        """Columns of which at least one is 1 if a value is counted already, all negative."""
        columns, moment = self._columns, self._moment
        there = [(self._waits[u], -1.0)] if u in self._waits else []
        if columns.last[u] >= moment:
            there.append((u, -1.0))
        if columns.first[u] <= moment <= columns.until[u]:
            there.append((int(columns.again[u]), -1.0))
        return there

    def _gone(self, when: Floats) -> Sum:
        """What is let go between its readers."""
        columns, gone = self._columns, when[self._moment]
        sizes = columns.problem.sizes[columns.breakable]
        return [(int(columns.fleeting[i]), -float(sizes[i])) for i in np.flatnonzero(gone)]
