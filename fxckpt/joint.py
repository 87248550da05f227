"""The joint graph: forward and backward of a callable in one `torch.fx` graph.

A `Joint` is in static single assignment form: no node changes a value that another node reads.
Operations that mutate are `ops.inplace` nodes, which return new contents; what the callable does to
its inputs and buffers is listed in `writes`. The roles of its nodes:

    primals      placeholders: parameters, buffers, inputs and constants of the callable
    forward      what the callable ran, in the order in which it ran
    cotangents   placeholders: gradients of the outputs that take part
    backward     what the autograd engine ran for these cotangents, in order

NOTE [Contributions]

A parameter that is used twice (tied weights) gets two contributions, and autograd adds them to
whatever came before: ((before + c1) + c2). If a model is called twice in one step, or a parameter
appears in a penalty term, something did come before, and before + (c1 + c2) is another number.
So up to `MAX_CONTRIBUTIONS` of them are delivered one by one, and autograd adds them as in eager.

Every node carries in `meta`:

    val          the fake tensor (or tuple of them) that it produced
    phase        "forward" or "backward"
    path         the innermost module that ran it, of forward the one that it differentiates
    calls        all running module calls, from the root to the innermost
    source       the user's source line, "file.py:31"
    alias        the node whose storage it is a view of, if it is a view (views are free)
    like         of memory made after a tensor (`zeros_like`), the node of that tensor; not read
    nest         the checkpoints inside of the captured one that it is computed in, see `nests`
    tags         names given by `fxckpt.name`
    kind         what a primal is, see `Primal`
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from operator import getitem
from typing import Any

import torch
from torch.fx import Graph, Node

from fxckpt import ops
from fxckpt.places import ROOT, Position

MAX_CONTRIBUTIONS = 4  # beyond, holding them all would cost more memory than exactness is worth


@dataclasses.dataclass(slots=True)
class Primal:
    """An argument of the captured callable.

    `source` finds the tensor at call time: a container and the key in it, or None and the position
    among the flattened inputs of the call.
    """

    name: str
    kind: str  # "input", "parameter", "buffer", "attribute" or "constant"
    fake: torch.Tensor
    node: Node
    source: tuple[Any, Any]
    stand_in: torch.Tensor  # what Python sees: the fake, unless it is spread over processes
    leaves: list[torch.Tensor]  # what autograd sees as this tensor during capture

    @property
    def requires_grad(self) -> bool:
        """Whether a gradient is wanted."""
        return any(leaf.requires_grad for leaf in self.leaves)


@dataclasses.dataclass(slots=True)
class Joint:
    """Forward and backward of one callable for one signature. See the module's docstring."""

    graph: Graph
    primals: dict[str, Node]  # by primal name, used ones only
    cotangents: list[Node]
    outputs: list[Node]  # what forward returns, each on a storage of its own
    writes: dict[str, Node]  # primal name -> its contents after forward
    grads: dict[str, tuple[Node, ...]]  # primal name -> contributions to its gradient, in order
    position: Position = ROOT
    symbols: tuple[str, ...] = ()  # names in arguments, see `symbols`
    sizes: tuple[int, ...] = ()  # what these are in the call that it has the shapes of
    lean: int = 0  # what was done for less memory, see `lean`

    def forward_nodes(self) -> Iterator[Node]:
        """The operations of the forward phase, in execution order."""
        return self._nodes("forward")

    def backward_nodes(self) -> Iterator[Node]:
        """The operations of the backward phase, in execution order."""
        return self._nodes("backward")

    def _nodes(self, phase: str) -> Iterator[Node]:
        return (n for n in self.graph.nodes if n.op == "call_function" and n.meta["phase"] == phase)

    def values(self) -> list[Value]:
        """The forward values that can be saved: tensors that own their storage, in order."""
        return [Value(n) for n in self.forward_nodes() if is_value(n)]

    def verify(self) -> None:
        """Asserts the invariants of a joint graph; run after every rewrite in tests."""
        self.graph.lint()
        backward_seen = False
        for node in self.graph.nodes:
            if node.op != "call_function":
                continue
            assert "val" in node.meta, f"{node} has no value"
            backward_seen |= node.meta["phase"] == "backward"
            assert not (backward_seen and node.meta["phase"] == "forward"), f"{node} out of order"
            op = ops.operation(node)
            mutates = node.target is not ops.inplace and isinstance(op, torch._ops.OpOverload)
            if mutates:
                written = list(ops.mutated_arguments(op, node.args, node.kwargs))
                assert not written, f"{node} mutates its argument {written}"
            if node.meta.get("alias") is not None:
                assert node.meta["alias"] in node.all_input_nodes, f"{node} aliases a stranger"
        assert len(self.cotangents) <= len(self.outputs)


@dataclasses.dataclass(frozen=True)
class Value:
    """A tensor computed by forward, as policies see it.

    A policy is called with a `Value` and answers whether backward may keep it (`SAVE`) or has to
    compute it again (`RECOMPUTE`).
    """

    node: Node

    @property
    def name(self) -> str:
        """The name of the value in the printed graphs."""
        return self.node.name

    @property
    def op(self) -> Any:
        """The operation that computes it, e.g. `torch.ops.aten.mm.default`."""
        return ops.operation(producer(self.node))

    @property
    def path(self) -> str:
        """Path of the innermost module that computed it, e.g. `"layers.3.mlp.up"`."""
        return self.node.meta["path"]

    @property
    def module_types(self) -> tuple[type, ...]:
        """Classes of the modules that it was computed in, from the outermost to the innermost."""
        return tuple(call.cls for call in self.node.meta["calls"] if call.cls is not object)

    @property
    def source(self) -> str:
        """The user's source line, e.g. `"model.py:31"`; empty if there is none."""
        return self.node.meta["source"]

    @property
    def tags(self) -> tuple[str, ...]:
        """Names given to it by `fxckpt.name`."""
        return self.node.meta.get("tags", ())

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return tuple(self.node.meta["val"].shape)

    @property
    def dtype(self) -> torch.dtype:
        """Its element type."""
        return self.node.meta["val"].dtype

    @property
    def bytes(self) -> int:
        """Size of its storage in bytes."""
        return storage_bytes(self.node.meta["val"])

    @property
    def random(self) -> bool:
        """Whether it was drawn from a random generator."""
        return ops.node_is_random(producer(self.node))

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.shape)) or "scalar"
        return f"<Value {self.name}: {self.op} {shape} in {self.path or 'the root'!r}>"


def producer(node: Node) -> Node:
    """The operation that computed a value, also if the value is one of several results."""
    while node.target is getitem and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def is_value(node: Node) -> bool:
    """Whether a node is one tensor on a storage of its own (no view, no tuple, no placeholder)."""
    return (
        node.op == "call_function"
        and isinstance(node.meta["val"], torch.Tensor)
        and node.meta.get("alias") is None
    )


def memory_of(node: Node) -> Node | None:
    """The value in whose memory a value is, if it has none of its own."""
    if node.target is torch.ops.aten._unsafe_view.default:
        return node.all_input_nodes[0]
    return node.meta.get("alias")


def owner_of(node: Node) -> Node:
    """The value in whose memory a value is in the end."""
    while (shares := memory_of(node)) is not None:
        node = shares
    return node


def root(node: Node) -> Node:
    """The node that owns the storage of `node`."""
    while (alias := node.meta.get("alias")) is not None:
        node = alias
    return node


def storage_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a (fake) tensor's storage."""
    return tensor.untyped_storage().nbytes()


def reachable(seeds: list[Node], stop: Callable[[Node], bool] = lambda _: False) -> set[Node]:
    """All nodes that `seeds` depend on, themselves included; does not look behind `stop` nodes."""
    seen: set[Node] = set()
    stack = list(seeds)
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if not stop(node):
            stack.extend(node.all_input_nodes)
    return seen


def in_order(graph: Graph) -> Callable[[Node], int]:
    """A sort key: the position of a node in its graph."""
    positions = {node: i for i, node in enumerate(graph.nodes)}
    return functools.partial(dict.__getitem__, positions)
