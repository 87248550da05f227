"""What usual strategies come to, as `torch.utils.checkpoint` runs them: memory and time.

NOTE [How torch runs a checkpointed region]

The first operation of backward that needs anything of a region lets all of it run again, not only
what it needs itself. By default that ends where all is there that the region had saved ("early
stop"); without, the region runs to its end. What backward reads is kept from then on until the last
operation has read it. Backward is eager's: no operation of it moves, and results take new memory
(`Memory(eager=True)`). In selective checkpointing, what is saved does not run again.

Not counted, in favour of these strategies: results that selective checkpointing keeps although
nothing reads them, and what a region that runs to its end holds besides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from torch.fx import Node

from fxckpt import ops
from fxckpt.attention import attentions
from fxckpt.errors import PolicyError
from fxckpt.joint import Joint, producer
from fxckpt.memory import Memory
from fxckpt.regions import Region, Structure
from fxckpt.schedule import Choice
from fxckpt.segments import blocks, read_by_backward, segments


class Usual(NamedTuple):
    """What a strategy comes to.

    Attributes:
        peak: Bytes.
        seconds: Of what runs again.
        whole: Likewise without early stop.
    """

    peak: int
    seconds: float
    whole: float


Find = Callable[[Structure], list[Region]]


def _blocks_or_segments(structure: Structure) -> list[Region]:
    return blocks(structure) or segments(structure)


def _all_but_the_last(structure: Structure) -> list[Region]:
    """As `checkpoint_sequential` does: backward of the last one follows at once."""
    return segments(structure)[:-1]


STRATEGIES: Mapping[str, tuple[Find, bool]] = {  # the regions, and whether products are saved
    "per-block checkpointing": (blocks, False),
    "selective, matmuls saved": (_blocks_or_segments, True),
    "attention recomputed": (attentions, False),
    "sqrt(n) segments": (_all_but_the_last, False),
}


def usual(name: str, memory: Memory, joint: Joint, seconds: Callable[[Node], float]) -> Usual:
    """What one of `STRATEGIES` comes to.

    Args:
        name: Which.
        memory: Of the graph, as eager runs it.
        joint: The graph.
        seconds: What an operation takes.

    Raises:
        PolicyError: if the model has no such regions.
    """
    find, selective = STRATEGIES[name]
    structure = Structure(joint)
    regions = find(structure)
    if not regions:
        raise PolicyError(f"{name}: the model has no such regions")
    replay = memory.replay(_checkpointed(structure, regions, selective))
    again = {*replay.again}
    rest = (n for r in regions for n in r.nodes if memory.facts[n].runs and n not in again)
    to_the_end = {n for n in rest if not (selective and _is_product(n))}
    least = math.fsum(map(seconds, replay.again))
    return Usual(replay.peak, least, least + math.fsum(map(seconds, to_the_end)))


def _is_product(node: Node) -> bool:
    return ops.is_matrix_like(ops.operation(producer(node)))


def _checkpointed(structure: Structure, regions: Iterable[Region], selective: bool) -> Choice:
    """Saves all that is not inside a region; what is runs again together with the others."""
    read = read_by_backward(structure.joint)
    saved = {value.node for value in structure.joint.values()}
    together = {}
    for region in regions:
        inside = structure.inside(region.nodes)
        if selective:
            inside = {n for n in inside if not _is_product(n)}
        saved -= inside
        wanted = tuple(n for n in region.nodes if n in inside and n in read)
        together.update(dict.fromkeys(region.nodes, wanted))
    return Choice(frozenset(saved), together=together)
