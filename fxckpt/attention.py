"""Finds the attention layers of a model, however they are written.

NOTE [How layers are found]

Attention, and feed-forward layers likewise (`feedforward.py`), are first looked for in the graph,
where names do not matter:

    attention       product - softmax - product, or one fused operation
    feed-forward    product - nonlinearity - product, ending at the width that it began with

then the region around such a core is widened to all that belongs to it: the projections before and
after. If a module call does nothing else, the region is that call; if the layer is written inline
in a larger call, it is the operations from the first projection to the last, and the modules
(`nn.Linear`) that hold the projections. What has no such core (linear attention, a mixture of
experts with its router) is found by the name of its class or attribute.

"Product" here is a matrix product (`ops.is_matrix_like`). Walks from a core stop at products, so
they stay local, whatever the size of the model.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection

from torch.fx import Node

from fxckpt import ops
from fxckpt.places import Call
from fxckpt.regions import (
    DENSE,
    NONLINEAR,
    SOFTMAX,
    Region,
    Structure,
    argument_behind,
    between,
    first_products,
    inline,
    inputs,
    is_product,
    numel,
    operands,
    operation_name,
    users,
    walk,
    with_results,
)

_NAME = re.compile(r"attention|attn|(^|_)mha($|_)", re.IGNORECASE)


@dataclasses.dataclass(slots=True)
class _Core:
    """The heart of an attention layer, from the scores to the weighted sum of values.

    `operands` are queries, keys and values; `last` are the operations whose results go to the
    output projection.
    """

    nodes: set[Node]
    operands: set[Node]
    last: set[Node]


def attentions(structure: Structure) -> list[Region]:
    """The attention layers of a model, in order."""
    cores = _merged(structure, _attention_cores(structure))
    found = [_attention(structure, core) for core in cores]
    covered = set().union(*(r.nodes for r in found))

    def named(call: Call) -> bool:
        scope = structure.scopes[call]
        return is_attention(call) and structure.has_product(call) and covered.isdisjoint(scope)

    calls = structure.outermost(lambda call: call.path != "" and named(call))
    if not calls and not found:
        calls = structure.outermost(named)
    return [*found, *(structure.region("attention", c) for c in calls)]


def is_attention(call: Call) -> bool:
    """Whether a module is attention by the name of its class or attribute."""
    names = (call.cls.__name__, call.path.rpartition(".")[2])
    return any(_NAME.search(name) for name in names)


def _attention_cores(structure: Structure) -> list[_Core]:
    found = []
    for node in structure.chains:
        if ops.is_attention(ops.operation(node)):
            nodes = set(with_results([node]))
            queries = {n for n in node.args[:3] if isinstance(n, Node) and n in structure.chains}
            found.append(_Core(nodes, queries, nodes))
        elif operation_name(node) in SOFTMAX and (core := _written_out(structure, node)):
            found.append(core)
    return found


def _written_out(structure: Structure, softmax: Node) -> _Core | None:
    """The core around a softmax if its input comes from a product and its result enters one.

    Between them lie operations on tensors of about the size of the scores: scaling, masks, casts,
    dropout, views, and a concatenated sink.
    """
    size = numel(softmax)

    def passes(node: Node) -> bool:
        return size / 2 <= numel(node) <= 2 * size and operation_name(node) not in SOFTMAX

    scores = {p for p in first_products([softmax], passes, inputs) if _has_no_weight(p)}
    sums = {p for p in first_products([softmax], passes, users) if _has_no_weight(p)}
    if not scores or not sums:
        return None
    near = walk(sums, inputs, lambda n: n is softmax or n in scores or passes(n))
    nodes = between(scores, sums, near)
    factors = {n for p in scores | sums for n in operands(p)} - nodes
    return _Core(nodes, {n for n in factors if n.op == "call_function"}, sums)


def _has_no_weight(product: Node) -> bool:
    """Whether a product is one of activations, not of an activation with a parameter."""
    if operation_name(product) in ("mm", "addmm"):
        return all(argument_behind(n) is None for n in operands(product))
    return operation_name(product) in DENSE


def _merged(structure: Structure, cores: list[_Core]) -> list[_Core]:
    """Cores in the same call of an attention module (a loop over heads) made one."""
    separate: list[_Core] = []
    by_home: dict[Call, _Core] = {}
    for core in cores:
        home = structure.common_calls(core.nodes)[-1]
        if not is_attention(home):
            separate.append(core)
            continue
        joint = by_home.setdefault(home, core)
        joint.nodes |= core.nodes
        joint.operands |= core.operands
        joint.last |= core.last
    return [*by_home.values(), *separate]


def _attention(structure: Structure, core: _Core) -> Region:
    """The region around a core: the widest call made for it alone, or what belongs to it inline."""
    chain = structure.common_calls(core.nodes)
    depth, nodes = len(chain) - 1, core.nodes
    if (chain[-1].path or is_attention(chain[-1])) and _serves(structure, core, chain[-1]):
        while depth > 1 and _widens(structure, core, chain[depth - 1], chain[depth]):
            depth -= 1
        whole = structure.region("attention", chain[depth])
        if depth == 0 or any(is_product(n) and n not in core.nodes for n in whole.nodes):
            return whole
        # A module of the core alone: its projections are in the call around it.
        depth, nodes = depth - 1, set(whole.nodes)
    scope = structure.scopes[chain[depth]]
    first = first_products(core.operands, scope.__contains__, inputs) & scope.keys()
    last = _output_projections(core, scope)
    nodes = nodes | between(first, core.nodes, scope) | between(core.last, last, scope)
    return inline(structure, "attention", chain[depth], nodes)


def _widens(structure: Structure, core: _Core, parent: Call, call: Call) -> bool:
    """Whether a parent call belongs to attention too: by its name, or as it holds projections."""
    more = any(is_product(n) for n in structure.scopes[parent].keys() - structure.scopes[call])
    return (more or is_attention(parent)) and _serves(structure, core, parent)


def _output_projections(core: _Core, scope: Collection[Node]) -> set[Node]:
    """The products that the result of attention enters before it joins the residual stream."""
    branch = walk(core.last, users, scope.__contains__)

    def passes(node: Node) -> bool:
        name = operation_name(node)
        return node in scope and not (
            _is_residual(node, branch) or ops.is_norm(ops.operation(node)) or name in SOFTMAX
        )

    after = {u for n in core.last for u in users(n)} - core.nodes
    return first_products(filter(passes, after), passes, users)


def _serves(structure: Structure, core: _Core, call: Call) -> bool:
    """Whether all products of a call are projections for this core.

    Those are: the core's own, those before it with no nonlinearity on the way to queries, keys and
    values (a feed-forward layer before attention has one), the output projection, and what the
    output projection needs (a gate).
    """
    scope = structure.scopes[call]
    last = _output_projections(core, scope)
    needed = walk([*core.nodes, *last], inputs, scope.__contains__)
    before = walk(core.operands & scope.keys(), inputs, scope.__contains__)
    bends = {n for n in before if operation_name(n) in NONLINEAR | SOFTMAX} - core.nodes
    foreign = walk(bends, inputs, scope.__contains__)
    return all(n in needed and n not in foreign for n in scope if is_product(n))


def _is_residual(node: Node, branch: Collection[Node]) -> bool:
    """Whether a node adds something that is not of `branch`, and larger than a bias."""
    terms = (n for n in node.all_input_nodes if numel(n) == numel(node))
    return operation_name(node) == "add" and any(n not in branch for n in terms)
