"""Cuts a forward graph into parts that are recomputed one at a time: blocks, or segments.

NOTE [Which parts are good]

Backward recomputes one part after the other, each from what was kept, so that it needs

    kept bytes  +  bytes inside the largest part

where the bytes inside are those that backward reads of the part. Both searches below minimise this
number. It leaves out gradients and temporaries, which do not depend on the choice much.
"""

from __future__ import annotations

import dataclasses
import itertools
from bisect import bisect_right
from collections.abc import Collection, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from torch.fx import Node

from fxckpt.joint import Joint, is_value, producer, root, storage_bytes
from fxckpt.places import Call, kind
from fxckpt.regions import Region, Structure, argument_behind


def read_by_backward(joint: Joint) -> set[Node]:
    """The forward values that backward reads if all of them are kept."""
    return {
        root(read)
        for node in joint.backward_nodes()
        for read in node.all_input_nodes
        if is_forward_value(root(read))
    }


def is_forward_value(node: Node) -> bool:
    """Whether a node is a value that forward computes."""
    return is_value(node) and node.meta["phase"] == "forward"


def _bytes(nodes: Iterable[Node]) -> int:
    return sum(storage_bytes(n.meta["val"]) for n in nodes)


# --- blocks -------------------------------------------------------------------------------------


def blocks(structure: Structure) -> list[Region]:
    """The repeated blocks of a model.

    Candidates are the calls of one class (of several modules or of one that is shared), if it is
    called at least twice and multiplies something. Classes are taken up one after the other (the
    decoder's layers besides the encoder's), each time the one that lowers the memory estimate most
    (see the note above), until none does. A call that is taken up replaces those inside of it;
    calls inside one that was taken up before stay out.
    """
    costs = _Costs(structure)
    groups = [g for g in _groups(structure) if costs.estimate(g) < costs.estimate([])]
    chosen: list[Call] = []
    while True:
        options = [_joined(structure, chosen, group) for group in groups]
        best = min(options, key=costs.estimate, default=chosen)
        if costs.estimate(best) >= costs.estimate(chosen):
            return [structure.region("block", call) for call in chosen]
        chosen = best


def _joined(structure: Structure, chosen: list[Call], group: list[Call]) -> list[Call]:
    """The outermost calls of both."""
    return structure.outermost({*chosen, *group}.__contains__)


def _groups(structure: Structure) -> list[list[Call]]:
    """The calls of each kind that is called several times; none lies in another of its kind.

    Of a part of which the model has several, that may be the part itself.
    """
    kinds = {call: kind(call.path, call.cls) for call in structure.scopes}
    groups = [
        structure.outermost(lambda call, wanted=wanted: kinds[call] == wanted)  # type: ignore[misc]
        for wanted in sorted(set(kinds.values()) - {None}, key=str)
    ]
    copies = structure.joint.position.copies
    return [g for g in groups if len(g) * copies > 1 and any(map(structure.has_product, g))]


class _Costs:
    """The memory estimate of a choice of calls to recompute."""

    def __init__(self, structure: Structure) -> None:
        self.structure = structure
        # Copies of weights that autocast made are no reason to call something a block.
        read = read_by_backward(structure.joint)
        self.read = {n for n in read if argument_behind(n) is None}
        self._known: dict[Call, tuple[set[Node], set[Node], int]] = {}

    def estimate(self, calls: Collection[Call]) -> int:
        """Bytes kept (of all copies, if this is a part) and bytes inside the largest call."""
        inside, inputs, largest = set(), set(), 0
        for call in calls:
            own, read, size = self._of(call)
            inside |= own
            inputs |= read
            largest = max(largest, size)
        copies = self.structure.joint.position.copies
        return _bytes((self.read | inputs) - inside) * copies + largest

    def _of(self, call: Call) -> tuple[set[Node], set[Node], int]:
        """What is inside a call, what it reads from outside, and its bytes for backward."""
        if call not in self._known:
            scope = self.structure.scopes[call]
            inside = self.structure.inside(scope.keys())
            roots = {root(read) for node in scope for read in node.all_input_nodes}
            inputs = {n for n in roots if n not in scope and is_forward_value(n)}
            self._known[call] = inside, inputs, _bytes(inside & self.read)
        return self._known[call]


# --- segments -----------------------------------------------------------------------------------

_MOST_CUTS = 256  # candidates; the search takes time in the square of it
_LIMITS = 32  # limits on the bytes inside a segment, denser among the small ones

Numbers = NDArray[np.int64]


@dataclasses.dataclass(frozen=True, slots=True)
class _Lives:
    """For each value of forward: where it is made, where forward reads it last, and its bytes.

    `needed` are its bytes if backward reads it, else 0. A cut at `i` stands before operation `i`.
    """

    values: list[Node]
    made: Numbers
    last: Numbers
    size: Numbers
    needed: Numbers
    length: int

    def crossing(self, cut: int) -> NDArray[np.bool_]:
        """Which values are made before a cut and read after it."""
        return (self.made < cut) & (self.last >= cut)


def segment_inputs(structure: Structure) -> set[Node]:
    """The values that cross the cuts between about sqrt(n) segments of equal size.

    Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016: a chain of n layers, cut
    into sqrt(n) segments, needs O(sqrt(n)) memory. Here the layers are single operations, the graph
    need not be a chain, and cuts are chosen to minimise kept bytes + bytes inside the largest
    segment: for each of some limits on the latter, dynamic programming finds the cheapest cuts.
    """
    lives = _lives(structure)
    crossing = np.zeros(len(lives.values), dtype=np.bool_)
    for cut in _best_cuts(lives):
        crossing |= lives.crossing(cut)
    return {v for v, crosses in zip(lives.values, crossing, strict=True) if crosses}


def segments(structure: Structure) -> list[Region]:
    """These segments, in order."""
    position = {node: i for i, node in enumerate(structure.chains)}
    cuts = sorted(_best_cuts(_lives(structure)))
    found: list[set[Node]] = [set() for _ in range(len(cuts) + 1)]
    for node in position:  # with all results of one operation in one segment
        found[bisect_right(cuts, position[producer(node)])].add(node)
    return [Region("segment", str(i), frozenset(nodes)) for i, nodes in enumerate(found)]


def _best_cuts(lives: _Lives) -> list[int]:
    cuts = _candidates(lives)
    kept, inside = _tables(lives, cuts)
    sizes = np.unique(inside)
    some = np.unique(np.geomspace(1, len(sizes), _LIMITS).astype(np.int64)) - 1
    plans = [_cheapest(kept, inside, limit) for limit in sizes[some]]
    _, chosen = min((plan for plan in plans if plan is not None), key=lambda plan: plan[0])
    return [cuts[i] for i in chosen]


def _lives(structure: Structure) -> _Lives:
    position = {node: i for i, node in enumerate(structure.chains)}
    read = read_by_backward(structure.joint)
    values = [n for n in position if is_value(n)]
    size = [storage_bytes(n.meta["val"]) for n in values]
    last = [max((position[r] for r in structure.readers.get(n, ())), default=-1) for n in values]
    return _Lives(
        values,
        _numbers(position[producer(n)] for n in values),
        _numbers(last),
        _numbers(size),
        _numbers(s * (n in read) for n, s in zip(values, size, strict=True)),
        len(position),
    )


def _numbers(values: Iterable[int]) -> Numbers:
    return np.array(list(values), dtype=np.int64)


def _candidates(lives: _Lives) -> list[int]:
    """Cuts to choose from: begin, end, and where the fewest bytes cross in each stretch between."""
    crossing = [int(lives.size[lives.crossing(i)].sum()) for i in range(lives.length + 1)]
    inner = range(1, lives.length)
    stretches = [s for s in np.array_split(inner, min(_MOST_CUTS, max(len(inner), 1))) if len(s)]
    return [0, *(int(min(s, key=crossing.__getitem__)) for s in stretches), lives.length]


def _tables(lives: _Lives, cuts: Sequence[int]) -> tuple[Numbers, Numbers]:
    """For segments from cut `j` to cut `i`: bytes kept of it, bytes inside, as [i, j] of tables."""
    kept = np.zeros((len(cuts), len(cuts)), dtype=np.int64)
    inside = np.zeros_like(kept)
    starts = np.searchsorted(lives.made, cuts)  # index of the first value made after each cut
    for i, cut in enumerate(cuts):
        crosses = lives.crossing(cut)
        before = lives.made < cut
        kept[i] = _sums_from(lives.size * crosses, starts)
        inside[i] = _sums_from(lives.needed * (before & ~crosses), starts)
    return kept, inside


def _sums_from(numbers: Numbers, starts: Numbers) -> Numbers:
    """The sum of `numbers[start:]` for each start."""
    return np.append(np.cumsum(numbers[::-1])[::-1], 0)[starts]


def _cheapest(kept: Numbers, inside: Numbers, limit: int) -> tuple[int, list[int]] | None:
    """The cuts that keep the fewest bytes with no segment over the limit, and what they cost."""
    count = len(kept)
    cost = np.zeros(count)
    previous = np.zeros(count, dtype=np.int64)
    for i in range(1, count):
        total = np.where(inside[i, :i] <= limit, cost[:i] + kept[i, :i], np.inf)
        previous[i] = int(total.argmin())
        cost[i] = total[previous[i]]
    if np.isinf(cost[-1]):
        return None
    path = [count - 1]
    while path[-1]:
        path.append(int(previous[path[-1]]))
    largest = max((int(inside[i, j]) for i, j in itertools.pairwise(path)), default=0)
    return int(cost[-1]) + largest, path[1:-1]
