"""From the memory of a graph to the numbers of the linear programs."""

from __future__ import annotations

import numpy as np
from torch.fx import Node

from fxckpt.joint import producer
from fxckpt.memory import Memory
from fxckpt.solve import Problem

_LARGE = 1 / 8  # of what lives in any case: what may be let go between its readers


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
        [[values[v] for v in memory.reinplacer.candidates(o) if v in values] for o in operations],
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
