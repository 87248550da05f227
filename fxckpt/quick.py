"""The count of `memory`, for searches that ask for thousands of decisions on one graph.

NOTE [Pieces]

Backward runs in pieces: an operation of it, and before that what runs again for it. Decisions that
are alike have most pieces in common, so pieces are kept, and so are those that are made of two, of
four, and so on. Each knows what was looked at while it was made: what was there, and what was
decided about it. Where all of that is the same, so is the piece. If a decision differs from one
that was counted before in a single value, most of it is there already.

`Memory.replay` is what all this has to agree with, moment for moment: see the tests.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.fx import Node

from fxckpt.joint import producer, reachable
from fxckpt.ledger import allocated
from fxckpt.memory import Memory
from fxckpt.pieces import Builder, Piece, Reuse
from fxckpt.schedule import Before, Choice, Residual, State
from fxckpt.variables import Variables

_BRANCHES = 4  # pieces that a larger one is made of
_VARIANTS = 16  # of each piece that are kept
_END = 1 << 60  # after all moments


class Count:
    """What a decision comes to.

    Attributes:
        live: Bytes at each moment, see `Replay.live`.
        ahead: How many of them are of forward.
        seconds: Of what runs again.
        again: What runs again, in order; some may do so several times.
    """

    def __init__(
        self, forward: _Phase, backward: _Phase, again: list[Node], seconds: float
    ) -> None:
        self.live: NDArray[np.int64] = np.concatenate([forward.live, backward.live])
        self.ahead, self.seconds, self.again = len(forward.live), seconds, again
        self._forward, self._backward = forward, backward

    @property
    def peak(self) -> int:
        """The most that lives at any moment."""
        return int(self.live.max(initial=0))

    def at_peak(self) -> list[Node]:
        """The values that live there, largest first."""
        moment = int(self.live.argmax())
        if moment < self.ahead:
            return self._forward.alive(moment)
        return self._backward.alive(moment - self.ahead)


@dataclasses.dataclass(frozen=True, slots=True)
class _Phase:
    """The bytes of forward or of backward; the slots, and when each ends."""

    live: NDArray[np.int64]
    piece: Piece
    end: list[int]

    def alive(self, moment: int) -> list[Node]:
        """The values that live at a moment, largest first."""
        piece = self.piece
        lives = zip(piece.values, piece.size, piece.born, piece.read, self.end, strict=True)
        found = [
            (size, value)
            for value, size, born, read, end in lives
            if value is not None and size and born <= moment <= max(read, end)
        ]
        return [value for _, value in sorted(found, key=lambda entry: -entry[0])]


class Quick:
    """Counts decisions about the values of a joint graph.

    Args:
        memory: Of the graph.
        seconds: What each forward operation takes.
    """

    def __init__(self, memory: Memory, seconds: Mapping[Node, float]) -> None:
        self._seconds, self._variables = seconds, Variables(memory)
        self._random = memory.scheduler.random
        self._arguments = self._variables.arguments()
        self._groups, self._stay = self._variables.groups(), self._variables.staying()
        self._known: dict[tuple[int, int], list[Piece]] = {}
        self._forward = _Forward(self._variables)
        self._wanted = self._variables.behind_all(memory.scheduler.wanted)
        self._cotangents = sum(allocated(n.meta["val"]) for n in memory.scheduler.joint.cotangents)

    def count(self, choice: Choice) -> Count:
        """What a decision about `Memory.values` comes to."""
        variables = self._variables
        kept = self._arguments | variables.set_of(choice.saved)
        gone = variables.set_of(n for n in choice.transient if producer(n) not in self._random)
        fleeting = variables.set_of(choice.fleeting)
        decided = kept | gone << variables.count | fleeting << 2 * variables.count
        piece = self._run(0, len(self._groups), 0, 0, decided)
        forward = self._forward.run(piece.taken)
        seconds = math.fsum(map(self._seconds.__getitem__, piece.again))
        return Count(forward.phase, self._backward(piece, forward), piece.again, seconds)

    def _run(self, begin: int, end: int, available: int, passing: int, decided: int) -> Piece:
        """The piece of some operations of backward.

        Args:
            begin: The first of `groups`.
            end: The one after the last.
            available: What is there.
            passing: What of that is let go.
            decided: What is saved, what is let go, and what is fleeting.
        """
        known = self._known.setdefault((begin, end), [])
        for i, piece in enumerate(known):
            if piece.fits(available, passing, decided):
                known.insert(0, known.pop(i))
                return piece
        if end - begin == 1:
            piece = self._leaf(begin, Piece(available, passing, decided))
        else:
            piece = Piece(available, passing, decided)
            step = -(-(end - begin) // _BRANCHES)
            for first in range(begin, end, step):
                there = piece.available_after, piece.passing_after
                part = self._run(first, min(first + step, end), *there, decided)
                piece.then(part, self._variables)
            piece.forget(self._variables)
        known.insert(0, piece)
        del known[_VARIANTS:]
        return piece

    def _leaf(self, g: int, piece: Piece) -> Piece:
        builder, (asks, node) = Builder(self._variables, piece, backward=True), self._groups[g]
        for ask in asks:
            builder.make_available(ask)
        if node is not None:
            builder.step(node)
        piece.end(*self._stay[g], self._variables)
        return piece

    def _backward(self, piece: Piece, forward: _Forward) -> _Phase:
        """The bytes of backward."""
        whole, places = piece.copied(), {}
        outputs = dict(forward.outputs)  # slots of forward, and their bytes
        for v in piece.taken:
            place, size = forward.handed(v)
            places[place] = len(whole.size)
            whole.hand(v, size, self._variables.value(v))
        held = [places[place] for place in outputs if place in places]
        for slot in (*held, *map(whole.assigned.__getitem__, self._wanted)):
            whole.read[slot] = _END
        besides = self._cotangents + sum(b for p, b in outputs.items() if p not in places)
        return _phase(whole, _settled(whole)[0], besides)


class _Forward:
    """Replays of forward, of which all that differs is what is kept."""

    def __init__(self, variables: Variables) -> None:
        self._variables, self._memory = variables, variables.memory
        self._scheduler, self._reinplacer = self._memory.scheduler, self._memory.reinplacer
        self._known: dict[Any, Piece] = {}
        self._outputs = variables.behind_all(self._scheduler.joint.outputs)

    def run(self, taken: Iterable[int]) -> _Forward:
        """A replay; what it comes to is in the attributes.

        Args:
            taken: What is kept: variables of backward.
        """
        variables, writes = self._variables, self._reinplacer.writes
        residuals = [variables.residuals[v] for v in taken]
        sources = [variables.sources[v] for v in taken]
        whole = self._piece(residuals).copied()
        kept = [v for v, r in zip(sources, residuals, strict=True) if isinstance(r, Node)]
        for v in (*self._outputs, *kept):
            whole.read[whole.assigned[v]] = _END
        given = self._given(whole)
        end, root = _settled(whole, set(range(len(writes))), self._slots(given))
        later = [variables.behind(n) for p, n in writes.items() if p not in given]
        later += sources
        for slot in (whole.assigned[v] for v in later if v is not None):
            end[root.get(slot, slot)] = _END
        self._whole, self._root = whole, root
        self.outputs = dict(map(self._place, self._outputs)) if self._memory.outputs_held else {}
        besides = sum(b for _, b in self._memory.held_by_call)
        self.phase = _phase(whole, end, besides)
        if self._memory.between:
            waiting = sum(size for size, e in zip(whole.size, end, strict=True) if e == _END)
            most = waiting + besides + self._memory.between
            self.phase = dataclasses.replace(self.phase, live=np.append(self.phase.live, most))
        return self

    def handed(self, variable: int) -> tuple[int, int]:
        """The slot of what backward gets, and its bytes."""
        return self._place(self._variables.sources[variable])

    def _place(self, variable: int) -> tuple[int, int]:
        slot = self._whole.assigned[variable]
        slot = self._root.get(slot, slot)
        return slot, self._whole.size[slot]

    def _piece(self, residuals: list[Residual]) -> Piece:
        always = self._scheduler.always
        values = [r for r in residuals if isinstance(r, Node) and r not in always]
        more = frozenset(reachable(values, stop=always.__contains__) - always)
        key = (more, tuple(r for r in residuals if not isinstance(r, Node)))
        if key not in self._known:
            piece = self._known[key] = Piece(0, 0, 0)
            for node in self._reinplacer.writes:
                piece.make(self._variables.of[node], [0], [None])
            builder = Builder(self._variables, piece, backward=False)
            for step in self._scheduler.forward_steps(residuals):
                if isinstance(step, State | Before):
                    builder.copy(step)
                elif step in self._variables.of:
                    builder.step(step)
        return self._known[key]

    def _given(self, whole: Piece) -> set[Node]:
        """The primals that mutations work on directly, see `reinplace`."""
        chains, given = self._reinplacer.chains, set(self._reinplacer.writes)
        mutations = {reuse.node: reuse for reuse in whole.reuses if reuse.copies >= 0}
        primals = self._slots(given)
        while given:
            slots = self._slots(given)
            kept = {
                p
                for p in given
                if not all(_is_last(mutations[n], whole, primals, slots) for n in chains[p])
            }
            if not kept:
                break
            given -= kept
        return given

    def _slots(self, primals: Collection[Node]) -> set[int]:
        return {i for i, p in enumerate(self._reinplacer.writes) if p in primals}


def _settled(
    piece: Piece, given: Collection[int] = (), may_change: Collection[int] = ()
) -> tuple[list[int], dict[int, int]]:
    """When each slot ends if results take the place of what dies; and which are others, in the end.

    Args:
        piece: All of a phase. Slots that are others have no bytes afterwards.
        given: Slots that are there before the phase; so are those that are negative.
        may_change: Those among these that mutations may work on.
    """
    size, read, tuples_read = piece.size, piece.read, piece.tuples_read
    end = [*map(max, read, tuples_read)]
    root: dict[int, int] = {}
    for reuse in piece.reuses:
        _, moment, slots, first, copies = reuse
        if copies >= 0:
            if _is_last(reuse, piece, given, may_change):
                for result, s in enumerate(slots, copies):
                    root[result] = r = root.get(s, s)
                    size[result], end[r] = 0, max(end[r], end[result])
            continue
        for s in slots:
            if s >= 0 and read[s] == moment and s not in given:
                r = root.get(s, s)
                end[r], size[first] = moment - 1, size[r]
                if tuples_read[r] >= moment:  # the tuple has the new one from now on
                    tuples_read[first] = tuples_read[r]
                    end[first] = max(end[first], tuples_read[r])
                break
    return end, root


def _is_last(
    reuse: Reuse, piece: Piece, given: Collection[int], may_change: Collection[int]
) -> bool:
    """Whether nobody reads what a mutation works on later, and it may be changed."""
    return all(
        s >= 0 and piece.read[s] <= reuse.moment and (s not in given or s in may_change)
        for s in reuse.slots
    )


def _phase(piece: Piece, end: list[int], besides: int) -> _Phase:
    """The bytes at all moments.

    Args:
        piece: All of a phase.
        end: When each slot ends.
        besides: Bytes that live all the time.
    """
    count = piece.count
    ends = np.minimum(np.array(end, dtype=np.int64), count - 1) + 1
    born, size = np.array(piece.born, dtype=np.int64), np.array(piece.size, dtype=np.float64)
    there = born < ends  # and floating-point numbers are exact up to 8 PiB
    change = np.bincount(born[there], size[there], count + 1)
    change -= np.bincount(ends[there], size[there], count + 1)
    live = np.cumsum(change[:count]).astype(np.int64) + besides
    return _Phase(live + np.array(piece.workspaces, dtype=np.int64), piece, end)
