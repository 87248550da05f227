"""The first run of a graph: does every result look the way capture foresaw it?

NOTE [First runs]

Capture believes the fake kernels. Where one of them is wrong about a shape, a dtype or strides, the
graph may fail, or take another path than eager: it must not be used. So the first run of each graph
goes through an interpreter that compares each real result with the fake one; it keeps no value
longer than the generated code does, and later runs cost nothing.

A result that does not fit, of operands that do, is the fault of its own fake kernel. `shapes`
remembers the real geometry, and `Misfit` is raised once the graph is through (or fails on the way,
as it may). Then

    forward     takes back what it did to buffers and random states, and the call is captured anew
    backward    takes the generic route (see `again`); the next forward is captured anew

A result that differs again, though its geometry was learned, ends in a `CaptureError`.
"""

from __future__ import annotations

import dataclasses
from operator import getitem
from typing import Any

import torch
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from fxckpt import ops, shapes
from fxckpt.invisible import outside_of_modes
from fxckpt.shapes import Geometry
from fxckpt.symbols import Sizes, at


class Misfit(Exception):
    """Real results differ in shape, dtype or strides from what was captured.

    Args:
        op: The operation whose fake kernel is wrong.
        learned: Whether another capture can do better.
    """

    def __init__(self, op: Any, learned: bool) -> None:
        super().__init__(f"{op} differs from its fake kernel")
        self.op, self.learned = op, learned


def run(module: GraphModule, args: list[Any], sizes: Sizes) -> Any:
    """Runs a graph on a list of arguments, which it empties, as `module.forward` does.

    Args:
        module: The graph.
        args: Its arguments.
        sizes: What the symbols in it are in this call.

    Raises:
        Misfit: if results differ from the fake ones.
    """
    if any(isinstance(a, FakeTensor) for a in args):  # nothing real to compare with
        return module.forward([*args, sizes])
    graph = module.graph
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    values = {n: value for n, value in zip(placeholders, args, strict=True) if n.users}
    args.clear()
    dying, check = _dying(graph), _Check(sizes)
    for node in graph.nodes:
        if node.op == "call_function":
            try:
                _compute(node, values, check)
            except Exception:
                check.finish()  # what did not fit may be the reason
                raise
            for dead in dying.get(node, ()):
                del values[dead]
    check.finish()
    return map_arg(graph.output_node().args[0], values.__getitem__)


def _compute(node: Node, values: dict[Node, Any], check: _Check) -> None:
    args, kwargs = map_arg(at((node.args, node.kwargs), check.sizes), values.__getitem__)
    function: Any = node.target
    result = function(*args, **kwargs)
    check.compare(node, result)
    if node.users:
        values[node] = result


def _dying(graph: Graph) -> dict[Node, list[Node]]:
    """For each node, the values that are not read after it."""
    dying: dict[Node, list[Node]] = {}
    seen: set[Node] = set()
    for node in reversed(graph.nodes):
        for read in node.all_input_nodes:
            if read not in seen:
                seen.add(read)
                dying.setdefault(node, []).append(read)
    return dying


class _Check:
    """Compares real results with fake ones, and learns from those that differ."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self._unfit: set[Node] = set()
        self._misfit: Misfit | None = None

    def compare(self, node: Node, result: Any) -> None:
        """Compares what a node returned."""
        reads_unfit = not self._unfit.isdisjoint(node.all_input_nodes)
        if node.target is getitem:
            if reads_unfit:
                self._unfit.add(node)
        elif not _fits(node.meta.get("val"), result, self.sizes):
            self._unfit.add(node)
            if not reads_unfit:
                self._blame(node, result)

    def _blame(self, node: Node, result: Any) -> None:
        with outside_of_modes():
            call = _call_of(node, self.sizes)
            learned = _learn(call, node, result)
        if self._misfit is None or not learned:
            self._misfit = Misfit(call.op, learned)

    def finish(self) -> None:
        """Raises if anything differed."""
        if self._misfit is not None:
            raise self._misfit


def _fits(fake: Any, real: Any, sizes: Sizes) -> bool:
    if isinstance(fake, torch.Tensor):
        return isinstance(real, torch.Tensor) and shapes.alike(Geometry.seen(fake, sizes), real)
    if isinstance(fake, (tuple, list)) and isinstance(real, (tuple, list)):
        # Running statistics are missing at the end of what is recomputed.
        each = zip(fake, real, strict=False)
        return all((f is None) == (r is None) and _fits(f, r, sizes) for f, r in each)
    return True


# -- learning


@dataclasses.dataclass(slots=True)
class _Call:
    """The operation that a node runs, on the geometries that capture saw."""

    op: Any
    args: list[Any]
    kwargs: dict[str, Any]
    mutated: int  # how many results, at the end, are mutated arguments; -1: as its schema says


def _call_of(node: Node, sizes: Sizes) -> _Call:
    target: Any = node.target
    plain, given = at((node.args, node.kwargs), sizes)
    if target is ops.with_rng_state:
        target, plain = plain[2], plain[3:]
    elif target is ops.inplace_with_rng_state:
        target, plain = ops.inplace, plain[2:]

    def geometry(node: Node) -> Any:
        val = node.meta.get("val")
        return Geometry.seen(val, sizes) if isinstance(val, torch.Tensor) else None

    args: list[Any] = list(map_arg(plain, geometry))
    kwargs: dict[str, Any] = dict(map_arg(given, geometry))
    if target is not ops.inplace:
        return _Call(target, args, kwargs, -1)
    op, plan, *args = args
    for key, view, _ in plan:
        if view is not None:
            holder: Any = args if isinstance(key, int) else kwargs
            size, stride, _ = view
            holder[key] = dataclasses.replace(holder[key], size=size, stride=stride)
    return _Call(op, args, kwargs, len(plan))


def _learn(call: _Call, node: Node, result: Any) -> bool:
    """Remembers a real result; returns whether another capture can make use of that."""
    if not isinstance(call.op, OpOverload) or node.meta.get("alias") is not None:
        return False
    results = list(result) if isinstance(result, (tuple, list)) else [result]
    if call.mutated < 0:
        results = [results[i] for i in shapes.fresh(call.op, result)]
    else:
        results = results[: len(results) - call.mutated]
    found = tuple(Geometry.of(r) if isinstance(r, torch.Tensor) else None for r in results)
    return bool(found) and shapes.learn(call.op, call.args, call.kwargs, found)
