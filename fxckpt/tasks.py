"""What functions of autograd hold in eager mode: all that they work on, until they are done.

An operation of backward knows the function that ran it, by the number that autograd gives to each
(`meta["task"]`, see `recorder`). A graph has no functions any more: there, what an operation reads
for the last time may go right after it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from operator import getitem

import torch
from torch.fx import Node

from fxckpt import ops

aten = torch.ops.aten


def held_until_done(backward: Iterable[Node]) -> Iterator[tuple[Node, tuple[Node, ...]]]:
    """What functions of several operations hold.

    Args:
        backward: The operations, in the order in which they run.

    Yields:
        The last operation of a function, and what it or an earlier one read and none of them made.
    """
    own = (node for node in backward if not _adds_up(node))
    for task, group in groupby(own, key=lambda node: node.meta.get("task")):
        nodes = [*group]
        made = [n for n in nodes if n.target is not getitem and n.meta.get("alias") is None]
        if task is not None and len(made) > 1:
            reads = dict.fromkeys(read for node in nodes for read in node.all_input_nodes)
            yield made[-1], tuple(read for read in reads if read not in nodes)


def _adds_up(node: Node) -> bool:
    """Whether this is the sum of two gradients, which comes when a function is done."""
    sums = (aten.add.Tensor, aten.add_.Tensor)
    return ops.operation(node) in sums and all(
        read.meta.get("phase") != "forward" for read in node.all_input_nodes
    )
