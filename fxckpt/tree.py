"""Nested arguments and results: tensors apart from the structure that holds them.

`flatten` understands what `torch.utils._pytree` does (and whatever is registered there, such as
transformers' `ModelOutput`), and beyond it plain objects, such as key/value caches (see `objects`).
A `Spec` is hashable and compares by value, so that it can be part of a signature; it keeps no
tensor, and no object that holds one.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxckpt import objects
from fxckpt.contents import reader
from fxckpt.errors import CaptureError


@dataclasses.dataclass(frozen=True, slots=True)
class Spec:
    """Structure of a nested object without its tensors.

    `kind` is "tensor", "static" (`key` is the value made hashable), "node" (a registered pytree),
    "object" (`key` is its layout) or "known" (`key` is a number that the caller gave to it).
    """

    kind: str
    type: type | None = None
    key: Hashable = None
    children: tuple[Spec, ...] = ()
    payload: Any = dataclasses.field(default=None, compare=False)  # what `unflatten` needs
    unflatten: Any = dataclasses.field(default=None, compare=False)


_TENSOR = Spec("tensor")


def flatten(
    tree: Any,
    *,
    open_objects: bool = False,
    parts: list[Any] | None = None,
    known: Mapping[int, int] | None = None,
    is_shared: Callable[[Any], bool] | None = None,
) -> tuple[list[torch.Tensor], Spec]:
    """Takes the tensors out of `tree`, depth first.

    Args:
        tree: Anything.
        open_objects: Look into objects that hold no tensor too, so that `unflatten` copies them and
            two states of an object have two structures. Else they are static leaves.
        parts: Gets whatever else is in the tree and has an identity that may matter, in order.
        known: Objects, by `id`, of which the structure shall contain just a number.
        is_shared: Tells which other objects are static leaves, whatever they contain.

    Returns:
        The tensors in order (one that occurs twice is listed twice), and the structure.

    Raises:
        CaptureError: if an object that holds tensors contains itself.
    """
    tensors: list[torch.Tensor] = []
    walk = _Walk(tensors, [] if parts is None else parts, known or {}, is_shared, open_objects)
    return tensors, _flatten(tree, walk, ())


def unflatten(spec: Spec, tensors: Iterable[Any], known: Sequence[Any] = ()) -> Any:
    """The inverse of `flatten`: containers are built anew, static leaves are shared.

    Raises:
        CaptureError: if there is an object that cannot be built anew.
    """
    source = iter(tensors)
    return _unflatten(spec, lambda: next(source), known)


def mentions_known(spec: Spec) -> bool:
    """Whether `unflatten` needs known objects."""
    return spec.kind == "known" or any(map(mentions_known, spec.children))


def names(spec: Spec, prefix: str = "") -> list[str]:
    """How a user would write each tensor of a structure, e.g. `"['labels']"` or `".loss"`."""
    if spec.kind == "tensor":
        return [prefix]
    if spec.kind == "object":
        keys = spec.payload.names()
    elif spec.kind == "node" and isinstance(spec.payload, list) and spec.type is not list:
        of_items = spec.payload[1] if spec.type is defaultdict else spec.payload
        keys = [f"[{k!r}]" for k in of_items]
    else:
        keys = [f"[{i}]" for i in range(len(spec.children))]
    return [n for k, c in zip(keys, spec.children, strict=True) for n in names(c, prefix + k)]


@dataclasses.dataclass(frozen=True, slots=True)
class _Walk:
    """What `flatten` collects, and how."""

    tensors: list[torch.Tensor]
    parts: list[Any]
    known: Mapping[int, int]
    is_shared: Callable[[Any], bool] | None
    open_objects: bool


def _flatten(tree: Any, walk: _Walk, above: tuple[int, ...]) -> Spec:
    if isinstance(tree, torch.Tensor):
        walk.tensors.append(tree)
        return _TENSOR
    kind = type(tree)
    if kind in _ATOMS:
        return Spec("static", kind, repr(tree) if kind in (float, complex) else tree, (), tree)
    if id(tree) in walk.known:
        return Spec("known", kind, walk.known[id(tree)])
    if id(tree) in above:
        raise CaptureError(f"an argument or result of type {kind.__name__} contains itself")
    if isinstance(tree, torch.nn.Module):
        raise CaptureError(f"an argument or result is a module ({kind.__name__})")
    if walk.is_shared is not None and walk.is_shared(tree):
        return Spec("static", kind, static_key(tree), (), tree)
    walk.parts.append(tree)
    above = (*above, id(tree))
    handler = pytree.SUPPORTED_NODES.get(pytree._get_node_type(tree))
    if handler is not None:
        children, context = handler.flatten_fn(tree)
        specs = tuple(_flatten(child, walk, above) for child in children)
        return Spec("node", kind, static_key(context), specs, context, handler.unflatten_fn)
    found = objects.inside(tree)
    holds = found is not None and holds_tensor(tree)
    if found is None or not (holds or (walk.open_objects and _is_tree(tree, ()))):
        return Spec("static", kind, static_key(tree), (), tree)
    layout, inner = found
    specs = tuple(_flatten(child, walk, above) for child in inner)
    if not holds and objects.is_unique(kind):
        return Spec("static", kind, (layout, specs), (), tree)
    return Spec("object", kind, layout_key(layout), specs, layout)


_ATOMS: frozenset[type] = frozenset(
    (type(None), bool, int, float, complex, str, bytes, torch.Size, torch.dtype, torch.device)
)


def _children(tree: Any) -> Sequence[Any]:
    """What lies in a registered container or an object."""
    handler = pytree.SUPPORTED_NODES.get(pytree._get_node_type(tree))
    if handler is not None:
        return handler.flatten_fn(tree)[0]
    found = objects.inside(tree)
    return () if found is None else found[1]


def holds_tensor(tree: Any) -> bool:
    """Whether there is a tensor in something, a few levels deep."""
    return holds(tree, torch.Tensor)


def holds(tree: Any, kind: type | tuple[type, ...]) -> bool:
    """Whether something of a kind is in something, a few levels deep."""
    return _holds(tree, kind, 0, set())


def _holds(tree: Any, kind: Any, depth: int, seen: set[int]) -> bool:
    if isinstance(tree, kind):
        return True
    if type(tree) is torch.Size:
        return any(isinstance(n, kind) for n in tree)
    if type(tree) in _ATOMS or depth > 6 or id(tree) in seen:
        return False
    seen.add(id(tree))
    return any(_holds(c, kind, depth + 1, seen) for c in _children(tree))


def _is_tree(tree: Any, above: tuple[int, ...]) -> bool:
    """Whether an object is small enough to be compared by its contents, and holds no cycle."""
    if type(tree) in _ATOMS:
        return True
    if id(tree) in above or len(above) > 6:
        return False
    return all(_is_tree(child, (*above, id(tree))) for child in _children(tree))


def _unflatten(spec: Spec, take: Callable[[], Any], known: Sequence[Any]) -> Any:
    if spec.kind == "tensor":
        return take()
    if spec.kind == "static":
        return spec.payload
    if spec.kind == "known":
        assert isinstance(spec.key, int)
        return known[spec.key]
    children = [_unflatten(child, take, known) for child in spec.children]
    if spec.kind == "node":
        return spec.unflatten(children, spec.payload)
    return objects.create(spec.type, spec.payload, children)


def layout_key(layout: objects.Layout) -> Hashable:
    """What is compared of a layout: its keys with their types."""
    return (*layout[2:], layout.base, static_key(layout.keys) if layout.keys else ())


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
