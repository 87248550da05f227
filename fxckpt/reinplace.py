"""Which operations may write into memory that is there, because nobody can tell the difference.

A joint graph never changes a value, so each mutation in it works on a copy. In what finally runs,
the copy is needless if the old contents are not read afterwards, neither directly nor through a
view, and are not returned. That holds for nearly all mutations of real models, because autograd
would not allow them otherwise. What is left of an in-place operation is then the operation itself,
on the memory that eager mode would use.

Likewise, the result of an element-wise operation may take the place of an operand that dies with
it. The kernel is the same, and so is the result if it looks like that operand: then eager would
have made it with these strides too.

In backward this never concerns residuals and cotangents, which have to last if the graph is
retained.
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
from fxckpt.joint import Joint, memory_of, owner_of, producer, storage_bytes
from fxckpt.schedule import Schedule, Scheduler, Step
from fxckpt.symbols import look_alike, looks
from fxckpt.tasks import is_sum_of_gradients


@dataclasses.dataclass(frozen=True, slots=True)
class Reuse:
    """The steps of one phase that need no new memory, by their positions.

    Attributes:
        mutations: Those that work on their arguments themselves.
        results: Those that write their result into the memory of an operand, and that operand.
    """

    mutations: set[int]
    results: dict[int, Node]


@dataclasses.dataclass(frozen=True, slots=True)
class Needless:
    """The memory that the steps of a schedule need not allocate.

    Attributes:
        forward: In forward.
        backward: In backward.
        unwritten: Primals that forward has to change but that no mutation works on directly, with
            the contents that have to be copied into them.
    """

    forward: Reuse
    backward: Reuse
    unwritten: dict[Node, Node]


def all_anew(joint: Joint) -> Needless:
    """Every operation makes new memory: for compilers, which see to that themselves."""
    none = Reuse(set(), {})
    return Needless(none, none, {joint.primals[p]: node for p, node in joint.writes.items()})


class Reinplacer:
    """Finds the needless memory in schedules of one joint graph.

    Args:
        scheduler: Of the graph.
        eager: Whether element-wise operations make new memory as eager does, but for sums of
            gradients.
    """

    def __init__(self, scheduler: Scheduler, *, eager: bool = False) -> None:
        joint = scheduler.joint
        operations = [*joint.forward_nodes(), *joint.backward_nodes()]
        self.shares = {n: memory_of(n) for n in operations}
        self.bases = {n: _bases(n) for n in operations if n.target is ops.inplace}
        self.pure_again = {n for n in self.bases if ops.without_statistics(n) is not None}
        find = _added_to if eager else _replaceable
        found = {n: find(n) for n in operations}
        self.replaceable = {n: operands for n, operands in found.items() if operands}
        self._scheduler = scheduler
        self.writes = {joint.primals[name]: node for name, node in joint.writes.items()}
        self.chains = {p: _chain(p, contents) for p, contents in self.writes.items()}

    def needless(self, schedule: Schedule) -> Needless:
        """The memory that need not be allocated."""
        scheduler = self._scheduler
        residuals = [r for r in schedule.residuals if isinstance(r, Node)]
        returned = [*scheduler.joint.outputs, *residuals]
        forward = _Uses(self, schedule.forward, scheduler.reads, returned)
        given = set(self.writes)
        # A primal is mutated directly only if that leads all the way to its final contents.
        while kept := {p for p in given if not forward.are_last(self.chains[p], given)}:
            given -= kept
        backward = _Uses(self, schedule.backward, scheduler.reads_again, scheduler.wanted)
        return Needless(
            forward.reuse(given),
            backward.reuse((), self.pure_again),
            {p: contents for p, contents in self.writes.items() if p not in given},
        )

    def candidates(self, node: Node) -> tuple[Node, ...]:
        """The values whose memory an operation may write to, once nobody reads them."""
        operands = self.bases.get(node) or self.replaceable.get(node, ())
        return tuple(dict.fromkeys(map(owner_of, operands)))


class _Uses:
    """Who owns the memory of the values in a list of steps, and when it is read for the last time.

    Owners are the positions of the steps that made them, or nodes that no step made.

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
        owner: dict[Node, int | Node] = {}
        last: dict[int | Node, int] = {}
        self._steps, self._last, self._facts = steps, last, facts
        self._positions: dict[Node, int] = {}  # of the mutations
        # The owners of what each mutation works on, and of the operands that may be replaced.
        self._bases: dict[int, list[int | Node]] = {}
        self._operands: dict[int, list[tuple[int | Node, Node]]] = {}
        for i, node in enumerate(steps):
            if not isinstance(node, Node):
                continue
            for read in reads[node]:
                last[owner.get(read, read)] = i
            if node in facts.bases:
                self._positions[node] = i
                self._bases[i] = [owner.get(base, base) for base in facts.bases[node]]
            elif node in facts.replaceable:
                several = [(owner.get(n, n), n) for n in facts.replaceable[node]]
                owners = [owner.get(n, n) for n in reads[node]]
                self._operands[i] = [each for each in several if owners.count(each[0]) == 1]
            base = facts.shares[node]
            owner[node] = i if base is None else owner.get(base, base)
        last.update((owner.get(node, node), len(steps)) for node in returned)

    def are_last(self, mutations: Iterable[Node], given: Collection[Node]) -> bool:
        """Whether nobody reads, after each of these, what it works on.

        Args:
            mutations: Which.
            given: Arguments that may be changed.
        """
        return all(self._is_last(self._positions[node], given) for node in mutations)

    def _is_last(self, position: int, given: Collection[Node]) -> bool:
        return all(
            (isinstance(owner, int) or owner in given) and self._last[owner] <= position
            for owner in self._bases[position]
        )

    def reuse(self, given: Collection[Node], pure: Collection[Node] = ()) -> Reuse:
        """What needs no new memory.

        Args:
            given: Arguments that may be changed.
            pure: Mutations that leave out what they do to their arguments.
        """
        results = {}
        for i, operands in self._operands.items():
            for owner, operand in operands:
                if isinstance(owner, int) and self._last[owner] == i:
                    results[i] = operand
                    break
        mutations = {
            i for i in self._bases if self._steps[i] not in pure and self._is_last(i, given)
        }
        return Reuse(mutations, results)


def _replaceable(node: Node) -> tuple[Node, ...]:
    """The operands whose memory a result could take, as far as their looks go."""
    result = node.meta["val"]
    if not isinstance(result, torch.Tensor):
        return ()
    device = result.device.type
    operands = [
        n
        for i, n in enumerate(node.args)
        if isinstance(n, Node) and ops.writing_into(node.target, i, device) is not None
    ]
    if not operands:
        return ()
    if not all(_keeps_strides(n.meta["val"], result) for n in node.all_input_nodes):
        return ()
    fits = (n for n in operands if _looks_like(n.meta["val"], result))
    return tuple(n for n in fits if _is_made_for(owner_of(n), result))


def _added_to(node: Node) -> tuple[Node, ...]:
    """The gradient that autograd adds another one to in place, if nobody else needs it.

    Views hold the memory of their base.
    """
    first = node.args[0] if is_sum_of_gradients(node) else None
    return tuple(n for n in _replaceable(node) if n is first and memory_of(n) is None)


def _keeps_strides(operand: torch.Tensor, result: torch.Tensor) -> bool:
    """Whether an operand cannot be why a result has other strides than another operand."""
    one, other = looks(operand), looks(result)
    if look_alike(one.size, other.size):
        return look_alike(one.stride, other.stride) or not any(operand.stride())
    return operand.dim() == 0 or (one.contiguous and other.contiguous)


def _looks_like(operand: torch.Tensor, result: torch.Tensor) -> bool:
    """Whether a result would fit into the place of an operand, and fill it."""

    one, other = looks(operand), looks(result)
    alike = look_alike((one.size, one.stride, one.offset), (other.size, other.stride, other.offset))
    same = (operand.dtype, operand.device) == (result.dtype, result.device)
    full = result.numel() * result.element_size()
    return alike and same and full == storage_bytes(result) > 0


def _is_made_for(owner: Node, result: torch.Tensor) -> bool:
    if owner.op != "call_function" or not isinstance(owner.meta["val"], torch.Tensor):
        return False
    return look_alike(looks(owner.meta["val"]).bytes, looks(result).bytes) and _is_alone(owner)


def _is_alone(owner: Node) -> bool:
    """Whether a value cannot share its memory with a primal, or with another result."""
    made = producer(owner)
    if made.target is ops.inplace:
        roots = [owner_of(base) for base in _bases(made)]
        return all(n.op == "call_function" and _is_alone(n) for n in roots)
    if made is owner:
        return True
    same = [t for t in made.meta["val"] if t is not None and _shares(t, owner.meta["val"])]
    taken = [user for user in made.users if user.args[1:] == owner.args[1:]]
    return len(same) == len(taken) == 1


def _shares(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata


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


def write_into(node: Node, operand: Node) -> None:
    """Lets an element-wise operation write its result into the memory of an operand."""
    variant = ops.writing_into(node.target, node.args.index(operand))
    assert variant is not None, "see `_replaceable`"
    node.target, keyword = variant
    if keyword:
        node.kwargs = {**node.kwargs, keyword: operand}
