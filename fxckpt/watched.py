"""What a watch looks after: contents of objects, and whether all is as it was.

The whole is told in `watch`.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Hashable, Sequence
from itertools import chain
from operator import contains, is_, itemgetter
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as nn_module

from fxckpt import spread, tree
from fxckpt.contents import MISSING, Inside, Read, is_fixed, is_leaf, is_plain
from fxckpt.description import Description
from fxckpt.installation import is_runner
from fxckpt.reads import EVERYTHING
from fxckpt.state import HOOKS
from fxckpt.symbols import has_extent

GLOBAL_HOOKS = tuple(getattr(nn_module, f"_global{kind}") for kind in HOOKS)
# What nn.Module itself reads; submodules, hooks, parameters and buffers are watched anyway.
INTERNALS = {*nn.Module().__dict__, *vars(nn.Module)} - {"training", "forward"}
LAZY = (nn.UninitializedParameter, nn.UninitializedBuffer)
MEMBERS = ("_modules", "_parameters", "_buffers", *HOOKS)
members = itemgetter(*MEMBERS)  # of the `__dict__` of a module

Condition = Callable[[], bool]


def same_objects(now: Sequence[Any], before: Sequence[Any]) -> bool:
    """Whether these are the same objects in the same order."""
    return len(now) == len(before) and all(map(is_, now, before))


def same_dictionaries(dictionaries: list[dict[Any, Any]]) -> Condition:
    """Tells whether dictionaries hold the same objects under the same keys as now."""
    empty, full = [d for d in dictionaries if not d], [d for d in dictionaries if d]
    sizes = [*map(len, full)]
    keys = [*chain.from_iterable(full)]
    values = [*chain.from_iterable(map(dict.values, full))]

    def same() -> bool:
        return (
            not any(empty)
            and [*map(len, full)] == sizes
            and all(map(is_, chain.from_iterable(map(dict.values, full)), values))
            and [*chain.from_iterable(full)] == keys
        )

    return same


def same_attributes(attributes: list[tuple[dict[str, Any], Sequence[str]]]) -> Condition:
    """Tells likewise for the members and some attributes of modules."""
    getters: dict[tuple[str, ...], Any] = {}  # modules of one class share theirs
    pairs, absent = [], []
    for d, names in attributes:
        there = (*MEMBERS, *(n for n in names if n in d))
        pairs.append((getters.setdefault(there, itemgetter(*there)), d))
        absent += [(d, n) for n in names if n not in d]
    values = [*chain.from_iterable(get(d) for get, d in pairs)]
    without, missing = [d for d, _ in absent], [n for _, n in absent]

    def same() -> bool:
        try:
            now = chain.from_iterable(get(d) for get, d in pairs)
            return all(map(is_, now, values)) and not any(map(contains, without, missing))
        except KeyError:
            return False

    return same


def same_class_attributes(attributes: list[tuple[Any, str]]) -> Condition:
    """Tells whether classes have the same attributes as now."""
    values = [vars(cls).get(name) for cls, name in attributes]
    return lambda: all(
        vars(cls).get(name) is value for (cls, name), value in zip(attributes, values, strict=True)
    )


def some_of(dictionary: dict[str, Any], names: list[str]) -> Read:
    """A function that tells what is under some names."""
    return lambda: (names, [dictionary.get(name, MISSING) for name in names])


class Contents:
    """What an object holds, and what it held when it was last looked at.

    Args:
        owner: The object, if it has to be kept.
        read: Tells what it holds.
        place: The `id` of the container of tensors.
        slots: Where tensors are which captured graphs take from there anew at each call.
    """

    def __init__(self, owner: Any, read: Read, place: int, slots: set[tuple[int, Any]]) -> None:
        self.owner, self.read, self.place, self._slots = owner, read, place, slots
        self._take(*read())

    def with_slots(self, slots: set[tuple[int, Any]]) -> Contents:
        """A copy for another watch."""
        new = copy.copy(self)
        new._slots = slots
        return new

    def unchanged(self) -> bool:
        """Whether all is as it was."""
        names, values = self.read()
        before = self.before
        return (
            len(values) == len(before)
            and all(map(is_, values, before))
            and (names is self.names or names == self.names)
        )

    def refresh(self) -> bool:
        """Takes note of what is there now; whether containers or the places of tensors changed."""
        if self.unchanged():
            return False
        arranged = self._arrangement()
        self._take(*self.read())
        return self._arrangement() != arranged

    def tensors(self) -> list[torch.Tensor]:
        """The tensors in it."""
        return self._tensors

    def described(self, description: Description) -> Hashable:
        """What it holds, see `Watch.described`."""
        return tuple(
            (
                name if isinstance(name, (str, int)) else description.by_identity(name),
                None if (self.place, name) in self._slots else description.of(value),
            )
            for name, value in zip(self.names, self.before, strict=True)
        )

    def may_change(self) -> bool:
        """Whether other objects, or other tensors, may be in it later."""
        return not is_fixed(self.owner) or bool(self.tensors())

    def is_data(self) -> bool:
        """Whether another object with the same contents serves as well."""
        return type(self.owner) in (list, dict, set) and not self.tensors()

    def key(self, numbers: dict[int, int]) -> Hashable:
        """What is compared with states seen before.

        Args:
            numbers: By `id`, the containers for which another one serves as well.
        """
        return tuple(
            (name, "like", numbers[value]) if value in numbers else (name, value)
            for name, value in self._parts
        )

    def _take(self, names: Sequence[Any], values: Sequence[Any]) -> None:
        self.names, self.before = names, values
        self._tensors = [v for v in values if isinstance(v, torch.Tensor)]
        self._parts = [*map(self._part, names, values)]

    def _arrangement(self) -> list[Any]:
        pairs = zip(self.names, self.before, strict=True)
        return [
            (name, None if isinstance(v, torch.Tensor) else id(v))
            for name, v in pairs
            if isinstance(v, torch.Tensor) or not is_leaf(v)
        ]

    def _part(self, name: Any, value: Any) -> tuple[Hashable, Hashable]:
        name = name if isinstance(name, (str, int)) else id(name)
        if isinstance(value, torch.Tensor):
            return name, None if (self.place, name) in self._slots else id(value)
        by_value = is_plain(value) or (type(value) is tuple and all(map(is_plain, value)))
        return name, tree.static_key(value) if by_value else id(value)


def attributes(
    module: nn.Module, names: list[str], slots: set[tuple[int, Any]], *, is_root: bool
) -> Contents:
    """Those of a module that have these names, or all of them.

    The root, which keeps the watch, is not kept by it.
    """
    reference, place = weakref.ref(module), id(module.__dict__)

    def some() -> Inside:
        attributes = required(reference()).__dict__
        return names, [attributes.get(name, MISSING) for name in names]

    def everything() -> Inside:
        attributes = required(reference()).__dict__
        kept = {k: v for k, v in attributes.items() if k not in INTERNALS and not is_runner(k)}
        return [*kept], [*kept.values()]

    read = everything if EVERYTHING in names else some
    return Contents(None if is_root else module, read, place, slots)


def same_geometry(tensors: list[torch.Tensor], geometry: list[Any]) -> bool:
    """Whether tensors have their geometry still; makes no objects that stay, which is faster."""
    for t, known in zip(tensors, geometry, strict=True):
        if not isinstance(known, tuple):
            if known not in (type(t), t.layout):
                return False
            continue
        cls, dtype, requires_grad, shape, strides, device, spreading = known
        if (
            t.dtype is not dtype
            or t.requires_grad is not requires_grad
            or t.shape != shape
            or t.stride() != strides
            or t.device != device
            or type(t) is not cls
            or (spreading is not None and spread.geometry(t) != spreading)
        ):
            return False
    return True


def geometry(t: torch.Tensor) -> Any:
    """What is compared of a tensor."""
    if type(t) in LAZY:
        return type(t)
    if not has_extent(t):
        return t.layout
    plain = type(t), t.dtype, t.requires_grad, t.shape, t.stride(), t.device
    return *plain, spread.geometry(t)


def required(value: Any) -> Any:
    """Something that is there."""
    assert value is not None
    return value
