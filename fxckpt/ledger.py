"""Books of storages: when each is made while the steps of a schedule run, and when it is freed.

Time is the number of the step. A storage is made by the step whose result it holds, and freed after
the last step that reads a variable on it: a value, a view of it, or the tuple that it came in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from operator import getitem
from typing import Any

import torch
from torch.fx import Node

from fxckpt import ops
from fxckpt.joint import storage_bytes
from fxckpt.reinplace import Reinplacer, Reuse
from fxckpt.schedule import Before, State, Step
from fxckpt.workspace import oversized, workspace

_CUDA_BLOCK = 512  # the caching allocator hands out multiples of this
_NOWHERE = (0,)  # the storage of everything that is there anyway


def allocated(val: torch.Tensor) -> int:
    """Bytes that the allocator of its device hands out for the storage of a (fake) tensor."""
    return rounded(storage_bytes(val), val.device)


def allocated_for_result(node: Node, result: torch.Tensor) -> int:
    """The same for a result of an operation."""
    size = oversized(node)
    return allocated(result) if size is None else rounded(size, result.device)


def rounded(size: int, device: torch.device) -> int:
    """Bytes that the allocator of a device hands out for a number of bytes."""
    return -(-size // _CUDA_BLOCK) * _CUDA_BLOCK if device.type == "cuda" else size


def allocated_for_state(device: torch.device) -> int:
    """Bytes of a generator's state, which CUDA keeps in the memory of the host."""
    return ops.rng_state_bytes(device) if device.type == "cpu" else 0


def allocated_for_copy(val: torch.Tensor) -> int:
    """Bytes of what `ops.clone_exactly` makes of a tensor."""
    if val.numel() == 0:
        return 0
    extent = sum((n - 1) * s for n, s in zip(val.size(), val.stride(), strict=True)) + 1
    return rounded(extent * val.element_size(), val.device)


@dataclasses.dataclass(frozen=True, slots=True)
class Fact:
    """What an operation of a joint graph does to memory.

    Attributes:
        shares: The value whose memory the result is in, or the tuple that it is taken out of.
        index: Its place in that tuple, if the memory is not that of the tuple as a whole.
        fresh: Bytes of each new result.
        copies: Bytes of the copies of what it works on, if these are not needless.
        bases: What it works on.
        workspace: See `workspace`.
        workspace_again: Likewise if it runs again.
    """

    shares: Node | None
    index: int | None
    fresh: tuple[int, ...]
    copies: tuple[int, ...]
    bases: tuple[Node, ...]
    workspace: int
    workspace_again: int

    @property
    def runs(self) -> bool:
        """Whether it is more than a view."""
        return self.shares is None

    def taking(self, size: int) -> Fact:
        """The same of an operation that takes as many bytes while it runs, if not more."""
        return dataclasses.replace(self, workspace=max(self.workspace, size))

    @staticmethod
    def of(node: Node, known: Reinplacer, workspaces: bool) -> Fact:
        """The facts of a node."""
        parent: Any
        if (shares := known.shares[node]) is not None:
            return Fact(shares, None, (), (), (), 0, 0)
        if node.target is getitem:
            parent, index = node.args
            return Fact(parent, index, (), (), (), 0, 0)  # type: ignore[arg-type]
        bases, val = known.bases.get(node, []), node.meta["val"]
        results = list(val) if isinstance(val, (tuple, list)) else [val]
        count = len(results) - len(bases)
        taken = workspace(node) if workspaces else 0
        return Fact(
            None,
            None,
            tuple(_sizes(node, results[:count])),
            tuple(allocated_for_copy(result) for result in results[count:]),
            tuple(bases),
            taken,
            _while_drawing(node, taken) if ops.node_is_random(node) else taken,
        )


def _sizes(node: Node, results: Sequence[torch.Tensor | None]) -> Iterator[int]:
    """Bytes that each result adds; those that are another one once more add none."""
    seen = set()
    for result, wanted in zip(results, _output_mask(node, len(results)), strict=True):
        if result is None or not wanted or (key := result.untyped_storage()._cdata) in seen:
            yield 0
        else:
            seen.add(key)
            yield allocated_for_result(node, result)


def _while_drawing(node: Node, taken: int) -> int:
    """Bytes besides its operands and results while a random operation runs again.

    There is the generator's state that is put back afterwards, and at the end the one that the
    operation leaves (see `ops.with_rng_state`).
    """
    state = allocated_for_state(ops.node_device(node))
    return state + max(taken, state)


def _output_mask(node: Node, count: int) -> Sequence[bool]:
    """Which results are computed: backward operations that leave that open say so at the end."""
    mask: Any = node.args[-1] if node.args else None
    is_mask = isinstance(mask, (list, tuple)) and all(isinstance(each, bool) for each in mask)
    return mask if is_mask and len(mask) == count else [True] * count


class Ledger:
    """The storages of one replay.

    Args:
        facts: By node of the joint graph.
    """

    def __init__(self, facts: Mapping[Node, Fact]) -> None:
        self.now = 0
        self.sizes = [0]
        # When something ran that is more than a view, and its workspace.
        self.notable: list[tuple[int, Node, int]] = []
        self._facts = facts
        self._born, self._read = [0], [0]  # when each storage is made, and read for the last time
        self._owners: list[Step | None] = [None]
        self._places: dict[Step, tuple[int, ...]] = {}  # the storages that each variable holds
        self._parents: dict[int, Node] = {}  # the tuples that storages came in

    def make(self, owner: Step, sizes: Collection[int]) -> tuple[int, ...]:
        """Makes storages; `owner` is what they are shown as."""
        first, count = len(self.sizes), len(sizes)
        self.sizes += sizes
        self._born += [self.now] * count
        self._read += [self.now] * count
        self._owners += [owner] * count
        return tuple(range(first, first + count))

    def place(self, step: Step, *sizes: int) -> tuple[int, ...]:
        """Makes storages for the results of a step."""
        places = self._places[step] = self.make(step, sizes)
        return places

    def of(self, steps: Iterable[Step]) -> set[int]:
        """The storages that variables hold now."""
        return {s for step in steps for s in self._places.get(step, _NOWHERE)}

    def keep(self, storages: Iterable[int]) -> None:
        """Notes that storages are still in use."""
        for storage in storages:
            self._read[storage] = self.now

    def hand_on(self, steps: Iterable[Step]) -> None:
        """Forgets all variables but these. Those for changed primals are now in their place."""
        self._places = {
            step.node if isinstance(step, Before) else step: self._places[step] for step in steps
        }

    def run(
        self,
        steps: Iterable[Step],
        reads: Mapping[Node, Iterable[Node]],
        reuse: Reuse,
        pure: Collection[Node] = (),
        states: Mapping[Node, State] | None = None,
    ) -> None:
        """Notes what steps read and make.

        Args:
            steps: What runs.
            reads: What each operation reads.
            reuse: The steps that need no new memory.
            pure: The mutations that leave out what they do to their arguments.
            states: What random operations that run again draw from, see `Schedule`.
        """
        places, last = self._places, self._read
        for i, step in enumerate(steps):
            self.now += 1
            if isinstance(step, Node):
                for read in reads[step]:
                    for storage in places.get(read, _NOWHERE):
                        last[storage] = self.now
                if (replaced := reuse.results.get(i)) is None:
                    self._make(step, i in reuse.mutations, step in pure, (states or {}).get(step))
                else:
                    self._replace(places[replaced][0], step)
            else:
                self._extra(step)

    def _make(self, node: Node, direct: bool, pure: bool, state: State | None) -> None:
        fact = self._facts[node]
        if fact.shares is not None:
            places = self._places.get(fact.shares, _NOWHERE)
            if fact.index is not None:
                places = places[fact.index : fact.index + 1]
                self._owners[places[0]], self._parents[places[0]] = node, fact.shares
            self._places[node] = places
            return
        taken = fact.workspace
        if state is not None:
            taken = fact.workspace_again
            self.keep(self._places[state])
        if pure or not fact.bases:
            self.place(node, *fact.fresh)
        elif direct:
            bases = [s for base in fact.bases for s in self._places.get(base, _NOWHERE)]
            self._places[node] = (*self.place(node, *fact.fresh), *bases)
        else:
            self.place(node, *fact.fresh, *fact.copies)
        self.notable.append((self.now, node, taken))

    def _replace(self, storage: int, step: Node) -> None:
        """Lets a result take the place of an operand: a storage that is made as another dies."""
        (new,) = self.place(step, self.sizes[storage])
        self._read[storage] = self.now - 1
        if (parent := self._parents.get(storage)) is not None:
            self._parents[new] = parent
            held = self._places[parent]
            self._places[parent] = tuple(new if s == storage else s for s in held)
        self.notable.append((self.now, step, self._facts[step].workspace))

    def _extra(self, step: State | Before) -> None:
        self.keep(self._places.get(step, ()))
        if isinstance(step, State):
            self.place(step, allocated_for_state(ops.node_device(step.node)))
        else:
            self.place(step, allocated_for_copy(step.node.meta["val"]))
        self.notable.append((self.now, step.node, 0))

    def elsewhere(self, size: int) -> None:
        """Notes that something else takes bytes for a while, after the latest operation."""
        self.now += 1
        *_, (_, latest, _) = self.notable
        self.notable.append((self.now, latest, size))

    def live(self) -> list[int]:
        """The bytes that live at each time, results of the step included."""
        return self._summed(zip(self.sizes, self._born, self._read, strict=True))

    def live_of(self, storages: Iterable[int]) -> list[int]:
        """The same for some of the storages."""
        return self._summed((self.sizes[s], self._born[s], self._read[s]) for s in storages)

    def _summed(self, lives: Iterable[tuple[int, int, int]]) -> list[int]:
        change = [0] * (self.now + 2)
        for size, born, read in lives:
            change[born] += size
            change[read + 1] -= size
        return list(accumulate(change))

    def older(self) -> list[int]:
        """The bytes that live at each time and were there before."""
        older = self.live()
        for size, born in zip(self.sizes, self._born, strict=True):
            older[born] -= size
        return older

    def lives(self) -> Iterator[tuple[Node, int, int]]:
        """For each storage, the first value on it, when it was made and when it was read last."""
        for owner, born, read in zip(self._owners, self._born, self._read, strict=True):
            if owner is not None:
                yield _node_of(owner), born, read

    def alive(self, time: int) -> Iterator[tuple[int, Node, int]]:
        """The storages that live at a time: the first value on each, and its bytes."""
        entries = zip(self._owners, self.sizes, self._born, self._read, strict=True)
        for storage, (owner, size, born, read) in enumerate(entries):
            if owner is not None and size and born <= time <= read:
                yield storage, _node_of(owner), size

    def made_again(self, boundary: int) -> set[int]:
        """The storages that forward operations made after a time."""
        owners = enumerate(zip(self._owners, self._born, strict=True))
        return {
            storage
            for storage, (owner, born) in owners
            if born > boundary and owner is not None and _is_of_forward(_node_of(owner))
        }


def _node_of(step: Step) -> Node:
    return step if isinstance(step, Node) else step.node


def _is_of_forward(node: Node) -> bool:
    return node.meta.get("phase") == "forward"
