"""The linear program with what waits at the moments that bind; pure numbers.

NOTE [What waits]

The program of `solve` knows how long a value is read, not how long it waits for that. Both follow
from what has run again by a moment t of backward, so each moment that binds gets variables of its
own (of what is far from it, little is to be known):

    e(o) <= r(o)                            o has run again by then
    e(o) >= 1 - s(v) - s(u)                 for results u of o that make v, which is read by then
    e(o) >= e(c) - s(u)                     for results u of o that c reads, which has run by then
    e(o) <= sum of e(c) over readers c      nothing runs before it is asked for
    w(u) >= e(o) - s(u) - g(o)              u is read later: it waits, or o runs once more
    w(u) >= e(c) - s(v) - w(v) - s(u) - g(o)    so it does if c has to run once more to make v
    z(u) >= r(c) - e(c) - (u is computed again)    u is saved for c, which runs later
    f(v) <= r(o), h(o)                      v is not there between its readers: o runs once more
    y(u) >= f(v) - h(p) - (u is there)      so does p, unless its result u, which o reads, waits

All decisions satisfy these, so the optimum remains a bound, and it is hardly ever below what a
replay shows. What it does not contain are the bytes while something runs again. A program for plans
has rows for these too: operands and results of an operation, and all that has run before it.

Chains of operations are followed for `_NEAR` steps back from what is read; what lies behind has not
run, unless something at the end of a chain has. Where the bound may be the reason that a plan looks
poor, they are followed for `_FAR` steps, at the moments that bind: through all of a layer.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Iterable
from operator import or_
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import csr_matrix

from fxckpt.solve import Floats, Problem, Solution, at_moments, sums

_NEAR, _FAR = 12, 40
_CLOSE = 3  # steps back from what is let go between its readers
_MOST_CUTS, _MOST_ROUNDS = 6, 4  # moments that one round adds; with fewer rows a bound is lower
_FEW, _MOST_NODES = 48, 30  # operations that run again, nodes of branching for a sharper bound
_GAIN = 1.5e-2  # of the optimum, that a round has to bring for there to be another one
_TOLERANCE, _SLACK = (
    1e-4,
    0.01,
)  # of the budget: what may be over, and what a moment that binds has left

Cut = tuple[int, int]  # a moment, and the operation that runs again for it, or -1 (-2: of forward)


class _Rows:
    """Rows `entries @ x <= bound`, and columns that only they have."""

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self.i: list[int] = []
        self.j: list[int] = []
        self.x: list[float] = []
        self.bounds: list[float] = []

    def column(self) -> int:
        self.columns += 1
        return self.columns - 1

    def add(self, entries: Iterable[tuple[int, float]], bound: float = 0.0) -> None:
        for column, factor in entries:
            self.i.append(len(self.bounds))
            self.j.append(column)
            self.x.append(factor)
        self.bounds.append(bound)


class Exact:
    """The program of one problem; the moments that matter are kept for the next budget.

    Args:
        problem: The numbers.
        recomputing: Whether to count what lives while something runs again: for plans. If not, the
            optimum is a bound.
    """

    def __init__(self, problem: Problem, *, recomputing: bool = False) -> None:
        self.problem, self._recomputing = problem, recomputing
        self._n, self._m = len(problem.sizes), len(problem.seconds)
        self._first, self._last = problem.needs()
        self._until = problem.replaced_at()
        self._reads: list[list[int]] = [[] for _ in problem.sizes]  # moments
        for moment, values in enumerate(problem.reads):
            for v in values:
                self._reads[v].append(moment)
        self._results: list[list[int]] = [[] for _ in problem.seconds]
        self._readers: list[list[int]] = [[] for _ in problem.sizes]
        for v, o in enumerate(problem.producer):
            self._results[o].append(v)
        for o, operands in enumerate(problem.operands):
            for u in dict.fromkeys(operands):
                self._readers[u].append(o)
        never = len(problem.backward)
        self._asked = np.array(
            [min((self._first[v] for v in r), default=never) for r in self._results]
        )
        self._behind: list[int] = []  # for each operation those that it depends on, as bits
        for operands in problem.operands:
            makers = {int(problem.producer[u]) for u in operands}
            self._behind.append(
                functools.reduce(or_, (self._behind[p] | 1 << p for p in makers), 0)
            )
        # Columns: s(v), r(o), g(o), h(o), for each value whether it is computed again, and f(v).
        n, m = self._n, self._m
        several = [v for v in range(n) if len(self._results[problem.producer[v]]) > 1]
        self._again = n + problem.producer.copy()
        self._again[several] = n + 3 * m + np.arange(len(several))
        self._breakable = problem.breakable()
        self._fleeting = n + 3 * m + len(several) + np.arange(len(self._breakable))
        self._columns = n + 3 * m + len(several) + len(self._breakable)
        self._gaps = at_moments(problem.gaps, self._breakable)
        self._given_up = at_moments(problem.given_up(), self._breakable)
        self._unit = max(float(problem.backward.max(initial=0.0)), float(problem.sizes.sum()), 1.0)
        self._logic = self._logic_rows(several)
        self._known: dict[Cut, _Rows] = {}
        self._cuts: dict[Cut, _Rows] = {}  # those that are in use
        self._scale = max(float(problem.seconds.max(initial=0.0)), 1e-12)
        self._latest: Any = None

    def solve(self, budget: float, *, whole: bool = False) -> Solution | None:
        """The optimum for a budget in bytes; None if nothing fits.

        Args:
            budget: Bytes.
            whole: Without fractions; after some branching, what is found is returned.
        """
        problem = self.problem
        if max(problem.forward.max(initial=0.0), problem.backward.max(initial=0.0)) > budget:
            return None
        found = None
        for solver in (self._relaxed, self._branched) if whole else (self._relaxed,):
            before = 0.0
            for _ in range(_MOST_ROUNDS):
                matrix, bounds, objective = self._assembled(budget)
                found = solver(matrix, bounds, objective)
                if found.x is None:
                    return None
                gains = found.fun > (1 + _GAIN) * before
                if not gains or not self._cut(found.x[: self._columns], budget):
                    break
                before = found.fun
        assert found is not None
        self._latest = found
        self._keep_tight(matrix @ found.x, bounds - _SLACK * budget / self._unit)
        return self._solution(found, whole)

    def sharpened(self, budget: float) -> float | None:
        """A bound over whole numbers, which is higher; for the budget that was solved for last.

        Where little runs again, it matters that a value is saved as a whole, and is soon found out.
        Elsewhere, that takes long, and brings less: None.
        """
        found = self._latest
        if found is None or np.count_nonzero(found.x[self._n :][: self._m] > _TOLERANCE) > _FEW:
            return None
        matrix, bounds, objective = self._assembled(budget)
        found = self._branched(matrix, bounds, objective, nodes=_MOST_NODES, count=self._n)
        if found.mip_dual_bound is None:
            return None
        return max(float(found.mip_dual_bound) - self._ties(), 0.0) * self._scale

    def deepened(self, budget: float) -> float | None:
        """A bound that knows more of what waits; for the budget that was solved for last.

        None if there is none: if that was not solved, or nothing fits.
        """
        if self._latest is None:
            return None
        near, self._cuts = self._cuts, {cut: self._rows_of(cut, _FAR) for cut in self._cuts}
        found = self._relaxed(*self._assembled(budget))
        self._cuts = near
        return None if found.x is None else self._solution(found, whole=False).seconds

    def _keep_tight(self, values: Floats, least: Floats) -> None:
        """Drops the moments that do not bind; those that were added last are not known yet."""
        row = len(self._logic.bounds)
        for cut, rows in [*self._cuts.items()]:
            row += len(rows.bounds)
            if row <= len(values) and values[row - 1] < least[row - 1]:
                del self._cuts[cut]

    def _relaxed(self, matrix: csr_matrix, bounds: Floats, objective: Floats) -> Any:
        return linprog(objective, matrix, bounds, bounds=(0, 1), method="highs")

    def _branched(
        self,
        matrix: csr_matrix,
        bounds: Floats,
        objective: Floats,
        nodes: int = 1,
        count: int | None = None,
    ) -> Any:
        """Solves for whole numbers in the first columns, by default in all that are decisions."""
        integrality = np.zeros(len(objective))
        integrality[: self._n + 3 * self._m if count is None else count] = 1
        return milp(
            objective,
            constraints=LinearConstraint(matrix, ub=bounds),
            bounds=Bounds(0, 1),
            integrality=integrality,
            options={"node_limit": nodes, "mip_rel_gap": 3e-3},
        )

    def _solution(self, found: Any, whole: bool) -> Solution:
        n, m, x = self._n, self._m, found.x
        costs = self._costs(n + 3 * m)
        value = found.mip_dual_bound if whole else float(costs @ x[: n + 3 * m])
        seconds = max(value - self._ties(), 0.0)
        let_go, fleeting = x[n + m : n + 2 * m][self.problem.producer], np.zeros(n)
        fleeting[self._breakable] = x[self._fleeting]
        return Solution(x[:n], let_go, fleeting, seconds * self._scale)

    def _ties(self) -> float:
        """The most that what decides between equals can cost."""
        return float(self._costs(self._n).sum())

    def _costs(self, columns: int) -> Floats:
        problem, n, m = self.problem, self._n, self._m
        costs = np.zeros(columns)
        costs[n : n + 3 * m] = np.tile(problem.seconds, 3)[: max(columns - n, 0)]
        costs[:n] = 1e-6 * problem.seconds.sum() / max(problem.sizes.sum(), 1.0) * problem.sizes
        return costs / self._scale

    def _assembled(self, budget: float) -> tuple[csr_matrix, Floats, Floats]:
        """All rows as one matrix, their bounds, and the costs of its columns."""
        i, j, x, bounds = [], [], [], []
        rows, columns = 0, self._columns
        for part in (self._logic, *self._cuts.values()):
            local = np.array(part.j, dtype=np.int64)
            i.append(np.array(part.i, dtype=np.int64) + rows)
            j.append(np.where(local >= self._columns, local + columns - self._columns, local))
            x.append(np.array(part.x))
            bounds.append(np.array(part.bounds))
            rows, columns = rows + len(part.bounds), columns + part.columns - self._columns
            if part is not self._logic:
                bounds[-1][-1] += budget / self._unit  # the last row is that of the bytes
        shape = (rows, columns)
        matrix = csr_matrix(
            (np.concatenate(x), (np.concatenate(i), np.concatenate(j))), shape=shape
        )
        return matrix, np.concatenate(bounds), self._costs(columns)

    def _logic_rows(self, several: list[int]) -> _Rows:
        problem, n, m, again = self.problem, self._n, self._m, self._again
        rows = _Rows(self._columns)
        for o, operands in enumerate(problem.operands):
            rows.add([(n + m + o, 1), (n + o, -1)])
            for u in dict.fromkeys(operands):
                if problem.producer[u] != o:
                    rows.add([(n + o, 1), (u, -1), (int(again[u]), -1)])
        for v in range(n):
            if self._last[v] >= 0:
                rows.add([(v, -1), (int(again[v]), -1)], -1)
            rows.add([(v, 1), (int(again[v]), 1)], 1)
        for f, v in zip(self._fleeting, self._breakable, strict=True):
            rows.add([(int(f), 1), (int(again[v]), -1)])
            rows.add([(int(f), 1), (n + 2 * m + int(problem.producer[v]), -1)])
        for v in several:
            rows.add([(int(again[v]), 1), (n + int(problem.producer[v]), -1)])
        return rows

    # -- what lives

    def _cut(self, x: Floats, budget: float) -> bool:
        """Adds rows for the moments that are over most; whether there are any."""
        over = self._over(x, budget)
        new = sorted((c for c in over if c not in self._cuts), key=lambda c: (-over[c], c))
        for cut in new[:_MOST_CUTS]:
            if cut not in self._known:
                self._known[cut] = self._rows_of(cut, _NEAR)
            self._cuts[cut] = self._known[cut]
        return bool(new)

    def _over(self, x: Floats, budget: float) -> dict[Cut, float]:
        """The moments that need more than the budget, and how much."""
        problem, n = self.problem, self._n
        live = _Live(self, x)
        ahead = len(problem.forward)
        forward = problem.forward + sums(
            ahead, problem.last + 1, np.full(n, ahead), problem.sizes * x[:n]
        )
        found: dict[Cut, float] = {}
        least = budget * (1 + _TOLERANCE)
        for moments, kind in ((forward, -2), (live.backward(), -1)):
            before, after = np.append(-np.inf, moments[:-1]), np.append(moments[1:], -np.inf)
            for t in np.flatnonzero((moments > least) & (moments >= before) & (moments >= after)):
                found[int(t), kind] = float(moments[t] - budget)
        if self._recomputing:
            for cut, bytes_ in live.recomputing():
                if bytes_ > least:
                    found[cut] = bytes_ - budget
        return found

    def _rows_of(self, cut: Cut, depth: int) -> _Rows:
        """The rows of a moment, that of its bytes last; chains are followed for so many steps."""
        moment, operation = cut
        rows, problem = _Rows(self._columns), self.problem
        if operation == -2:
            live = dict.fromkeys(np.flatnonzero(problem.last < moment), 1.0)
            fixed = problem.forward[moment]
            bytes_ = [(int(v), float(problem.sizes[v])) for v in live]
        else:
            waiting = _Waiting(self, rows, moment, depth, operation)
            bytes_ = waiting.live() if operation < 0 else waiting.live_while(operation)
            fixed = (problem.backward if operation < 0 else problem.before)[moment]
        rows.add([(int(c), float(b) / self._unit) for c, b in bytes_ if b], -fixed / self._unit)
        return rows


class _Waiting:
    """The columns and rows of one moment of backward.

    Chains are followed for `depth` steps, and to one operation, if it is not -1.
    """

    def __init__(
        self, program: Exact, rows: _Rows, moment: int, depth: int, operation: int
    ) -> None:
        self._program, self._rows, self._moment = program, rows, moment
        # For each operation, the column that says whether it has run.
        self._run = self._near(depth, operation)
        self._through = self._gates()
        self._waits: dict[int, int] = {}
        self._link()

    def _near(self, depth: int, operation: int) -> dict[int, int]:
        """e(o): that of what is read already is r(o)."""
        program, rows, problem = self._program, self._rows, self._program.problem
        n = program._n
        run = {int(o): n + int(o) for o in np.flatnonzero(program._asked <= self._moment)}
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

    def _has_run(self, o: int) -> list[tuple[int, float]]:
        """Columns of which at least one is 1 if an operation has run, all negative.

        What is far away has only run if what leads there from the end of a chain has.
        """
        while o not in self._run and o in self._through:
            o = self._through[o]
        if o in self._run:
            return [(self._run[o], -1.0)]
        return [(self._run[e], -1.0) for e in self._edge if self._program._behind[e] >> o & 1]

    def _gates(self) -> dict[int, int]:
        """For operations that only run early if a certain later one does, the first such one.

        These are immediate dominators (Cooper, Harvey and Kennedy 2001) of the graph from readers
        to operands, which is entered at what is read already.
        """
        program = self._program
        gate: dict[int, int] = {}
        for o in range(program._m - 1, -1, -1):
            readers = {c for v in program._results[o] for c in program._readers[v]} - {o}
            if program._asked[o] <= self._moment or not readers:
                continue
            common: int | None = max(readers)
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
        return o in self._run and self._program._asked[o] > self._moment

    def _link(self) -> None:
        program, rows, run = self._program, self._rows, self._run
        problem = program.problem
        for o in run:
            for u in dict.fromkeys(problem.operands[o]):
                p = int(problem.producer[u])
                if not self._is_early(p) or p == o:
                    continue
                if self._is_early(o):
                    rows.add([(run[o], 1), (run[p], -1), (u, -1)])
                for v in program._results[o]:
                    if program._first[v] <= self._moment:
                        rows.add([(run[p], -1), (v, -1), (u, -1)], -1)
        for o in filter(self._is_early, run):
            self._ask_for(o)
            self._wait_for(o)
        for v in [v for v in self._waits if program._last[v] >= 0]:
            self._wait_besides(v)

    def _ask_for(self, o: int) -> None:
        """Nothing runs before it is asked for."""
        program, rows, run = self._program, self._rows, self._run
        readers = {c for v in program._results[o] for c in program._readers[v]}
        asking = dict(entry for c in sorted(readers) for entry in self._has_run(c))
        rows.add([(run[o], 1), (program._n + o, -1)])
        if o in self._through:
            rows.add([(run[o], 1), *self._has_run(self._through[o])])
        rows.add([(run[o], 1), *((c, f) for c, f in asking.items() if c != run[o])])

    def _wait_for(self, o: int) -> None:
        """What is read later waits, or is computed once more."""
        program, rows = self._program, self._rows
        more = program._n + program._m + o
        for u in program._results[o]:
            if program._first[u] > self._moment and program.problem.sizes[u]:
                self._waits[u] = rows.column()
                if program._last[u] >= 0:
                    kept = [(u, -1)] if len(program._results[o]) > 1 else []  # else it is not saved
                    rows.add([(self._run[o], 1), *kept, (more, -1), (self._waits[u], -1)])

    def _wait_besides(self, v: int) -> None:
        """So does what backward does not read, for a value that is computed once more."""
        program, problem, rows = self._program, self._program.problem, self._rows
        c = int(problem.producer[v])
        for u in dict.fromkeys(problem.operands[c]):
            if u in self._waits and program._last[u] < 0:
                more = program._n + program._m + int(problem.producer[u])
                there = [(u, -1), (more, -1), (self._waits[u], -1)]
                rows.add([(self._run[c], 1), (v, -1), (self._waits[v], -1), *there])

    def _kept(self) -> list[tuple[int, float]]:
        """What is saved and still there."""
        program, rows, sizes = self._program, self._rows, self._program.problem.sizes
        kept = [(int(v), float(sizes[v])) for v in np.flatnonzero(program._last >= self._moment)]
        for v in map(int, np.flatnonzero((program._last < self._moment) & (sizes > 0))):
            column = None
            for c in program._readers[v]:
                if program._asked[c] <= self._moment or c == program.problem.producer[v]:
                    continue
                column = rows.column() if column is None else column
                there = [(int(program._again[v]), -1.0), (column, -1.0)]
                rows.add([(program._n + c, 1), *self._has_run(c), *there])
            if column is not None:
                kept.append((column, float(sizes[v])))
        return kept

    def live(self) -> list[tuple[int, float]]:
        """Columns and bytes of what lives at the moment, besides what lives in any case."""
        program, moment, sizes = self._program, self._moment, self._program.problem.sizes
        read = np.flatnonzero((program._first <= moment) & (moment <= program._until))
        again = [(int(program._again[v]), float(sizes[v])) for v in read]
        waiting = ((w, float(sizes[v])) for v, w in self._waits.items())
        gone = self._gone(program._given_up)
        return [*self._kept(), *again, *waiting, *gone, *self._waiting_for_gone()]

    def _waiting_for_gone(self) -> Iterable[tuple[int, float]]:
        """What waits to make those once more that are let go between their readers."""
        program, rows, t = self._program, self._rows, self._moment
        problem, h = program.problem, program._n + 2 * program._m
        columns = zip(program._breakable, program._fleeting, strict=True)
        stack = [(v, v, int(f), _CLOSE) for v, f in columns if v in problem.gaps[t]]
        while stack:
            v, made, runs, steps = stack.pop()
            until = program._reads[v][bisect.bisect(program._reads[v], t)]
            for u in dict.fromkeys(problem.operands[problem.producer[made]]):
                p, reads = int(problem.producer[u]), program._reads[u]
                comes = bisect.bisect(reads, t) < bisect.bisect(reads, until)
                if comes or p == problem.producer[made]:
                    continue  # it is made for something else
                waits, more = rows.column(), rows.column()
                rows.add([(runs, 1), (waits, -1), (more, -1), *self._there(u)])
                rows.add([(more, 1), (h + p, -1)])
                if steps > 1:
                    stack.append((v, u, more, steps - 1))
                yield waits, float(problem.sizes[u])

    def _there(self, u: int) -> list[tuple[int, float]]:
        """Columns of which at least one is 1 if a value is counted already, all negative."""
        program, moment = self._program, self._moment
        there = [(self._waits[u], -1.0)] if u in self._waits else []
        if program._last[u] >= moment:
            there.append((u, -1.0))
        if program._first[u] <= moment <= program._until[u]:
            there.append((int(program._again[u]), -1.0))
        return there

    def _gone(self, when: Floats) -> list[tuple[int, float]]:
        """What is let go between its readers."""
        program, gone = self._program, when[self._moment]
        sizes = program.problem.sizes[program._breakable]
        return [(int(program._fleeting[i]), -float(sizes[i])) for i in np.flatnonzero(gone)]

    def live_while(self, o: int) -> list[tuple[int, float]]:
        """Likewise while an operation runs again for it."""
        program, rows, moment = self._program, self._rows, self._moment
        problem, sizes = program.problem, program.problem.sizes
        first, last, again = program._first, program._last, program._again
        runs = self._run[o]
        if program._asked[o] == moment:
            runs = rows.column()
            for v in program._results[o]:
                if first[v] == moment:
                    rows.add([(v, -1), (runs, -1)], -1)
        found = self._kept()
        operands = set(problem.operands[o])
        for v in range(program._n):
            earlier = problem.producer[v] < o
            if first[v] < moment <= last[v] or (
                first[v] == moment and earlier and v not in operands
            ):
                found.append((int(again[v]), float(sizes[v])))
            elif v in operands and sizes[v]:
                held = rows.column()
                found.append((held, float(sizes[v])))
                if v != problem.taken[o]:
                    rows.add([(runs, 1), (v, -1), (held, -1)])
                if v in self._waits:
                    rows.add([(self._waits[v], 1), (held, -1)])
            elif earlier and v in self._waits:
                found.append((self._waits[v], float(sizes[v])))
        found += [(runs, float(sizes[v])) for v in program._results[o]]
        return [*found, *self._gone(program._gaps)]


class _Live:
    """The bytes at each moment of backward for a solution: see the note, all chains followed."""

    def __init__(self, program: Exact, x: Floats) -> None:
        n, m = program._n, program._m
        self._program = program
        self._saved, self._run, self._more = x[:n], x[n : n + m], x[n + m : n + 2 * m]
        self._again = x[program._again]
        self._fleeting = program.problem.sizes[program._breakable] * x[program._fleeting]
        self._has_run = self._chains()
        self._waits = self._waiting()
        self._kept = self._kept_for_later()

    def _chains(self) -> Floats:
        program, saved = self._program, self._saved
        has_run = np.zeros((program._m, len(program.problem.backward)))
        for o in range(program._m - 1, -1, -1):
            for v in program._results[o]:
                first = program._first[v]
                np.maximum(has_run[o, first:], 1 - saved[v], out=has_run[o, first:])
                for c in program._readers[v]:
                    if c != o:
                        np.maximum(has_run[o], has_run[c] - saved[v], out=has_run[o])
        return has_run

    def _waiting(self) -> Floats:
        program, saved, more = self._program, self._saved, self._more
        waits = np.zeros((program._n, self._has_run.shape[1]))
        for u in range(program._n - 1, -1, -1):
            o = int(program.problem.producer[u])
            until = program._asked[o]
            if program._last[u] >= 0:
                waits[u, :until] = self._has_run[o, :until] - saved[u] - more[o]
                continue
            for c in program._readers[u]:
                for v in program._results[c]:
                    if program._last[v] >= 0:
                        end = min(until, program._first[v])
                        needed = self._has_run[c] - saved[v] - waits[v] - saved[u] - more[o]
                        np.maximum(waits[u, :end], needed[:end], out=waits[u, :end])
        result: Floats = np.maximum(waits, 0)
        return result

    def _kept_for_later(self) -> Floats:
        program = self._program
        kept = np.zeros_like(self._waits)
        for v in range(program._n):
            begin = program._last[v] + 1
            for c in program._readers[v]:
                end = program._asked[c]
                if c != program.problem.producer[v] and begin < end:
                    needed = self._run[c] - self._has_run[c, begin:end] - self._again[v]
                    np.maximum(kept[v, begin:end], needed, out=kept[v, begin:end])
        return kept

    def backward(self) -> Floats:
        """At each moment."""
        program, problem = self._program, self._program.problem
        sizes, behind = problem.sizes, len(problem.backward)
        none = np.zeros(program._n, dtype=np.int64)
        saved = sums(behind, none, program._last + 1, sizes * self._saved)
        again = sums(behind, program._first, program._until + 1, sizes * self._again)
        waiting: Floats = sizes @ (self._waits + self._kept)
        return problem.backward + saved + again + waiting - program._given_up @ self._fleeting

    def recomputing(self) -> Iterable[tuple[Cut, float]]:
        """While each operation runs again."""
        program, problem = self._program, self._program.problem
        sizes, first, last = problem.sizes, program._first, program._last
        makes = problem.producer
        for o in map(int, np.flatnonzero(self._run > 0.01)):
            for k, share in self._when(o):
                held = np.where(last >= k, self._saved, 0) + self._kept[:, k]
                held += np.where((first < k) & (k <= last), self._again, 0)
                earlier = makes < o
                held += np.where(earlier & (first == k), self._again, 0) + np.where(
                    earlier, self._waits[:, k], 0
                )
                for u in problem.operands[o]:
                    if u != problem.taken[o]:
                        held[u] = max(held[u], share)
                made = share * sizes[program._results[o]].sum()
                gone = program._gaps[k] @ self._fleeting
                yield (k, o), float(problem.before[k] + sizes @ held + made - gone)

    def _when(self, o: int) -> Iterable[tuple[int, float]]:
        """The moments for which an operation runs again, and how much of it."""
        asked, run = self._program._asked[o], self._has_run[o]
        steps = np.diff(run[: asked + 1], prepend=0.0)
        return [(int(k), float(run[k])) for k in np.flatnonzero(steps > 0.01)]
