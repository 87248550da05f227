"""Looks for decisions within a budget of bytes that run little again, by replaying them exactly.

NOTE [The search]

Rounded solutions of the linear program (see `solve`) are nearly right: within a few per cent of the
budget, and of the optimum. Three things make plans of them:

    aim lower   if the replay needs more than the budget, the program is solved for less
    repair      as long as a decision is over the budget, give up a value that lives when most does:
                the one that takes off most for the seconds that it costs
    fill        save what is computed again as long as it still fits, the most seconds for a byte
                first

All that is ever replayed goes into one pool, from which each budget takes the fastest that fits:
what was found for a smaller budget is not lost for a larger one.

The search is limited by a number of replays and not by a clock, so that it is deterministic.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray
from torch.fx import Node

from fxckpt.joint import producer
from fxckpt.memory import Memory, Replay
from fxckpt.schedule import Choice
from fxckpt.solve import Floats, Problem, Program

# For each value whether it is saved; and then, for each, whether it is let go (see `schedule`).
Decision = NDArray[np.bool_]

_ROUNDINGS = (0.999, 0.5, 0.001)  # what counts as saved
_AIMS, _AT_ONCE = 8, 6  # how often to aim lower; how many values to try when one is given up


@dataclasses.dataclass(frozen=True, slots=True)
class Found:
    """A decision, and what it comes to."""

    decision: Decision
    peak: int
    seconds: float  # of what runs again


class Search:
    """The decisions on one joint graph that are known so far.

    Args:
        memory: Of the graph.
        seconds: What each forward operation takes.
        replays: How many a call may make, about.
    """

    def __init__(self, memory: Memory, seconds: dict[Node, float], replays: int) -> None:
        self.memory, self._seconds, self._replays = memory, seconds, replays
        self._problem = problem_of(memory, seconds)
        self._index = {node: i for i, node in enumerate(memory.values)}
        self._bounds, self._plans = Program(self._problem), Program(self._problem, patient=True)
        self._pool: dict[bytes, Found] = {}
        self._left = 0

    # -- what is known

    def bound(self, budget: float) -> float | None:
        """Seconds that every decision within a budget takes at least; None if none fits."""
        solution = self._bounds.solve(budget)
        return None if solution is None else solution.seconds

    def best(self, budget: float) -> Found | None:
        """The fastest that is known to fit; of those, the one that needs least."""
        fitting = (f for f in self._pool.values() if f.peak <= budget)
        return min(fitting, key=lambda f: (f.seconds, f.peak), default=None)

    def least(self) -> Found:
        """The one that is known to need least."""
        return min(self._pool.values(), key=lambda f: (f.peak, f.seconds))

    def consider(self, saved: Iterable[Node]) -> Found:
        """Adds a decision to those that are known."""
        decision = np.zeros(2 * len(self._index), dtype=bool)
        decision[[self._index[n] for n in saved if n in self._index]] = True
        return self._try(decision)

    def choice(self, decision: Decision) -> Choice:
        """The values that a decision saves, and those that it lets go."""
        values, count = self.memory.values, len(self._index)
        saved = frozenset(values[i] for i in np.flatnonzero(decision[:count]))
        return Choice(saved, frozenset(values[i] for i in np.flatnonzero(decision[count:])))

    # -- looking for more

    def look(self, budget: float) -> None:
        """Looks for decisions within a budget."""
        self._left = self._replays
        aim = budget
        for _ in range(_AIMS):
            solution = self._plans.solve(aim)
            if solution is None:
                aim = (aim + budget) / 2
                continue
            tried = [self._try(self._rounded(solution.saved, limit)) for limit in _ROUNDINGS]
            for found in tried:
                if found.peak > budget and self._left > self._replays // 3:
                    self._repair(found, budget)
            over = max(found.peak for found in tried) - budget
            if over <= 0:
                break
            aim -= max(0.35 * over, 0.002 * budget)
        if (known := self.best(budget)) is not None:
            self._fill(known, budget)

    def look_for_least(self, floor: float) -> None:
        """Looks for decisions that need as little as possible, down to a bound of that."""
        step = 0.5
        while step > 0.01 and (least := self.least().peak) > floor:
            target = min(least - step * (least - floor), least - 1)
            self.look(target)
            if self.best(target) is None:
                step /= 2

    def _try(self, decision: Decision) -> Found:
        key = decision.tobytes()
        if key not in self._pool:
            self._left -= 1
            replay = self._replay(decision)
            seconds = math.fsum(self._seconds[n] for n in replay.again)  # in any order
            self._pool[key] = Found(decision, replay.peak, seconds)
        return self._pool[key]

    def _replay(self, decision: Decision) -> Replay:
        return self.memory.replay(self.choice(decision))

    def _rounded(self, saved: Floats, limit: float) -> Decision:
        return np.append(saved > limit, np.zeros(len(saved), dtype=bool))

    def _repair(self, found: Found, budget: float) -> None:
        replay = self._replay(found.decision)
        while found.peak > budget and self._left > 0:
            over = _excess(replay, budget)
            best, most = None, 0.0
            for decision in self._remedies(found.decision, replay):
                other = self._try(decision)
                after = self._replay(decision)
                gain = over - _excess(after, budget)
                gain /= max(other.seconds - found.seconds, 1e-9)
                if gain > most:
                    best, most, next_replay = other, gain, after
            if best is None:
                return
            found, replay = best, next_replay

    def _remedies(self, decision: Decision, replay: Replay) -> Iterator[Decision]:
        """Decisions with one value less where most lives: not saved, or let go."""
        count = len(self._index)
        alive = [v for n, _ in replay.at_peak() if (v := self._index.get(n)) is not None]
        saved = [v for v in alive if decision[v]]
        for v in sorted(saved, key=self._seconds_for_a_byte)[:_AT_ONCE]:
            yield _changed(decision, v, False)
        waiting = [v for v in alive if not decision[v] and not decision[count + v]]
        for v in sorted(waiting, key=self._seconds_for_a_byte)[:_AT_ONCE]:
            yield _changed(decision, count + v, True)

    def _fill(self, found: Found, budget: float) -> None:
        improved = True
        while improved and self._left > 0:
            improved = False
            again = self._replay(found.decision).recomputed
            values = [v for n, v in self._index.items() if producer(n) in again]
            unsaved = [v for v in values if not found.decision[v]]
            unsaved.sort(key=self._seconds_for_a_byte, reverse=True)
            passing = len(self._index) + np.array(unsaved, dtype=int)
            changes = [(int(v), False) for v in passing if found.decision[v]]
            for v, value in changes + [(v, True) for v in unsaved]:
                if self._left <= 0:
                    return
                other = self._try(_changed(found.decision, v, value))
                if other.peak <= budget and other.seconds < found.seconds:
                    found, improved = other, True

    def _seconds_for_a_byte(self, v: int) -> float:
        problem = self._problem
        return float(problem.seconds[problem.producer[v]] / max(problem.sizes[v], 1.0))


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
    return Problem(
        np.array([memory.cost[v] for v in values], dtype=float),
        np.array([operations[producer(v)] for v in values], dtype=np.int64),
        np.array([seconds[o] for o in operations], dtype=float),
        [[values[u] for u in memory.inputs_of[o]] for o in operations],
        [[values[u] for u in memory.needed_by.get(m.node, ())] for m in backward],
        [[values[u] for u in memory.replaceable.get(m.node, ())] for m in backward],
        last,
        np.array([m.live for m in forward], dtype=float),
        np.array([m.live for m in backward], dtype=float),
    )


def _changed(decision: Decision, v: int, value: bool) -> Decision:
    changed = decision.copy()
    changed[v] = value
    return changed


def _excess(replay: Replay, budget: float) -> float:
    return sum(m.live - budget for m in replay.moments if m.live > budget)
