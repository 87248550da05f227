"""Finds the attention and feed-forward parts of a model, however they are written.

NOTE [How they are found]

Both are first looked for in the graph, where names do not matter:

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
from collections import deque
from collections.abc import Callable, Collection, Iterable

from torch.fx import Node

from fxckpt import ops
from fxckpt.calls import Call
from fxckpt.joint import root
from fxckpt.regions import (
    Region,
    Structure,
    is_product,
    numel,
    operation_name,
    with_results,
)

_SOFTMAX = frozenset({"_softmax", "_safe_softmax", "_masked_softmax", "softmax"})
_NONLINEAR = frozenset(
    "celu clamp clamp_min elu erf gelu glu hardsigmoid hardswish hardtanh leaky_relu mish prelu "
    "_prelu_kernel relu relu6 rrelu rrelu_with_noise selu sigmoid silu softplus tanh "
    "threshold".split()
)
_DENSE = frozenset(
    "mm addmm bmm baddbmm addbmm mv addmv matmul linear _grouped_mm _scaled_mm "
    "_scaled_grouped_mm".split()
)
_ATTENTION_NAME = re.compile(r"attention|attn|(^|_)mha($|_)", re.IGNORECASE)
_MLP_CLASS = re.compile(
    r"(?i:(mlp|ffn|feed_?forward(network)?|moe|experts?|swiglu|geglu|dense(relu|act|gatedact)dense)"
    r"(block|layer|module|net)?\d*$)|FF(Layer)?$"
)
_MLP_ATTRIBUTE = re.compile(
    r"(^|_)(mlp|ffn?|ffwd|feed_?forward|moe|experts?|denserelu?dense)(_\w+)?\d*$", re.IGNORECASE
)

Step = Callable[[Node], Iterable[Node]]


@dataclasses.dataclass(slots=True)
class _Core:
    """The heart of an attention or feed-forward layer.

    `first` are the operations whose operands come from the projections, `last` those whose results
    go to the output projection; `nodes` are these and all between them.
    """

    nodes: set[Node]
    operands: set[Node]
    last: set[Node]


@dataclasses.dataclass(frozen=True, slots=True)
class _Layers:
    """The products of a perceptron: those before a nonlinearity and those after one."""

    first: set[Node]
    last: set[Node]

    @property
    def all(self) -> set[Node]:
        return self.first | self.last


def attentions(structure: Structure) -> list[Region]:
    """The attention layers of a model, in order."""
    cores = _merged(structure, _attention_cores(structure))
    found = [_attention(structure, core) for core in cores]
    covered = set().union(*(r.nodes for r in found))

    def named(call: Call) -> bool:
        scope = structure.scopes[call]
        return _is_attention(call) and structure.has_product(call) and covered.isdisjoint(scope)

    calls = structure.outermost(lambda call: call.path != "" and named(call))
    if not calls and not found:
        calls = structure.outermost(named)
    return [*found, *(structure.region("attention", c) for c in calls)]


def mlps(structure: Structure) -> list[Region]:
    """The feed-forward layers of a model, mixtures of experts included."""
    attention = set().union(*(r.nodes for r in attentions(structure)))

    def named(call: Call) -> bool:
        scope = structure.scopes[call]
        return (
            call.path != ""
            and _is_mlp(call)
            and structure.has_product(call)
            and any(operation_name(n) in _NONLINEAR for n in scope)
            and attention.isdisjoint(scope)
        )

    found = [structure.region("mlp", call) for call in structure.outermost(named)]
    covered = attention.union(*(r.nodes for r in found))
    unnamed = (p for p in _perceptrons(structure) if covered.isdisjoint(p.all))
    return [*found, *(_mlp(structure, layers) for layers in unnamed)]


def _is_attention(call: Call) -> bool:
    names = (call.cls.__name__, call.path.rpartition(".")[2])
    return any(_ATTENTION_NAME.search(name) for name in names)


def _is_mlp(call: Call) -> bool:
    attribute = call.path.rpartition(".")[2]
    if _is_attention(call):
        return False
    return bool(_MLP_CLASS.search(call.cls.__name__) or _MLP_ATTRIBUTE.search(attribute))


# --- walks --------------------------------------------------------------------------------------


def _inputs(node: Node) -> Iterable[Node]:
    return (n for n in node.all_input_nodes if n.op == "call_function")


def _users(node: Node) -> Iterable[Node]:
    return (n for n in node.users if n.op == "call_function" and n.meta["phase"] == "forward")


def _walk(
    starts: Iterable[Node], step: Step, enter: Callable[[Node], bool] = lambda _: True
) -> dict[Node, None]:
    """The nodes reached from `starts` by steps to nodes that may be entered, in the order found."""
    seen = dict.fromkeys(starts)
    queue = deque(seen)
    while queue:
        for node in step(queue.popleft()):
            if node not in seen and enter(node):
                seen[node] = None
                queue.append(node)
    return seen


def _products_before(
    starts: Iterable[Node], passes: Callable[[Node], bool], step: Step = _inputs
) -> set[Node]:
    """The first products met from `starts` on, through nodes that pass."""

    def onward(node: Node) -> Iterable[Node]:
        return () if is_product(node) else step(node)

    reached = _walk(starts, onward, lambda n: is_product(n) or passes(n))
    return set(filter(is_product, reached))


def _between(first: Iterable[Node], last: Iterable[Node], scope: Collection[Node]) -> set[Node]:
    """The nodes on the ways from `first` to `last` within `scope`, ends included."""
    above = _walk(last, _inputs, scope.__contains__)
    return set(_walk(first, _users, above.__contains__)) & above.keys()


def _is_residual(node: Node, branch: Collection[Node]) -> bool:
    """Whether a node adds something that forward computed outside of `branch`."""
    return operation_name(node) == "add" and any(n not in branch for n in _inputs(node))


# --- attention ----------------------------------------------------------------------------------


def _attention_cores(structure: Structure) -> list[_Core]:
    found = []
    for node in structure.chains:
        if ops.is_attention(ops.operation(node)):
            nodes = set(with_results([node]))
            queries = {n for n in node.args[:3] if isinstance(n, Node) and n in structure.chains}
            found.append(_Core(nodes, queries, nodes))
        elif operation_name(node) in _SOFTMAX and (core := _written_out(structure, node)):
            found.append(core)
    return found


def _written_out(structure: Structure, softmax: Node) -> _Core | None:
    """The core around a softmax if its input comes from a product and its result enters one.

    Between them lie operations on tensors of about the size of the scores: scaling, masks, casts,
    dropout, views, and a concatenated sink.
    """
    size = numel(softmax)

    def passes(node: Node) -> bool:
        return size / 2 <= numel(node) <= 2 * size and operation_name(node) not in _SOFTMAX

    scores = {p for p in _products_before([softmax], passes) if _has_no_weight(p)}
    sums = {p for p in _products_before([softmax], passes, _users) if _has_no_weight(p)}
    if not scores or not sums:
        return None
    nodes = _between(scores, sums, structure.chains)
    operands = {n for p in scores | sums for n in _operands(p)}
    return _Core(nodes, {n for n in operands - nodes if n in structure.chains}, sums)


def _has_no_weight(product: Node) -> bool:
    """Whether a product is one of activations, not of an activation with a parameter."""
    if operation_name(product) in ("mm", "addmm"):
        return all(root(n).op == "call_function" for n in _operands(product))
    return operation_name(product) in _DENSE


def _merged(structure: Structure, cores: list[_Core]) -> list[_Core]:
    """Cores in the same innermost call (heads in a loop, windows) put together."""
    by_call: dict[Call, _Core] = {}
    for core in cores:
        home = structure.common_calls(core.nodes)[-1]
        if home in by_call and _is_attention(home):
            known = by_call[home]
            known.nodes |= core.nodes
            known.operands |= core.operands
            known.last |= core.last
        else:
            by_call[home if _is_attention(home) else Call("", len(by_call), type(core))] = core
    return list(by_call.values())


def _attention(structure: Structure, core: _Core) -> Region:
    """The region around a core: the widest call made for it alone, or what belongs to it inline."""
    chain = structure.common_calls(core.nodes)
    home = chain[-1]
    if (home.path or _is_attention(home)) and _serves(structure, core, home):
        for parent in chain[-2:0:-1]:
            if not (_is_attention(parent) and _serves(structure, core, parent)):
                break
            home = parent
        return structure.region("attention", home)
    scope = structure.scopes[home]
    first = _products_before(core.operands, scope.__contains__) & scope.keys()
    last = _output_projections(core, scope)
    nodes = core.nodes | _between(first, core.nodes, scope) | _between(core.last, last, scope)
    return _inline(structure, "attention", home, nodes)


def _output_projections(core: _Core, scope: Collection[Node]) -> set[Node]:
    """The products that the result of attention enters before it joins the residual stream."""
    branch = _walk(core.last, _users, scope.__contains__)

    def passes(node: Node) -> bool:
        name = operation_name(node)
        return node in scope and not (
            _is_residual(node, branch) or ops.is_norm(ops.operation(node)) or name in _SOFTMAX
        )

    after = {u for n in core.last for u in _users(n)} - core.nodes
    return _products_before(filter(passes, after), passes, _users)


def _serves(structure: Structure, core: _Core, call: Call) -> bool:
    """Whether all products of a call are projections for this core.

    Those are: the core's own, those before it with no nonlinearity on the way to queries, keys and
    values (a feed-forward layer before attention has one), the output projection, and what the
    output projection needs (a gate).
    """
    scope = structure.scopes[call]
    last = _output_projections(core, scope)
    needed = _walk([*core.nodes, *last], _inputs, scope.__contains__)
    before = _walk(core.operands & scope.keys(), _inputs, scope.__contains__)
    bends = {n for n in before if operation_name(n) in _NONLINEAR | _SOFTMAX} - core.nodes
    foreign = _walk(bends, _inputs, scope.__contains__)
    return all(n in needed and n not in foreign for n in scope if is_product(n))


# --- feed-forward -------------------------------------------------------------------------------


def _perceptrons(structure: Structure) -> list[_Layers]:
    """Products with nonlinearities between them that lead back to the width they start from."""
    found: list[_Layers] = []
    for node in structure.chains:
        if operation_name(node) not in _NONLINEAR:
            continue
        layers = _around(node)
        if not layers.first or not layers.last or not all(map(_weight, layers.all)):
            continue
        for other in [f for f in found if f.all & layers.all]:
            found.remove(other)
            layers = _Layers(other.first | layers.first, other.last | layers.last)
        found.append(layers)
    return [layers for layers in found if _is_sound(layers)]


def _around(nonlinear: Node) -> _Layers:
    """The products after a nonlinearity, and those before them: the gate's too, if there is one.

    Between them lie operations on tensors of about the same size, in one branch.
    """
    size = numel(nonlinear)

    def passes(node: Node) -> bool:
        part = numel(node) == 0 and node.meta.get("alias") is not None  # a split
        near = size / 2 <= numel(node) <= 2 * size
        return (near or part) and operation_name(node) not in _SOFTMAX

    def in_branch(node: Node) -> bool:
        return passes(node) and not _joins_branches(node, passes)

    last = _products_before([nonlinear], in_branch, _users)
    entering = {n for p in last for n in _inputs(p) if in_branch(n)}
    return _Layers(_products_before([*entering, nonlinear], in_branch), last)


def _joins_branches(node: Node, passes: Callable[[Node], bool]) -> bool:
    """Whether a node adds what comes from different products: `x + f(x)`, unlike `x + x ** 3`."""
    if operation_name(node) != "add":
        return False
    terms = [n for n in node.all_input_nodes if n.op == "call_function" or numel(n) == numel(node)]
    origins = [_products_before([n], passes) for n in terms]
    return any(origin != origins[0] for origin in origins)


def _is_sound(layers: _Layers) -> bool:
    """Whether the layers keep the width, and none is applied twice (a recurrent network).

    More than a few layers are a network of their own, which is not worth recomputing as one.
    """
    if len(layers.first & layers.last) > 2:
        return False
    heads, tails = layers.first - layers.last, layers.last - layers.first
    weights = [_weight(p) for p in layers.all]
    widths_in = {_operands(p)[0].meta["val"].shape[-1] for p in heads}
    widths_out = {p.meta["val"].shape[-1] for p in tails}
    return len(widths_in) == 1 and widths_in == widths_out and len({*weights}) == len(weights)


def _operands(product: Node) -> tuple[Node, Node]:
    """The two factors of a dense product; the first argument of `addmm` is a summand."""
    start = 1 if operation_name(product).startswith(("addmm", "baddbmm", "addbmm", "addmv")) else 0
    return product.args[start], product.args[start + 1]  # type: ignore[return-value]


def _weight(product: Node) -> Node | None:
    """The argument of the callable that a dense product multiplies with, if it is one."""
    if operation_name(product) not in _DENSE:
        return None
    factor = root(_operands(product)[1])
    while operation_name(factor) == "_to_copy":  # autocast
        factor = root(factor.all_input_nodes[0])
    return factor if factor.op == "placeholder" else None


def _mlp(structure: Structure, layers: _Layers) -> Region:
    """The region of a perceptron: the innermost call around it, or what belongs to it inline."""
    chain = structure.common_calls(layers.all)
    home = chain[-1]
    if home.path and _has_only(structure, home, layers.all):
        for parent in chain[-2:0:-1]:
            if not (_is_mlp(parent) and _has_only(structure, parent, layers.all)):
                break
            home = parent
        return structure.region("mlp", home)
    nodes = _between(layers.first, layers.last, structure.scopes[home])
    return _inline(structure, "mlp", home, nodes)


# --- regions ------------------------------------------------------------------------------------


def _inline(structure: Structure, kind: str, home: Call, nodes: set[Node]) -> Region:
    """A region in a larger call: `nodes`, and the inner calls whose products are all among them."""
    nodes = set(nodes)
    for product in [n for n in nodes if is_product(n)]:
        chain = structure.chains[product]
        for call in chain[chain.index(home) + 1 :]:
            if _has_only(structure, call, nodes):
                nodes |= structure.scopes[call].keys()
                break
    return Region(kind, f"{home.name}: {kind}", frozenset(nodes))


def _has_only(structure: Structure, call: Call, nodes: Collection[Node]) -> bool:
    return all(n in nodes for n in structure.scopes[call] if is_product(n))
