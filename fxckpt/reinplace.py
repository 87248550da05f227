"""Turns `ops.inplace` back into real mutation wherever nobody can tell the difference.

A joint graph never changes a value, so each mutation in it works on a copy. In what finally runs,
the copy is needless if the old contents are not read afterwards, neither directly nor through a
view, and are not returned. That holds for nearly all mutations of real models, because autograd
would not allow them otherwise. What is left of an in-place operation is then the operation itself,
on the memory that eager mode would use.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from operator import getitem
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Node

from fxckpt import ops
from fxckpt.joint import producer
from fxckpt.schedule import Schedule, Scheduler, Step

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True, slots=True)
class Needless:
    """The mutations of a schedule that need no copy.

    Attributes:
        forward: Those of forward.
        backward: Those of backward.
        unwritten: Primals that forward has to change but that no mutation works on directly, with
            the contents that have to be copied into them.
    """

    forward: set[Node]
    backward: set[Node]
    unwritten: dict[Node, Node]


class Reinplacer:
    """Finds the needless copies in schedules of one joint graph."""

    def __init__(self, scheduler: Scheduler) -> None:
        joint = scheduler.joint
        operations = [*joint.forward_nodes(), *joint.backward_nodes()]
        self.shares = {n: memory_of(n) for n in operations}
        self.bases = {n: _bases(n) for n in operations if n.target is ops.inplace}
        self.pure_again = {n for n in self.bases if ops.without_statistics(n) is not None}
        self._scheduler = scheduler
        self._writes = {joint.primals[name]: node for name, node in joint.writes.items()}
        self._chains = {p: _chain(p, contents) for p, contents in self._writes.items()}

    def needless(self, schedule: Schedule) -> Needless:
        """The mutations that may work on their arguments themselves."""
        scheduler = self._scheduler
        residuals = [r for r in schedule.residuals if isinstance(r, Node)]
        returned = [*scheduler.joint.outputs, *residuals]
        forward = _Uses(self, schedule.forward, scheduler.reads, returned)
        given = set(self._writes)
        # A primal is mutated directly only if that leads all the way to its final contents.
        while kept := {p for p in given if not forward.are_last(self._chains[p], given)}:
            given -= kept
        backward = _Uses(self, schedule.backward, scheduler.reads_again, scheduler.wanted)
        return Needless(
            {n for n in forward.mutations if forward.are_last([n], given)},
            {n for n in backward.mutations if backward.are_last([n], ())} - self.pure_again,
            {p: contents for p, contents in self._writes.items() if p not in given},
        )


class _Uses:
    """Who owns the memory of the values in a list of steps, and when it is read for the last time.

    Args:
        facts: What is known of the joint graph.
        steps: What runs.
        reads: What each operation reads.
        returned: What is read at the end.
    """

    def __init__(
        self,
        facts: Reinplacer,
        steps: Sequence[Step],
        reads: Mapping[Node, Iterable[Node]],
        returned: Iterable[Node],
    ) -> None:
        owner: dict[Node, Node] = {}
        last: dict[Node, int] = {}
        self._facts, self._owner, self._last = facts, owner, last
        self.mutations: dict[Node, int] = {}  # with their positions
        for i, node in enumerate(steps):
            if not isinstance(node, Node):
                continue
            for read in reads[node]:
                last[owner.get(read, read)] = i
            base = facts.shares[node]
            owner[node] = node if base is None else owner.get(base, base)
            if node in facts.bases:
                self.mutations[node] = i
        last.update((owner.get(node, node), len(steps)) for node in returned)

    def are_last(self, mutations: Iterable[Node], given: Collection[Node]) -> bool:
        """Whether nobody reads, after each of these, what it works on.

        Args:
            mutations: Which.
            given: Arguments that may be changed.
        """
        return all(
            (owner in self._owner or base in given) and self._last[owner] <= self.mutations[node]
            for node in mutations
            for base in self._facts.bases[node]
            for owner in [self._owner.get(base, base)]
        )


def memory_of(node: Node) -> Node | None:
    """The value in whose memory a value is, if it has none of its own."""
    if node.target is aten._unsafe_view.default:
        return node.all_input_nodes[0]
    return node.meta.get("alias")


def _call(node: Node) -> tuple[int, OpOverload, ops.Plan, tuple[Any, ...]]:
    """Where in the arguments of a mutation its operation stands, and the operation, plan, rest."""
    start = 0 if node.target is ops.inplace else 2
    args: Any = node.args
    op, plan, *rest = args[start:]
    return start, op, plan, tuple(rest)


def _bases(node: Node) -> list[Node]:
    """The values that a mutation works on."""
    _, _, plan, rest = _call(node)
    kwargs: Any = node.kwargs
    return [rest[key] if isinstance(key, int) else kwargs[key] for key, _, _ in plan]


def _chain(placeholder: Node, contents: Node) -> list[Node]:
    """The mutations that lead from a placeholder to its final contents, last one first."""
    chain = []
    while contents is not placeholder:
        node = producer(contents)
        bases = _bases(node)
        index: Any = 0 if contents is node else contents.args[1]
        fresh = _result_count(node) - len(bases)
        chain.append(node)
        contents = bases[index - fresh]
    return chain


def _result_count(node: Node) -> int:
    return len(node.meta["val"]) if isinstance(node.meta["val"], tuple) else 1


def reinplace(node: Node) -> None:
    """Lets a mutation work on its arguments themselves."""
    start, op, plan, rest = _call(node)
    bases, results = _bases(node), _result_count(node)
    fresh = results - len(bases)
    direct = all(view is None for _, view, _ in plan) and (
        (fresh == 0 and len(bases) == 1) or (fresh > 1 and fresh == len(op._schema.returns))
    )
    before: Any = node.args[:start]
    if not direct:
        without_copies = tuple((key, view, False) for key, view, _ in plan)
        node.args = (*before, op, without_copies, *rest)
        return
    node.target = ops.with_rng_state if before else op
    node.args = (*before, op, *rest) if before else rest
    for user in list(node.users) if fresh else ():
        index: Any = user.args[1] if user.target is getitem else 0
        if index >= fresh:
            user.replace_all_uses_with(bases[index - fresh])
            node.graph.erase_node(user)
