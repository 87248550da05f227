"""Values that Python reads while a model is captured, and the guards that keep watch over them.

A model may look at small integer and boolean tensors (`mask.all()`, `lengths.max().item()`,
`nonzero`) and go another way for other values. During capture such a value is computed from the
real arguments; afterwards the same few operations run before each call, and another result means
another graph.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from fxckpt import ops
from fxckpt.errors import CaptureError
from fxckpt.joint import reachable

_HINT = "Keep that decision outside of the model, or rewrite its submodules."
MAX_ELEMENTS = 1 << 24  # of one intermediate: beyond, evaluating at each call is not cheap


@dataclasses.dataclass(frozen=True, slots=True)
class Guard:
    """A value that the captured graph depends on: a function of a few primals."""

    primals: tuple[str, ...]
    compute: GraphModule
    expected: Any

    def holds(self, lookup: Callable[[str], torch.Tensor]) -> bool:
        """Whether the value is the one that was captured, for the primals that `lookup` finds."""
        with torch.no_grad():
            return summary(self.compute(*map(lookup, self.primals))) == self.expected


def summary(value: Any) -> Any:
    """What is compared of a value: a shape for tensors, else the value itself."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape)
    if isinstance(value, (tuple, list)):
        return tuple(map(summary, value))
    return repr(value)


def make_guard(
    graph: Graph, func: OpOverload, args: Any, kwargs: Any, known: Mapping[Node, Any]
) -> tuple[list[Node], GraphModule]:
    """The operations that lead from primals to `func(*args)`, as a module of its own.

    Args:
        graph: The recorded graph; `args` and `kwargs` contain nodes of it.
        func: The operation that reads a value.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        known: Real tensors of the placeholders that have values during capture.

    Returns:
        The placeholders that the value depends on, and the module: a function of them.

    Raises:
        CaptureError: if the value depends on something that is not known, or not cheap.
    """
    inputs: list[Node] = []
    map_arg((args, kwargs), inputs.append)
    needed = reachable(inputs)
    _require_knowable(needed, known, str(func))
    slice_, copies = Graph(), {}
    primals = [n for n in graph.nodes if n in needed and n.op == "placeholder"]
    for node in primals:
        copies[node] = slice_.placeholder(node.name)
    for node in graph.nodes:
        if node in needed and node.op != "placeholder":
            copies[node] = slice_.node_copy(node, copies.__getitem__)
    read = slice_.call_function(
        func, map_arg(tuple(args), copies.__getitem__), map_arg(dict(kwargs), copies.__getitem__)
    )
    slice_.output(read)
    return primals, GraphModule({}, slice_)


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
            node.meta["val"].numel() > MAX_ELEMENTS
        ):
            raise CaptureError(f"forward reads a value ({what}) of a large tensor", hint=_HINT)
