"""What the replay of a decision tells: the bytes at every moment, and where values live."""

from __future__ import annotations

import functools
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.fx import Node

from fxckpt.ledger import Ledger
from fxckpt.schedule import Before, Schedule, Step

# What live bytes are, see `Replay.by_kind`. A storage that is of several kinds is of the first.
KINDS = ("outputs", "gradients", "saved", "recomputed", "temporary")


class Moment(NamedTuple):
    """One operation that runs.

    Attributes:
        node: The operation in the joint graph; for a step that is not there (the copy of a
            generator's state, or of a buffer), what it is for.
        phase: "forward", "recompute" or "backward".
        live: Bytes that exist while it runs: operands, results, and all that is kept.
    """

    node: Node
    phase: str
    live: int


class Needs(NamedTuple):
    """Bytes that forward and backward need as a part of a larger step.

    Gradients that arrive are those of somebody else.

    Attributes:
        kept: Between forward and backward, but for outputs.
        outputs_kept: Outputs that backward reads.
        forward: The most while forward runs, outputs included.
        backward: The most while backward runs, if somebody else holds the outputs.
        backward_alone: Likewise if nobody does.
    """

    kept: int
    outputs_kept: int
    forward: int
    backward: int
    backward_alone: int


class Replay:
    """What a decision does to memory.

    Attributes:
        saved: Bytes that forward hands to backward.
        again: The forward operations that run again, in order; some may do so several times.
        live: Bytes at each of `moments`.
        schedule: What runs.

    Args:
        saved: See above.
        again: See above.
        ledger: The books.
        boundary: The time at which backward starts.
        schedule: See above.
        kinds: The storages of some of `KINDS`.
    """

    def __init__(
        self,
        saved: int,
        again: tuple[Node, ...],
        ledger: Ledger,
        boundary: int,
        schedule: Schedule,
        kinds: Mapping[str, Collection[int]],
    ) -> None:
        self.saved, self.again, self.schedule, self._given_kinds = saved, again, schedule, kinds
        self._ledger, self._boundary = ledger, boundary
        at_all = np.array(ledger.live(), dtype=np.int64)
        times = [time for time, *_ in ledger.notable]
        workspaces = [workspace for *_, workspace in ledger.notable]
        self.live: NDArray[np.int64] = at_all[times] + np.array(workspaces, dtype=np.int64)

    @functools.cached_property
    def moments(self) -> tuple[Moment, ...]:
        """The operations in the order in which they run, without views."""
        return tuple(map(Moment, self._nodes(), self._phases(), self.live.tolist()))

    @property
    def recomputed(self) -> frozenset[Node]:
        """The forward operations that run again."""
        return frozenset(self.again)

    @property
    def peak(self) -> int:
        """The most that lives at any moment."""
        return int(self.live.max(initial=0))

    @property
    def forward_peak(self) -> int:
        """The most that lives at any moment of forward."""
        return int(self.live[: self._first_of_backward].max(initial=0))

    @property
    def backward_peak(self) -> int:
        """The most that lives at any moment of backward, recomputation included."""
        return int(self.live[self._first_of_backward :].max(initial=0))

    @property
    def _first_of_backward(self) -> int:
        """The first of `moments` that is not of forward."""
        return bisect_left(self._ledger.notable, self._boundary, key=lambda entry: entry[0])

    def lives(self) -> Iterator[tuple[Node, int, int]]:
        """Where values that are kept or computed again live in backward.

        Each operation of backward is two moments: 2 k is where most lives while something is
        computed again for operation k, 2 k + 1 is where that runs itself.

        Yields:
            The value, and the first and last of the moments at which it is there; one that is
            computed several times comes several times. The first is -1 for what forward made.
        """
        times = self._times_of_backward()
        for node, born, read in self._ledger.lives():
            first = bisect_left(times, born) if born > self._boundary else -1
            last = bisect_right(times, read) - 1
            if node.meta.get("phase") == "forward" and last >= max(first, 0):
                yield node, first, last

    def before_backward(self) -> list[int]:
        """What is there already when each operation of backward runs."""
        older = self._ledger.older()
        entries = zip(self._phases(), self._ledger.notable, strict=True)
        return [older[time] for phase, (time, *_) in entries if phase == "backward"]

    def at_peak(self) -> list[tuple[Node, int]]:
        """The first value on each storage that lives at the peak, and its bytes; largest first."""
        if not len(self.live):
            return []
        time, *_ = self._ledger.notable[int(self.live.argmax())]
        alive = ((node, size) for _, node, size in self._ledger.alive(time))
        return sorted(alive, key=lambda entry: entry[1], reverse=True)

    def kept_apart(self) -> tuple[int, int]:
        """Bytes that are kept for backward and are no outputs, and those of outputs that are."""
        sizes, given = self._ledger.sizes, self._given_kinds
        both = {*given["saved"]} & {*given["outputs"]}
        return sum(sizes[s] for s in self._storages["saved"]), sum(sizes[s] for s in both)

    # -- for reports

    def by_kind(self) -> dict[str, NDArray[np.int64]]:
        """What `live` is made of: bytes of each of `KINDS` at each of `moments`.

        outputs     what forward returns, and the gradients that arrive for it
        gradients   of parameters and inputs, which backward returns
        saved       what forward hands to backward, and what is kept to run forward again
        recomputed  values that are computed again
        temporary   all else: what an operation or the next ones read and drop, gradients of
                    activations, and workspaces
        """
        times = [time for time, *_ in self._ledger.notable]
        found = {
            kind: np.array(self._ledger.live_of(storages), dtype=np.int64)[times]
            for kind, storages in self._storages.items()
        }
        return {**found, "temporary": self.live - sum(found.values())}

    def holdings(self, moment: int) -> list[tuple[Node, str, int]]:
        """What lives at one of `moments`: the first value on each storage, its kind and bytes."""
        time, node, workspace = self._ledger.notable[moment]
        kinds = {s: kind for kind, storages in self._storages.items() for s in storages}
        found = [
            (owner, kinds.get(storage, "temporary"), size)
            for storage, owner, size in self._ledger.alive(time)
        ]
        return found + ([(node, "temporary", workspace)] if workspace else [])

    def kept(self) -> list[tuple[Step, int]]:
        """The residuals, and the bytes that each adds to `saved`."""
        seen: set[int] = set()
        found = []
        for step in self.schedule.residuals:
            places = self._ledger.of([step.node if isinstance(step, Before) else step]) - seen
            found.append((step, sum(self._ledger.sizes[s] for s in places)))
            seen |= places
        return found

    @functools.cached_property
    def _storages(self) -> dict[str, set[int]]:
        """The storages of each kind but the last; none is of two."""
        again = self._ledger.made_again(self._boundary)
        known: set[int] = set()
        found = {}
        for kind in KINDS[:-1]:
            found[kind] = {*(again if kind == "recomputed" else self._given_kinds[kind])} - known
            known |= found[kind]
        return found

    def _nodes(self) -> Iterator[Node]:
        return (node for _, node, _ in self._ledger.notable)

    def _phases(self) -> Iterator[str]:
        for time, node, _ in self._ledger.notable:
            again = time > self._boundary and node.meta["phase"] == "forward"
            yield "forward" if time < self._boundary else "recompute" if again else "backward"

    def _times_of_backward(self) -> list[int]:
        """When the moments of `lives` are."""
        times, most = [], (0, 0)
        entries = zip(self._phases(), self._ledger.notable, self.live.tolist(), strict=True)
        for phase, (time, *_), live in entries:
            if phase == "backward":
                times += [most[1] or time, time]
                most = 0, 0
            elif phase == "recompute":
                most = max(most, (live, time))
        return times
