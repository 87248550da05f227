"""What is kept between forward and backward, and where it comes from."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.fx import Node

from fxckpt import ops
from fxckpt.errors import CaptureError, FxckptError
from fxckpt.functional import checkpoint, is_checkpointed, module_of
from fxckpt.installation import installed, runner_of
from fxckpt.joint import producer
from fxckpt.module import rewrite
from fxckpt.quantities import readable
from fxckpt.runtime import Captured


class Saved(NamedTuple):
    """A tensor that is kept.

    Attributes:
        origin: Where it comes from: "argument x[0]", "parameter 'layer.weight'", "named 'z'",
            "output of aten.mm at model.py:31 in layers.3.mlp".
        shape: Its shape.
        dtype: Its dtype.
        size: Its bytes.
    """

    origin: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    size: int


def saved_values(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Saved]:
    """What a call keeps for its backward; nothing is run.

    As `jax.ad_checkpoint.saved_residuals`, on which its descriptions are modelled.

    Args:
        fn: What `checkpoint` or `rewrite` returned; anything else is taken as it is, which keeps
            whatever its backward reads.
        *args: Arguments of the call.
        **kwargs: Keyword arguments.

    Returns:
        The tensors: first arguments and parameters, then values, in the order of forward.

    Raises:
        CaptureError: if the call cannot be captured.

    Example:
        >>> import torch, fxckpt
        >>> f = fxckpt.checkpoint(lambda x: x.sin().sin())
        >>> print(fxckpt.saved_values(f, torch.ones(3, requires_grad=True))[0].origin)
        argument x
    """
    captured = _captured(fn, args, kwargs)
    if captured is None:
        return []
    joint, split = captured.program.joint, captured.program.split
    nodes = {n.name: n for n in joint.graph.nodes}
    order = {n: i for i, n in enumerate(joint.graph.nodes)}
    parameters = parameters_of(fn)
    primals = [_primal(name, joint.primals[name], parameters) for name in split.saved_primals]
    residuals = [_node(nodes, name) for name in split.residuals]
    residuals.sort(key=lambda found: order[found[1]])
    return [*primals, *(_value(kind, node) for kind, node in residuals)]


def print_saved_values(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Prints what `saved_values` returns, a line each.

    Example:
        >>> import torch, fxckpt
        >>> fn = lambda x: fxckpt.name(x.sin(), "sine").sin()
        >>> fxckpt.print_saved_values(fn, torch.ones(3, requires_grad=True))
        float32[3] (12 bytes) argument x
        float32[3] (12 bytes) named 'sine'
    """
    for value in saved_values(fn, *args, **kwargs):
        dtype = str(value.dtype).removeprefix("torch.")
        shape = ",".join(map(str, value.shape))
        print(f"{dtype}[{shape}] ({readable(value.size)}) {value.origin}")


def _captured(fn: Any, args: Any, kwargs: Any) -> Captured | None:
    module: nn.Module
    if isinstance(fn, nn.Module):
        module = fn if installed(fn) is not None else rewrite(fn, "everything")
    else:
        checkpointed = fn if is_checkpointed(fn) else checkpoint(fn, policy="everything")
        module = module_of(checkpointed)
    if not module.training:
        raise FxckptError(
            "saved_values(model, ...): the model is in evaluation mode, where it "
            "keeps nothing. Call model.train() first"
        )
    with torch.enable_grad():
        found: Any = runner_of(module).found(module, args, kwargs)
    if isinstance(found, CaptureError):
        raise found
    return found


def shown_input(name: str, parameters: list[str]) -> str:
    """The name of an input, by the names of positional parameters: "args[0]['a']" is "x['a']"."""
    positional = re.match(r"args\[(\d+)\]", name)
    if positional and int(positional[1]) < len(parameters):
        return parameters[int(positional[1])] + name[positional.end() :]
    return name


def parameters_of(fn: Any) -> list[str]:
    """The names of positional parameters."""
    try:
        found = inspect.signature(fn.forward if isinstance(fn, nn.Module) else fn).parameters
    except (TypeError, ValueError):
        return []
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [name for name, p in found.items() if p.kind in kinds]


def _primal(name: str, node: Node, parameters: list[str]) -> Saved:
    kind, val = node.meta["kind"], node.meta["val"]
    name = shown_input(name, parameters)
    shown = {"input": f"argument {name}", "literal": "a constant", "constant": "a constant"}
    return _saved(shown.get(kind, f"{kind} {name!r}"), val)


def _node(nodes: dict[str, Node], name: str) -> tuple[str, Node]:
    """What kind of residual that is, and of which node."""
    for prefix in ("rng", "before"):
        if name not in nodes and (node := nodes.get(name.removeprefix(f"{prefix}_"))) is not None:
            return prefix, node
    return "value", nodes[name]


def _value(kind: str, node: Node) -> Saved:
    val = node.meta["val"]
    if kind == "before":
        return _saved(f"contents of {node.name} before forward changes them", val)
    if kind == "rng":
        size = ops.rng_state_bytes(ops.node_device(node))
        return Saved(
            f"state of the random generator before {_place(node)}", (size,), torch.uint8, size
        )
    tags = node.meta.get("tags")
    named = "named " + ", ".join(map(repr, tags)) if tags else f"output of {_place(node)}"
    return _saved(named, val)


def _place(node: Node) -> str:
    operation = str(ops.operation(producer(node))).rpartition(".")[0]
    source, path = node.meta.get("source"), node.meta.get("path")
    return operation + (f" at {source}" if source else "") + (f" in {path}" if path else "")


def _saved(origin: str, val: torch.Tensor) -> Saved:
    return Saved(origin, tuple(val.shape), val.dtype, val.untyped_storage().nbytes())
