"""Nested arguments and results: tensors apart from the structure that holds them.

`flatten` understands what `torch.utils._pytree` does (and whatever is registered there, such as
transformers' `ModelOutput`), and beyond it dataclasses and plain objects that hold tensors in
attributes, such as key/value caches. A `Spec` is hashable and compares by value, so that it can be
part of a signature.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxckpt.contents import reader
from fxckpt.errors import CaptureError


@dataclasses.dataclass(frozen=True, slots=True)
class Spec:
    """Structure of a nested object without its tensors.

    `kind` is "tensor", "static" (`key` is the value made hashable), "node" (a registered pytree) or
    "object" (a dataclass or object: `key` holds the attribute names).
    """

    kind: str
    type: type | None = None
    key: Hashable = None
    children: tuple[Spec, ...] = ()
    payload: Any = dataclasses.field(default=None, compare=False)  # what `unflatten` needs
    unflatten: Any = dataclasses.field(default=None, compare=False)


_TENSOR = Spec("tensor")


def flatten(tree: Any, *, open_objects: bool = False) -> tuple[list[torch.Tensor], Spec]:
    """Takes the tensors out of `tree`, depth first.

    Args:
        tree: Anything.
        open_objects: Look into objects that hold no tensor too, so that `unflatten` copies them and
            two states of an object have two structures. Else they are static leaves.

    Returns:
        The tensors in order (one that occurs twice is listed twice), and the structure.

    Raises:
        CaptureError: if an object that holds tensors contains itself.
    """
    tensors: list[torch.Tensor] = []
    return tensors, _flatten(tree, tensors, (), open_objects)


def unflatten(spec: Spec, tensors: Sequence[Any]) -> Any:
    """The inverse of `flatten`: containers are built anew, static leaves are shared."""
    source = iter(tensors)
    return _unflatten(spec, lambda: next(source))


def names(spec: Spec, prefix: str = "") -> list[str]:
    """How a user would write each tensor of a structure, e.g. `"['labels']"` or `".loss"`."""
    if spec.kind == "tensor":
        return [prefix]
    if spec.kind == "object":
        keys = [f".{k}" for k in spec.payload[0]]
    elif spec.kind == "node" and isinstance(spec.payload, list) and spec.type is not list:
        keys = [f"[{k!r}]" for k in spec.payload]
    else:
        keys = [f"[{i}]" for i in range(len(spec.children))]
    return [n for k, c in zip(keys, spec.children, strict=True) for n in names(c, prefix + k)]


def _flatten(
    tree: Any, tensors: list[torch.Tensor], above: tuple[int, ...], open_objects: bool
) -> Spec:
    if isinstance(tree, torch.Tensor):
        tensors.append(tree)
        return _TENSOR
    kind = type(tree)
    if kind in _ATOMS:
        return Spec("static", kind, repr(tree) if kind in (float, complex) else tree, (), tree)
    if id(tree) in above:
        raise CaptureError(f"an argument or result of type {kind.__name__} contains itself")
    if isinstance(tree, torch.nn.Module):
        raise CaptureError(f"an argument or result is a module ({kind.__name__})")
    above = (*above, id(tree))
    children, context = _children(tree, open_objects)
    if children is None:
        return Spec("static", kind, static_key(tree), (), tree)
    specs = tuple(_flatten(child, tensors, above, open_objects) for child in children)
    handler = pytree.SUPPORTED_NODES.get(pytree._get_node_type(tree))
    if handler is not None:
        return Spec("node", kind, static_key(context), specs, context, handler.unflatten_fn)
    return Spec("object", kind, tuple(context[0]), specs, context)


_ATOMS: frozenset[type] = frozenset(
    (type(None), bool, int, float, complex, str, bytes, torch.Size, torch.dtype, torch.device)
)


def _children(tree: Any, open_objects: bool) -> tuple[Sequence[Any] | None, Any]:
    """Children and what is needed to rebuild the parent; no children (None) makes a static leaf."""
    handler = pytree.SUPPORTED_NODES.get(pytree._get_node_type(tree))
    if handler is not None:
        return handler.flatten_fn(tree)
    attributes = _attributes(tree)
    if attributes is None:
        return None, None
    if not _holds_tensor(tree, 0, set()) and not (open_objects and _is_tree(tree, ())):
        return None, None
    return list(attributes.values()), (list(attributes), tree)


def _attributes(tree: Any) -> dict[str, Any] | None:
    if isinstance(tree, (type, torch.nn.Module, torch.device, torch.dtype)) or callable(tree):
        return None
    if hasattr(tree, "__dict__"):
        return vars(tree)
    if dataclasses.is_dataclass(tree):
        return {f.name: getattr(tree, f.name) for f in dataclasses.fields(tree)}
    return None


def _holds_tensor(tree: Any, depth: int, seen: set[int]) -> bool:
    if isinstance(tree, torch.Tensor):
        return True
    if type(tree) in _ATOMS or depth > 6 or id(tree) in seen:
        return False
    seen.add(id(tree))
    handler = pytree.SUPPORTED_NODES.get(pytree._get_node_type(tree))
    if handler is not None:
        children: Any = handler.flatten_fn(tree)[0]
    else:
        children = (_attributes(tree) or {}).values()
    return any(_holds_tensor(c, depth + 1, seen) for c in children)


def _is_tree(tree: Any, above: tuple[int, ...]) -> bool:
    """Whether an object is small enough to be compared by its contents, and holds no cycle."""
    if type(tree) in _ATOMS:
        return True
    if id(tree) in above or len(above) > 6:
        return False
    handler = pytree.SUPPORTED_NODES.get(pytree._get_node_type(tree))
    children = handler.flatten_fn(tree)[0] if handler else (_attributes(tree) or {}).values()
    return all(_is_tree(child, (*above, id(tree))) for child in children)


def _unflatten(spec: Spec, take: Callable[[], Any]) -> Any:
    if spec.kind == "tensor":
        return take()
    if spec.kind == "static":
        return spec.payload
    children = [_unflatten(child, take) for child in spec.children]
    assert spec.type is not None
    if spec.kind == "node":
        return spec.unflatten(children, spec.payload)
    keys, template = spec.payload
    if not hasattr(template, "__dict__"):
        return dataclasses.replace(template, **dict(zip(keys, children, strict=True)))
    rebuilt = copy.copy(template)
    vars(rebuilt).update(zip(keys, children, strict=True))
    return rebuilt


def static_key(value: Any, depth: int = 0) -> Hashable:
    """A hashable stand-in for a static value that differs whenever the value does.

    Arrays and unhashable containers are compared by content; other objects by their own equality,
    and by what they hold.
    """
    if isinstance(value, (list, tuple)):
        return (type(value), *map(static_key, value))
    if isinstance(value, dict):
        return (type(value), *((static_key(k), static_key(v)) for k, v in value.items()))
    if isinstance(value, (set, frozenset)):
        return (type(value), frozenset(map(static_key, value)))
    if isinstance(value, float):
        return (float, repr(value))
    if type(value).__module__ == "numpy" and hasattr(value, "tobytes"):
        return (type(value), getattr(value, "shape", ()), str(value.dtype), value.tobytes())
    try:
        hash(value)
    except TypeError:
        return (type(value), repr(value))
    return (type(value), value, _inside(value, depth))


def _inside(value: Any, depth: int) -> Hashable:
    """The plain values that an object holds, a few levels deep, if these are not many."""
    read = reader(value) if type(value) not in _ATOMS and depth < _DEPTH else None
    if read is None:
        return None
    _, values = read()
    return tuple(static_key(v, depth + 1) for v in values) if len(values) <= _MOST else None


_DEPTH, _MOST = 3, 32
