"""A joint graph as `quick` sees it: numbers for what takes memory, and no views.

Views take no memory, and die with what reads them: what reads a view reads the value behind it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

from torch.fx import Node

from fxckpt.joint import producer
from fxckpt.memory import Memory
from fxckpt.schedule import Before, Residual, State

Group = tuple[list[tuple[int, ...]], Node | None]


class Variables:
    """The variables of one joint graph.

    Values, tuples of them, states of generators, and what forward changes; in the order of the
    graph.

    Attributes:
        of: The number of each.
        things: What each number stands for.
        reads: The variables that each operation reads.
        reads_again: Likewise if it runs again.
        bases: Those that a mutation works on; None for what is there anyway.
        candidates: Those whose place the result of an operation may take.
        named: For each operation the values that there is a choice about, by the place in what it
            makes.
        width: For variables that are tuples, how many storages running them again makes.
        drops: For each variable, the set that is gone if it is let go.
        with_siblings: For each, the set of it and what comes out of the same tuple.
        results: For tuples, what comes out of them and backward reads.
        residuals: For each of backward, what forward hands on for it.
        sources: Likewise the variable of forward that is.
    """

    def __init__(self, memory: Memory) -> None:
        self.memory, self.facts = memory, memory.facts
        scheduler, reinplacer = memory.scheduler, memory.reinplacer
        self.random, self.owner, self.pure_again = (
            scheduler.random,
            scheduler.owner,
            reinplacer.pure_again,
        )
        self.things = [*self._found()]
        self.of: dict[Any, int] = {thing: v for v, thing in enumerate(self.things)}
        self.count = len(self.things)
        self.reads = {n: self.behind_all(scheduler.reads[n]) for n in self.facts}
        self.reads_again = {n: self.behind_all(scheduler.reads_again[n]) for n in self.facts}
        self.bases = {n: [*map(self.behind, b)] for n, b in reinplacer.bases.items()}
        self.candidates = {n: tuple(self._free_of(n)) for n in reinplacer.replaceable}
        self.named = {n: self._results(n) for n, fact in self.facts.items() if fact.runs}
        self.width = {self.of[n]: self._width(n) for n in self.named}
        self.drops, self.with_siblings = self._kin()
        self.results = {
            self.of[node]: self.behind_all(results) for node, results in scheduler.results.items()
        }
        self.residuals, self.sources = self._handed_on()

    def _found(self) -> Iterator[Any]:
        scheduler = self.memory.scheduler
        for node in scheduler.joint.graph.nodes:
            if node in scheduler.written or (node in self.facts and self.is_own(node)):
                yield node
        yield from (("state", node) for node in scheduler.random)
        yield from (("before", node) for node in scheduler.written)

    def is_own(self, node: Node) -> bool:
        """Whether an operation is no view."""
        fact = self.facts[node]
        return fact.shares is None or fact.index is not None

    def behind(self, node: Node) -> int | None:
        """The variable behind a view; None for what is there anyway."""
        while node in self.facts and not self.is_own(node):
            shares = self.facts[node].shares
            assert shares is not None
            node = shares
        return self.of.get(node)

    def behind_all(self, nodes: Iterable[Node]) -> tuple[int, ...]:
        """The variables behind several, without what is there anyway."""
        found = dict.fromkeys(map(self.behind, nodes))
        return tuple(v for v in found if v is not None)

    def _free_of(self, node: Node) -> Iterator[int]:
        """Those that an operation reads once."""
        reads = [*map(self.behind, self.memory.scheduler.reads_again[node])]
        for operand in self.memory.reinplacer.replaceable[node]:
            v = self.behind(operand)
            if v is not None and reads.count(v) == 1:
                yield v

    def _results(self, node: Node) -> list[Node | None]:
        fact, choices = self.facts[node], self.memory.cost
        found: list[Node | None] = [None] * (len(fact.fresh) + len(fact.copies))
        if node in choices:
            found[0] = node
        for user in node.users:
            if user in choices and (index := self.facts[user].index) is not None:
                found[index] = user
        return found

    def _width(self, node: Node) -> int:
        fact = self.facts[node]
        return len(fact.fresh) + (0 if node in self.pure_again else len(fact.copies))

    def _kin(self) -> tuple[list[int], list[int]]:
        families: dict[int, int] = defaultdict(int)
        parents = [
            self.of.get(producer(thing), v) if isinstance(thing, Node) else v
            for v, thing in enumerate(self.things)
        ]
        for v, parent in enumerate(parents):
            families[parent] |= 1 << v
        return [1 << v | 1 << p for v, p in enumerate(parents)], [families[p] for p in parents]

    # -- sets

    def set_of(self, nodes: Iterable[Node]) -> int:
        """Some values as a set."""
        return sum(1 << self.of[node] for node in nodes)

    def _handed_on(self) -> tuple[list[Residual], list[int]]:
        """What forward hands on for each variable of backward, and the variable of that."""
        written = self.memory.scheduler.written
        residuals: list[Residual] = []
        sources = []
        for v, thing in enumerate(self.things):
            if not isinstance(thing, Node):
                residuals.append(State(thing[1]))
                sources.append(v)
            elif thing in written:
                residuals.append(Before(thing))
                sources.append(self.of["before", thing])
            else:
                residuals.append(thing)
                sources.append(v)
        return residuals, sources

    def value(self, variable: int) -> Node | None:
        """The value that a variable is, if there is a choice about it."""
        thing = self.things[variable]
        return thing if thing in self.memory.cost else None

    def arguments(self) -> int:
        """What backward gets handed in if it needs it, whatever is decided."""
        is_argument = self.memory.scheduler.is_argument
        nodes = (thing for thing in self.things if isinstance(thing, Node))
        return self.set_of(node for node in nodes if is_argument(node, ()))

    # -- backward

    def groups(self) -> list[Group]:
        """For each operation of backward what it and the views before it ask for, then the rest."""
        groups: list[Group] = []
        asks: list[tuple[int, ...]] = []
        scheduler = self.memory.scheduler
        for node in scheduler.backward:
            asks.append(self._of_forward(scheduler.reads[node]))
            if self.is_own(node):
                groups.append(([a for a in asks if a], node))
                asks = []
        asks.append(self._of_forward(scheduler.wanted))
        return [*groups, ([a for a in asks if a], None)]

    def _of_forward(self, nodes: Iterable[Node]) -> tuple[int, ...]:
        return tuple(
            v for v in self.behind_all(nodes) if self.things[v].meta.get("phase") != "backward"
        )

    def staying(self) -> list[tuple[int, int]]:
        """For each of `groups`, what stays after it although it is let go, see `schedule`.

        And what does although it is fleeting.
        """
        scheduler = self.memory.scheduler
        changes: dict[int, int] = defaultdict(int)
        for node, (first, last) in scheduler.stays.items():
            if first < last and (v := self.of.get(node)) is not None:
                changes[first] ^= 1 << v
                changes[last] ^= 1 << v
        found, now = [], 0
        for i, node in enumerate(scheduler.backward):
            now ^= changes[i]
            if self.is_own(node):
                soon = sum(1 << self.of[n] for n in scheduler.read_next[i] if n in self.of)
                found.append((now, soon))
        return [*found, (-1, -1)]
