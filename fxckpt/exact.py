"""The linear program with what waits at the moments that bind; pure numbers.

The program of `solve`, with columns and rows of their own for each moment that binds (see
`waiting`). Chains of operations are followed for `_NEAR` steps back from what is read there; what
lies behind has not run, unless something at the end of a chain has. At moments whose bytes have a
price they are followed for `_FAR` steps, through all of a layer, and all other operations have
variables: without them, a fraction of a long chain (the residual stream of a transformer) could
have run early and be nowhere.

Whole numbers are asked for in s(v) alone: the rest is hardly ever a fraction then, and the solution
is found soon. For small graphs they are asked for in all, and how often operations run again is
counted (see `logic`), which fractions do not tell of. But the moments that have rows are those that
fractions do not fit at. So those that it does not fit at get rows, too, and it is looked for again,
until it is nearly a plan.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix

from fxckpt import highs
from fxckpt.columns import OFTEN, Columns, Rows
from fxckpt.living import Live
from fxckpt.logic import logic, runs
from fxckpt.moment import Moment
from fxckpt.running import Running
from fxckpt.solve import Floats, Ints, Problem, Solution, sums

_NEAR, _FAR = 12, 40
_MOST_CUTS, _PARTS = 6, 128  # moments that one round adds, and how many parts they are taken from
_MOST_WORK = 5 * 10**8  # entries times iterations, after which there is no further round
_FEW, _MOST_NODES = 48, 3  # operations that run again, nodes of branching for a sharper bound
_SMALL, _FEWER = 150, 15_000  # values, entries of moments: all is asked for in whole numbers
_MOST_BRANCHED = 6  # rounds of whole numbers
_MOST_ENTRIES = 25_000  # of a matrix, for a sharper bound
_ENOUGH = 5e-3  # of the optimum, see `Exact`
_HARD = 2e-2  # likewise, that they are away if it took long to find them
_GAIN = 1.5e-2  # of the optimum, that a round has to bring for there to be another one
# Of the budget: what may be over, what a moment that binds has left, and what is far from fitting.
_TOLERANCE, _SLACK, _ROUGH = 1e-4, 0.01, 0.1
_PATIENCE = 2  # solutions in a row that a moment does not bind in, before it is dropped
_FREE = 1e-7  # of the seconds of what takes longest: a price that is none

Cut = tuple[int, int]  # a moment, and the operation that runs again for it, or -1 (-2: of forward)
# A matrix, what it times x must not be above, and the costs of x.
Assembled = tuple[csr_matrix, Floats, Floats]


class Exact:
    """The program of one problem; the moments that matter are kept for the next budget.

    Args:
        problem: The numbers.
        recomputing: Whether to count what lives while something runs again: for plans. If not, the
            optimum is a bound.
        gap: Of the optimum, that whole numbers may be away from it.

    Attributes:
        left: Entries of matrices in which whole numbers may still be looked for.
        counting: Whether it is counted how often operations run again, for whole numbers.
    """

    def __init__(
        self, problem: Problem, *, recomputing: bool = False, gap: float = _ENOUGH
    ) -> None:
        self.problem, self._recomputing, self._gap = problem, recomputing, gap
        self._columns = Columns(problem)
        self._unit = max(float(problem.backward.max(initial=0.0)), float(problem.sizes.sum()), 1.0)
        self._logic = logic(self._columns)
        self._known: dict[tuple[Cut, bool], Rows] = {}
        self._cuts: dict[Cut, bool] = {}  # those in use, and whether chains are followed far
        self._idle: dict[Cut, int] = {}  # for how many solutions they did not bind
        self._scale = max(float(problem.seconds.max(initial=0.0)), 1e-12)
        self._latest: Any = None
        self.left, self.counting = 0, False

    def solve(self, budget: float, enough: float = math.inf) -> Solution | None:
        """The optimum for a budget in bytes, with fractions; None if nothing fits.

        Args:
            budget: Bytes.
            enough: Seconds: an optimum of that much, as a bound, need not be higher.
        """
        problem = self.problem
        if max(problem.forward.max(initial=0.0), problem.backward.max(initial=0.0)) > budget:
            return None
        self._begin(budget)
        before, work, was_rough, more = 0.0, 0, True, True
        while more:
            matrix, bounds, objective = self._assembled(budget)
            found = highs.relaxed(objective, matrix, bounds)
            if found.x is None:
                return None
            solution, over = self._solution(found), self._over(found.x, budget)
            rough = max(over.values(), default=0.0) > _ROUGH * budget
            work += found.nit * matrix.nnz
            more = (
                (rough or was_rough or found.fun > (1 + _GAIN) * before)
                and solution.seconds < enough
                and work < _MOST_WORK
                and self._refine(over, [] if rough else self._binding(found))
            )
            before, was_rough = found.fun, rough
        self._latest = found
        self._keep_tight(bounds - matrix @ found.x, _SLACK * budget / self._unit)
        return solution

    def branched(self, budget: float, known: float = math.inf) -> Iterator[Solution]:
        """Solutions where each value is saved as a whole, with the moments of the latest optimum.

        Each fits at the moments that those before did not fit at. They end with one that fits as
        far as is known, and when no entries are left.

        Args:
            budget: Bytes.
            known: Seconds: of what takes longer, nothing is looked for.
        """
        for cut in [cut for cut in self._cuts if self._idle[cut]]:
            self._drop(cut)
        most = self.left // 2
        for _ in range(_MOST_BRANCHED):
            if self.left <= 0:
                return
            counted = [runs(self._columns)] if self.is_small or self.counting else []
            program = self._assembled(budget, *counted)
            found = self._branched(program, known)
            is_hard = found.mip_gap is None or found.mip_gap > max(_HARD, self._gap)
            self.left -= max(2 * program[0].nnz, most) if is_hard else program[0].nnz
            if found.x is None:
                return
            yield self._solution(found)
            if not self._refine(self._over(found.x, budget), []):
                return

    def sharpened(self, budget: float, known: float, others: Iterable[Cut] = ()) -> float | None:
        """A bound over whole numbers, which is higher; with the moments of the latest optimum.

        None if there is none, and for large programs, for which it takes long.

        Args:
            budget: Bytes.
            known: Seconds that a decision takes which fits: the most that the bound can be.
            others: Further moments, see `while_running`.
        """
        more = dict.fromkeys((cut for cut in others if cut not in self._cuts), True)
        program = self._assembled(budget)
        if program[0].nnz > _MOST_ENTRIES:
            return None
        if more:
            self._add(more)
            program = self._assembled(budget)
        found = self._branched(program, known, proven=True)
        if found.status == highs.NOTHING_FITS:
            return known
        return None if found.mip_dual_bound is None else self._seconds(found.mip_dual_bound)

    def while_running(self) -> list[Cut]:
        """The moments in use at which something runs again."""
        return [cut for cut in self._cuts if cut[1] >= 0]

    @property
    def is_small(self) -> bool:
        """Whether solutions in whole numbers are found soon."""
        entries = sum(len(rows.x) for rows in self._rows())
        return self._columns.n <= _SMALL and entries <= _FEWER

    def soon(self) -> bool:
        """Whether the latest optimum is soon sharpened: where little runs again."""
        n, m = self._columns.n, self._columns.m
        return bool(np.count_nonzero(self._latest.x[n : n + m] > _TOLERANCE) <= _FEW)

    def _refine(self, over: dict[Cut, float], binding: list[Cut]) -> bool:
        """Adds rows for the moments that are over most, and all that is known of those that bind.

        Returns:
            Whether there are any.
        """
        more = {cut: cut in self._cuts for cut in self._worst(over)}  # rows may not say enough
        more |= {cut: True for cut in binding if not self._cuts[cut]}
        self._add(more)
        return bool(more)

    def _add(self, cuts: dict[Cut, bool]) -> None:
        self._cuts |= cuts
        self._idle |= dict.fromkeys(cuts, 0)

    def _begin(self, budget: float) -> None:
        """Adds rows for moments that are over if all is saved: those of other budgets may not do.

        What does not fit at them goes elsewhere, a little to each of many moments.
        """
        n = self._columns.n
        saved = np.zeros(self._columns.count)
        saved[:n] = self._columns.last >= 0
        new = [cut for cut in self._worst(self._over(saved, budget)) if cut not in self._cuts]
        self._add(dict.fromkeys(new, False))

    def _worst(self, over: dict[Cut, float]) -> list[Cut]:
        """The moments that are over most, apart from each other, as far as not all is known."""
        apart = len(self.problem.backward) / _PARTS
        worst: list[Cut] = []
        for cut in sorted(over, key=lambda cut: (-over[cut], cut)):
            beside = any(abs(cut[0] - other[0]) < apart for other in worst)
            if not self._cuts.get(cut) and not beside and len(worst) < _MOST_CUTS:
                worst.append(cut)
        return worst

    def _binding(self, found: Any) -> list[Cut]:
        """The moments of which a byte more would make the optimum less: by their prices."""
        prices = -found.ineqlin.marginals[self._last_rows()]
        return [cut for cut, price in zip(self._cuts, prices, strict=True) if price > _FREE]

    def _last_rows(self) -> Ints:
        """The numbers of the rows of bytes, of all moments in use."""
        counts = [len(rows.bounds) for rows in (self._logic, *self._rows())]
        return np.cumsum(counts, dtype=np.int64)[1:] - 1

    def _rows(self) -> Iterator[Rows]:
        return (self._rows_of(*cut) for cut in self._cuts.items())

    def _keep_tight(self, left: Floats, slack: float) -> None:
        """Drops the moments that had more than a little left for some times."""
        for cut, bytes_ in zip([*self._cuts], left[self._last_rows()], strict=True):
            self._idle[cut] = 0 if bytes_ <= slack else self._idle[cut] + 1
            if self._idle[cut] > _PATIENCE:
                self._drop(cut)

    def _drop(self, cut: Cut) -> None:
        del self._cuts[cut]
        self._known.pop((cut, True), None)  # which are many

    def _branched(self, program: Assembled, known: float, *, proven: bool = False) -> Any:
        """Solves for whole numbers in the columns that say what is saved; if few, in all."""
        matrix, bounds, objective = program
        whole = self._columns.often if self.is_small else self._columns.n
        return highs.near(
            objective,
            matrix,
            bounds,
            np.arange(len(objective)) < whole,
            nodes=_MOST_NODES if proven else 1,  # more of them raise the bound alone
            gap=self._gap,
            least=known / self._scale + self._ties(),
            proven=proven,
        )

    def _solution(self, found: Any) -> Solution:
        n, m, x = self._columns.n, self._columns.m, found.x
        let_go, fleeting = x[n + m : n + 2 * m][self.problem.producer], np.zeros(n)
        fleeting[self._columns.breakable] = x[self._columns.fleeting]
        value = float(self._costs(self._columns.count) @ x[: self._columns.count])
        return Solution(x[:n], let_go, fleeting, self._seconds(value))

    def _seconds(self, value: float) -> float:
        """What a value of the objective is in seconds, at least."""
        return max(value - self._ties(), 0.0) * self._scale

    def _ties(self) -> float:
        """The most that what decides between equals can cost."""
        return float(self._costs(self._columns.n).sum())

    def _costs(self, columns: int) -> Floats:
        problem, n, m = self.problem, self._columns.n, self._columns.m
        costs = np.zeros(columns)
        costs[n : n + 3 * m] = np.tile(problem.seconds, 3)[: max(columns - n, 0)]
        if columns > self._columns.often:
            costs[self._columns.often : self._columns.often + m] = OFTEN * problem.seconds
        costs[:n] = 1e-6 * problem.seconds.sum() / max(problem.sizes.sum(), 1.0) * problem.sizes
        return costs / self._scale

    def _assembled(self, budget: float, *more: Rows) -> Assembled:
        """All rows as one matrix, their bounds, and the costs of its columns."""
        i, j, x, bounds = [], [], [], []
        own = self._columns.count
        rows, columns = 0, own
        for place, part in enumerate((self._logic, *more, *self._rows())):
            local = np.array(part.j, dtype=np.int64)
            i.append(np.array(part.i, dtype=np.int64) + rows)
            j.append(np.where(local >= own, local + columns - own, local))
            x.append(np.array(part.x))
            bounds.append(np.array(part.bounds))
            rows, columns = rows + len(part.bounds), columns + part.columns - own
            if place > len(more):
                bounds[-1][-1] += budget / self._unit  # the last row is that of the bytes
        shape = (rows, columns)
        matrix = csr_matrix(
            (np.concatenate(x), (np.concatenate(i), np.concatenate(j))), shape=shape
        )
        return matrix, np.concatenate(bounds), self._costs(columns)

    # -- what lives

    def _over(self, x: Floats, budget: float) -> dict[Cut, float]:
        """The moments that need more than the budget, and how much."""
        problem, n = self.problem, self._columns.n
        live = Live(self._columns, x[: self._columns.count], proven=not self._recomputing)
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

    def _rows_of(self, cut: Cut, far: bool) -> Rows:
        """The rows of a moment, that of its bytes last."""
        if (cut, far) not in self._known:
            self._known[cut, far] = self._made(cut, far)
        return self._known[cut, far]

    def _made(self, cut: Cut, far: bool) -> Rows:
        moment, operation = cut
        rows, problem = Rows(self._columns.count), self.problem
        if operation == -2:
            live = dict.fromkeys(np.flatnonzero(problem.last < moment), 1.0)
            fixed = problem.forward[moment]
            bytes_ = [(int(v), float(problem.sizes[v])) for v in live]
        else:
            kind, depth = Moment if operation < 0 else Running, _FAR if far else _NEAR
            proven = not self._recomputing
            rows_of = kind(self._columns, rows, moment, depth, operation, far=far, proven=proven)
            bytes_ = rows_of.live()
            fixed = (problem.backward if operation < 0 else problem.before)[moment]
        rows.add([(int(c), float(b) / self._unit) for c, b in bytes_ if b], -fixed / self._unit)
        return rows
