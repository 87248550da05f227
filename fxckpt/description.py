"""Describes what modules hold in a way that is the same for modules that look the same."""

from __future__ import annotations

import types
from collections import OrderedDict, deque
from collections.abc import Hashable, Mapping
from typing import Any

from torch import nn

from fxckpt import tree
from fxckpt.contents import is_fixed, is_plain

_BUILT_IN = frozenset((dict, list, set, frozenset, deque, OrderedDict))


class Description:
    """Describes values without their identity where that does not matter.

    Args:
        numbers: By `id`, the objects that are described elsewhere.

    Attributes:
        named: The objects that descriptions name by their `id`.
    """

    def __init__(self, numbers: Mapping[int, Hashable]) -> None:
        self._numbers = numbers
        self.named: list[Any] = []

    def of(self, value: Any) -> Hashable:
        """A description; equal ones are of values that mean the same to who reads them."""
        kind = type(value)
        if is_plain(value):
            return tree.static_key(value)
        if kind is tuple:
            return kind, tuple(map(self.of, value))
        if kind is types.MethodType:
            return kind, self.of(value.__self__), self.of(value.__func__)
        if kind is types.FunctionType and is_fixed(value):
            return kind, self.by_identity(value.__code__), self.by_identity(value.__globals__)
        if id(value) in self._numbers and (kind in _BUILT_IN or isinstance(value, nn.Module)):
            return kind, self._numbers[id(value)]
        return self.by_identity(value)

    def by_identity(self, value: Any) -> int:
        """The `id` of an object, which is kept."""
        self.named.append(value)
        return id(value)
