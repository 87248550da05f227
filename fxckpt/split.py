"""Joint graph and decisions in, forward and backward graph out: renders what `schedule` decides."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from fxckpt import ops
from fxckpt.codegen import graph_module
from fxckpt.errors import CaptureError
from fxckpt.joint import Joint, storage_bytes
from fxckpt.reinplace import (
    Needless,
    Reinplacer,
    Reuse,
    all_anew,
    reinplace,
    write_into,
)
from fxckpt.schedule import Before, Residual, Schedule, Scheduler, State, Step, recomputation

aten = torch.ops.aten


@dataclasses.dataclass(slots=True)
class Split:
    """The two halves of a joint graph.

    `forward` takes the list of `primals` and returns (*outputs, *residuals); it changes the primals
    in `written`. `backward` takes the list (*saved_primals, *residuals, *cotangents) and returns a
    gradient, or None, for each of `primals`, then further contributions (see the note in `joint`)
    to the gradients of `extra`. Both empty the list that they are given. `first_states` tells
    which residuals are the state in which the generator of a device is when forward begins.
    """

    forward: GraphModule
    backward: GraphModule
    primals: list[str]
    extra: list[str]
    saved_primals: list[str]
    residuals: list[str]
    written: list[str]
    first_states: dict[int, torch.device]


def split(joint: Joint, saved: Collection[Node], *, reuse: bool = True) -> Split:
    """Splits a joint graph in two.

    Args:
        joint: The graph; it is not changed.
        saved: The values (see `Joint.values`) that backward may keep; it keeps those that it reads.
            All others are recomputed.
        reuse: Whether operations may write into memory that is there (see `reinplace`).
    """
    scheduler = Scheduler(joint)
    schedule = scheduler.schedule(saved)
    needless = Reinplacer(scheduler).needless(schedule) if reuse else all_anew(joint)
    primals = list(joint.primals)
    saved_primals = [name for name in primals if joint.primals[name] in schedule.primals]
    residuals = [_residual_name(r) for r in schedule.residuals]
    extra = [name for name in primals for _ in joint.grads.get(name, ())[1:]]
    backward = _Backward(joint, schedule, needless.backward, [*saved_primals, *residuals])
    return Split(
        _forward(joint, schedule, needless),
        backward.module([*primals, *extra]),
        primals,
        extra,
        saved_primals,
        residuals,
        list(joint.writes),
        _first_states(schedule),
    )


def kept_bytes(joint: Joint, saved: Collection[Node]) -> int:
    """What `split` keeps between forward and backward, parameters and buffers not counted."""
    schedule = Scheduler(joint).schedule(saved)
    inputs = [n for n in schedule.primals if n.meta["kind"] == "input"]
    return sum(storage_bytes(n.meta["val"]) for n in inputs) + sum(
        ops.rng_state_bytes(ops.node_device(r.node))
        if isinstance(r, State)
        else storage_bytes((r if isinstance(r, Node) else r.node).meta["val"])
        for r in schedule.residuals
    )


def backward_from(
    joint: Joint, have: Split, *, reuse: bool = True
) -> tuple[GraphModule, list[int]]:
    """Another backward graph for residuals that a forward already handed on.

    Args:
        joint: Same forward as the one of `have`, other cotangents.
        have: The split whose forward ran.
        reuse: See `split`.

    Returns:
        The graph, with arguments (*saved_primals, *residuals, *more primals, *cotangents), and the
        positions of these further primals among the arguments of forward.

    Raises:
        CaptureError: if a value is needed that is neither there nor recomputable.
    """
    kept = set(have.residuals)
    scheduler = Scheduler(joint)
    schedule = scheduler.schedule([n for n in joint.graph.nodes if n.name in kept])
    needed = {_residual_name(r) for r in schedule.residuals}
    primals = [name for name, node in joint.primals.items() if node in schedule.primals]
    missing = [*sorted(needed - kept), *(n for n in primals if n not in have.primals)]
    if missing:
        raise CaptureError(f"backward needs {missing[0]}, which was not kept")
    extra = [name for name in primals if name not in have.saved_primals]
    arguments = [*have.saved_primals, *have.residuals, *extra]
    needless = Reinplacer(scheduler).needless(schedule) if reuse else all_anew(joint)
    backward = _Backward(joint, schedule, needless.backward, arguments)
    module = backward.module([*have.primals, *have.extra])
    return module, [have.primals.index(name) for name in extra]


def _residual_name(residual: Residual) -> str:
    if isinstance(residual, State):
        return f"rng_{residual.node.name}"
    if isinstance(residual, Before):
        return f"before_{residual.node.name}"
    return residual.name


def _first_states(schedule: Schedule) -> dict[int, torch.device]:
    positions = {residual: i for i, residual in enumerate(schedule.residuals)}
    found: dict[int, torch.device] = {}
    drawn: set[torch.device] = set()
    for step in schedule.forward:
        if isinstance(step, State):
            if ops.node_device(step.node) not in drawn:
                found[positions[step]] = ops.node_device(step.node)
        elif isinstance(step, Node) and ops.node_is_random(step):
            drawn.add(ops.node_device(step))
    return found


class _Backward:
    """Renders the backward half of a schedule.

    Args:
        joint: What is scheduled.
        schedule: What runs.
        reuse: The steps of it that need no new memory.
        arguments: Names of primals and residuals in the order in which they are handed in, before
            the cotangents; the graph drops at once those that it does not read.
    """

    def __init__(
        self, joint: Joint, schedule: Schedule, reuse: Reuse, arguments: Sequence[str]
    ) -> None:
        self._joint, self._schedule = joint, schedule
        self._graph = Graph()
        self._copies: dict[Node, Node] = {}  # those made last
        self._states: dict[State, Node] = {}
        self._add_arguments(arguments)
        self._mutations: list[Node] = []  # that need no copy
        for i, step in enumerate(schedule.backward):
            if isinstance(step, State):
                self._copy_state(step)
            else:
                self._run(step)
                _use_again(i, step, self._copies, reuse, self._mutations)

    def module(self, wanted: Sequence[str]) -> GraphModule:
        """The finished graph.

        Args:
            wanted: Names of the primals for which a gradient is returned; a name that occurs twice
                gets two contributions.
        """
        delivered = {name: self._deliver(name, n) for name, n in Counter(wanted).items()}
        self._graph.output(tuple(delivered[name].pop(0) for name in wanted))
        for node in self._mutations:
            reinplace(node)
        return graph_module(self._graph, "Backward", self._joint.symbols)

    def _deliver(self, name: str, places: int) -> list[Node | None]:
        """The contributions to a gradient, added up if there are more than places for them."""
        grads = [self._copies[g] for g in self._joint.grads.get(name, ())]
        while len(grads) > places:
            first, second, *rest = grads
            total = self._graph.call_function(aten.add.Tensor, (first, second))
            total.meta = {"region": first.meta.get("region", "")}
            grads = [total, *rest]
        return [*grads, *[None] * (places - len(grads))]

    def _add_arguments(self, names: Sequence[str]) -> None:
        primals = {n: p for n, p in self._joint.primals.items() if p in self._schedule.primals}
        residuals = {_residual_name(r): r for r in self._schedule.residuals}
        for name in names:
            if name in primals:
                self._copies[primals[name]] = self._argument(name, primals[name].meta["val"])
            elif name not in residuals:
                self._argument("unused", None)
            elif isinstance(residual := residuals[name], State):
                self._states[residual] = self._argument(name, None)
            else:
                node = residual.node if isinstance(residual, Before) else residual
                self._copies[node] = self._argument(name, node.meta["val"])
        for node in self._joint.cotangents:
            self._copies[node] = self._argument(node.name, node.meta["val"])

    def _argument(self, name: str, val: Any) -> Node:
        node = self._graph.placeholder(name)
        node.target = node.name
        node.meta["val"] = val
        return node

    def _copy_state(self, state: State) -> None:
        """Replays use up a state, and a residual has to last if the graph is retained."""
        copy = self._graph.call_function(torch.clone, (self._states[state],))
        copy.meta["region"] = _region("recompute", state.node)
        self._states[state] = copy

    def _run(self, node: Node) -> None:
        again = node.meta["phase"] == "forward"
        call: Any = recomputation(node) if again else (node.target, node.args, node.kwargs)
        target, args, kwargs = map_arg(call, self._copies.__getitem__)
        if (state := self._schedule.states.get(node)) is not None:
            replayed = (self._states[state], ops.node_device(node))
            if target is ops.inplace:
                target, args = ops.inplace_with_rng_state, (*replayed, *args)
            else:
                target, args = ops.with_rng_state, (*replayed, target, *args)
        copy = self._graph.create_node("call_function", target, args, kwargs, node.name)
        region = _region("recompute" if again else "backward of", node)
        copy.meta = {**node.meta, "region": region}
        if (alias := node.meta.get("alias")) is not None:
            copy.meta["alias"] = self._copies[alias]
        self._copies[node] = copy


def _forward(joint: Joint, schedule: Schedule, needless: Needless) -> GraphModule:
    """Renders the forward half of a schedule."""
    graph, recomputed = Graph(), {*schedule.recomputed}
    copies: dict[Step, Node] = {n: graph.node_copy(n) for n in joint.primals.values()}
    mutations: list[Node] = []
    for i, step in enumerate(schedule.forward):
        if isinstance(step, Before):
            copies[step] = graph.call_function(ops.clone_exactly, (copies[step.node],))
        elif isinstance(step, State):
            copies[step] = graph.call_function(ops.read_rng_state, (ops.node_device(step.node),))
            copies[step].meta["region"] = _region("recomputed in backward:", step.node)
        else:
            again = step in recomputed
            copies[step] = copy = graph.node_copy(step, copies.__getitem__)
            copy.meta["region"] = _region("recomputed in backward:" if again else "", step)
            if (alias := step.meta.get("alias")) is not None:
                copy.meta["alias"] = copies[alias]
            _use_again(i, step, copies, needless.forward, mutations)
    for primal, contents in needless.unwritten.items():
        graph.call_function(aten.copy_.default, (copies[primal], copies[contents]))
    graph.output(tuple(copies[r] for r in (*joint.outputs, *schedule.residuals)))
    for node in mutations:
        reinplace(node)
    return graph_module(graph, "Forward", joint.symbols)


def _use_again(
    position: int, step: Node, copies: Mapping[Any, Node], reuse: Reuse, mutations: list[Node]
) -> None:
    """Lets a step write its result into memory that is there; mutations have to wait their turn.

    Those may take the place of nodes that are still to be copied.
    """
    if (operand := reuse.results.get(position)) is not None:
        write_into(copies[step], copies[operand])
    elif position in reuse.mutations:
        mutations.append(copies[step])


def _region(what: str, node: Node) -> str:
    calls = node.meta["calls"]
    return f"{what} {calls[-1].name if calls else '(root)'}".strip()
