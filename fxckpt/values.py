"""Values that Python reads while a model is captured, and the guards that keep watch over them.

A model may look at small tensors (`mask.all()`, `lengths.max().item()`, `nonzero`) and go another
way for other values. During capture such a value is computed from the real arguments; afterwards
the same few operations run before each call, and another result means another graph.

NOTE [What may be read]

    integers and booleans           whatever is computed from them
    floating-point inputs, buffers  truth values, integers and shapes: a number that is read of them
    and constants                   differs at each step
    parameters, random draws, what  nothing: computing that takes forward itself
    needs a gradient
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from fxckpt import invisible, ops
from fxckpt.codegen import graph_module
from fxckpt.errors import CaptureError
from fxckpt.joint import Primal, reachable
from fxckpt.symbols import Sizes, Symbols, hint

_HINT = "Keep that decision outside of the model, or rewrite its submodules."
MAX_ELEMENTS = 1 << 24  # of one intermediate: beyond, evaluating at each call is not cheap


@dataclasses.dataclass(frozen=True, slots=True)
class Guard:
    """A value that the captured graph depends on: a function of a few primals."""

    primals: tuple[str, ...]
    compute: GraphModule
    expected: Any

    def holds(self, lookup: Callable[[str], torch.Tensor], sizes: Sizes = ()) -> bool:
        """Whether the value is the one that was captured, for the primals that `lookup` finds."""
        with _as_recorded():
            return (
                summary(self.compute.forward([*map(lookup, self.primals), sizes])) == self.expected
            )


def summary(value: Any) -> Any:
    """What is compared of a value: a shape for tensors, else the value itself."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape)
    if isinstance(value, (tuple, list)):
        return tuple(map(summary, value))
    return repr(value)


def is_readable(primal: Primal, tensor: torch.Tensor) -> bool:
    """Whether Python may read values that depend on a primal; see the note."""
    if not tensor.dtype.is_floating_point and not tensor.dtype.is_complex:
        return True
    return primal.kind != "parameter" and not tensor.requires_grad


def make_guard(
    graph: Graph,
    func: OpOverload,
    args: Any,
    kwargs: Any,
    known: Mapping[Node, torch.Tensor],
    symbols: Symbols,
) -> tuple[list[Node], GraphModule]:
    """The operations that lead from primals to `func(*args)`, as a module of its own.

    Args:
        graph: The recorded graph; `args` and `kwargs` contain nodes of it.
        func: The operation that reads a value.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        known: Real tensors of the placeholders that may be read.
        symbols: Of the capture.

    Returns:
        The placeholders that the value depends on, and the module: a function of them.

    Raises:
        CaptureError: if the value depends on something that is not known, or not cheap.
    """
    inputs: list[Node] = []
    map_arg((args, kwargs), inputs.append)
    needed = reachable(inputs)
    _require_knowable(needed, known, str(func))
    if func is torch.ops.aten._local_scalar_dense.default:
        _require_integer(inputs[0], needed, str(func))
    primals, slice_, copies = _slice(graph, needed, symbols)
    args, kwargs = symbols.numbers((tuple(args), dict(kwargs)), symbols.sizes)
    read = slice_.call_function(
        func, map_arg(args, copies.__getitem__), map_arg(kwargs, copies.__getitem__)
    )
    slice_.output(read)
    return primals, graph_module(slice_, "Guard", symbols.names)


def evaluate(compute: GraphModule, tensors: Iterable[torch.Tensor], sizes: Sizes) -> Any:
    """What a slice of a recorded graph computes for real tensors, in the middle of a capture."""
    with invisible.outside_of_modes(), _as_recorded():
        return compute.forward([*tensors, sizes])


def evaluated(
    graph: Graph,
    wanted: Mapping[int, Node],
    real: Mapping[Node, torch.Tensor],
    symbols: Symbols,
) -> dict[int, torch.Tensor]:
    """The values of nodes of a recorded graph, by any key, given those of its placeholders."""
    primals, slice_, copies = _slice(graph, reachable([*wanted.values()]), symbols)
    slice_.output(tuple(copies[n] for n in wanted.values()))
    compute = graph_module(slice_, "Kept", symbols.names)
    values = evaluate(compute, (real[p] for p in primals), symbols.sizes)
    return dict(zip(wanted, values, strict=True))


def _slice(
    graph: Graph, needed: set[Node], symbols: Symbols
) -> tuple[list[Node], Graph, dict[Node, Node]]:
    """Copies nodes, without what they remember of the capture: a guard lives on."""
    slice_ = Graph()
    copies: dict[Node, Node] = {}
    primals = [n for n in graph.nodes if n in needed and n.op == "placeholder"]
    for node in primals:
        copies[node] = slice_.placeholder(node.name)
    for node in graph.nodes:
        if node in needed and node.op != "placeholder":
            copies[node] = slice_.node_copy(node, copies.__getitem__)
            copies[node].meta = {}
    return primals, slice_, copies


@contextlib.contextmanager
def _as_recorded() -> Iterator[None]:
    """Operations run as they were recorded: casts of autocast are among them."""
    with torch.no_grad(), torch._C._DisableAutocast():
        yield


def _require_integer(read: Node, nodes: set[Node], what: str) -> None:
    floating = any(
        n.op == "placeholder" and n.meta["kind"] != "literal" and _is_floating(n) for n in nodes
    )
    if floating and _is_floating(read):
        raise CaptureError(
            f"forward reads a value ({what}) that depends on floating-point data", hint=_HINT
        )


def _is_floating(node: Node) -> bool:
    dtype = node.meta["val"].dtype
    return dtype.is_floating_point or dtype.is_complex


def _require_knowable(nodes: set[Node], known: Mapping[Node, Any], what: str) -> None:
    for node in nodes:
        if node.op == "placeholder":
            if node not in known:
                raise CaptureError(
                    f"forward reads a value ({what}) that depends on floating-point data",
                    hint=_HINT,
                )
        elif ops.node_is_random(node):
            raise CaptureError(
                f"forward reads a value ({what}) that depends on a random draw", hint=_HINT
            )
        elif isinstance(node.meta["val"], torch.Tensor) and (
            hint(node.meta["val"].numel()) > MAX_ELEMENTS
        ):
            raise CaptureError(f"forward reads a value ({what}) of a large tensor", hint=_HINT)
