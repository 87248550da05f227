"""Pieces of a replay: what steps that run one after the other do to memory, see `quick`.

Sets of variables are integers, a bit for each. A slot is a storage; slots and moments are counted
from the first of a piece.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from torch.fx import Node

from fxckpt import ops
from fxckpt.ledger import allocated_for_copy, allocated_for_state
from fxckpt.schedule import Before, State
from fxckpt.variables import Variables

NEVER = -(1 << 60)  # before all moments


class Reuse(NamedTuple):
    """An operation that may write into memory that is there, see `reinplace`.

    Attributes:
        node: The operation.
        moment: When it runs.
        slots: What it may write to; for a variable that the piece does not make, -1 - variable.
        first: The first slot of its results.
        copies: The first slot of the copies that it does not need if all of `slots` die; -1 if it
            does not mutate, and its result takes the place of the first one that dies.
    """

    node: Node
    moment: int
    slots: tuple[int, ...]
    first: int
    copies: int


class Piece:
    """Steps that run one after the other.

    Attributes:
        looked: The variables that decide about what runs.
        taken: What forward hands on for it, in order.
        again: What runs again, in order.
        count: Moments.
        size: Bytes of each slot.
        born: When each is made.
        read: When each is read last.
        tuples_read: When another result is taken out of the same tuple.
        values: What is on each.
        workspaces: At each moment.
        reads: When variables that were there before are read last.
        tuples: When something is taken out of tuples that were there before.
        late: Variables that are taken out of these: each, the tuple, its place in that.
        assigned: The first slot of each variable that is made.
        reuses: In order.
    """

    __slots__ = (
        "again", "assigned", "available", "available_after", "born", "count", "decided",
        "decided_by", "late", "looked", "passing", "passing_after", "read", "reads", "reuses",
        "size", "soon", "stay", "taken", "tuples", "tuples_read", "values", "workspaces",
    )  # fmt: skip

    def __init__(self, available: int, passing: int, decided: int) -> None:
        self.available, self.passing, self.decided = available, passing, decided
        self.available_after, self.passing_after = available, passing
        self.looked = self.decided_by = 0
        self.stay = -1  # what is let go and was not looked at stays if it is in here
        self.soon = -1  # and, if it is fleeting, in here
        self.count = 0
        self.taken: list[int] = []
        self.again: list[Node] = []
        self.size: list[int] = []
        self.born: list[int] = []
        self.read: list[int] = []
        self.tuples_read: list[int] = []
        self.values: list[Node | None] = []
        self.workspaces: list[int] = []
        self.reads: dict[int, int] = {}
        self.tuples: dict[int, int] = {}
        self.late: list[tuple[int, int, int]] = []
        self.assigned: dict[int, int] = {}
        self.reuses: list[Reuse] = []

    def fits(self, available: int, passing: int, decided: int) -> bool:
        """Whether the same runs where this is there, and this is decided."""
        return not (
            (available ^ self.available) & self.looked
            or (decided ^ self.decided) & self.decided_by
            or (passing ^ self.passing) & self.looked
        )

    def end(self, stay: int, soon: int, variables: Variables) -> None:
        """Lets go what does not stay, and forgets what was not looked at."""
        self.stay, self.soon = stay, soon
        staying = self._staying(self.decided, variables)
        for v in bits(self.passing_after & ~staying):
            self.available_after &= ~variables.drops[v]
        self.passing_after &= staying
        self.forget(variables)

    def _staying(self, decided: int, variables: Variables) -> int:
        """What stays after each operation although it is let go."""
        return self.stay & (self.soon | ~(decided >> 2 * variables.count))

    def after(
        self, available: int, passing: int, decided: int, variables: Variables
    ) -> tuple[int, int]:
        """What is there afterwards, and what of that is let go."""
        others, staying = passing & ~self.looked, self._staying(decided, variables)
        available = available & ~self.looked | self.available_after
        for v in bits(others & ~staying):
            available &= ~variables.drops[v]
        return available, others & staying | self.passing_after

    def then(self, other: Piece, variables: Variables) -> None:
        """Adds the steps of the next piece, and what is known of when it fits."""
        available, passing = self.available_after, self.passing_after
        available, passing = other.after(available, passing, self.decided, variables)
        self.available_after, self.passing_after = available, passing
        self.looked |= other.looked
        self.stay &= other.stay
        self.soon &= other.soon
        self.taken += other.taken
        self.again += other.again
        self.extend(other, variables)

    def forget(self, variables: Variables) -> None:
        """Forgets what was not looked at."""
        self.available_after &= self.looked
        self.passing_after &= self.looked
        looked, count = self.looked, variables.count
        self.decided_by = looked | looked << count | looked << 2 * count

    def extend(self, other: Piece, variables: Variables) -> None:
        """Adds the steps of another piece."""
        base, first, assigned, read = self.count, len(self.size), self.assigned, self.read
        for variable, parent, index in other.late:
            if (slot := assigned.get(parent)) is None:
                self.late.append((variable, parent, index))
            else:
                assigned[variable] = slot + index
        for v, moment in other.reads.items():
            if (slot := assigned.get(v)) is None:
                self.reads[v] = base + moment
            else:
                read[slot] = base + moment
        for v, moment in other.tuples.items():
            if (slot := assigned.get(v)) is None:
                self.tuples[v] = base + moment
            else:
                self.take_out(slot, variables.width[v], base + moment)
        for node, moment, slots, made, copies in other.reuses:
            where = tuple([s + first if s >= 0 else assigned.get(-1 - s, s) for s in slots])
            copies += first if copies >= 0 else 0
            self.reuses.append(Reuse(node, base + moment, where, made + first, copies))
        self.size += other.size
        self.born += [base + moment for moment in other.born]
        read += [base + moment for moment in other.read]
        self.tuples_read += [base + moment for moment in other.tuples_read]
        self.values += other.values
        self.workspaces += other.workspaces
        for v, slot in other.assigned.items():
            assigned[v] = first + slot
        self.count += other.count

    def copied(self) -> Piece:
        """The same, to add slots to and to settle (see `quick`)."""
        made = copy.copy(self)
        for name in ("size", "born", "read", "tuples_read", "values"):
            setattr(made, name, [*getattr(self, name)])
        made.assigned = {**self.assigned}
        return made

    def take_out(self, first: int, width: int, moment: int) -> None:
        """Notes that something is taken out of a tuple."""
        self.tuples_read[first : first + width] = [moment] * width

    def make(self, variable: int, sizes: Sequence[int], values: Sequence[Node | None]) -> None:
        """Makes slots for a variable, at this moment."""
        count = len(sizes)
        self.assigned[variable] = len(self.size)
        self.size += sizes
        self.values += values
        self.born += [self.count] * count
        self.read += [self.count] * count
        self.tuples_read += [NEVER] * count

    def hand(self, variable: int, size: int, value: Node | None) -> None:
        """Makes a slot for what is there when the piece begins."""
        self.assigned[variable] = len(self.size)
        self.size.append(size)
        self.values.append(value)
        self.born.append(0)
        self.read.append(self.reads.get(variable, -1))
        self.tuples_read.append(NEVER)

    def note_read(self, variable: int) -> None:
        """Notes that a variable is read at this moment."""
        if (slot := self.assigned.get(variable)) is not None:
            self.read[slot] = self.count
        else:
            self.reads[variable] = self.count

    def tick(self, workspace: int) -> None:
        """Ends a moment."""
        self.workspaces.append(workspace)
        self.count += 1


def bits(mask: int) -> Iterator[int]:
    """The members of a set, smallest first."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


class Builder:
    """Makes the piece of some steps.

    Args:
        variables: Of the graph.
        piece: To which steps are added.
        backward: Whether it is one of backward.
    """

    def __init__(self, variables: Variables, piece: Piece, *, backward: bool) -> None:
        self._variables, self.piece = variables, piece
        self._pure = variables.pure_again if backward else ()

    def make_available(self, ask: Iterable[int]) -> None:
        """Adds what is missing of some variables, and what that needs (see `schedule`)."""
        variables, piece = self._variables, self.piece
        missing, stack = 0, [*ask]
        while stack:
            v = stack.pop()
            bit = 1 << v
            piece.looked |= variables.with_siblings[v]
            if (piece.available_after | missing) & bit:
                continue
            missing |= bit
            if not piece.decided & bit:
                stack += variables.reads_again[variables.things[v]]
                gone = piece.decided | piece.decided >> variables.count
                stack += [r for r in variables.results.get(v, ()) if not gone >> r & 1]
        left: dict[Any, Node] = {}
        for v in bits(missing):
            if piece.decided >> v & 1:
                piece.taken.append(v)
                continue
            node = variables.things[v]
            if node in variables.random:
                self._draw(node, left)
            self.step(node, again=True)
            if piece.decided >> variables.count >> variables.of[variables.owner[node]] & 1:
                piece.passing_after |= 1 << v
        piece.available_after |= missing

    def _draw(self, node: Node, left: dict[Any, Node]) -> None:
        """Copies the state that a random operation runs under, see `schedule`."""
        piece, random = self.piece, self._variables.random
        device, index = random[node]
        previous, state = left.get(device), self._variables.of["state", node]
        if previous is not None and random[previous] == (device, index - 1):
            piece.assigned[state] = piece.assigned[self._variables.of["state", previous]]
        else:
            piece.taken.append(state)
            piece.note_read(state)
            self.copy(State(node))
        left[device] = node

    def copy(self, step: State | Before) -> None:
        """Adds the copy of a state, or of what forward changes."""
        if isinstance(step, State):
            kind, size = "state", allocated_for_state(ops.node_device(step.node))
        else:
            kind, size = "before", allocated_for_copy(step.node.meta["val"])
        self.piece.make(self._variables.of[kind, step.node], [size], [None])
        self.piece.tick(0)

    def step(self, node: Node, *, again: bool = False) -> None:
        """Adds an operation, or what takes a result out of a tuple."""
        variables, piece, fact = self._variables, self.piece, self._variables.facts[node]
        if fact.shares is not None:
            self._take_out(node)
            return
        for v in (variables.reads_again if again else variables.reads)[node]:
            piece.note_read(v)
        if again and node in variables.random:
            piece.note_read(variables.of["state", node])
        sizes = fact.fresh if node in self._pure else (*fact.fresh, *fact.copies)
        operands: Sequence[int | None] = variables.candidates.get(node, ())
        if fact.bases:
            operands = () if node in self._pure else variables.bases[node]
        if operands and None not in operands:
            slots = tuple(piece.assigned.get(v, -1 - v) for v in operands if v is not None)
            first = len(piece.size)
            copies = first + len(fact.fresh) if fact.bases else -1
            piece.reuses.append(Reuse(node, piece.count, slots, first, copies))
        piece.make(variables.of[node], sizes, variables.named[node][: len(sizes)])
        piece.tick(fact.workspace_again if again else fact.workspace)
        if again:
            piece.again.append(node)

    def _take_out(self, node: Node) -> None:
        variables, piece, fact = self._variables, self.piece, self._variables.facts[node]
        assert fact.shares is not None
        assert fact.index is not None
        variable, parent = variables.of[node], variables.of[fact.shares]
        if (first := piece.assigned.get(parent)) is not None:
            piece.assigned[variable] = first + fact.index
            piece.take_out(first, variables.width[parent], piece.count - 1)
        else:
            piece.tuples[parent] = piece.count - 1
            piece.late.append((variable, parent, fact.index))
