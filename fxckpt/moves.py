"""Changes of decisions: for less memory, for less recomputation, and at random."""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator

import numpy as np

from fxckpt.joint import producer
from fxckpt.pool import STATES, Decision, Found, Pool
from fxckpt.solve import Problem

_AT_ONCE = 6  # values to try to give up
_DESCENT = 0.95  # from one repair to the next
# Of annealing: what is taken for the worse, and what bytes over the budget cost, of the best; how
# often two values are changed, and how far from each other.
_HEAT, _PRICE, _PAIRS, _BESIDE = 3e-4, 20.0, 0.6, 12
_NEXT = 32  # the power that bytes are raised to, for those next to the peak to count a little


class Moves:
    """Changes of decisions on one joint graph; they end when the pool has no replays left.

    Args:
        pool: What was replayed.
        problem: The numbers of the graph.
    """

    def __init__(self, pool: Pool, problem: Problem) -> None:
        self._pool, self._problem = pool, problem
        self._breakable = {*problem.breakable()}
        self._again = problem.seconds[problem.producer]
        self._roles = problem.roles()

    def without_waiting(self, decision: Decision) -> Decision:
        """The same with all let go that is not saved."""
        saved, _, fleeting = np.split(decision, STATES)
        return np.concatenate([saved, ~saved, fleeting])

    def descend(self, found: Found, low: float) -> Found:
        """Repairs a decision for less and less."""
        while self._pool.left > 0 and found.peak > low:
            better = self.repair(found, max(low, _DESCENT * found.peak))
            if better.peak >= found.peak:
                break
            found = better
        return found

    def repair(self, found: Found, budget: float) -> Found:
        """Gives up one thing after another until a decision fits, or nothing helps."""
        while found.peak > budget and self._pool.left > 0:
            over = _excess(found, budget)
            best, most = None, 0.0
            for decision in self._remedies(found.decision):
                other = self._pool.replay(decision)
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
        count, peak = len(self._pool.index), self._pool.count(decision).at_peak()
        alive = [v for n in peak if (v := self._pool.index.get(n)) is not None]
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

    def fill(self, found: Found, budget: float) -> None:
        """Saves more, or lets less go, as long as it fits."""
        improved = True
        while improved and self._pool.left > 0:
            improved = False
            for v, value in self._samples(found.decision):
                if self._pool.left <= 0:
                    return
                if value and not self._has_room(found, v, budget):
                    continue
                other = self._pool.replay(_changed(found.decision, v, value))
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

    def anneal(self, budget: float) -> None:
        """Looks at random for what is faster than the best that fits."""
        if (best := self._pool.best(budget)) is None:
            return
        price = _PRICE * best.seconds / budget

        def cost(found: Found) -> float:
            return found.seconds + price * max(found.peak - budget, 0)

        for found in self._walk(best, cost):
            if found.peak <= budget:
                best = min(best, found, key=lambda each: each.seconds)
        self._pool.left = len(self._pool.index)
        self.fill(best, budget)

    def lower(self, found: Found) -> Found:
        """Looks at random for what needs less than a decision.

        What counts is nearly the peak: also in how many moments how much lives next to it, so that
        less in some of these is progress.
        """

        def cost(each: Found) -> float:
            return float(np.mean((each.live / found.peak) ** _NEXT) ** (1 / _NEXT))

        return min([found, *self._walk(found, cost)], key=need)

    def _walk(self, found: Found, cost: Callable[[Found], float]) -> Iterator[Found]:
        """Changes one value or two near each other, at random, and hardly ever for the worse.

        Simulated annealing (Kirkpatrick, Gelatt and Vecchi 1983) at a low temperature: what counts
        is that it passes through many decisions that are as good.
        """
        chance, count, tries = random.Random(0), len(self._pool.index), self._pool.left
        now = cost(found)
        heat = _HEAT * now
        while (left := self._pool.left) > 0:
            v = chance.randrange(count)
            u = min(max(v + chance.randint(-_BESIDE, _BESIDE), 0), count - 1)
            decision = found.decision.copy()
            for w in {v, u} if chance.random() < _PAIRS else {v}:
                kind = chance.randrange(4 if w in self._breakable else 3)
                decision[w::count] = kind == 0, kind >= 2, kind == 3
            other = self._pool.replay(decision)
            more = cost(other) - now
            if more <= 0 or chance.random() < math.exp(-more * tries / (heat * left)):
                found, now = other, now + more
                yield found

    def _samples(self, decision: Decision) -> list[tuple[int, bool]]:
        """Of supplements that do the same in equal layers, the outer ones and the middle one."""
        count, alike = len(self._pool.index), defaultdict(list)
        supplements = [*self._supplements(decision)]
        for v, value in supplements:
            alike[self._roles[v % count], value].append((v, value))
        several = [sorted(each) for each in alike.values()]
        chosen = {each[i] for each in several for i in (0, len(each) // 2, -1)}
        return [each for each in supplements if each in chosen]

    def _supplements(self, decision: Decision) -> Iterator[tuple[int, bool]]:
        """What could be changed for less recomputation; the most seconds for a byte first."""
        count, runs = len(self._pool.index), Counter(self._pool.count(decision).again)
        again = [v for n, v in self._pool.index.items() if not decision[v] and runs[producer(n)]]
        twice = [v for v in again if runs[producer(self._pool.memory.values[v])] > 1]
        for v in sorted(twice, key=self._seconds_for_a_byte, reverse=True):
            for bit in (2 * count + v, count + v):
                if decision[bit]:
                    yield bit, False
        for v in sorted(again, key=self._seconds_for_a_byte, reverse=True):
            yield v, True

    def _seconds_for_a_byte(self, v: int) -> float:
        return float(self._again[v] / max(self._problem.sizes[v], 1.0))


def need(found: Found) -> tuple[int, float]:
    """What is less for a decision that needs less."""
    return found.peak, found.seconds


def _changed(decision: Decision, v: int, value: bool) -> Decision:
    changed = decision.copy()
    changed[v] = value
    return changed


def _excess(found: Found, budget: float) -> float:
    return float(np.maximum(found.live - budget, 0).sum())
