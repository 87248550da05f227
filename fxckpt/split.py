"""Joint graph and decisions in, forward and backward graph out.

NOTE [Recomputation just in time]

Backward operations are emitted in the order in which autograd ran them. Right before each one
comes whatever it reads and does not have yet:

    a primal            is an argument of the backward graph (a reference, no memory)
    a view              is taken anew of its base (views are free)
    a saved value       is an argument of the backward graph: a residual
    anything else       is recomputed: its own inputs first, by the same rule, in forward order

A recomputed value stays for later readers and dies after the last. What nobody reads is never
recomputed: the last product of a block, for example, is no input of its own backward.

Three kinds of values need care when they are recomputed:

    random values       forward reads the generator's state right before the operation and hands it
                        on; backward runs the operation under that state (`ops.with_rng_state`)
    running statistics  are updated in forward, once; recomputation leaves them out
    changed primals     (buffers updated by forward): if backward reads the contents before the
                        change, forward keeps a copy

Forward runs what the outputs, the writes and the residuals need, and everything that draws random
numbers, so that the generators end where eager leaves them.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from fxckpt import ops
from fxckpt.codegen import graph_module
from fxckpt.errors import CaptureError
from fxckpt.joint import Joint, in_order, is_value, reachable, storage_bytes
from fxckpt.reinplace import reinplace


@dataclasses.dataclass(slots=True)
class Split:
    """The two halves of a joint graph.

    `forward` takes the list of `primals` and returns (*outputs, *residuals); it changes the primals
    in `written`. `backward` takes the list (*saved_primals, *residuals, *cotangents) and returns a
    gradient, or None, for each of `primals`, then further contributions (see the note in `joint`)
    to the gradients of `extra`. Both empty the list that they are given.
    """

    forward: GraphModule
    backward: GraphModule
    primals: list[str]
    extra: list[str]
    saved_primals: list[str]
    residuals: list[str]
    written: list[str]


def split(joint: Joint, saved: Collection[Node]) -> Split:
    """Splits a joint graph in two.

    Args:
        joint: The graph; it is not changed.
        saved: The values (see `Joint.values`) that backward may keep; it keeps those that it reads.
            All others are recomputed.
    """
    emitter = _Backward(joint, frozenset(saved))
    primals = list(joint.primals)
    saved_primals = [name for name in primals if joint.primals[name] in emitter.primals]
    residuals = [_residual_name(r) for r in emitter.residuals]
    extra = [name for name in primals for _ in joint.grads.get(name, ())[1:]]
    return Split(
        _forward(joint, emitter),
        emitter.module([*saved_primals, *residuals], [*primals, *extra]),
        primals,
        extra,
        saved_primals,
        residuals,
        list(joint.writes),
    )


def kept_bytes(joint: Joint, saved: Collection[Node]) -> int:
    """What `split` keeps between forward and backward, parameters and buffers not counted."""
    emitter = _Backward(joint, frozenset(saved))
    inputs = [n for n in emitter.primals if n.meta["kind"] == "input"]
    return sum(storage_bytes(n.meta["val"]) for n in inputs) + sum(
        ops.rng_state_bytes(ops.node_device(r.node))
        if isinstance(r, _State)
        else storage_bytes((r if isinstance(r, Node) else r.node).meta["val"])
        for r in emitter.residuals
    )


def backward_from(joint: Joint, have: Split) -> tuple[GraphModule, list[int]]:
    """Another backward graph for residuals that a forward already handed on.

    Args:
        joint: Same forward as the one of `have`, other cotangents.
        have: The split whose forward ran.

    Returns:
        The graph, with arguments (*saved_primals, *residuals, *more primals, *cotangents), and the
        positions of these further primals among the arguments of forward.

    Raises:
        CaptureError: if a value is needed that is neither there nor recomputable.
    """
    kept = set(have.residuals)
    emitter = _Backward(joint, frozenset(n for n in joint.graph.nodes if n.name in kept))
    needed = {_residual_name(r) for r in emitter.residuals}
    primals = [name for name, node in joint.primals.items() if node in emitter.primals]
    missing = [*sorted(needed - kept), *(n for n in primals if n not in have.primals)]
    if missing:
        raise CaptureError(f"backward needs {missing[0]}, which was not kept")
    extra = [name for name in primals if name not in have.saved_primals]
    arguments = [*have.saved_primals, *have.residuals, *extra]
    module = emitter.module(arguments, [*have.primals, *have.extra])
    return module, [have.primals.index(name) for name in extra]


def read_before_written(joint: Joint) -> list[str]:
    """The primals that forward changes, and whose contents before the change have any effect."""
    wanted = [*joint.outputs, *(g for each in joint.grads.values() for g in each)]
    seen: set[Node] = set()
    while wanted:
        node = wanted.pop()
        if node not in seen:
            seen.add(node)
            wanted.extend(_nodes_in(_recomputation(node)))
    return [name for name in joint.writes if joint.primals.get(name) in seen]


@dataclasses.dataclass(frozen=True, slots=True)
class _State:
    """The generator state before a random operation: a residual that is not a value."""

    node: Node


@dataclasses.dataclass(frozen=True, slots=True)
class _Before:
    """The contents of a primal before forward changed it, likewise."""

    node: Node


_Residual = Node | _State | _Before


def _residual_name(residual: _Residual) -> str:
    if isinstance(residual, _State):
        return f"rng_{residual.node.name}"
    if isinstance(residual, _Before):
        return f"before_{residual.node.name}"
    return residual.name


class _Backward:
    """Emits the backward graph, and finds out which residuals it needs."""

    def __init__(self, joint: Joint, saved: frozenset[Node]) -> None:
        self.joint = joint
        self.primals: set[Node] = set()  # primals that backward reads
        self.residuals: list[_Residual] = []
        self.recomputed: set[Node] = set()
        self._saved = saved
        self._written = {joint.primals[name] for name in joint.writes if name in joint.primals}
        self._order = in_order(joint.graph)
        self._random = _random_order(joint)
        self._states: dict[torch.device, tuple[int, Node]] = {}  # left by the latest recomputation
        self._graph = Graph()
        self._body = self._graph.create_node("call_function", object)  # arguments go above it
        self._copies: dict[Node, Node] = {}
        self._arguments: dict[_Residual, Node] = {}
        self._emit()

    def module(self, arguments: Sequence[str], wanted: Sequence[str]) -> GraphModule:
        """The finished graph.

        Args:
            arguments: Names of primals and residuals in the order in which they are handed in,
                before the cotangents; those that the graph does not read are dropped at once.
            wanted: Names of the primals for which a gradient is returned; a name that occurs twice
                gets two contributions.
        """
        by_name = dict(self.joint.primals)
        residuals = {_residual_name(r): r for r in self.residuals}
        for name in arguments:
            key = by_name[name] if by_name.get(name) in self.primals else residuals.get(name)
            known = (
                self._arguments[key] if key is not None else self._argument(None, "unused", None)
            )
            self._body.prepend(known)
        for node in self.joint.cotangents:
            self._body.prepend(self._arguments[node])
        self._graph.erase_node(self._body)
        delivered = {name: self._deliver(name, n) for name, n in Counter(wanted).items()}
        self._graph.output(tuple(delivered[name].pop(0) for name in wanted))
        reinplace(self._graph, {})
        return graph_module(self._graph, "Backward")

    def _deliver(self, name: str, places: int) -> list[Node | None]:
        """The contributions to a gradient, added up if there are more than places for them."""
        grads = [self._copies[g] for g in self.joint.grads.get(name, ())]
        while len(grads) > places:
            first, second, *rest = grads
            total = self._graph.call_function(torch.ops.aten.add.Tensor, (first, second))
            total.meta = {"region": first.meta.get("region", "")}
            grads = [total, *rest]
        return [*grads, *[None] * (places - len(grads))]

    def _emit(self) -> None:
        joint, wanted = self.joint, [g for each in self.joint.grads.values() for g in each]
        effects = [n for n in joint.backward_nodes() if ops.always_runs(n)]
        needed = reachable([*wanted, *effects], stop=lambda n: n.meta.get("phase") == "forward")
        for node in joint.cotangents:
            self._copies[node] = self._argument(node, node.name, node.meta["val"])
        for node in joint.backward_nodes():
            if node in needed:
                self._make_available(node.all_input_nodes)
                self._copy(node, node.target, node.args, node.kwargs, _region("backward of", node))
        self._make_available(wanted)

    def _make_available(self, nodes: Iterable[Node]) -> None:
        """Emits what is missing of `nodes`, and what that needs, in forward order."""
        missing: set[Node] = set()
        stack = list(nodes)
        while stack:
            node = stack.pop()
            if node not in missing and node not in self._copies:
                missing.add(node)
                if not self._is_argument(node):
                    stack.extend(_nodes_in(_recomputation(node)))
        self._states.clear()
        for node in sorted(missing, key=self._order):
            if self._is_argument(node):
                self._copies[node] = self._take(node)
            else:
                self._recompute(node)

    def _is_argument(self, node: Node) -> bool:
        if node.op == "placeholder":
            return True
        if ops.is_blank(node):
            return False  # memory without contents is not worth keeping, whatever the policy says
        return is_value(node) and (
            node in self._saved or ops.is_new_statistic(node) or _smaller_than_its_state(node)
        )

    def _take(self, node: Node) -> Node:
        """A forward value or primal as an argument of the backward graph."""
        if node in self._written:
            return self._residual(_Before(node), node.meta["val"])
        if node.op == "placeholder":
            self.primals.add(node)
            return self._argument(node, node.name, node.meta["val"])
        return self._residual(node, node.meta["val"])

    def _residual(self, residual: _Residual, val: Any) -> Node:
        self.residuals.append(residual)
        return self._argument(residual, _residual_name(residual), val)

    def _argument(self, key: _Residual | None, name: str, val: Any) -> Node:
        with self._graph.inserting_before(self._body):
            node = self._graph.placeholder(name)
        node.target = node.name
        node.meta["val"] = val
        if key is not None:
            self._arguments[key] = node
        return node

    def _recompute(self, node: Node) -> None:
        target, args, kwargs = _recomputation(node)
        if node.meta.get("alias") is None:
            self.recomputed.add(node)
        copy = self._copy(node, target, args, kwargs, _region("recompute", node))
        if ops.node_is_random(node):
            replayed = (self._random_state(node, copy), ops.node_device(node))
            if copy.target is ops.inplace:
                copy.target, copy.args = ops.inplace_with_rng_state, (*replayed, *copy.args)
            else:
                operation: Any = copy.target
                copy.target, copy.args = ops.with_rng_state, (*replayed, operation, *copy.args)

    def _random_state(self, node: Node, copy: Node) -> Node:
        """The generator state for a random operation that is recomputed.

        If the random operation before it in forward has just been recomputed too, the state that it
        left goes on; else forward has to hand one over. A copy of that is used up.
        """
        device, index = ops.node_device(node), self._random[node]
        previous, state = self._states.get(device, (None, None))
        if state is None or previous != index - 1:
            residual = self._residual(_State(node), None)
            with self._graph.inserting_before(copy):
                state = self._graph.call_function(torch.clone, (residual,))
            state.meta["region"] = copy.meta["region"]
        self._states[device] = index, state
        return state

    def _copy(self, node: Node, target: Any, args: Any, kwargs: Any, region: str) -> Node:
        args, kwargs = map_arg((args, kwargs), self._copies.__getitem__)
        copy = self._graph.create_node("call_function", target, args, kwargs, node.name)
        copy.meta = {**node.meta, "region": region}
        if (alias := node.meta.get("alias")) is not None:
            copy.meta["alias"] = self._copies[alias]
        self._copies[node] = copy
        return copy


def _forward(joint: Joint, backward: _Backward) -> GraphModule:
    """The forward graph for the residuals that backward needs."""
    states = {r.node for r in backward.residuals if isinstance(r, _State)}
    effects = [n for n in joint.forward_nodes() if ops.always_runs(n)]
    values = [r for r in backward.residuals if isinstance(r, Node)]
    needed = reachable([*joint.outputs, *joint.writes.values(), *values, *effects])
    graph, copies = Graph(), {}
    extra: dict[_Residual, Node] = {}
    for node in joint.primals.values():
        copies[node] = graph.node_copy(node)
    for residual in backward.residuals:
        if isinstance(residual, _Before):
            extra[residual] = graph.call_function(ops.clone_exactly, (copies[residual.node],))
    for node in joint.forward_nodes():
        if node not in needed:
            continue
        if node in states:
            state = graph.call_function(ops.read_rng_state, (ops.node_device(node),))
            state.meta["region"] = _region("recomputed in backward:", node)
            extra[_State(node)] = state
        copies[node] = graph.node_copy(node, copies.__getitem__)
        if (alias := node.meta.get("alias")) is not None:
            copies[node].meta["alias"] = copies[alias]
        again = node in backward.recomputed
        copies[node].meta["region"] = _region("recomputed in backward:" if again else "", node)
    results = [copies[n] for n in joint.outputs]
    results += [copies[r] if isinstance(r, Node) else extra[r] for r in backward.residuals]
    graph.output(tuple(results))
    writes = {copies[joint.primals[name]]: copies[n] for name, n in joint.writes.items()}
    reinplace(graph, writes)
    return graph_module(graph, "Forward")


def _random_order(joint: Joint) -> dict[Node, int]:
    """The random operations of forward, counted for each device."""
    count: Counter[torch.device] = Counter()
    order = {}
    for node in joint.forward_nodes():
        if ops.node_is_random(node):
            device = ops.node_device(node)
            order[node] = count[device]
            count[device] += 1
    return order


def _smaller_than_its_state(node: Node) -> bool:
    """Whether a random value takes no more memory than what it takes to draw it again."""
    if not ops.node_is_random(node):
        return False
    val = node.meta["val"]
    return storage_bytes(val) <= ops.rng_state_bytes(val.device)


def _recomputation(node: Node) -> tuple[Any, Any, Any]:
    """Target and arguments that compute a node again, without side effects."""
    without = ops.without_statistics(node)
    return (node.target, node.args, node.kwargs) if without is None else without


def _nodes_in(tree: Any) -> list[Node]:
    found: list[Node] = []
    map_arg(tree, found.append)
    return found


def _region(what: str, node: Node) -> str:
    calls = node.meta["calls"]
    return f"{what} {calls[-1].name if calls else '(root)'}".strip()
