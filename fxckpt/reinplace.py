"""Turns `ops.inplace` back into real mutation wherever nobody can tell the difference.

A joint graph never changes a value, so each mutation in it works on a copy. In a finished graph the
copy is needless if the old contents are not read afterwards, neither directly nor through a view,
and are not returned. That holds for nearly all mutations of real models, because autograd would
not allow them otherwise. What is left of an in-place operation is then the operation itself, on
the memory that eager mode would use.
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import getitem
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Graph, Node

from fxckpt import ops
from fxckpt.joint import in_order, producer, root

aten = torch.ops.aten


def reinplace(graph: Graph, writes: Mapping[Node, Node]) -> None:
    """Removes needless copies from a graph, in place, and adds the writes to its arguments.

    Args:
        graph: A forward or backward graph with an output node.
        writes: For each placeholder that the graph has to change, its final contents. All other
            placeholders keep theirs.
    """
    position, last_use = in_order(graph), _last_uses(graph)
    mutations = [n for n in graph.nodes if n.op == "call_function" and _is_mutation(n)]
    given = set(writes)

    def needless(node: Node) -> bool:
        return all(
            (_owner(base).op == "call_function" or base in given)
            and last_use[_owner(base)] <= position(node)
            for base in _bases(node)
        )

    # A placeholder is mutated directly only if that leads all the way to its final contents.
    while kept := {p for p in given if not all(map(needless, _chain(p, writes[p])))}:
        given -= kept
    donating = [n for n in mutations if needless(n)]
    final = {p: writes[p] for p in writes if p not in given}
    for node in donating:
        _donate(node)
    with graph.inserting_before(graph.output_node()):
        for placeholder, contents in final.items():
            graph.call_function(aten.copy_.default, (placeholder, contents))


def _is_mutation(node: Node) -> bool:
    return node.target in (ops.inplace, ops.inplace_with_rng_state)


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


def _owner(node: Node) -> Node:
    """The node whose memory a node is in."""
    node = root(node)
    while node.target is aten._unsafe_view.default:
        node = root(node.args[0])  # type: ignore[arg-type]
    return node


def _last_uses(graph: Graph) -> dict[Node, int]:
    """For each owner of memory, the position of the last node that reads it."""
    last: dict[Node, int] = {}
    for i, node in enumerate(graph.nodes):
        last.setdefault(_owner(node), i)
        for read in node.all_input_nodes:
            last[_owner(read)] = i
    return last


def _donate(node: Node) -> None:
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
