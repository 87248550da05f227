"""Joint graph and decisions in; what forward and backward run, in order, out.

`split` makes graphs of a schedule, and `memory` counts the bytes that live while it runs: there is
one place that decides what is recomputed, and when.

NOTE [Recomputation just in time]

Backward operations run in the order in which autograd ran them. Right before each one comes
whatever it reads and does not have yet:

    a primal            is an argument of the backward graph (a reference, no memory)
    a view              is taken anew of its base (views are free)
    a saved value       is an argument of the backward graph: a residual
    anything else       is recomputed: its own inputs first, by the same rule, in forward order

A recomputed value stays for later readers and dies after the last. What nobody reads is never
recomputed: the last product of a block, for example, is no input of its own backward. Of several
results all that backward reads are taken at once: what is left of them, such as the result of a
normalization whose statistics alone are read, would live as long as they do.

NOTE [Values that are let go]

A value is often recomputed long before backward reads it, because another one is recomputed from
it. A decision may let such values go (`Choice.transient`): they stay from the first operation of
backward that reads them to the last, and whenever they are needed besides, they are recomputed for
that and dropped. So some operations run again more than once, and less memory waits. Some may be
let go between their readers as well (`Choice.fleeting`): they stay only from one operation to the
next.

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
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from fxckpt import ops
from fxckpt.joint import (
    Joint,
    in_order,
    is_value,
    owner_of,
    producer,
    reachable,
    storage_bytes,
)
from fxckpt.tasks import held_until_done


@dataclasses.dataclass(frozen=True, slots=True)
class State:
    """The generator state before a random operation.

    In forward, the step that reads it; as a residual, what is handed on; in backward, the step that
    copies it, because a replay uses it up.
    """

    node: Node


@dataclasses.dataclass(frozen=True, slots=True)
class Before:
    """The contents of a primal before forward changed it: the step that copies, and the copy."""

    node: Node


Step = Node | State | Before
Residual = Step


@dataclasses.dataclass(frozen=True)
class Choice(Collection[Node]):
    """A decision: the values that backward may keep, and those that do not wait for it.

    As a collection, it is that of the values to keep; where these are all there is to say, any
    other collection will do.

    Attributes:
        saved: The values to keep.
        transient: See the note on values that are let go.
        fleeting: Those of them that do not stay until another reader, unless it comes next.
        joint: The graph that these are values of, if it is another one than was asked about.
        stays: For some transient values, between which operations of backward they stay, if it is
            not from the first that reads them to the last.
    """

    saved: frozenset[Node]
    transient: frozenset[Node] = frozenset()
    fleeting: frozenset[Node] = frozenset()
    joint: Joint | None = dataclasses.field(default=None, compare=False, repr=False)
    stays: Mapping[Node, tuple[int, int]] = dataclasses.field(
        default_factory=dict, compare=False, repr=False
    )
    together: Mapping[Node, Collection[Node]] = dataclasses.field(
        default_factory=dict, compare=False, repr=False
    )

    @staticmethod
    def of(saved: Collection[Node]) -> Choice:
        """A choice that keeps these values."""
        return saved if isinstance(saved, Choice) else Choice(frozenset(saved))

    def of_graph(self, joint: Joint) -> Choice:
        """The same for another graph of the same operations, such as that of other sizes."""
        named = {node.name: node for node in joint.graph.nodes}
        return Choice(
            frozenset(named[n.name] for n in self.saved),
            frozenset(named[n.name] for n in self.transient),
            frozenset(named[n.name] for n in self.fleeting),
            None if self.joint is None else joint,
            {named[n.name]: each for n, each in self.stays.items()},
        )

    def __contains__(self, node: object) -> bool:
        return node in self.saved

    def __iter__(self) -> Iterator[Node]:
        return iter(self.saved)

    def __len__(self) -> int:
        return len(self.saved)


@dataclasses.dataclass(slots=True)
class Schedule:
    """What runs, for one decision.

    Attributes:
        forward: The steps of forward.
        backward: The steps of backward. Forward operations among them are recomputed, or views that
            are taken again; an operation that occurs twice makes a new value each time.
        residuals: What forward hands to backward, in the order in which backward asks for it.
        primals: The primals that backward reads unchanged.
        recomputed: The forward operations that run again, views left out, in order.
        states: The state that each recomputed random operation runs under; where several have the
            same, each goes on from what the one before it left.
    """

    forward: list[Step]
    backward: list[Node | State]
    residuals: list[Residual]
    primals: set[Node]
    recomputed: list[Node]
    states: dict[Node, State]


class Scheduler:
    """Makes schedules of one joint graph: what they have in common is found out once.

    Args:
        joint: The graph.
        eager: Whether functions of autograd hold what they work on until they are done.
    """

    def __init__(self, joint: Joint, *, eager: bool = False) -> None:
        forward, backward = list(joint.forward_nodes()), list(joint.backward_nodes())
        self.joint = joint
        self.order = in_order(joint.graph)
        self.reads = {n: tuple(n.all_input_nodes) for n in (*forward, *backward)}
        if eager:
            self.reads.update(held_until_done(backward))
        self.reads_again = {**self.reads, **{n: _inputs_again(n) for n in forward}}  # in backward
        self.wanted = [g for each in joint.grads.values() for g in each]
        self.written = {joint.primals[name] for name in joint.writes if name in joint.primals}
        self._forward = forward
        self.always = reachable([*joint.outputs, *joint.writes.values(), *_effects(forward)])
        self._argument = {n for n in joint.graph.nodes if _is_always_handed_on(n)}
        # Memory without contents is not worth keeping, whatever the policy says.
        self._blank = {n for n in forward if ops.is_blank(n)}
        needed = reachable([*self.wanted, *_effects(backward)], stop=_is_of_forward)
        self.backward = [n for n in backward if n in needed]
        self.random = _random_order(forward)
        self.owner = {n: owner_of(n) for n in (*forward, *backward)}
        self.stays = self._direct_readers()
        self.results = self._results_read()
        self.read_next = self._read_next()

    def schedule(self, saved: Collection[Node]) -> Schedule:
        """The schedule that keeps `saved` (see `split.split`), which may be a `Choice`.

        What is drawn at random is never let go: its state would have to be kept for each time.
        """
        choice = Choice.of(saved)
        made = _Backward(self, choice)
        backward = made.steps()
        return Schedule(
            self.forward_steps(made.residuals),
            backward,
            made.residuals,
            made.primals,
            made.recomputed,
            made.states,
        )

    def bare(self) -> Schedule:
        """What runs whatever is saved: forward as if there were no backward, and backward alone."""
        return Schedule(self.forward_steps([]), [*self.backward], [], set(), [], {})

    def forward_steps(self, residuals: list[Residual]) -> list[Step]:
        values = [r for r in residuals if isinstance(r, Node)]
        needed = self.always | reachable(values, stop=self.always.__contains__)
        states = {r.node for r in residuals if isinstance(r, State)}
        steps: list[Step] = [r for r in residuals if isinstance(r, Before)]
        for node in self._forward:
            if node in states:
                steps.append(State(node))
            if node in needed:
                steps.append(node)
        return steps

    def _direct_readers(self) -> dict[Node, tuple[int, int]]:
        """For each value, the positions in `backward` at which it is read first and last."""
        stays: dict[Node, tuple[int, int]] = {}
        for i, node in enumerate(self.backward):
            for read in self.reads[node]:
                owner = self.owner.get(read, read)
                first, _ = stays.get(owner, (i, i))
                stays[owner] = first, i
        return stays

    def _results_read(self) -> dict[Node, list[Node]]:
        """For each operation with several results those that operations of backward read."""
        found: dict[Node, list[Node]] = {}
        for value in self.stays:
            if producer(value) is not value:
                found.setdefault(producer(value), []).append(value)
        return found

    def _read_next(self) -> list[set[Node]]:
        """For each position in `backward`, the values that the operation after it reads."""
        found: list[set[Node]] = []
        coming: set[Node] = set()
        for node in reversed(self.backward):
            found.append(coming)
            reads = {self.owner.get(read, read) for read in self.reads[node]}
            coming = reads if self.owner[node] is node else coming | reads
        return found[::-1]

    def has_choice(self, node: Node) -> bool:
        """Whether a forward value can be saved as well as recomputed."""
        return is_value(node) and node not in self._argument and node not in self._blank

    def is_argument(self, node: Node, saved: Collection[Node]) -> bool:
        """Whether backward gets a primal or forward value handed in, if it needs it."""
        return node in self._argument or (node in saved and self.has_choice(node))


class _Backward:
    """The steps of backward for one decision, and what they need of forward."""

    def __init__(self, scheduler: Scheduler, choice: Choice) -> None:
        self.primals: set[Node] = set()
        self.residuals: list[Residual] = []
        self.recomputed: list[Node] = []
        self.states: dict[Node, State] = {}
        self._scheduler, self._saved, self._together = scheduler, choice.saved, choice.together
        self._transient = {n for n in choice.transient if producer(n) not in scheduler.random}
        self._fleeting, self._stays = choice.fleeting, {**scheduler.stays, **choice.stays}
        self._available = set(scheduler.joint.cotangents)
        self._passing: set[Node] = set()  # the transient ones among these
        self._steps: list[Node | State] = []

    def steps(self) -> list[Node | State]:
        scheduler, available = self._scheduler, self._available
        for i, node in enumerate(scheduler.backward):
            self._make_available(scheduler.reads[node])
            available.add(node)
            self._steps.append(node)
            if self._passing and scheduler.owner[node] is node:
                self._let_go(i)
        self._make_available(scheduler.wanted)
        return self._steps

    def _let_go(self, position: int) -> None:
        """Forgets what is transient and not between its readers, views of it included."""
        never, coming = (position + 1, position), self._scheduler.read_next[position]
        for node in [*self._passing]:
            value = self._scheduler.owner[node]
            first, last = self._stays.get(value, never)
            is_between = first <= position < last
            if not is_between or (value in self._fleeting and value not in coming):
                self._passing.remove(node)
                self._available -= {node, producer(node)}

    def _make_available(self, nodes: Iterable[Node]) -> None:
        """Adds what is missing of `nodes`, and what that needs, in forward order."""
        available, scheduler = self._available, self._scheduler
        stack = [n for n in nodes if n not in available]
        if not stack:
            return
        missing: set[Node] = set()
        arguments: set[Node] = set()
        while stack:
            node = stack.pop()
            if node in missing or node in available:
                continue
            missing.add(node)
            if scheduler.is_argument(node, self._saved):
                arguments.add(node)
            else:
                stack.extend(scheduler.reads_again[node])
                stack.extend(n for n in self._together.get(node, ()) if n not in missing)
                stack.extend(self._kept_results(node))
        left: dict[torch.device, Node] = {}
        for node in sorted(missing, key=scheduler.order):
            if node in arguments:
                self._take(node)
            else:
                self._recompute(node, left)
                if scheduler.owner[node] in self._transient:
                    self._passing.add(node)
        available |= missing

    def _kept_results(self, node: Node) -> Iterator[Node]:
        """Those of several results that stay for backward, so that the rest need not."""
        for value in self._scheduler.results.get(node, ()):
            is_argument = self._scheduler.is_argument(value, self._saved)
            if value not in self._transient and not is_argument:
                yield value

    def _take(self, node: Node) -> None:
        if node in self._scheduler.written:
            self.residuals.append(Before(node))
        elif node.op == "placeholder":
            self.primals.add(node)
        else:
            self.residuals.append(node)

    def _recompute(self, node: Node, left: dict[torch.device, Node]) -> None:
        """Adds a forward operation; `left` is the random one recomputed last, for each device.

        If that is also the one before it in forward, the state that it left goes on; else forward
        has to hand one over.
        """
        if node.meta.get("alias") is None:
            self.recomputed.append(node)
        if (drawn := self._scheduler.random.get(node)) is not None:
            device, index = drawn
            previous = left.get(device)
            if previous is not None and self._scheduler.random[previous] == (device, index - 1):
                self.states[node] = self.states[previous]
            else:
                state = self.states[node] = State(node)
                self.residuals.append(state)
                self._steps.append(state)
            left[device] = node
        self._steps.append(node)


def recomputation(node: Node) -> tuple[Any, Any, Any]:
    """Target and arguments that compute a node again, without side effects."""
    without = ops.without_statistics(node)
    return (node.target, node.args, node.kwargs) if without is None else without


def read_before_written(joint: Joint) -> list[str]:
    """The primals that forward changes, and whose contents before the change have any effect."""
    wanted = [*joint.outputs, *(g for each in joint.grads.values() for g in each)]
    seen: set[Node] = set()
    while wanted:
        node = wanted.pop()
        if node not in seen:
            seen.add(node)
            wanted.extend(_inputs_again(node))
    return [name for name in joint.writes if joint.primals.get(name) in seen]


def _inputs_again(node: Node) -> tuple[Node, ...]:
    found: list[Node] = []
    map_arg(recomputation(node), found.append)
    return tuple(dict.fromkeys(found))


def _effects(nodes: Iterable[Node]) -> list[Node]:
    return [n for n in nodes if ops.always_runs(n)]


def _is_of_forward(node: Node) -> bool:
    return node.meta.get("phase") == "forward"


def _is_always_handed_on(node: Node) -> bool:
    """Whether backward never computes a node, whatever is saved."""
    if node.op == "placeholder":
        return True
    return (
        _is_of_forward(node)
        and is_value(node)
        and not ops.is_blank(node)
        and (
            ops.is_new_statistic(node)
            or _smaller_than_its_state(node)
            or ops.node_is_collective(producer(node))
        )
    )


def _smaller_than_its_state(node: Node) -> bool:
    """Whether a random value takes no more memory than what it takes to draw it again."""
    if not ops.node_is_random(node):
        return False
    val = node.meta["val"]
    return storage_bytes(val) <= ops.rng_state_bytes(val.device)


def _random_order(nodes: Iterable[Node]) -> dict[Node, tuple[torch.device, int]]:
    """The random operations among `nodes`: device, and place among those of that device."""
    count: Counter[torch.device] = Counter()
    order = {}
    for node in nodes:
        if ops.node_is_random(node):
            device = ops.node_device(node)
            order[node] = (device, count[device])
            count[device] += 1
    return order
