"""The linear program with what waits at the moments that bind; pure numbers.

The program of `solve`, with columns and rows of their own for each moment that binds (see
`waiting`). Chains of operations are followed for `_NEAR` steps back from what is read there; what
lies behind has not run, unless something at the end of a chain has. Where the bound may be the
reason that a plan looks poor, they are followed for `_FAR` steps, through all of a layer, and all
other operations have variables: without them, a fraction of a long chain (the residual stream of a
transformer) could have run early and be nowhere.

Whole numbers are asked for in s(v) alone: the rest is hardly ever a fraction then, and the solution
is found soon. It is a bound, too, and nearly a plan.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import numpy as np
from scipy.optimize import LinearConstraint
from scipy.sparse import csr_matrix

from fxckpt import highs
from fxckpt.columns import Columns, Rows
from fxckpt.living import Live
from fxckpt.solve import Floats, Problem, Solution, sums
from fxckpt.waiting import Waiting

_NEAR, _FAR = 12, 40
_MOST_CUTS, _MOST_ROUNDS = 6, 4  # moments that one round adds; with fewer rows a bound is lower
_FEW, _MOST_NODES = 48, 12  # operations that run again, nodes of branching for a sharper bound
_MOST_FOR_PLANS = 12_000  # entries of a matrix with what lives while something runs again
_MOST_DEEP_ROUNDS, _MOST_TWICE = 2, 50_000  # with long chains; entries for there to be another one
_ENOUGH = 3e-3  # of the optimum, that whole numbers may be away from it
_GAIN = 1.5e-2  # of the optimum, that a round has to bring for there to be another one
# Of the budget: what may be over, and what a moment that binds has left.
_TOLERANCE, _SLACK = 1e-4, 0.01

Cut = tuple[int, int]  # a moment, and the operation that runs again for it, or -1 (-2: of forward)


class Exact:
    """The program of one problem; the moments that matter are kept for the next budget.

    Args:
        problem: The numbers.
        recomputing: Whether to count what lives while something runs again: for plans. If not, the
            optimum is a bound.

    Attributes:
        entries: Of the matrix that whole numbers were looked for last: it takes longer for more.
    """

    def __init__(self, problem: Problem, *, recomputing: bool = False) -> None:
        self.problem, self._recomputing = problem, recomputing
        self._columns = Columns(problem)
        self._unit = max(float(problem.backward.max(initial=0.0)), float(problem.sizes.sum()), 1.0)
        self._logic = self._logic_rows()
        self._known: dict[Cut, Rows] = {}
        self._cuts: dict[Cut, Rows] = {}  # those that are in use
        self._scale = max(float(problem.seconds.max(initial=0.0)), 1e-12)
        self._latest: Any = None
        self.entries = 0

    def solve(self, budget: float) -> Solution | None:
        """The optimum for a budget in bytes, with fractions; None if nothing fits."""
        problem = self.problem
        if max(problem.forward.max(initial=0.0), problem.backward.max(initial=0.0)) > budget:
            return None
        before = 0.0
        for _ in range(_MOST_ROUNDS):
            matrix, bounds, objective = self._assembled(budget, self._cuts)
            found = self._relaxed(matrix, bounds, objective)
            if found.x is None:
                return None
            gains = found.fun > (1 + _GAIN) * before
            if not gains or not self._cut(found.x[: self._columns.count], budget):
                break
            before = found.fun
        self._latest = found
        self._keep_tight(matrix @ found.x, bounds - _SLACK * budget / self._unit)
        return self._solution(found)

    def branched(self, budget: float, most: int) -> Solution | None:
        """Likewise where each value is saved as a whole, with all that is known of what waits.

        After some branching, the best that is found is returned; its seconds are what no decision
        can be below.

        Args:
            budget: Bytes.
            most: Entries of the matrix: for more of them, as for what fits nowhere, None.
        """
        if self.solve(budget) is None:
            return None
        program = self._assembled(budget, self._far(self._cuts))
        self.entries = program[0].nnz
        if self.entries > (min(most, _MOST_FOR_PLANS) if self._recomputing else most):
            return None
        found = self._branched(*program)
        return None if found.x is None else self._solution(found, found.mip_dual_bound)

    def sharpened(self, budget: float) -> float | None:
        """A bound over whole numbers, which is higher; for the budget that was solved for last.

        Where little runs again, it matters that a value is saved as a whole, and is soon found out.
        Elsewhere, that takes long, and brings less: None.
        """
        found, n = self._latest, self._columns.n
        if found is None:
            return None
        runs = found.x[n : n + self._columns.m]
        if np.count_nonzero(runs > _TOLERANCE) > _FEW:
            return None
        found = self._branched(*self._assembled(budget, self._cuts))
        if found.mip_dual_bound is None:
            return None
        return max(float(found.mip_dual_bound) - self._ties(), 0.0) * self._scale

    def deepened(self, budget: float) -> float | None:
        """A bound that knows more of what waits; for the budget that was solved for last.

        None if there is none: if that was not solved, or nothing fits.
        """
        if self._latest is None:
            return None
        cuts: dict[Cut, Rows] = {}
        new = [*self._cuts]
        for _ in range(_MOST_DEEP_ROUNDS):
            cuts |= self._far(new)
            program = self._assembled(budget, cuts)
            found = self._relaxed(*program)
            if found.x is None:
                return None
            new = self._new(found.x[: self._columns.count], budget, cuts)
            if not new or program[0].nnz > _MOST_TWICE:
                break
        return self._solution(found).seconds

    def _far(self, cuts: Iterable[Cut]) -> dict[Cut, Rows]:
        """The rows of all that is known of what waits at some moments."""
        return {cut: self._rows_of(cut, far=True) for cut in cuts}

    def _keep_tight(self, values: Floats, least: Floats) -> None:
        """Drops the moments that do not bind; those that were added last are not known yet."""
        row = len(self._logic.bounds)
        for cut, rows in [*self._cuts.items()]:
            row += len(rows.bounds)
            if row <= len(values) and values[row - 1] < least[row - 1]:
                del self._cuts[cut]

    def _relaxed(self, matrix: csr_matrix, bounds: Floats, objective: Floats) -> Any:
        return highs.relaxed(objective, matrix, bounds)

    def _branched(self, matrix: csr_matrix, bounds: Floats, objective: Floats) -> Any:
        """Solves for whole numbers in the columns that say what is saved."""
        nodes = 1 if self._recomputing else _MOST_NODES  # more of them raise the bound alone
        whole = np.arange(len(objective)) < self._columns.n
        limits = LinearConstraint(matrix, ub=bounds)
        # Small programs are as fast without, and print nothing; large ones need it for good plans.
        presolve = not self._recomputing
        return highs.branched(objective, limits, whole, nodes=nodes, gap=_ENOUGH, presolve=presolve)

    def _solution(self, found: Any, bound: float | None = None) -> Solution:
        n, m, x = self._columns.n, self._columns.m, found.x
        value = float(self._costs(n + 3 * m) @ x[: n + 3 * m]) if bound is None else bound
        seconds = max(value - self._ties(), 0.0)
        let_go, fleeting = x[n + m : n + 2 * m][self.problem.producer], np.zeros(n)
        fleeting[self._columns.breakable] = x[self._columns.fleeting]
        return Solution(x[:n], let_go, fleeting, seconds * self._scale)

    def _ties(self) -> float:
        """The most that what decides between equals can cost."""
        return float(self._costs(self._columns.n).sum())

    def _costs(self, columns: int) -> Floats:
        problem, n, m = self.problem, self._columns.n, self._columns.m
        costs = np.zeros(columns)
        costs[n : n + 3 * m] = np.tile(problem.seconds, 3)[: max(columns - n, 0)]
        costs[:n] = 1e-6 * problem.seconds.sum() / max(problem.sizes.sum(), 1.0) * problem.sizes
        return costs / self._scale

    def _assembled(self, budget: float, cuts: dict[Cut, Rows]) -> tuple[csr_matrix, Floats, Floats]:
        """All rows as one matrix, their bounds, and the costs of its columns."""
        i, j, x, bounds = [], [], [], []
        own = self._columns.count
        rows, columns = 0, own
        for part in (self._logic, *cuts.values()):
            local = np.array(part.j, dtype=np.int64)
            i.append(np.array(part.i, dtype=np.int64) + rows)
            j.append(np.where(local >= own, local + columns - own, local))
            x.append(np.array(part.x))
            bounds.append(np.array(part.bounds))
            rows, columns = rows + len(part.bounds), columns + part.columns - own
            if part is not self._logic:
                bounds[-1][-1] += budget / self._unit  # the last row is that of the bytes
        shape = (rows, columns)
        matrix = csr_matrix(
            (np.concatenate(x), (np.concatenate(i), np.concatenate(j))), shape=shape
        )
        return matrix, np.concatenate(bounds), self._costs(columns)

    def _logic_rows(self) -> Rows:
        problem, columns = self.problem, self._columns
        n, m, again = columns.n, columns.m, columns.again
        rows = Rows(columns.count)
        for o, operands in enumerate(problem.operands):
            rows.add([(n + m + o, 1), (n + o, -1)])
            for u in dict.fromkeys(operands):
                if problem.producer[u] != o:
                    rows.add([(n + o, 1), (u, -1), (int(again[u]), -1)])
        for v in range(n):
            if columns.last[v] >= 0:
                rows.add([(v, -1), (int(again[v]), -1)], -1)
            rows.add([(v, 1), (int(again[v]), 1)], 1)
        for f, v in zip(columns.fleeting, columns.breakable, strict=True):
            rows.add([(int(f), 1), (int(again[v]), -1)])
            rows.add([(int(f), 1), (n + 2 * m + int(problem.producer[v]), -1)])
        for v in columns.several:
            rows.add([(int(again[v]), 1), (n + int(problem.producer[v]), -1)])
        return rows

    # -- what lives

    def _cut(self, x: Floats, budget: float) -> bool:
        """Adds rows for the moments that are over most; whether there are any."""
        new = self._new(x, budget, self._cuts)
        for cut in new:
            if cut not in self._known:
                self._known[cut] = self._rows_of(cut)
            self._cuts[cut] = self._known[cut]
        return bool(new)

    def _new(self, x: Floats, budget: float, cuts: Collection[Cut]) -> list[Cut]:
        """The moments that are over most, and have no rows."""
        over = self._over(x, budget)
        return sorted((c for c in over if c not in cuts), key=lambda c: (-over[c], c))[:_MOST_CUTS]

    def _over(self, x: Floats, budget: float) -> dict[Cut, float]:
        """The moments that need more than the budget, and how much."""
        problem, n = self.problem, self._columns.n
        live = Live(self._columns, x)
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

    def _rows_of(self, cut: Cut, *, far: bool = False) -> Rows:
        """The rows of a moment, that of its bytes last; chains are followed for so many steps."""
        moment, operation = cut
        rows, problem = Rows(self._columns.count), self.problem
        if operation == -2:
            live = dict.fromkeys(np.flatnonzero(problem.last < moment), 1.0)
            fixed = problem.forward[moment]
            bytes_ = [(int(v), float(problem.sizes[v])) for v in live]
        else:
            depth = _FAR if far else _NEAR
            waiting = Waiting(self._columns, rows, moment, depth, operation, far=far)
            bytes_ = waiting.live() if operation < 0 else waiting.live_while(operation)
            fixed = (problem.backward if operation < 0 else problem.before)[moment]
        rows.add([(int(c), float(b) / self._unit) for c, b in bytes_ if b], -fixed / self._unit)
        return rows
