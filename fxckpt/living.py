"""What lives at all moments for a solution of `exact`, which may have fractions; pure numbers."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from fxckpt.columns import Columns
from fxckpt.solve import Floats, sums


class Live:
    """The bytes at each moment of backward for a solution: see `moment`, all chains followed."""

    def __init__(self, columns: Columns, x: Floats, *, proven: bool = True) -> None:
        n, m = columns.n, columns.m
        self._columns, self._proven = columns, proven
        self._saved, operations = x[:n], x[n : n + 3 * m]
        self._run, self._more, self._let_go = operations.reshape(3, m)
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
        """What waits for what runs later, after backward has read it."""
        columns, later = self._columns, self._later()
        kept = np.zeros_like(self._waits)
        for v in range(columns.n):
            p, last = columns.problem.producer[v], columns.last[v]
            begin = columns.until[v] + 1  # a result takes its place at the last moment, unless
            needed = np.zeros_like(kept[v])
            for c in columns.readers[v]:
                if c != p:
                    np.maximum(needed, later[c], out=needed)
            if len(columns.results[p]) == 1:
                made = self._has_run[p] - self._more[p] - self._let_go[p] - self._waits[v]
                needed += np.maximum(made, 0)
            kept[v, begin:] = (needed - self._again[v])[begin:]
            kept[v, begin : last + 1] -= self._saved[v]  # counted already
        return np.maximum(kept, 0)

    def _later(self) -> Floats:
        """What has yet to run, or to run once more."""
        columns = self._columns
        later = np.maximum(self._run[:, None] - self._has_run, 0)
        for c in range(columns.m - 1, -1, -1):
            if columns.runs_when_asked(c):
                before = later[c, : columns.asked[c]]
                np.maximum(before, self._more[c], out=before)
            is_one = len(columns.results[c]) == 1
            for v in columns.results[c] if self._proven and is_one else []:
                gone = later[c, columns.until[v] + 1 :]
                for d in columns.readers[v]:
                    if d != c:
                        due = later[d, columns.until[v] + 1 :] + self._more[c] - 1
                        np.maximum(gone, due, out=gone)
        return later

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
