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
        The last operation of a function, and what it reads or is held until then.
    """
    functions = (node for node in backward if not is_sum_of_gradients(node))
    for task, group in groupby(functions, key=lambda node: node.meta.get("task")):
        nodes = [*group]
        made = [n for n in nodes if n.target is not getitem and n.meta.get("alias") is None]
        if task is not None and len(made) > 1:
            own = {*nodes}
            held = [n for node in nodes for n in node.all_input_nodes if n not in own]
            yield made[-1], tuple(dict.fromkeys((*made[-1].all_input_nodes, *held)))


def is_sum_of_gradients(node: Node) -> bool:
    """Whether an operation of backward adds up two gradients, which comes between functions."""
    if ops.operation(node) not in (aten.add.Tensor, aten.add_.Tensor):
        return False
    return all(n.meta.get("phase") != "forward" for n in (node, *node.all_input_nodes))
