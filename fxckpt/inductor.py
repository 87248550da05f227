"""Compiles the two graphs with Inductor, and keeps what was decided.

NOTE [What is compiled]

A graph is cut into runs of operations that Inductor may fuse, and single operations that run as
they are: what draws random numbers, and what reads or replays the state of a generator. So masks
of dropout are those of eager, bit by bit; everything else is equal up to rounding, since fused
kernels round in other places.

What is saved and what is recomputed is decided before, by which values the two graphs hand to one
another; Inductor sees one graph at a time and cannot change it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from operator import getitem
from typing import Any

import torch
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from fxckpt import ops
from fxckpt.invisible import outside_of_modes


@dataclasses.dataclass(frozen=True, slots=True)
class _Step:
    """A function of some values that makes others; `dying` are not read afterwards."""

    run: Callable[..., Any]
    reads: list[Node]
    makes: list[Node]
    dying: list[Node]


class Compiled:
    """What a graph module does, by compiled code.

    Args:
        module: Takes a list, which it empties.
    """

    def __init__(self, module: GraphModule) -> None:
        nodes = [*module.graph.nodes]
        self._arguments = [n for n in nodes if n.op == "placeholder"]
        self._results = module.graph.output_node().args[0]
        runs = [*_runs(n for n in nodes if n.op == "call_function")]
        dying = _dying(runs, self._results)
        with outside_of_modes(), torch.no_grad():
            self._steps = [_step(run, dead) for run, dead in zip(runs, dying, strict=True)]

    def __call__(self, values: list[Any]) -> Any:
        """Runs on a list of arguments, which it empties."""
        there = dict(zip(self._arguments, values, strict=True))
        values.clear()
        for step in self._steps:
            given = [there[n] for n in step.reads]
            for n in step.dying:
                del there[n]
            made = step.run(*given)
            del given
            there.update(zip(step.makes, made, strict=True))
        return map_arg(self._results, there.__getitem__)


def _runs(nodes: Iterable[Node]) -> Iterator[list[Node]]:
    """Runs of operations that are compiled together; an operation that is not is one by itself.

    What takes a result out of several comes with the operation that makes them.
    """
    run: list[Node] = []
    for node in nodes:
        if node.target is getitem:
            continue
        with_results = [node, *(user for user in node.users if user.target is getitem)]
        if _may_be_compiled(node):
            run += with_results
            continue
        if run:
            yield run
        yield with_results
        run = []
    if run:
        yield run


def _may_be_compiled(node: Node) -> bool:
    known = node.target is ops.inplace or isinstance(node.target, OpOverload)
    return known and not ops.node_is_random(node)


def _dying(runs: list[list[Node]], results: Any) -> list[list[Node]]:
    """For each run, the values that are not read after it."""
    kept: set[Node] = set()
    map_arg(results, kept.add)
    found: list[list[Node]] = []
    for run in reversed(runs):
        read = dict.fromkeys(n for node in run for n in node.all_input_nodes if n not in run)
        found.append([n for n in read if n not in kept])
        kept.update(read)
    return found[::-1]


def _step(run: list[Node], dying: list[Node]) -> _Step:
    inside = {*run}
    reads = [*dict.fromkeys(n for node in run for n in node.all_input_nodes if n not in inside)]
    makes = [n for n in run if n.users.keys() - inside]
    graph, copies = Graph(), {}
    for n in reads:
        copies[n] = graph.placeholder(n.name)
    for n in run:
        copies[n] = graph.node_copy(n, copies.__getitem__)
    graph.output(tuple(copies[n] for n in makes))
    module = GraphModule({}, graph)
    # Views alone are not worth a call of compiled code.
    if not _may_be_compiled(run[0]) or all(n.meta.get("alias") is not None for n in run):
        return _Step(module.forward, reads, makes, dying)
    with FakeTensorMode():
        fakes = [_like(n.meta["val"]) for n in reads]
    return _Step(torch._inductor.compile(module, fakes), reads, makes, dying)  # type: ignore[arg-type]


def _like(val: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(val.shape, val.stride(), dtype=val.dtype, device=val.device)
