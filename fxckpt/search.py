"""Looks for decisions within a budget of bytes that run little again, by replaying them exactly.

NOTE [The search]

Rounded solutions of the linear program (see `solve`) are nearly right: within a few per cent of the
budget, and of the optimum. Five things make plans of them:

    aim lower   if the replay needs more than the budget, the program is solved for less
    wait        for small graphs, the program is that of `exact`, which knows what waits for what
    repair      as long as a decision is over the budget, give up a value that lives when most does:
                the one that takes off most for the seconds that it costs
    fill        save what is computed again as long as it still fits, the most seconds for a byte
                first
    anneal      change one or two values at random, where all of this leaves a gap

All that is ever replayed goes into one pool, from which each budget takes the fastest that fits:
what was found for a smaller budget is not lost for a larger one.

It ends when the best is within 2 % of the bound, or 4 % before it aims lower, and is limited by a
number of replays and not by a clock, so that it is deterministic.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray
from torch.fx import Node

from fxckpt.exact import Exact
from fxckpt.joint import producer
from fxckpt.memory import Memory
from fxckpt.quick import Count, Quick
from fxckpt.schedule import Choice
from fxckpt.solve import Lives, Problem, Program, Solution

# For each value whether it is saved; then, for each, whether it is let go; and whether it is
# fleeting (see `schedule`).
Decision = NDArray[np.bool_]

_ROUNDINGS = (0.999, 0.5, 0.001)  # what counts as saved
_RECENT = 32  # replays that are kept
_LESSONS, _AIMS = 4, 8  # how often to learn, and to aim lower
_SHARES = (1.0, 0.85, 0.7)  # of the budget, that are aimed for from below
# Times the bound: when to stop, to aim and anneal, and to look from below.
_BEST, _GOOD, _POOR = 1.02, 1.04, 1.3
# Of annealing: times the replays of other ways; what is taken for the worse, and what bytes over
# the budget cost, of the best; how often two values are changed, and how far from each other.
_ANNEALED, _HEAT, _PRICE, _PAIRS, _BESIDE = 3, 3e-4, 20.0, 0.6, 12
_FEW = 150  # values, for which exact solutions are found soon
_AT_ONCE = 6  # values to try to give up
_STATES = 3  # of a value, that a decision tells
_LARGE = 1 / 8  # of what lives in any case: what may be let go between its readers
_NEARLY = 0.02  # of what is found to need least: what may be left
_HALVINGS, _STARTS, _DESCENT = 8, 4, 0.95  # how to find what needs least


@dataclasses.dataclass(frozen=True, slots=True)
class Found:
    """A decision, and what it comes to."""

    decision: Decision
    peak: int
    seconds: float  # of what runs again
    live: NDArray[np.int64]  # bytes at every moment
    kept: int  # those at the end of forward
    backward: int  # the most in backward


class Search:
    """The decisions on one joint graph that are known so far.

    Args:
        memory: Of the graph.
        seconds: What each forward operation takes.
        replays: How many a call may make, about.
        exact: How many exact solutions it may look at (see `exact`), of small graphs.
        more: Seconds that are added to what runs again: what this graph takes longer than others.
    """

    def __init__(
        self,
        memory: Memory,
        seconds: dict[Node, float],
        replays: int,
        exact: int,
        more: float = 0.0,
    ) -> None:
        self.memory, self._seconds, self._replays, self._more = memory, seconds, replays, more
        self._solutions = exact if len(memory.values) <= _FEW else 0
        self._problem = problem_of(memory, seconds)
        self._breakable = {*self._problem.breakable()}
        self._again = self._problem.seconds[self._problem.producer]
        self._roles = self._problem.roles()
        self._quick = Quick(memory, seconds)
        self._index = {node: i for i, node in enumerate(memory.values)}
        self._bounds = Exact(self._problem)
        self._exact = Exact(self._problem, recomputing=True)
        self._plans = Program(self._problem.in_two_moments())
        self._bound_of: dict[float, float | None] = {}
        self._sharpened: set[float] = set()  # budgets whose bound is as high as it gets
        self._pool: dict[bytes, Found] = {}
        self._given: list[Found] = []  # what was to be considered
        self._recent: dict[bytes, Count] = {}
        self._left = 0

    # -- what is known

    def bound(self, budget: float) -> float | None:
        """Seconds that every decision within a budget takes at least; None if none fits."""
        if budget not in self._bound_of:
            solution = self._bounds.solve(budget)
            self._bound_of[budget] = None if solution is None else solution.seconds + self._more
        return self._bound_of[budget]

    def best(self, budget: float) -> Found | None:
        """The fastest that is known to fit; of those, the one that needs least."""
        fitting = (f for f in self._pool.values() if f.peak <= budget)
        return min(fitting, key=lambda f: (f.seconds, f.peak), default=None)

    def is_behind(self, seconds: float, budget: float) -> bool:
        """Whether the fastest that is known to fit takes longer, or nothing ever will fit."""
        known = self.best(budget)
        return self._is_hopeless(budget) if known is None else known.seconds > seconds

    def front(self, parts: int) -> list[Found]:
        """The known decisions of which none other keeps less, needs less and is as fast, too.

        Args:
            parts: How finely bytes are told apart: into so many parts of the most.
        """
        unit = max(f.backward for f in self._pool.values()) / parts or 1.0

        def rounded(found: Found) -> tuple[float, int, int]:
            return found.seconds, round(found.kept / unit), round(found.backward / unit)

        front: list[tuple[int, int]] = []
        found = []
        for each in sorted(self._pool.values(), key=lambda f: (rounded(f), f.kept, f.backward)):
            _, saved, backward = rounded(each)
            if not any(s <= saved and b <= backward for s, b in front):
                front.append((saved, backward))
                found.append(each)
        return found

    def consider(self, saved: Iterable[Node]) -> Found:
        """Adds a decision to those that are known."""
        decision = np.zeros(_STATES * len(self._index), dtype=bool)
        decision[[self._index[n] for n in saved if n in self._index]] = True
        self._given.append(self._try(decision))
        return self._given[-1]

    def choice(self, decision: Decision) -> Choice:
        """The values that a decision saves, and those that it lets go."""
        values = self.memory.values
        saved, transient, fleeting = (
            frozenset(values[i] for i in np.flatnonzero(part))
            for part in np.split(decision, _STATES)
        )
        return Choice(saved, transient, fleeting)

    # -- looking for more

    def look(self, budget: float) -> Iterator[None]:
        """Looks for decisions within a budget, until one is near the bound; pauses between ways."""
        if self.bound(budget) is None:
            return
        for look, near in (
            (self._look_by_learning, _BEST),
            (functools.partial(self._look_exactly, self._exact), _GOOD),
            (self._look_by_aiming, _GOOD),
        ):
            self._left = self._replays
            look(budget)
            self._sharpen(budget)
            if (known := self.best(budget)) is not None and self._is_poor(budget, _BEST):
                self._fill(known, budget)
            if not self._is_poor(budget, near) or self._is_hopeless(budget):
                return
            yield
        self._left = self._replays
        if self._is_poor(budget, _POOR):
            self._look_from_below(budget)
        yield
        if self._is_poor(budget, _GOOD):
            self._anneal(budget)

    def _sharpen(self, budget: float) -> None:
        """Raises the bound where it may be the reason that the best looks poor."""
        if budget in self._sharpened or self.best(budget) is None:
            return
        for sharpen in (self._bounds.deepened, self._bounds.sharpened):
            if self._is_poor(budget, _BEST):
                self._sharpened.add(budget)
                if (seconds := sharpen(budget)) is not None:
                    seconds += self._more
                    self._bound_of[budget] = max(self._bound_of[budget] or 0.0, seconds)

    def _is_hopeless(self, budget: float) -> bool:
        """Whether nothing fits, not even what needs least."""
        return self.best(budget) is None and self.least.peak > budget

    def _is_poor(self, budget: float, factor: float) -> bool:
        """Whether the best that is known takes much longer than the bound."""
        bound, known = self.bound(budget), self.best(budget)
        return known is None or bound is None or known.seconds > factor * bound

    def _look_exactly(self, program: Exact, budget: float) -> list[Found]:
        """Solutions that know what waits: for graphs that are small enough to find them soon."""
        aim, made = budget, []
        for _ in range(self._solutions):
            solution = program.solve(aim, whole=True)
            if solution is None:
                break
            found = self._try(self._rounded(solution, 0.5))
            made.append(found)
            over = found.peak - budget
            if over <= 0:
                break
            made.append(self._repair(found, budget))
            aim -= max(0.5 * over, 0.005 * budget)
        return made

    def _look_from_below(self, budget: float) -> None:
        """Lets all go that is not saved, and then less."""
        for share in _SHARES:
            if (solution := self._plans.solve(share * budget)) is None:
                break
            start = self._try(self._without_waiting(self._rounded(solution, 0.5)))
            if (found := self._repair(start, budget)).peak <= budget:
                self._fill(found, budget)
        if self.best(budget) is None:
            self._left = self._replays
            self._fill(self.least, budget)

    def _look_by_learning(self, budget: float) -> None:
        """Solutions without fractions, where values live as they did in the replay before."""
        lives = self._plans.lives()
        for _ in range(_LESSONS):
            solution = self._plans.solve(budget, lives, whole=True)
            if solution is None:
                return
            found = self._try(self._rounded(solution, 0.5))
            if found.peak <= budget:
                return
            self._learn(found, lives)
            if self._left > self._replays // 2:
                self._repair(found, budget)

    def _look_by_aiming(self, budget: float) -> None:
        """Rounded solutions, for less and less where they need too much."""
        aim = budget
        for _ in range(_AIMS):
            solution = self._plans.solve(aim)
            if solution is None:
                aim = (aim + budget) / 2
                continue
            tried = [self._try(self._rounded(solution, limit)) for limit in _ROUNDINGS]
            for found in tried:
                if found.peak > budget and self._left > self._replays // 3:
                    self._repair(found, budget)
            over = max(found.peak for found in tried) - budget
            if over <= 0:
                break
            aim -= max(0.35 * over, 0.002 * budget)

    def _learn(self, found: Found, lives: Lives) -> None:
        """Notes where values live that a decision saves, or computes again and keeps."""
        count = len(self._index)
        for node, first, last in self.memory.replay(self.choice(found.decision)).lives():
            if (v := self._index.get(node)) is None:
                continue
            if first < 0:
                lives.until[v] = last
            elif not found.decision[count + v]:
                lives.begin[v], lives.end[v] = first, last

    @functools.cached_property
    def least(self) -> Found:
        """The one that is found to need least, whatever else was looked for before."""
        self._left = self._replays
        plans = Program(self._plans.problem)
        starts = [*self._given]
        low, high = float(self.memory.fixed.peak), float(starts[0].peak)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            if (solution := plans.solve(middle)) is None:
                low = middle
            else:
                high = middle
                starts += [self._try(self._rounded(solution, limit)) for limit in _ROUNDINGS]
        starts += [self._try(self._without_waiting(found.decision)) for found in starts]
        starts.sort(key=_need)
        nothing = np.zeros(_STATES * len(self._index), dtype=bool)  # many others may need as much
        lowest = [self._descend(found, low) for found in (self._try(nothing), *starts[:_STARTS])]
        return self._least_exactly(min(lowest, key=_need), low)

    def _least_exactly(self, found: Found, low: float) -> Found:
        """Halves what lies between a decision and what none can need less than."""
        program, high = Exact(self._problem, recomputing=True), found.peak
        for _ in range(self._solutions):
            if high - low <= _NEARLY * high:
                break
            self._left = self._replays
            middle = (low + high) / 2
            made = self._look_exactly(program, middle)
            better = min(made, key=_need, default=found)
            if better.peak < found.peak:
                found = min(better, self._descend(better, low), key=_need)
            low, high = (low, found.peak) if found.peak <= middle else (middle, high)
        return found

    def _without_waiting(self, decision: Decision) -> Decision:
        """The same with all let go that is not saved."""
        saved, _, fleeting = np.split(decision, _STATES)
        return np.concatenate([saved, ~saved, fleeting])

    def _descend(self, found: Found, low: float) -> Found:
        """Repairs a decision for less and less."""
        while self._left > 0 and found.peak > low:
            better = self._repair(found, max(low, _DESCENT * found.peak))
            if better.peak >= found.peak:
                break
            found = better
        return found

    def _try(self, decision: Decision) -> Found:
        key = decision.tobytes()
        self._left -= 1
        if key not in self._pool:
            count = self._count(decision)
            kept = int(count.live[count.ahead - 1]) if count.ahead else 0
            back = int(count.live[count.ahead :].max(initial=0))
            seconds = count.seconds + self._more
            self._pool[key] = Found(decision, count.peak, seconds, count.live, kept, back)
        return self._pool[key]

    def _count(self, decision: Decision) -> Count:
        """What a decision comes to; the latest ones are kept."""
        key = decision.tobytes()
        if key not in self._recent:
            if len(self._recent) >= _RECENT:
                del self._recent[next(iter(self._recent))]
            self._recent[key] = self._quick.count(self.choice(decision))
        return self._recent[key]

    def _rounded(self, solution: Solution, limit: float) -> Decision:
        saved = solution.saved > limit
        fleeting = (solution.fleeting > 0.5) & ~saved
        return np.concatenate([saved, (solution.let_go > 0.5) & ~saved | fleeting, fleeting])

    def _repair(self, found: Found, budget: float) -> Found:
        """Gives up one thing after another until a decision fits, or nothing helps."""
        while found.peak > budget and self._left > 0:
            over = _excess(found, budget)
            best, most = None, 0.0
            for decision in self._remedies(found.decision):
                other = self._try(decision)
                gain = over - _excess(other, budget)
                gain /= max(other.seconds - found.seconds, 1e-9)
                if gain > most:
                    best, most = other, gain
            if best is None:
                break
            found = best
        return found

    def _remedies(self, decision: Decision) -> Iterator[Decision]:
        """Decisions with one value less where most lives, or one that ends recomputation there."""
        count, peak = len(self._index), self._count(decision).at_peak()
        alive = [v for n in peak if (v := self._index.get(n)) is not None]
        saved = [v for v in alive if decision[v]]
        for v in sorted(saved, key=self._seconds_for_a_byte)[:_AT_ONCE]:
            yield _changed(decision, v, False)
        waiting = [v for v in alive if not decision[v] and not decision[count + v]]
        for v in sorted(waiting, key=self._seconds_for_a_byte)[:_AT_ONCE]:
            yield _changed(decision, count + v, True)
        for v in [v for v in alive if v in self._breakable and not decision[2 * count + v]]:
            there = _changed(decision, v, False)
            yield _changed(_changed(there, count + v, True), 2 * count + v, True)
        for v in [v for v in alive if not decision[v]][:_AT_ONCE]:
            yield _changed(decision, v, True)

    def _fill(self, found: Found, budget: float) -> None:
        """Saves more, or lets less go, as long as it fits."""
        improved = True
        while improved and self._left > 0:
            improved = False
            for v, value in self._samples(found.decision):
                if self._left <= 0:
                    return
                if value and not self._has_room(found, v, budget):
                    continue
                other = self._try(_changed(found.decision, v, value))
                if other.peak <= budget and other.seconds < found.seconds:
                    found, improved = other, True

    def _has_room(self, found: Found, v: int, budget: float) -> bool:
        """Whether a value fits at the end of forward, without what it is computed again from."""
        problem = self._problem
        if problem.last[v] >= len(problem.forward) - 1:
            return True  # it is there already
        freed, seen, stack = 0.0, {v}, [*problem.operands[problem.producer[v]]]
        while stack:
            u = stack.pop()
            if u in seen:
                continue
            seen.add(u)
            if found.decision[u]:
                freed += problem.sizes[u]
            else:
                stack += problem.operands[problem.producer[u]]
        return found.kept + problem.sizes[v] - freed <= budget

    def _anneal(self, budget: float) -> None:
        """Changes one value or two near each other, at random, and hardly ever for the worse.

        Simulated annealing (Kirkpatrick, Gelatt and Vecchi 1983) at a low temperature: what counts
        is that it passes through many decisions that are as good.
        """
        if (best := self.best(budget)) is None:
            return
        found = best
        chance, count, tries = random.Random(0), len(self._index), _ANNEALED * self._replays
        heat, price = _HEAT * best.seconds, _PRICE * best.seconds / budget

        def cost(found: Found) -> float:
            return found.seconds + price * max(found.peak - budget, 0)

        for left in range(tries, 0, -1):
            v = chance.randrange(count)
            u = min(max(v + chance.randint(-_BESIDE, _BESIDE), 0), count - 1)
            decision = found.decision.copy()
            for w in {v, u} if chance.random() < _PAIRS else {v}:
                kind = chance.randrange(4 if w in self._breakable else 3)
                decision[w::count] = kind == 0, kind >= 2, kind == 3
            other = self._try(decision)
            more = cost(other) - cost(found)
            if more <= 0 or chance.random() < math.exp(-more * tries / (heat * left)):
                found = other
            if other.peak <= budget:
                best = min(best, other, key=lambda each: each.seconds)
        self._left = self._replays
        self._fill(best, budget)

    def _samples(self, decision: Decision) -> list[tuple[int, bool]]:
        """Of supplements that do the same in equal layers, the outer ones and the middle one."""
        count, alike = len(self._index), defaultdict(list)
        supplements = [*self._supplements(decision)]
        for v, value in supplements:
            alike[self._roles[v % count], value].append((v, value))
        several = [sorted(each) for each in alike.values()]
        chosen = {each[i] for each in several for i in (0, len(each) // 2, -1)}
        return [each for each in supplements if each in chosen]

    def _supplements(self, decision: Decision) -> Iterator[tuple[int, bool]]:
        """What could be changed for less recomputation; the most seconds for a byte first."""
        count, runs = len(self._index), Counter(self._count(decision).again)
        again = [v for n, v in self._index.items() if not decision[v] and runs[producer(n)]]
        twice = [v for v in again if runs[producer(self.memory.values[v])] > 1]
        for v in sorted(twice, key=self._seconds_for_a_byte, reverse=True):
            for bit in (2 * count + v, count + v):
                if decision[bit]:
                    yield bit, False
        for v in sorted(again, key=self._seconds_for_a_byte, reverse=True):
            yield v, True

    def _seconds_for_a_byte(self, v: int) -> float:
        return float(self._again[v] / max(self._problem.sizes[v], 1.0))


def problem_of(memory: Memory, seconds: dict[Node, float]) -> Problem:
    """The numbers of the linear program.

    Args:
        memory: Of a joint graph.
        seconds: Of its forward operations.
    """
    values = {node: i for i, node in enumerate(memory.values)}
    operations = {node: i for i, node in enumerate(memory.inputs_of)}
    moments = memory.fixed.moments
    forward = [m for m in moments if m.phase == "forward"]
    backward = [m for m in moments if m.phase != "forward"]
    when = {m.node: i for i, m in reversed([*enumerate(forward)])}
    last = np.array([when.get(producer(v), 0) for v in values], dtype=np.int64)
    for node, operands in memory.inputs_of.items():
        for u in operands if node in when else ():
            last[values[u]] = max(last[values[u]], when[node])
    for node, operation in memory.replaced.items():
        if node in values:
            last[values[node]] = when[operation] - 1
    taken = {o: values[v] for v, o in memory.replaced.items() if v in values}
    reads = [[values[u] for u in memory.needed_by.get(m.node, ())] for m in backward]
    return Problem(
        np.array([memory.cost[v] for v in values], dtype=float),
        np.array([operations[producer(v)] for v in values], dtype=np.int64),
        np.array([seconds[o] for o in operations], dtype=float),
        [[values[u] for u in memory.inputs_of[o]] for o in operations],
        reads,
        [[values[u] for u in memory.replaceable.get(m.node, ())] for m in backward],
        last,
        np.array([m.live for m in forward], dtype=float),
        np.array([m.live for m in backward], dtype=float),
        np.array(memory.fixed_before, dtype=float),
        [taken.get(o, -1) for o in operations],
        _gaps(reads, {values[v] for v in memory.values if _may_be_broken(memory, v)}),
    )


def _may_be_broken(memory: Memory, value: Node) -> bool:
    """Whether a value may be let go between its readers: the others are not worth the columns."""
    is_random = producer(value) in memory.scheduler.random
    return not is_random and memory.cost[value] >= _LARGE * memory.fixed.peak


def _gaps(reads: list[list[int]], some: set[int]) -> list[list[int]]:
    """For each moment those of some values that are read before and after, and not there."""
    read = [{*values} & some for values in reads]
    last = {v: t for t, values in enumerate(read) for v in values}
    gaps: list[list[int]] = []
    known: set[int] = set()
    for t, values in enumerate(read):
        known |= values
        gaps.append(sorted(v for v in known - values if t < last[v]))
    return gaps


def _need(found: Found) -> tuple[int, float]:
    return found.peak, found.seconds


def _changed(decision: Decision, v: int, value: bool) -> Decision:
    changed = decision.copy()
    changed[v] = value
    return changed


def _excess(found: Found, budget: float) -> float:
    return float(np.maximum(found.live - budget, 0).sum())
