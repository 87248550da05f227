"""Joint graph in; the same with a backward that needs less memory at a time, and the same bits.

For plans (see `planner`): what eager runs stays what policies and eager's own peak are about.

    gradients first     What finishes the gradient of a primal runs as soon as it can: that of a
                        weight before that of the layer's input, so that the input can die.
    convolutions        are differentiated in two calls, by the weight and then by the input: where
                        that can die in between, or, if they are among the largest, be let go.
    sides               What tells where gradients pass is something smaller, or there anyway, see
                        `sides`.
    slices              Views that outlive what they are views of are copied, see `slices`.
    shapes alone        Some operations of backward take an operand for its shape. They get memory
                        of one element that looks like it, and nobody keeps the operand for them.

None of this changes what a kernel computes: the order of sums is that of `add` nodes, and kernels
decide by shapes, dtypes and strides what they do. The looks of contiguous operands can be imitated;
others decide about the layout of results, and are left alone.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterator
from operator import getitem
from typing import Any

import torch
from torch.fx import Graph, Node

from fxckpt import ops
from fxckpt.joint import Joint, memory_of, owner_of, storage_bytes
from fxckpt.sides import tell_otherwise
from fxckpt.slices import copy_what_waits
from fxckpt.symbols import blank, looks

aten = torch.ops.aten

_LARGE = 0.4  # of the largest convolution


class Lean(enum.IntFlag):
    """What to do."""

    CHEAP = 1  # what hardly costs anything
    TWO_CALLS = 2  # for the largest convolutions: for decisions that let go between readers
    SLICES = 4  # copies of what waits, which take time


def lean(joint: Joint, what: int = Lean.CHEAP) -> Joint:
    """A joint graph of the same results, whose backward needs less memory at a time.

    Args:
        joint: The graph; it stays as it is.
        what: See `Lean`; 0 for nothing.
    """
    if not what:
        return joint
    new = dataclasses.replace(_reordered(joint), lean=int(what))
    for node in _worth_two_calls(new, largest=bool(what & Lean.TWO_CALLS)):
        _differentiate_twice(node)
    tell_otherwise(new)
    if what & Lean.SLICES:
        copy_what_waits(new)
    for node in [*new.backward_nodes()]:
        for position in ops.read_for_shape(node):
            _imitate(node, position)
    return new


# --- gradients first ------------------------------------------------------------------------------


def _reordered(joint: Joint) -> Joint:
    graph = Graph()
    copies: dict[Node, Node] = {}
    for node in (*_placeholders(joint), *joint.forward_nodes(), *_gradients_first(joint)):
        copies[node] = copy = graph.node_copy(node, copies.__getitem__)
        if (alias := node.meta.get("alias")) is not None:
            copy.meta["alias"] = copies[alias]
    output = joint.graph.output_node()
    graph.node_copy(output, copies.__getitem__)
    return dataclasses.replace(
        joint,
        graph=graph,
        primals={name: copies[n] for name, n in joint.primals.items()},
        cotangents=[copies[n] for n in joint.cotangents],
        outputs=[copies[n] for n in joint.outputs],
        writes={name: copies[n] for name, n in joint.writes.items()},
        grads={name: tuple(copies[n] for n in each) for name, each in joint.grads.items()},
    )


def _placeholders(joint: Joint) -> Iterator[Node]:
    return (n for n in joint.graph.nodes if n.op == "placeholder")


def _gradients_first(joint: Joint) -> list[Node]:
    """The operations of backward, those that finish gradients as early as possible."""
    nodes = [*joint.backward_nodes()]
    place = {node: i for i, node in enumerate(nodes)}
    early = _for_gradients_alone(joint, nodes)
    # Right after the last operand that is not early itself; -1 is before all others.
    after: dict[Node, int] = {}
    for node in nodes:
        operands = [m for m in node.all_input_nodes if m in place]
        behind = (after[m] if m in early else place[m] for m in operands)
        after[node] = max(behind, default=-1) if node in early else place[node]
    for node in reversed(nodes):  # views are taken where they are read
        if node in early and node.users and all(user in early for user in node.users):
            after[node] = max(after[node], min(after[user] for user in node.users))
    return sorted(nodes, key=lambda n: (after[n], n in early, place[n]))


def _for_gradients_alone(joint: Joint, nodes: list[Node]) -> set[Node]:
    """The operations that finish gradients, what is done to the result, and views for them."""
    wanted = {g for each in joint.grads.values() for g in each}
    found: set[Node] = set()
    for node in reversed(nodes):
        readers = [user for user in node.users if user.op != "output"]
        finished = node in wanted or all(map(_passes_on, readers))
        only = (finished or _passes_on(node)) and all(user in found for user in readers)
        if only and not ops.always_runs(node):
            found.add(node)
    return found


def _passes_on(node: Node) -> bool:
    """Whether a node gives its operand another look."""
    return memory_of(node) is not None or node.target is aten._to_copy.default


# --- convolutions ---------------------------------------------------------------------------------


def _worth_two_calls(joint: Joint, *, largest: bool) -> list[Node]:
    """The convolutions of backward by a value and the weight for which it helps if that can go.

    Args:
        joint: The graph.
        largest: Whether these are among them whoever reads the value later.
    """
    nodes = [*joint.backward_nodes()]
    last = {owner_of(read): node for node in nodes for read in node.all_input_nodes}
    found = []
    for node in nodes:
        x: Any
        mask: Any
        if node.target is aten.convolution_backward.default:
            x, mask = node.args[1], node.args[-1]
            made = x.op == "call_function" and can_be_imitated(x.meta["val"])
            if made and mask[0] and mask[1]:
                found.append((node, owner_of(x), _bytes(node)))
    large = _LARGE * max((size for _, _, size in found), default=0)
    return [node for node, x, size in found if last[x] is node or (largest and size >= large)]


def _bytes(node: Node) -> int:
    """What the backward of a convolution reads and makes."""
    gradient: Any
    x: Any
    gradient, x, *_ = node.args
    return storage_bytes(gradient.meta["val"]) + 2 * storage_bytes(x.meta["val"])


def _differentiate_twice(node: Node) -> None:
    """Replaces a call for both gradients by one for each, that of the weight first."""
    mask: Any
    *rest, mask = node.args
    by_weight = _like(node, (*rest, [False, *mask[1:]]), node.name + "_weight")
    by_input = _like(node, (*rest, [True, False, False]), node.name + "_input")
    for user in [*node.users]:
        assert user.target is getitem, "it has several results"
        user.replace_input_with(node, by_input if user.args[1] == 0 else by_weight)
    node.graph.erase_node(node)


def _like(node: Node, args: tuple[Any, ...], name: str) -> Node:
    """The same operation with another mask, before it."""
    with node.graph.inserting_before(node):
        made = node.graph.create_node("call_function", node.target, args, {}, name)
    results = zip(node.meta["val"], args[-1], strict=True)
    made.meta = {**node.meta, "val": tuple(t if wanted else None for t, wanted in results)}
    return made


# --- shapes alone ---------------------------------------------------------------------------------


def can_be_imitated(val: torch.Tensor) -> bool:
    """Whether kernels take one element, expanded, for what a tensor looks like.

    Then they see neither layout as the one to keep, and take that for contiguous memory.
    """
    return looks(val).contiguous and val.numel() > 1


def _imitate(node: Node, position: int) -> None:
    """Gives an operation a tensor of one element in the place of an operand."""
    operand: Any = node.args[position]
    val = operand.meta["val"]
    if operand.op != "call_function" or not can_be_imitated(val):
        return
    fake = blank(val)
    args = ([*looks(val).size], list(fake.stride()))
    options: dict[str, Any] = {"dtype": val.dtype, "device": val.device}
    with node.graph.inserting_before(node):
        made = node.graph.call_function(aten.empty_strided.default, args, options)
    made.meta = {**node.meta, "val": fake}
    node.update_arg(position, made)
