"""Checkpoints within a checkpoint: what the inner ones recompute, and for how long it stays.

NOTE [Nests]

Of a value that is computed inside of several checkpoints, it counts which of them recompute it:

    none            it is saved
    the outermost   it is recomputed once, and stays until backward has read it
    an inner one    it stays only while backward is inside of the innermost of these; if it is
                    needed besides, to compute what comes behind it, it is computed for that and
                    dropped

So the memory is that of the nest: of a chain that is halved again and again, backward holds what
enters the halves that it is in, and the length of the innermost.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

from torch.fx import Node

from fxckpt.joint import Joint
from fxckpt.schedule import Choice, Scheduler

Interval = tuple[int, int]


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Nested:
    """One call of a checkpointed function or module inside of another one.

    Attributes:
        decide: Which values it saves, as if it were the only one.
    """

    decide: Callable[[Joint], Collection[Node]]


def with_nests(joint: Joint, choice: Choice) -> Choice:
    """A decision for the outermost checkpoint, and those of the checkpoints inside of it."""
    nested = {v.node: v.node.meta["nest"] for v in joint.values() if v.node.meta.get("nest")}
    if not nested:
        return choice
    decides = {each.decide for nest in nested.values() for each in nest}
    decided = {decide: {*decide(joint)} for decide in decides}
    recomputing: dict[Node, Nested] = {}
    for node, nest in nested.items():
        inner = [each for each in nest if node not in decided[each.decide]]
        if inner:
            recomputing[node] = inner[-1]
    intervals = _intervals(joint, nested)
    return Choice(
        choice.saved - recomputing.keys(),
        choice.transient | recomputing.keys(),
        choice.fleeting,
        choice.joint,
        {node: intervals[each] for node, each in recomputing.items() if each in intervals},
    )


def _intervals(joint: Joint, nested: dict[Node, Any]) -> dict[Nested, Interval]:
    """From the first to the last operation of backward that reads a value of a checkpoint."""
    found: dict[Nested, Interval] = {}
    for node, (first, last) in Scheduler(joint).stays.items():
        for each in nested.get(node, ()):
            known = found.get(each, (first, last))
            found[each] = min(first, known[0]), max(last, known[1])
    return found
