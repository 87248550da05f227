"""The exact bytes that live while a step runs, for any decision of what to save; nothing is run.

A replay walks through the steps of a `schedule` and keeps books of storages: when each is made, and
which step reads it for the last time. The generated code drops every variable after its last use,
so these are the bytes that its tensors hold.

What counts is what comes on top of the memory in use when forward is called: arguments, parameters
and buffers are there already. It comes and goes like this:

    results         with their operation, all of them; views, and mutations that need no copy (see
                    `reinplace`), take nothing. They die after the last step that reads them, or a
                    view of them, or another result of the same operation that is taken out of the
                    tuple later.
    outputs         belong to the caller, who may hold them to the end of backward
    cotangents      live all through backward: autograd holds the arguments of its functions
    gradients       live to the end of backward: all are returned at once
    residuals       die at their last reader in backward

Not counted: what kernels allocate and free while they run, apart from what `workspace` knows; what
follows backward (a gradient that is added to one that is there already); fragmentation and
rounding, apart from CUDA's (see `ledger.allocated`); a first call, which keeps more, to be able to
take back what it did.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence

from torch.fx import Node

from fxckpt import ops
from fxckpt.delivery import delivery
from fxckpt.joint import Joint, is_value
from fxckpt.ledger import Fact, Ledger, allocated, allocated_for_result, allocated_for_state
from fxckpt.reinplace import Reinplacer, Reuse
from fxckpt.replay import Needs, Replay
from fxckpt.schedule import Schedule, Scheduler, read_before_written


def replay(joint: Joint, saved: Collection[Node]) -> Replay:
    """Counts what lives at every moment if `saved` is kept (see `split.split`).

    Args:
        joint: The graph.
        saved: The values that backward may keep.
    """
    return Memory(joint).replay(saved)


class Memory:
    """Replays decisions on one joint graph, and tells a planner what it needs for a linear model.

    Attributes:
        joint: What is replayed.
        values: What can be saved or not: one value for each storage, in forward order. Left out are
            values for which there is no choice: those smaller than what it takes to draw them
            again, running statistics, and memory without contents.
        cost: The bytes that saving each of `values` adds; none for outputs that are held anyway.
        inputs_of: For each forward operation, which of `values` must be there to run it again; what
            is always there, such as primals, is left out.
        needed_by: For each backward operation, in order, which of `values` it reads, be it through
            views. What is taken out of the graph just before it (views) counts as read by it.
        replaced: The values of which an operation of forward takes the place unless they are saved,
            and that operation.
        replaceable: For operations of backward that make new memory, the values whose place they
            could take if these are computed again and die.
        fixed: What lives whatever is decided: at each operation of forward the values that forward
            itself still reads, at each operation of backward outputs, cotangents, gradients so far,
            and values of backward.
        fixed_before: Likewise right before each operation of backward.

    Operations with several results are recomputed as one: `joint.producer` leads from a value to
    its operation.

    Args:
        joint: What is replayed.
        outputs_held: Whether the caller holds the outputs to the end of backward. If not, they are
            taken to die before it, as in `model(x).sum().backward()`.
        workspaces: Whether to count what kernels take besides; not if the step is to run on
            another device than the graph is on.
        eager: Whether operations are eager's: results are made in new memory (see `reinplace`), and
            autograd lets go of what one of its functions works on when that is done (see `tasks`).
            What a rewritten step holds in any case counts here, too, such as cotangents: nothing
            is recomputed for as much memory as eager is said to need.
        between: Bytes that something else needs between forward and backward, such as blocks that
            come later; while it runs, there is what forward hands to backward besides.
    """

    def __init__(
        self,
        joint: Joint,
        *,
        outputs_held: bool = True,
        workspaces: bool = True,
        eager: bool = False,
        between: int = 0,
    ) -> None:
        self.joint, self.outputs_held, self.between = joint, outputs_held, between
        self._eager = eager
        self.scheduler = Scheduler(joint, eager=eager)
        self.reinplacer = Reinplacer(self.scheduler, eager=eager)
        nodes = [*joint.forward_nodes(), *joint.backward_nodes()]
        self.facts = {n: Fact.of(n, self.reinplacer, workspaces) for n in nodes}
        if workspaces and joint.grads:
            last = next(n for n in reversed(nodes) if self.facts[n].runs)
            self.facts[last] = self.facts[last].taking(delivery(joint))
        self.held_by_call = _held_by_call(joint)
        self.values = [
            n
            for n in joint.forward_nodes()
            if is_value(n) and self._root(n) is n and self.scheduler.has_choice(n)
        ]
        outputs = {self._root(n) for n in joint.outputs if outputs_held}
        self.cost = {
            n: 0 if n in outputs else allocated_for_result(n, n.meta["val"]) for n in self.values
        }
        self.inputs_of = {
            n: self._values_read(self.scheduler.reads_again[n])
            for n in joint.forward_nodes()
            if self.facts[n].runs
        }
        self.needed_by = dict(self._backward_reads())
        bare = self.scheduler.bare()
        needless = self.reinplacer.needless(bare)
        self.replaced = dict(self._replaced(bare, needless.forward))
        self.replaceable = dict(self._replaceable(bare, needless.backward))
        self.fixed = self._replay(bare, outputs_held)
        self.fixed_before = self.fixed.before_backward()

    def replay(self, saved: Collection[Node]) -> Replay:
        """Counts what lives at every moment if `saved` is kept (see `split.split`)."""
        return self._replay(self.scheduler.schedule(saved), self.outputs_held)

    def needs(self, saved: Collection[Node]) -> Needs:
        """What a decision comes to in a larger step, which counts what goes in and out itself."""
        schedule = self.scheduler.schedule(saved)
        # What arrives is held by autograd for our functions, and by nobody in the step as it is.
        held, alone = (self._replay(schedule, h, not self._eager) for h in (True, False))
        around = int(held.by_kind()["outputs"].max(initial=0))  # outputs, and what arrives
        arrive = sum(allocated(node.meta["val"]) for node in self.joint.cotangents)
        return Needs(
            *held.kept_apart(),
            held.forward_peak,
            held.backward_peak - around,
            alone.backward_peak - arrive,
        )

    def _replay(
        self, schedule: Schedule, outputs_held: bool, cotangents_held: bool = True
    ) -> Replay:
        scheduler, needless = self.scheduler, self.reinplacer.needless(schedule)
        ledger = Ledger(self.facts)
        held = [s for node, size in self.held_by_call for s in ledger.make(node, [size])]
        ledger.run(schedule.forward, scheduler.reads, needless.forward)
        if self.between:
            ledger.elsewhere(self.between)
        ledger.now += 1  # backward starts
        boundary = ledger.now
        outputs, residuals = ledger.of(self.joint.outputs), ledger.of(schedule.residuals)
        ledger.keep({*held, *outputs, *residuals, *ledger.of(needless.unwritten.values())})
        ledger.hand_on(schedule.residuals)
        for node in self.joint.cotangents:
            ledger.place(node, allocated(node.meta["val"]))
        given = ledger.of(self.joint.cotangents)
        ledger.run(
            schedule.backward,
            scheduler.reads_again,
            needless.backward,
            self.reinplacer.pure_again,
            schedule.states,
        )
        if outputs_held:
            ledger.keep(outputs)
        gradients = ledger.of(scheduler.wanted)
        ledger.keep({*given, *gradients} if cotangents_held else gradients)
        saved = sum(ledger.sizes[s] for s in residuals)
        again = tuple(n for n in schedule.recomputed if self.facts[n].runs)
        kinds = {
            "outputs": outputs | given,
            "gradients": gradients,
            "saved": residuals.union(held),
        }
        return Replay(saved, again, ledger, boundary, schedule, kinds)

    def _root(self, node: Node) -> Node:
        """The value that owns the memory of a value."""
        while (shares := self.reinplacer.shares.get(node)) is not None:
            node = shares
        return node

    def _values_read(self, reads: Iterable[Node]) -> tuple[Node, ...]:
        roots = dict.fromkeys(self._root(node) for node in reads)
        return tuple(node for node in roots if node in self.cost)

    def _backward_reads(self) -> Iterator[tuple[Node, tuple[Node, ...]]]:
        reads: list[Node] = []
        for node in self.scheduler.backward:
            reads += self.scheduler.reads[node]
            if self.facts[node].runs:
                yield node, self._values_read(reads)
                reads = []

    def _replaced(self, bare: Schedule, reuse: Reuse) -> Iterator[tuple[Node, Node]]:
        for i, step in enumerate(bare.forward):
            if isinstance(step, Node) and (i in reuse.mutations or i in reuse.results):
                candidates = self.reinplacer.candidates(step)
                if len(candidates) == 1:  # else another one may make room
                    yield candidates[0], step

    def _replaceable(self, bare: Schedule, reuse: Reuse) -> Iterator[tuple[Node, Sequence[Node]]]:
        for i, step in enumerate(bare.backward):
            if isinstance(step, Node) and i not in reuse.mutations and i not in reuse.results:
                yield step, [n for n in self.reinplacer.candidates(step) if n in self.cost]


def _held_by_call(joint: Joint) -> list[tuple[Node, int]]:
    """What `runtime` keeps besides until backward starts: random states, and copies of buffers.

    Without them, forward could not be run again where the backward graph does not apply.
    """
    random = {ops.node_device(n): n for n in joint.forward_nodes() if ops.node_is_random(n)}
    copied = [joint.primals[name] for name in read_before_written(joint)]
    states = [(node, allocated_for_state(device)) for device, node in random.items()]
    return [*states, *((node, allocated(node.meta["val"])) for node in copied)]
