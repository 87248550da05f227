"""From a joint graph and a decision to an `Account` of the step."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator

from torch.fx import Node

from fxckpt import ops
from fxckpt.account import (
    AS_IT_IS,
    KINDS,
    Account,
    Holding,
    Input,
    Moment,
    Row,
    warnings_about,
)
from fxckpt.cost import Costs
from fxckpt.joint import Joint, is_value, memory_of, owner_of, producer, storage_bytes
from fxckpt.memory import Memory
from fxckpt.planner import AnyDevice, are_here, costs_of, device_of
from fxckpt.plans import Plan
from fxckpt.rates import DEVICES
from fxckpt.replay import Replay
from fxckpt.schedule import Before, Choice, State


@dataclasses.dataclass(frozen=True)
class Subject:
    """What an account is about.

    Attributes:
        given: The graph of the step as it is.
        joint: The graph that runs: that of a plan, or the same.
        choice: What is saved.
        how: What decided, see `Account`.
        plan: The plan, if there is one.
    """

    given: Joint
    joint: Joint
    choice: Choice
    how: str
    plan: Plan | None = None


@dataclasses.dataclass(frozen=True)
class Circumstances:
    """What an account tells besides, see `Account`."""

    title: str
    inputs: tuple[Input, ...]
    parameters: int
    device: AnyDevice = None


def account_of(subject: Subject, about: Circumstances) -> Account:
    """What a step comes to.

    Raises:
        BudgetError: if the device means nothing, or is not here to be measured.
    """
    device, plan = about.device, subject.plan
    if device is None and plan is not None:
        device = DEVICES.get(plan.device)
    costs = costs_of(subject.given, device)
    here = are_here(costs, subject.given)
    eager_memory = Memory(subject.given, workspaces=here, eager=True)
    eager = eager_memory.replay(eager_memory.values)
    before = _moments(eager, costs)
    memory, replay, after = eager_memory, eager, before
    if subject.how != AS_IT_IS:
        memory = Memory(subject.joint, workspaces=here)
        replay = memory.replay(subject.choice)
        after = _moments(replay, costs)
    made = Account(
        about.title,
        subject.how,
        about.inputs,
        costs.device.name,
        str(device_of(subject.given)),
        about.parameters,
        None if plan is None else plan.budget,
        replay.saved,
        eager.saved,
        math.fsum(costs.seconds(n) for n in replay.again),
        sum(map(costs.seconds, (*subject.given.forward_nodes(), *subject.given.backward_nodes()))),
        None if plan is None else plan.bound,
        None,
        None,
        None,
        before,
        after,
        _holdings(replay),
        tuple(_Rows(subject, memory, replay, costs)),
        (),
    )
    told = warnings_about(made.split(), made.split(eager=True), subject.how)
    return dataclasses.replace(made, warnings=tuple(told))


def _moments(replay: Replay, costs: Costs) -> tuple[Moment, ...]:
    kinds = replay.by_kind()
    nothing = [0] * len(replay.moments)
    shares = zip(*(kinds[k].tolist() if k in kinds else nothing for k in KINDS), strict=True)
    found: list[Moment] = []
    now, last = 0.0, None
    for (node, phase, live), each in zip(replay.moments, shares, strict=True):
        found.append(
            Moment(node.name, _path(node), _operation(node), _source(node), phase, now, live, each)
        )
        # A state or a copy comes before its operation, and is shown as that.
        if node is not last and node.op != "placeholder":
            now += costs.seconds(node)
        last = node
    return tuple(found)


def _holdings(replay: Replay) -> tuple[Holding, ...]:
    if not len(replay.live):
        return ()
    alive = replay.holdings(int(replay.live.argmax()))
    found = (Holding(node.name, _path(node), kind, size) for node, kind, size in alive)
    return tuple(sorted(found, key=lambda holding: -holding.bytes))


class _Rows:
    """The rows of an account, in the order of forward."""

    def __init__(self, subject: Subject, memory: Memory, replay: Replay, costs: Costs) -> None:
        self._joint, self._how, self._costs = subject.joint, subject.how, costs
        self._kept = dict(replay.kept())
        self._times = Counter(replay.schedule.recomputed)
        self._outputs = {owner_of(n) for n in subject.joint.outputs}
        self._runs = {s for s in replay.schedule.forward if isinstance(s, Node)}
        self._with_choice = {*memory.values}
        self._readers = _first_readers(replay)
        self._timed: set[tuple[str, Node]] = set()  # the operations whose seconds a row has

    def __iter__(self) -> Iterator[Row]:
        for step, size in self._kept.items():
            if isinstance(step, Before):
                yield self._of_copy(step.node, size)
        for node in self._joint.forward_nodes():
            if (state := State(node)) in self._kept:
                yield self._of_state(node, self._kept[state])
            if is_value(node) and (action := self._action(node)):
                yield self._of_value(node, action)

    def _action(self, node: Node) -> str:
        """What is done with a value; nothing if it is never made, or lies in another one."""
        if node in self._kept:
            return "saved"
        if memory_of(node) is not None:
            return ""
        if self._times[node]:
            return "recomputed"
        if node in self._outputs:
            return "output"
        return "freed" if node in self._runs else ""

    def _of_value(self, node: Node, action: str) -> Row:
        val, times = node.meta["val"], self._times[node]
        seconds = 0.0
        if (key := (action, producer(node))) not in self._timed:
            self._timed.add(key)
            seconds = self._costs.seconds(producer(node)) * max(times, 1)
        return Row(
            node.name,
            action,
            self._kept.get(node, storage_bytes(val)),
            tuple(val.shape),
            str(val.dtype).removeprefix("torch."),
            _path(node),
            _operation(node),
            _source(node),
            seconds,
            times if action == "recomputed" else 0,
            self._reason(node, action),
        )

    def _reason(self, node: Node, action: str) -> str:
        if action == "output":
            return "held by the caller"
        if action == "freed":
            return "not read by backward"
        reader = self._readers.get(owner_of(node))
        use = f"for {reader.name}" if reader is not None else "for its gradient"
        if action == "recomputed" or self._how == AS_IT_IS:
            return use
        if node in self._outputs:
            return f"{use}; an output"
        return use if node in self._with_choice else f"{use}; too small to compute again"

    def _of_state(self, node: Node, size: int) -> Row:
        place = (_path(node), _operation(node), _source(node))
        name, why = f"state of {node.name}", "to draw the same numbers again"
        return Row(name, "saved", size, (size,), "uint8", *place, 0.0, 0, why)

    def _of_copy(self, node: Node, size: int) -> Row:
        val = node.meta["val"]
        dtype = str(val.dtype).removeprefix("torch.")
        name, why = f"copy of {node.name}", "forward changes it"
        return Row(name, "saved", size, tuple(val.shape), dtype, "", "copy", "", 0.0, 0, why)


def _first_readers(replay: Replay) -> dict[Node, Node]:
    """The operation of backward, or that is run again, which reads a value first."""
    found: dict[Node, Node] = {}
    for step in replay.schedule.backward:
        if isinstance(step, Node) and step.meta.get("alias") is None:
            for read in step.all_input_nodes:
                found.setdefault(owner_of(read), step)
    return found


def _path(node: Node) -> str:
    return str(node.meta.get("path") or "")


def _source(node: Node) -> str:
    return str(node.meta.get("source") or "")


def _operation(node: Node) -> str:
    if node.op != "call_function":
        return node.op
    return str(ops.operation(producer(node))).rpartition(".")[0] or str(ops.operation(node))
