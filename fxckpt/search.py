"""Looks for decisions within a budget of bytes that run little again, by replaying them exactly.

NOTE [The search]

Rounded solutions of the linear program (see `solve`) are nearly right: within a few per cent of the
budget, and of the optimum. Five things make plans of them:

    aim lower   if the replay needs more than the budget, the program is solved for less
    branch      where a gap is left, the program is that of `exact`, which knows what waits for
                what, in whole numbers
    repair      as long as a decision is over the budget, give up a value that lives when most does:
                the one that takes off most for the seconds that it costs
    fill        save what is computed again as long as it still fits, the most seconds for a byte
                first
    anneal      change one or two values at random, where all of this leaves a gap

All that is ever replayed goes into one pool, from which each budget takes the fastest that fits:
what was found for a smaller budget is not lost for a larger one.

It ends when the best is within 2 % of the bound, or 4 % before it aims lower, and is limited by
numbers of replays and of entries of matrices and not by a clock, so that it is deterministic.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator

import numpy as np
from torch.fx import Node

from fxckpt.exact import Cut, Exact
from fxckpt.memory import Memory
from fxckpt.moves import Moves, need
from fxckpt.pool import Decision, Found, Pool
from fxckpt.problems import problem_of
from fxckpt.solve import Lives, Program, Solution

_ROUNDINGS = (0.999, 0.5, 0.001)  # what counts as saved
_LESSONS, _AIMS, _BRANCHED = 4, 8, 2  # how often to learn, and to aim lower
_SHARES = (1.0, 0.85, 0.7)  # of the budget, that are aimed for from below
# Times the bound: when to stop, to aim and anneal, and to look from below.
_BEST, _GOOD, _POOR = 1.02, 1.04, 1.3
_ANNEALED = 2  # times the replays of the other ways
_TOLD = 1.02  # times the seconds of a solution: what its replay may take
_NEARLY = 0.02  # of what is found to need least: what may be left
_ANY = 1.0  # of the optimum, that a solution may be away from it which is to fit
_HALVINGS, _STARTS, _LEASTS = 8, 4, 2  # how to find what needs least


class Search:
    """The decisions on one joint graph that are known so far.

    Args:
        memory: Of the graph.
        seconds: What each forward operation takes.
        replays: How many a call may make, about.
        entries: Of matrices that it may look for whole numbers in (see `exact`), together.
        more: Seconds that are added to what runs again: what this graph takes longer than others.

    Attributes:
        memory: Of the graph.
        pool: The decisions that are known.
    """

    def __init__(
        self,
        memory: Memory,
        seconds: dict[Node, float],
        replays: int,
        entries: int,
        more: float = 0.0,
    ) -> None:
        self.memory, self._replays, self._more = memory, replays, more
        self.pool = Pool(memory, seconds, more)
        self._entries = entries
        self._problem = problem_of(memory, seconds)
        self._moves = Moves(self.pool, self._problem)
        self._bounds = Exact(self._problem)
        self._exact = Exact(self._problem, recomputing=True)
        self._plans = Program(self._problem.in_two_moments())
        self._bound_of: dict[float, float | None] = {}
        # Budgets whose bound is as high as it gets, and whether with all moments.
        self._sharpened: set[tuple[float, bool]] = set()
        self._given: list[Found] = []  # what was to be considered

    # -- what is known

    def bound(self, budget: float) -> float | None:
        """Seconds that every decision within a budget takes at least; None if none fits."""
        if budget not in self._bound_of:
            solution = self._bounds.solve(budget, self._known(budget) / _BEST)
            self._bound_of[budget] = None if solution is None else solution.seconds + self._more
        return self._bound_of[budget]

    def _known(self, budget: float) -> float:
        """Seconds of the fastest that is known to fit, without what this graph takes longer."""
        known = self.pool.best(budget)
        return math.inf if known is None else known.seconds - self._more

    def is_behind(self, seconds: float, budget: float) -> bool:
        """Whether the fastest that is known to fit takes longer, or nothing ever will fit."""
        known = self.pool.best(budget)
        return self._is_hopeless(budget) if known is None else known.seconds > seconds

    def consider(self, saved: Iterable[Node]) -> Found:
        """Adds a decision to those that are known."""
        self._given.append(self.pool.replay(self.pool.saving(saved)))
        return self._given[-1]

    # -- looking for more

    def look(self, budget: float) -> Iterator[None]:
        """Looks for decisions within a budget, until one is near the bound; pauses between ways."""
        for look, near in (
            (self._look_by_learning, _BEST),
            (self._look_by_aiming, _GOOD),
            (self._look_by_branching, _GOOD),
        ):
            self.pool.left = self._replays
            look(budget)
            if self.bound(budget) is None:
                return
            if self.is_poor(budget, _BEST) and self._bounds.soon():
                self._sharpen(budget)
            if (known := self.pool.best(budget)) is not None and self.is_poor(budget, _BEST):
                self._moves.fill(known, budget)
            if not self.is_poor(budget, near) or self._is_hopeless(budget):
                return
            yield
        self.pool.left = self._replays
        if self.is_poor(budget, _POOR):
            self._look_from_below(budget)
        yield
        if self.is_poor(budget, _GOOD):
            self.pool.left = _ANNEALED * self._replays
            self._moves.anneal(budget)

    def _sharpen(self, budget: float, *others: Cut) -> None:
        """Raises the bound, once, where it may be the reason that the best looks poor."""
        key = budget, bool(others)
        if key in self._sharpened or (known := self._known(budget)) == math.inf:
            return
        self._sharpened.add(key)
        if (seconds := self._bounds.sharpened(budget, known, others)) is not None:
            self._raise_bound(budget, seconds)

    def _raise_bound(self, budget: float, seconds: float) -> None:
        self._bound_of[budget] = max(self._bound_of[budget] or 0.0, seconds + self._more)

    def _is_hopeless(self, budget: float) -> bool:
        """Whether nothing fits, not even what needs least."""
        return self.pool.best(budget) is None and self.least.peak > budget

    def is_poor(self, budget: float, factor: float = _POOR) -> bool:
        """Whether the best that is known takes much longer than the bound."""
        bound, known = self.bound(budget), self.pool.best(budget)
        return known is None or bound is None or known.seconds > factor * bound

    def _look_by_branching(self, budget: float) -> None:
        """Solutions that also know what waits, and what lives while something runs again."""
        self._look_exactly(self._exact, budget, self._entries)
        if self.is_poor(budget, _GOOD):
            self._sharpen(budget, *self._exact.while_running())

    def _look_exactly(self, program: Exact, budget: float, entries: int) -> list[Found]:
        """Solutions that know what waits, and save each value as a whole."""
        aim, made = budget, []
        program.left, program.counting = entries, False
        for _ in range(_BRANCHED if program.solve(budget) is not None else 0):
            found, is_told = None, True
            for solution in program.branched(aim, self._known(budget)):
                self.pool.left = self._replays
                found = self.pool.replay(self._rounded(solution, 0.5))
                made.append(found)
                is_told = found.seconds - self._more <= _TOLD * solution.seconds
                if found.peak <= budget and is_told:
                    break
            if found is None:
                break
            over = found.peak - budget
            if over > 0:
                made.append(self._moves.repair(found, budget))
                aim -= over + 0.001 * budget
            if made[-1].peak <= budget:
                self._moves.fill(made[-1], budget)
            if over <= 0 and is_told:
                break
            program.counting = not is_told
        return made

    def _look_from_below(self, budget: float) -> None:
        """Lets all go that is not saved, and then less."""
        for share in _SHARES:
            if (solution := self._plans.solve(share * budget)) is None:
                break
            start = self.pool.replay(self._moves.without_waiting(self._rounded(solution, 0.5)))
            if (found := self._moves.repair(start, budget)).peak <= budget:
                self._moves.fill(found, budget)
        if self.pool.best(budget) is None:
            self.pool.left = self._replays
            self._moves.fill(self.least, budget)

    def _look_by_learning(self, budget: float) -> None:
        """Solutions without fractions, where values live as they did in the replay before."""
        lives = self._plans.lives()
        for _ in range(_LESSONS):
            solution = self._plans.solve(budget, lives, whole=True)
            if solution is None:
                return
            found = self.pool.replay(self._rounded(solution, 0.5))
            if found.peak <= budget:
                return
            self._learn(found, lives)
            if self.pool.left > self._replays // 2:
                self._moves.repair(found, budget)

    def _look_by_aiming(self, budget: float) -> None:
        """Rounded solutions, for less and less where they need too much."""
        aim = budget
        for _ in range(_AIMS):
            solution = self._plans.solve(aim)
            if solution is None:
                aim = (aim + budget) / 2
                continue
            tried = self._all_rounded(solution)
            for found in tried:
                if found.peak > budget and self.pool.left > self._replays // 3:
                    self._moves.repair(found, budget)
            over = max(found.peak for found in tried) - budget
            if over <= 0:
                break
            aim -= max(0.35 * over, 0.002 * budget)

    def _learn(self, found: Found, lives: Lives) -> None:
        """Notes where values live that a decision saves, or computes again and keeps."""
        count = len(self.pool.index)
        for node, first, last in self.memory.replay(self.pool.choice(found.decision)).lives():
            if (v := self.pool.index.get(node)) is None:
                continue
            if first < 0:
                lives.until[v] = last
            elif not found.decision[count + v]:
                lives.begin[v], lives.end[v] = first, last

    @functools.cached_property
    def least(self) -> Found:
        """The one that is found to need least, whatever else was looked for before."""
        self.pool.left = self._replays
        plans = Program(self._plans.problem)
        starts = [*self._given]
        low, high = float(self.memory.fixed.peak), float(starts[0].peak)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            if (solution := plans.solve(middle)) is None:
                low = middle
            else:
                high = middle
                starts += self._all_rounded(solution)
        starts += [
            self.pool.replay(self._moves.without_waiting(found.decision)) for found in starts
        ]
        starts.sort(key=need)
        nothing = self.pool.replay(self.pool.saving(()))  # many others may need as much
        lowest = [self._moves.descend(found, low) for found in (nothing, *starts[:_STARTS])]
        found = self._least_exactly(min(lowest, key=need), low)
        self.pool.left = self._replays
        return self._moves.lower(found)

    def _least_exactly(self, found: Found, low: float) -> Found:
        """Halves what lies between a decision and what none can need less than."""
        program, high = Exact(self._problem, recomputing=True, gap=_ANY), found.peak
        for _ in range(_LEASTS if program.is_small else 0):
            if high - low <= _NEARLY * high:
                break
            self.pool.left = self._replays
            middle = (low + high) / 2
            made = self._look_exactly(program, middle, self._entries // 3)
            better = min(made, key=need, default=found)
            if better.peak < found.peak:
                found = min(better, self._moves.descend(better, low), key=need)
            elif made:
                break  # what fits as far as is known does not
            low, high = (low, found.peak) if found.peak <= middle else (middle, high)
        return found

    def _rounded(self, solution: Solution, limit: float) -> Decision:
        saved = solution.saved > limit
        fleeting = (solution.fleeting > 0.5) & ~saved
        return np.concatenate([saved, (solution.let_go > 0.5) & ~saved | fleeting, fleeting])

    def _all_rounded(self, solution: Solution) -> list[Found]:
        return [self.pool.replay(self._rounded(solution, limit)) for limit in _ROUNDINGS]
