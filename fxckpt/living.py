"""What lives at all moments for a solution of `exact`, which may have fractions; pure numbers."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from fxckpt.columns import Columns
from fxckpt.solve import Floats, sums


class Live:
    """The bytes at each moment of backward for a solution: see `waiting`, all chains followed."""

    def __init__(self, columns: Columns, x: Floats) -> None:
        n, m = columns.n, columns.m
        self._columns = columns
        self._saved, self._run, self._more = x[:n], x[n : n + m], x[n + m : n + 2 * m]
        self._again = x[columns.again]
        self._fleeting = columns.problem.sizes[columns.breakable] * x[columns.fleeting]
        self._has_run = self._chains()
        self._waits = self._waiting()
        self._kept = self._kept_for_later()

    def _chains(self) -> Floats:
        columns, saved = self._columns, self._saved
        has_run = np.zeros((columns.m, len(columns.problem.backward)))
        for o in range(columns.m - 1, -1, -1):
            for v in columns.results[o]:
                first = columns.first[v]
                np.maximum(has_run[o, first:], 1 - saved[v], out=has_run[o, first:])
                for c in columns.readers[v]:
                    if c != o:
                        np.maximum(has_run[o], has_run[c] - saved[v], out=has_run[o])
        return has_run

    def _waiting(self) -> Floats:
        columns, saved, more = self._columns, self._saved, self._more
        waits = np.zeros((columns.n, self._has_run.shape[1]))
        due = np.zeros_like(self._has_run)  # what has to run once more, later
        for o in range(columns.m - 1, -1, -1):
            until = columns.asked[o]
            for u in columns.results[o]:
                if columns.last[u] >= 0:
                    needed, end = self._has_run[o], int(columns.first[u])
                    waits[u, :end] = needed[:end] - saved[u] - more[o]
                else:
                    readers = [c for c in columns.readers[u] if c != o]
                    needed, end = due[readers].max(0, initial=0.0), len(waits[u])
                    waits[u, :until] = needed[:until] - saved[u] - more[o]
                np.maximum(waits[u], 0, out=waits[u])
                np.maximum(due[o, :end], (needed - saved[u] - waits[u])[:end], out=due[o, :end])
        return waits

    def _kept_for_later(self) -> Floats:
        columns = self._columns
        kept = np.zeros_like(self._waits)
        for v in range(columns.n):
            begin = columns.last[v] + 1
            for c in columns.readers[v]:
                end = columns.asked[c]
                if c != columns.problem.producer[v] and begin < end:
                    needed = self._run[c] - self._has_run[c, begin:end]
                    if columns.runs_when_asked(c):
                        needed = np.maximum(needed, self._more[c])
                    needed = needed - self._again[v]
                    np.maximum(kept[v, begin:end], needed, out=kept[v, begin:end])
        return kept

    def backward(self) -> Floats:
        """At each moment."""
        columns, problem = self._columns, self._columns.problem
        sizes, behind = problem.sizes, len(problem.backward)
        none = np.zeros(columns.n, dtype=np.int64)
        saved = sums(behind, none, columns.last + 1, sizes * self._saved)
        again = sums(behind, columns.first, columns.until + 1, sizes * self._again)
        waiting: Floats = sizes @ (self._waits + self._kept)
        return problem.backward + saved + again + waiting - columns.given_up @ self._fleeting

    def recomputing(self) -> Iterable[tuple[tuple[int, int], float]]:
        """While each operation runs again."""
        columns, problem = self._columns, self._columns.problem
        sizes, first, last = problem.sizes, columns.first, columns.last
        makes = problem.producer
        for o in map(int, np.flatnonzero(self._run > 0.01)):
            for k, share in self._when(o):
                held = np.where(last >= k, self._saved, 0) + self._kept[:, k]
                held += np.where((first < k) & (k <= last), self._again, 0)
                earlier = makes < o
                held += np.where(earlier & (first == k), self._again, 0) + np.where(
                    earlier, self._waits[:, k], 0
                )
                free = 0.0  # of what the result may take the place of one
                for u in problem.operands[o]:
                    more = max(share - held[u], 0.0)
                    held[u] += more
                    if u in problem.taken[o]:
                        free = max(free, more * sizes[u])
                made = share * sizes[columns.results[o]].sum() - free
                gone = columns.gaps[k] @ self._fleeting
                yield (k, o), float(problem.before[k] + sizes @ held + made - gone)

    def _when(self, o: int) -> Iterable[tuple[int, float]]:
        """The moments for which an operation runs again, and how much of it."""
        asked, run = self._columns.asked[o], self._has_run[o]
        steps = np.diff(run[: asked + 1], prepend=0.0)
        return [(int(k), float(run[k])) for k in np.flatnonzero(steps > 0.01)]
