"""What modules that look the same have in common, so that it is looked up once for all of them.

NOTE [Likenesses]

Modules look the same if their descriptions are equal (`Watch.described`). To collect and describe
all that is watched takes milliseconds, for each layer of a stack again. So where it is simple, a
`Likeness` is compared instead, module by module: classes, names, geometry of tensors, and what was
read of attributes. It is simple if these are plain values, or objects that the other module has to
refer to as well: configurations, functions, and what these lead to. What lies beyond the modules is
then the same for all of them, and they watch it by the same conditions.

A description tells an object that refers to the module itself from one that refers to another one.
So there is no likeness where anything beyond the modules leads back to one of them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn

from fxckpt import tree
from fxckpt.contents import MISSING, Entries, is_plain
from fxckpt.installation import original_class
from fxckpt.reads import EVERYTHING
from fxckpt.state import HOOKS
from fxckpt.watched import (
    GLOBAL_HOOKS,
    LAZY,
    Condition,
    Contents,
    same_class_attributes,
    same_dictionaries,
    same_geometry,
)


class Likeness:
    """What a module looks like.

    Attributes:
        class_attributes: What was read of classes.
        conditions: Whether all that lies beyond the modules is as it was.
        geometry: Of the parameters and buffers.
        names: What is watched of each module.

    Args:
        modules: The module and those in it.
        names: What is watched of each.
        class_attributes: What was read of classes.
        beyond: What lies beyond the modules.
        geometry: Of the parameters and buffers.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        names: list[list[str]],
        class_attributes: list[tuple[Any, str]],
        beyond: Sequence[Contents],
        geometry: list[Any],
    ) -> None:
        self.class_attributes, self.geometry, self.names = class_attributes, geometry, names
        self.conditions = [*conditions_beyond([*map(copy.copy, beyond)], class_attributes)]
        self._structure, self._values = _structure(modules), self._read(modules)
        reached = chain(self._values, *(c.before for c in beyond))
        self._reached = frozenset(map(id, reached))

    @staticmethod
    def of(
        modules: Sequence[nn.Module],
        names: list[list[str]],
        class_attributes: list[tuple[Any, str]],
        beyond: Sequence[Contents],
        geometry: list[Any],
    ) -> Likeness | None:
        """The likeness of a module (see the class); None if it is not simple."""
        if any(EVERYTHING in each for each in names) or any(g in LAZY for g in geometry):
            return None
        found = Likeness(modules, names, class_attributes, beyond, geometry)
        if any(isinstance(value, torch.Tensor) for value in found._values):
            return None
        if any(c.tensors() for c in beyond):
            return None
        return found if found.of_others(modules) is not None else None

    def of_others(self, modules: Sequence[nn.Module]) -> list[torch.Tensor] | None:
        """The parameters and buffers of modules that look like this; None if they do not."""
        if len(modules) != len(self.names) or not all(same() for same in self.conditions):
            return None
        if any(m.__dict__[kind] for m in modules[1:] for kind in HOOKS):
            return None  # those of the first one run around it
        if _structure(modules) != self._structure:
            return None
        if not all(map(_means_the_same, self._read(modules), self._values)):
            return None
        held = [m.__dict__[kind] for m in modules for kind in ("_parameters", "_buffers")]
        if not self._reached.isdisjoint(map(id, (*modules, *held))):
            return None
        tensors = [t for members in held for t in members.values() if t is not None]
        alone = len({*map(id, tensors)}) == len(tensors)
        return tensors if alone and same_geometry(tensors, self.geometry) else None

    def _read(self, modules: Sequence[nn.Module]) -> list[Any]:
        """What is read of their attributes."""
        pairs = zip(modules, self.names, strict=True)
        return [m.__dict__.get(name, MISSING) for m, names in pairs for name in names]


def _structure(modules: Sequence[nn.Module]) -> list[Any]:
    """Classes; names of members; which submodules are where, and which tensors are None."""
    attributes = [m.__dict__ for m in modules]
    positions = {id(m): i for i, m in enumerate(modules)}
    found: list[Any] = [original_class(type(m)) for m in modules]
    for kind in ("_modules", "_parameters", "_buffers"):
        members = [each[kind] for each in attributes]
        found += map(len, members)
        found += chain.from_iterable(members)
        within = chain.from_iterable(each.values() for each in members)
        if kind == "_modules":
            found += [None if m is None else positions[id(m)] for m in within]
        else:
            found += [t is None for t in within]
    return found


def _means_the_same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    by_value = is_plain(a) or (type(a) is tuple and all(map(is_plain, (*a, *b))))
    return by_value and tree.static_key(a) == tree.static_key(b)


def conditions_beyond(
    beyond: Sequence[Contents], class_attributes: list[tuple[Any, str]]
) -> Iterator[Condition]:
    """Functions that tell whether all that lies beyond some modules is as it is now."""
    watched = [c for c in beyond if c.may_change()]
    held = [c.read.dictionary for c in watched if isinstance(c.read, Entries)]
    yield same_dictionaries([*GLOBAL_HOOKS, *held])
    yield same_class_attributes(class_attributes)
    rest = [c for c in watched if not isinstance(c.read, Entries)]
    yield lambda: all(c.unchanged() for c in rest)
