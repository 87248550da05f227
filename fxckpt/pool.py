"""The decisions on a graph that were replayed so far, each with what it comes to."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from torch.fx import Node

from fxckpt.memory import Memory
from fxckpt.quick import Count, Quick
from fxckpt.schedule import Choice

# For each value whether it is saved; then, for each, whether it is let go; and whether it is
# fleeting (see `schedule`).
Decision = NDArray[np.bool_]

STATES = 3  # of a value, that a decision tells
_RECENT = 32  # replays that are kept


@dataclasses.dataclass(frozen=True, slots=True)
class Found:
    """A decision, and what it comes to."""

    decision: Decision
    peak: int
    seconds: float  # of what runs again
    live: NDArray[np.int64]  # bytes at every moment
    kept: int  # those at the end of forward
    backward: int  # the most in backward


class Pool:
    """All that was replayed on one joint graph.

    Args:
        memory: Of the graph.
        seconds: What each forward operation takes.
        more: Seconds that are added to what runs again.

    Attributes:
        memory: Of the graph.
        index: The number of each value.
        left: How many replays may still be asked for.
    """

    def __init__(self, memory: Memory, seconds: dict[Node, float], more: float) -> None:
        self.memory, self._more = memory, more
        self.index = {node: i for i, node in enumerate(memory.values)}
        self.left = 0
        self._quick, self._operations = Quick(memory, seconds), max(len(memory.inputs_of), 1)
        self._found: dict[bytes, Found] = {}
        self._recent: dict[bytes, Count] = {}

    def saving(self, nodes: Iterable[Node]) -> Decision:
        """The decision to save some values, of which some may be others than those of the graph."""
        decision = np.zeros(STATES * len(self.index), dtype=bool)
        decision[[self.index[n] for n in nodes if n in self.index]] = True
        return decision

    def choice(self, decision: Decision) -> Choice:
        """The values that a decision saves, and those that it lets go."""
        values = self.memory.values
        saved, transient, fleeting = (
            frozenset(values[i] for i in np.flatnonzero(part))
            for part in np.split(decision, STATES)
        )
        return Choice(saved, transient, fleeting)

    def replay(self, decision: Decision) -> Found:
        """What a decision comes to; one replay is left less, or more where much runs again."""
        key = decision.tobytes()
        self.left -= 1
        if key not in self._found:
            count = self.count(decision)
            self.left -= len(count.again) // self._operations
            kept = int(count.live[count.ahead - 1]) if count.ahead else 0
            back = int(count.live[count.ahead :].max(initial=0))
            seconds = count.seconds + self._more
            self._found[key] = Found(decision, count.peak, seconds, count.live, kept, back)
        return self._found[key]

    def count(self, decision: Decision) -> Count:
        """What a decision comes to; the latest ones are kept."""
        key = decision.tobytes()
        if key not in self._recent:
            if len(self._recent) >= _RECENT:
                del self._recent[next(iter(self._recent))]
            self._recent[key] = self._quick.count(self.choice(decision))
        return self._recent[key]

    def best(self, budget: float) -> Found | None:
        """The fastest that is known to fit; of those, the one that needs least."""
        fitting = (f for f in self._found.values() if f.peak <= budget)
        return min(fitting, key=lambda f: (f.seconds, f.peak), default=None)

    def front(self, parts: int) -> list[Found]:
        """The known decisions of which none other keeps less, needs less and is as fast, too.

        Args:
            parts: How finely bytes are told apart: into so many parts of the most.
        """
        unit = max(f.backward for f in self._found.values()) / parts or 1.0

        def rounded(found: Found) -> tuple[float, int, int]:
            return found.seconds, round(found.kept / unit), round(found.backward / unit)

        front: list[tuple[int, int]] = []
        found = []
        for each in sorted(self._found.values(), key=lambda f: (rounded(f), f.kept, f.backward)):
            _, saved, backward = rounded(each)
            if not any(s <= saved and b <= backward for s, b in front):
                front.append((saved, backward))
                found.append(each)
        return found
