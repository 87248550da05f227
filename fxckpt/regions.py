"""Regions: sets of forward operations that policies treat as one, such as an attention layer.

NOTE [What is recomputed of a region]

    inside      values that only the region itself reads: recomputed
    results     values that other operations of forward read, or that forward returns: kept
    inputs      are computed elsewhere

Backward formulas read inputs, results and internals of the operation that they differentiate. So a
value that no operation outside of the region reads in forward is read in backward, if at all, for
the sake of the region; the readers in backward need not be looked at.
"""

from __future__ import annotations

import dataclasses
import re
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Set
from itertools import takewhile
from operator import getitem

import torch
from torch.fx import Node

from fxckpt import ops
from fxckpt.joint import Joint, is_value, root
from fxckpt.places import Call, Chain

SOFTMAX = frozenset({"_softmax", "_safe_softmax", "_masked_softmax", "softmax"})
NONLINEAR = frozenset(
    "celu clamp clamp_min elu erf gelu glu hardsigmoid hardswish hardtanh leaky_relu mish prelu "
    "_prelu_kernel relu relu6 rrelu rrelu_with_noise selu sigmoid silu softplus tanh "
    "threshold".split()
)
DENSE = frozenset(
    "mm addmm bmm baddbmm addbmm mv addmv matmul linear _grouped_mm _scaled_mm "
    "_scaled_grouped_mm".split()
)

Step = Callable[[Node], Iterable[Node]]


@dataclasses.dataclass(frozen=True, slots=True)
class Region:
    """A set of forward operations.

    Attributes:
        kind: `"attention"`, `"mlp"`, `"norm"`, `"block"` or `"selected"`.
        name: The module call that it is, `"h.3.attn"`, or the one that it lies in.
        nodes: The operations, views included.
    """

    kind: str
    name: str
    nodes: frozenset[Node]


class Structure:
    """A joint graph with the calls of its modules and the readers of its values.

    Attributes:
        chains: The calls that each forward operation was computed in.
        scopes: The forward operations of each call, in order, those of inner calls included.
        readers: The operations of forward that read a value, directly or through a view.
        returned: The values that forward returns or writes to a buffer.
    """

    def __init__(self, joint: Joint) -> None:
        self.joint = joint
        self.chains: dict[Node, Chain] = {n: n.meta["calls"] for n in joint.forward_nodes()}
        self.scopes: dict[Call, dict[Node, None]] = {}  # ordered sets
        for node, chain in self.chains.items():
            for call in chain:
                self.scopes.setdefault(call, {})[node] = None
        self.readers: dict[Node, set[Node]] = {}
        for node in self.chains:
            for read in node.all_input_nodes:
                if read is not node.meta.get("alias"):
                    self.readers.setdefault(root(read), set()).add(node)
        self.returned = {root(n) for n in (*joint.outputs, *joint.writes.values())}

    def parents(self) -> dict[Call, Call]:
        """The call that each call was made in."""
        pairs = ((c[i], c[i + 1]) for c in self.chains.values() for i in range(len(c) - 1))
        return {inner: outer for outer, inner in pairs}

    def common_calls(self, nodes: Iterable[Node]) -> Chain:
        """The calls that contain all of `nodes`, from the root to the innermost."""
        chains = [self.chains[n] for n in nodes]
        levels = zip(*chains, strict=False)
        return tuple(level[0] for level in takewhile(lambda calls: len(set(calls)) == 1, levels))

    def results(self, nodes: Set[Node]) -> set[Node]:
        """The values among `nodes` that forward reads outside of `nodes`, or returns."""
        return {
            n
            for n in nodes
            if is_value(n) and (n in self.returned or self.readers.get(n, set()) - nodes)
        }

    def inside(self, nodes: Set[Node]) -> set[Node]:
        """The values among `nodes` that nothing else reads in forward."""
        return {n for n in nodes if is_value(n)} - self.results(nodes)

    def has_product(self, call: Call) -> bool:
        """Whether a call contains a matrix product, a convolution or the like."""
        return any(map(is_product, self.scopes[call]))

    def outermost(self, matches: Callable[[Call], bool]) -> list[Call]:
        """The calls that match and lie in no other one that does, in order."""
        verdicts = {call: matches(call) for call in self.scopes}
        first = (next((c for c in chain if verdicts[c]), None) for chain in self.chains.values())
        return list(dict.fromkeys(call for call in first if call is not None))

    def region(self, kind: str, call: Call) -> Region:
        """The region that is a whole module call."""
        return Region(kind, call.name, frozenset(self.scopes[call]))


def is_product(node: Node) -> bool:
    """Whether a node is a matrix product, a convolution, a recurrent layer or an attention."""
    return ops.is_matrix_like(ops.operation(node))


def operation_name(node: Node) -> str:
    """`"relu"` for `aten.relu.default` as well as for `aten.relu_.default`."""
    return ops.schema_name(ops.operation(node)).removeprefix("aten::").rstrip("_")


def with_results(nodes: Iterable[Node]) -> Iterator[Node]:
    """The nodes, and for each that has several results the nodes that select one."""
    for node in nodes:
        yield node
        yield from (user for user in node.users if user.target is getitem)


def norms(structure: Structure) -> list[Region]:
    """Normalisations: modules whose class says so, and the normalising operations elsewhere."""

    def is_norm(call: Call) -> bool:
        return bool(re.search("norm", call.cls.__name__, re.IGNORECASE)) and not (
            call.path == "" or structure.has_product(call)
        )

    found = [structure.region("norm", call) for call in structure.outermost(is_norm)]
    covered = set().union(*(r.nodes for r in found))
    for node, chain in structure.chains.items():
        if ops.is_norm(ops.operation(node)) and node not in covered:
            name = f"{chain[-1].name}: {node.name}"
            found.append(Region("norm", name, frozenset(with_results([node]))))
    return found


def all_of(structure: Structure, regions: Iterable[Region]) -> set[Node]:
    """All values of disjoint regions, results too, but those that one region hands to another.

    What enters a region is kept, so that recomputation never reaches back through several.
    """
    owner = {node: i for i, region in enumerate(regions) for node in region.nodes}

    def handed_on(node: Node) -> bool:
        mine = owner[node]
        return any(owner.get(r, mine) != mine for r in structure.readers.get(node, ()))

    return {n for n in owner if is_value(n) and not handed_on(n)}


def numel(node: Node) -> int:
    """How many elements the result of a node has; 0 if it has several results."""
    val = node.meta["val"]
    return val.numel() if isinstance(val, torch.Tensor) else 0


# --- walks --------------------------------------------------------------------------------------


def inputs(node: Node) -> Iterable[Node]:
    """The operations that a node reads from."""
    return (n for n in node.all_input_nodes if n.op == "call_function")


def users(node: Node) -> Iterable[Node]:
    """The operations of forward that read a node."""
    return (n for n in node.users if n.op == "call_function" and n.meta["phase"] == "forward")


def walk(
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


def first_products(starts: Iterable[Node], passes: Callable[[Node], bool], step: Step) -> set[Node]:
    """The first products met by steps from `starts` on, these included, through nodes that pass."""

    def onward(node: Node) -> Iterable[Node]:
        return () if is_product(node) else step(node)

    reached = walk(starts, onward, lambda n: is_product(n) or passes(n))
    return set(filter(is_product, reached))


def between(first: Iterable[Node], last: Iterable[Node], scope: Collection[Node]) -> set[Node]:
    """The nodes on the ways from `first` to `last` within `scope`, ends included."""
    above = walk(last, inputs, scope.__contains__)
    return set(walk(first, users, above.__contains__)) & above.keys()


def operands(product: Node) -> tuple[Node, Node]:
    """The two factors of a dense product; the first argument of `addmm` is a summand."""
    start = 1 if operation_name(product).startswith(("addmm", "baddbmm", "addbmm", "addmv")) else 0
    return product.args[start], product.args[start + 1]  # type: ignore[return-value]


def argument_behind(node: Node) -> Node | None:
    """The argument of the callable that a node is a view or a cast of, if it is one of any."""
    node = root(node)
    while operation_name(node) == "_to_copy":  # autocast
        node = root(node.all_input_nodes[0])
    return node if node.op == "placeholder" else None


def inline(structure: Structure, kind: str, home: Call, nodes: set[Node]) -> Region:
    """A region in a larger call.

    That is `nodes`, the inner calls whose products are all among them, and what is made for them
    alone out of nothing: random and causal masks, copies of weights in another type.
    """
    nodes = set(nodes)
    for product in [n for n in nodes if is_product(n)]:
        chain = structure.chains[product]
        for call in chain[chain.index(home) + 1 :]:
            if is_made_of(structure, call, nodes):
                nodes |= structure.scopes[call].keys()
                break
    return Region(kind, f"{home.name}: {kind}", frozenset(nodes | _made_for(nodes)))


def _made_for(nodes: Set[Node]) -> set[Node]:
    """The operations that only `nodes` read from, and that read from nothing but these."""
    private: dict[Node, None] = {}
    queue = deque(nodes)
    while queue:
        for node in inputs(queue.popleft()):
            used = (u in nodes or u in private for u in users(node))
            if node not in nodes and node not in private and all(used):
                private[node] = None
                queue.append(node)
    made: set[Node] = set()
    for node in reversed(private):  # inputs come before their readers
        reads = node.all_input_nodes
        if argument_behind(node) is not None or all(n in nodes or n in made for n in reads):
            made.add(node)
    for node in private:
        if not all(user in nodes or user in made for user in users(node)):
            made.discard(node)
    return made


def is_made_of(structure: Structure, call: Call, nodes: Collection[Node]) -> bool:
    """Whether all products of a call are among `nodes`."""
    return all(n in nodes for n in structure.scopes[call] if is_product(n))
