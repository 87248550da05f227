"""Plain objects among arguments and results: what they consist of, and making others like them.

That is attributes, slots, and for subclasses of lists, dictionaries and tuples their items. No code
of an object's class runs.
"""

from __future__ import annotations

import copyreg
import enum
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from fxckpt.errors import CaptureError

_LEAVES = (
    *(type, enum.Enum, types.ModuleType),
    *(torch.nn.Module, torch.device, torch.dtype, torch.Tensor),
)
_OF_ITEMS = (OrderedDict, defaultdict, dict, list, deque, tuple)
_BASES: tuple[Any, ...] = (*_OF_ITEMS, types.SimpleNamespace)
_COPYING = ("__copy__", "__reduce__", "__reduce_ex__", "__new__")


class Layout(NamedTuple):
    """Where in an object its children are, in this order.

    `base` is the class that it extends: a type of container, or `object`. `keys` are those of the
    items of a dictionary; of a list, their indices.
    """

    base: Any
    keys: tuple[Any, ...]
    attributes: tuple[str, ...]
    slots: tuple[str, ...]

    def names(self) -> list[str]:
        """How a user would write the children."""
        return [f"[{k!r}]" for k in self.keys] + [f".{n}" for n in (*self.attributes, *self.slots)]


Inside = tuple[Layout, list[Any]]  # of an object, and its children


def inside(value: Any) -> Inside | None:
    """What an object consists of; None if it is not looked into."""
    kind = type(value)
    known = _kinds.get(kind)
    if known is None:
        known = _kinds[kind] = _Kind.of(kind)
    if known.is_leaf:
        return None
    attributes = object.__getattribute__(value, "__dict__") if known.has_attributes else {}
    children = [*attributes.values()]
    keys: Sequence[str] = ()
    slots: tuple[str, ...] = ()
    if known.base in _OF_ITEMS:
        keys, items = _items(known.base, value)
        children[:0] = items
    if known.slots:
        slots = tuple(n for n in known.slots if hasattr(value, n))
        children += (getattr(value, n) for n in slots)
    return Layout(known.base, tuple(keys), tuple(attributes), slots), children


class _Kind(NamedTuple):
    """What is the same for all objects of a class."""

    is_leaf: bool
    base: Any
    has_attributes: bool
    slots: Sequence[str]

    @staticmethod
    def of(kind: type) -> _Kind:
        base, has_attributes = _base(kind), bool(kind.__dictoffset__)
        slots = _slots(kind, base)
        leaf = issubclass(kind, _LEAVES) or any("__call__" in vars(c) for c in kind.__mro__)
        nothing = base not in _OF_ITEMS and not has_attributes and not slots
        return _Kind(leaf or nothing, base, has_attributes, slots)


_kinds: weakref.WeakKeyDictionary[type, _Kind] = weakref.WeakKeyDictionary()


def is_changeable(value: Any) -> bool:
    """Whether what an object consists of can change."""
    found = inside(value)
    return found is not None and found[0].base is not tuple


def _base(kind: type) -> Any:
    return next((b for b in _BASES if issubclass(kind, b)), object)


def _items(base: Any, value: Any) -> tuple[Sequence[Any], Sequence[Any]]:
    if issubclass(base, dict):
        return [*dict.keys(value)], [*dict.values(value)]
    return range(base.__len__(value)), [*base.__iter__(value)]


def _slots(kind: type, base: Any) -> Sequence[str]:
    names: Sequence[str] = copyreg._slotnames(kind)  # type: ignore[attr-defined]
    return ("default_factory", *names) if base is defaultdict else names


def is_unique(kind: type) -> bool:
    """Whether a copy of an object of a class might not do: a singleton, a file, and the like."""
    if kind not in _unique:
        base = _base(kind)
        own = any(getattr(kind, n, None) is not getattr(base, n, None) for n in _COPYING)
        _unique[kind] = own or hasattr(kind, "__del__") or not _is_creatable(kind, base)
    return _unique[kind]


_unique: weakref.WeakKeyDictionary[type, bool] = weakref.WeakKeyDictionary()


def _is_creatable(kind: Any, base: Any) -> bool:
    try:
        base.__new__(kind)
    except TypeError:  # it extends a class that is not written in Python
        return False
    return base is not deque  # which has a length that cannot be set


def create(kind: Any, layout: Layout, children: Sequence[Any]) -> Any:
    """An object of a class that consists of these.

    Raises:
        CaptureError: if the class cannot be instantiated without running its code.
    """
    if not _is_creatable(kind, layout.base):
        raise CaptureError(f"an argument or result of type {kind.__name__} cannot be copied")
    items = (children[: len(layout.keys)],) if layout.base is tuple else ()
    new = layout.base.__new__(kind, *items)
    fill(new, layout, children)
    return new


def fill(holder: Any, layout: Layout, children: Sequence[Any]) -> None:
    """Makes an object consist of these, and nothing else."""
    base, keys, attributes, slots = layout
    items, rest = children[: len(keys)], children[len(keys) :]
    if base in (list, deque):
        base.clear(holder)
        base.extend(holder, items)
    elif issubclass(base, dict):
        base.clear(holder)
        for key, item in zip(keys, items, strict=True):
            base.__setitem__(holder, key, item)
    if type(holder).__dictoffset__:
        own = object.__getattribute__(holder, "__dict__")
        own.clear()
        own.update(zip(attributes, rest, strict=False))
    values = dict(zip(slots, rest[len(attributes) :], strict=True))
    for name in _slots(type(holder), base):
        if name in values:
            object.__setattr__(holder, name, values[name])
        elif hasattr(holder, name):
            object.__delattr__(holder, name)
