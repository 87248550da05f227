"""Tells whether a module is still in a state in which it was captured.

NOTE [What is watched]

A captured graph depends on what forward read of the modules: so capture notes the names of the
attributes (`reads`), and a `Watch` looks after these, and after all parameters, buffers, submodules
and hooks. Values count as follows:

    numbers, strings, ...       by type and value
    parameters, buffers and     by geometry (dtype, shape, strides, device, requires_grad): the
    tensors in attributes       graph takes whatever tensor is there at the call
    lists, dictionaries, sets   by contents, and by which of them are one object; by identity too
                                if they hold tensors, which captured graphs take from there
    objects, functions          by identity and contents; what they contain is watched in turn, a
                                few levels deep: attributes, closures, keywords of `partial`
    arrays                      by contents
    anything else               by identity
    globals                     that methods of the modules, and what these call, may read: likewise

At each call the contents are compared with those of the call before, by identity, in C loops. Only
if that fails is the whole state looked up among the states seen before.
"""

from __future__ import annotations

import copy
import dataclasses
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from itertools import chain
from operator import contains, is_, itemgetter
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as nn_module

from fxckpt import spread, tree
from fxckpt.contents import (
    MISSING,
    Inside,
    Read,
    globals_of,
    is_fixed,
    is_leaf,
    is_plain,
    reader,
)
from fxckpt.description import Description
from fxckpt.errors import CaptureError
from fxckpt.installation import is_runner, original_class
from fxckpt.reads import EVERYTHING, Reads
from fxckpt.state import HOOKS, Variables, held_tensors

_GLOBAL_HOOKS = tuple(getattr(nn_module, f"_global{kind}") for kind in HOOKS)
# What nn.Module itself reads; submodules, hooks, parameters and buffers are watched anyway.
_INTERNALS = {*nn.Module().__dict__, *vars(nn.Module)} - {"training", "forward"}
_LAZY = (nn.UninitializedParameter, nn.UninitializedBuffer)
_MEMBERS = ("_modules", "_parameters", "_buffers", *HOOKS)
_members = itemgetter(*_MEMBERS)
_DEPTH = 6
_MOST = 5000

Condition = Callable[[], bool]


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Alike:
    """What a watch knows that helps to watch modules that may look the same.

    Attributes:
        reads: What is watched besides members: positions of modules, and names of attributes.
        contents: What is in objects without tensors, by `id`: most of them are shared.
    """

    reads: list[tuple[int, str]]
    contents: dict[int, _Contents]


class Watch:
    """Watches one module; see the note.

    Args:
        module: The module; only a weak reference to it is kept.
        most: How many states are remembered.
    """

    def __init__(self, module: nn.Module, most: int) -> None:
        self._root, self._most = weakref.ref(module), most
        self._inner = [*module.modules()][1:]
        self._reads: Reads = set()
        self._names_of: dict[int, list[str]] = {}  # of what was read, by id of the module
        self._globals: dict[int, list[str]] = {}  # names that functions read, by id of the globals
        self._class_attributes: list[tuple[Any, str]] = []
        self._structure = self._structure_now()
        self._contents: list[_Contents] = []
        self._tensors: list[torch.Tensor] = []
        self._geometry: list[Any] = []
        self._numbers: OrderedDict[Hashable, tuple[int, Any]] = OrderedDict()
        self._count = 0
        self._number: int | None = None
        self._unchanged: list[Condition] = []
        self._alike: Alike | None = None

    def state(self) -> int | None:
        """The same number for the same state; None if the structure of the module changed.

        After None everything that was captured is void: a submodule was replaced, a class was
        changed, a hook was registered or removed.

        Raises:
            CaptureError: if there is too much to watch.
        """
        if self._number is not None and all(unchanged() for unchanged in self._unchanged):
            return self._number
        if not _same_objects(self._structure_now(), self._structure):
            return None
        self._number = self._look_up()
        self._unchanged = [*self._conditions()]
        return self._number

    def is_lazy(self) -> bool:
        """Whether a parameter has no shape yet."""
        return any(g in _LAZY for g in self._geometry)

    def add(self, reads: Reads) -> None:
        """Watches these attributes too."""
        known = {id(m) for m in self._modules()}
        new = {
            (m, name)
            for m, name in reads
            if m in known and (name not in _INTERNALS or name == EVERYTHING)
        } | {(id(self._root()), "forward")}
        if not new <= self._reads:
            self._reads |= new
            self._names_of = _by_module(self._reads)
            self._number = None
            self._contents = []
            self._numbers.clear()
            self._class_attributes = self._found_in_classes()
            self._structure = self._structure_now()

    def alike(self) -> Alike:
        """What helps to watch modules that may look the same."""
        positions = {id(m): i for i, m in enumerate(self._modules())}
        reads = sorted((positions[m], name) for m, name in self._reads if m in positions)
        contents = {
            c.place: copy.copy(c) for c in self._contents if c.owner is not None and not c.tensors()
        }
        return Alike(reads, contents)

    def add_as(self, alike: Alike) -> None:
        """Watches what is watched of a module that may look the same."""
        if self._alike is not alike:
            self._alike, modules = alike, self._modules()
            self.add({(id(modules[i]), name) for i, name in alike.reads if i < len(modules)})

    def described(self) -> tuple[Hashable, list[Any]]:
        """The state, without reference to which modules these are, and objects that it names.

        Modules whose descriptions are equal look the same to a forward that reads what is watched.
        The description is valid while the objects exist that it names by their `id`.
        """
        self.state()
        modules = self._modules()
        numbers = {id(m): ("module", i) for i, m in enumerate(modules)}
        for i, contents in enumerate(self._contents):
            numbers.setdefault(contents.place, ("contents", i))
        described = Description(numbers)
        kinds = tuple(
            (original_class(type(m)), tuple(m._modules), described.of(tuple(m._modules.values())))
            for m in modules
        )
        hooks = tuple(
            (i, kind, described.of(tuple(m.__dict__[kind].values())))
            for i, m in enumerate(modules)
            for kind in HOOKS
            if i and m.__dict__[kind]  # those of the root run around it
        )
        classes = tuple(described.of(vars(cls).get(n)) for cls, n in self._class_attributes)
        held = tuple(c.described(described) for c in self._contents)
        first: dict[int, int] = {}
        ties = tuple(first.setdefault(id(t), i) for i, t in enumerate(self._tensors))
        key = kinds, hooks, classes, held, tuple(self._geometry), ties
        return key, described.named

    def _modules(self) -> list[nn.Module]:
        root = self._root()
        assert root is not None, "a module that is called exists"
        return [root, *self._inner]

    def _structure_now(self) -> list[Any]:
        """The objects of which the structure consists."""
        found: list[Any] = [v for hooks in _GLOBAL_HOOKS for v in (*hooks, *hooks.values())]
        for m in self._modules():
            found += [original_class(type(m)), *_members(m.__dict__)]
            for name in ("_modules", *HOOKS):
                found += [*m.__dict__[name], *m.__dict__[name].values()]
        return found + [vars(cls).get(name) for cls, name in self._class_attributes]

    def _found_in_classes(self) -> list[tuple[Any, str]]:
        """What was read of classes: where it was found, and its name."""
        found: dict[tuple[Any, str], None] = {}
        for m in self._modules():
            for name in self._names(m):
                mro = original_class(type(m)).__mro__
                owner = next((c for c in mro if name in vars(c)), None)
                if owner is not None and owner.__module__.partition(".")[0] != "torch":
                    found[owner, name] = None
        return [*found]

    def _names(self, m: nn.Module) -> list[str]:
        return self._names_of.get(id(m), [])

    # -- looking up a state

    def _look_up(self) -> int:
        rearranged = [c for c in self._contents if c.refresh()]
        if rearranged or not self._contents:
            self._contents = self._collect()
        self._tensors = [t for c in self._contents for t in c.tensors()]
        self._geometry = [*map(_geometry, self._tensors)]
        first: dict[int, int] = {}
        ties = tuple(first.setdefault(id(t), i) for i, t in enumerate(self._tensors))
        numbers = {c.place: i for i, c in enumerate(self._contents) if c.is_data()}
        key = tuple(c.key(numbers) for c in self._contents), tuple(self._geometry), ties
        if key not in self._numbers:
            self._count += 1
            # The owners are kept, so that no other object gets an id that is part of a key.
            self._numbers[key] = self._count, [c.owner for c in self._contents]
            if len(self._numbers) > self._most:
                self._numbers.popitem(last=False)
        self._numbers.move_to_end(key)
        return self._numbers[key][0]

    def _collect(self) -> list[_Contents]:
        """All that is to be watched now."""
        modules = self._modules()
        held = held_tensors(modules[0]).values()
        slots = {(id(_holder(container)), key) for h in held for container, key in h.slots}
        known = {id(m) for m in modules}
        self._globals = {}
        found: dict[int, _Contents] = {}
        queue: deque[tuple[Any, int]] = deque()

        def add(contents: _Contents, depth: int) -> None:
            found[contents.place] = contents
            queue.extend((v, depth) for v in contents.before if not is_leaf(v))

        for contents in self._of_modules(modules, slots):
            add(contents, 1)
        functions = [vars(cls).get(name) for cls, name in self._class_attributes]
        queue.extend((f, 1) for f in functions)
        while queue or functions:
            if not queue:  # what the functions found so far read of globals
                for namespace, names_read in globals_of(functions).values():
                    names = sorted({*names_read, *self._globals.get(id(namespace), ())})
                    self._globals[id(namespace)] = names
                    add(_Contents(None, _some(namespace, names), id(namespace), slots), 1)
                functions = []
                continue
            value, depth = queue.popleft()
            if id(value) in found:
                continue
            if isinstance(value, types.FunctionType):
                functions.append(value)
            if id(value) not in known and depth <= _DEPTH:
                if (inside := self._contents_of(value, slots)) is not None:
                    add(inside, 1 if isinstance(value, nn.Module) else depth + 1)
            if len(found) > _MOST + 3 * len(modules):
                raise CaptureError(f"forward may depend on more than {_MOST} objects")
        return [c for c in found.values() if not is_fixed(c.owner) or c.tensors()]

    def _of_modules(
        self, modules: list[nn.Module], slots: set[tuple[int, Any]]
    ) -> Iterator[_Contents]:
        """The tensors of modules, and what was read of them."""
        for m in modules:
            for members in (m._parameters, m._buffers):
                yield _Contents(members, _required(reader(members)), id(members), slots)
            if names := self._names(m):
                yield _attributes(m, names, slots, is_root=m is modules[0])

    def _contents_of(self, value: Any, slots: set[tuple[int, Any]]) -> _Contents | None:
        """What is in an object; None if that is not looked into."""
        known = self._alike.contents.get(id(value)) if self._alike is not None else None
        if known is not None and known.owner is value and known.unchanged():
            return known.with_slots(slots)
        read = reader(value)
        return None if read is None else _Contents(value, read, id(value), slots)

    # -- whether all is as it was

    def _conditions(self) -> Iterator[Condition]:
        """Functions that tell whether something is as it is now, mostly in C loops.

        None of them refers to the root, which keeps them.
        """
        root, inner, modules = self._root, self._inner, self._modules()
        types_now, members = [*map(type, modules)], _members(modules[0].__dict__)
        yield lambda: [type(root()), *map(type, inner)] == types_now
        yield lambda: _same_objects(_members(_required(root()).__dict__), members)
        attributes = [
            c for c in self._contents if isinstance(c, _Attributes) and c.owner is not None
        ]
        names = {id(c.owner): c.names for c in attributes}
        yield _same_attributes([(m.__dict__, names.get(id(m), ())) for m in inner])
        held = [c.owner for c in self._contents if type(c.owner) is dict]
        hooks = [m.__dict__[kind] for m in modules for kind in HOOKS]
        yield _same_dictionaries([*_GLOBAL_HOOKS, *hooks, *(m._modules for m in modules), *held])
        yield _same_class_attributes(self._class_attributes)
        tensors, geometry = self._tensors, self._geometry
        yield lambda: _same_geometry(tensors, geometry)
        rest = [c for c in self._contents if type(c.owner) is not dict and id(c.owner) not in names]
        yield lambda: all(c.unchanged() for c in rest)


def _by_module(reads: Reads) -> dict[int, list[str]]:
    """The names that were read, sorted, by the `id` of the module."""
    found: dict[int, list[str]] = {}
    for module, name in sorted(reads, key=itemgetter(1)):
        found.setdefault(module, []).append(name)
    return found


def _same_objects(now: Sequence[Any], before: Sequence[Any]) -> bool:
    return len(now) == len(before) and all(map(is_, now, before))


def _same_dictionaries(dictionaries: list[dict[Any, Any]]) -> Condition:
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


def _same_attributes(attributes: list[tuple[dict[str, Any], Sequence[str]]]) -> Condition:
    """Tells likewise for the members and some attributes of modules."""
    getters: dict[tuple[str, ...], Any] = {}  # modules of one class share theirs
    pairs, absent = [], []
    for d, names in attributes:
        there = (*_MEMBERS, *(n for n in names if n in d))
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


def _same_class_attributes(attributes: list[tuple[Any, str]]) -> Condition:
    values = [vars(cls).get(name) for cls, name in attributes]
    return lambda: all(
        vars(cls).get(name) is value for (cls, name), value in zip(attributes, values, strict=True)
    )


def _holder(container: Any) -> Any:
    return container.function if isinstance(container, Variables) else container


def _some(dictionary: dict[str, Any], names: list[str]) -> Read:
    return lambda: (names, [dictionary.get(name, MISSING) for name in names])


class _Contents:
    """What an object holds, and what it held when it was last looked at.

    Args:
        owner: The object, if it has to be kept.
        read: Tells what it holds.
        place: The `id` of the container of tensors.
        slots: Where tensors are which captured graphs take from there anew at each call.
    """

    def __init__(self, owner: Any, read: Read, place: int, slots: set[tuple[int, Any]]) -> None:
        self.owner, self._read, self.place, self._slots = owner, read, place, slots
        self._take(*read())

    def with_slots(self, slots: set[tuple[int, Any]]) -> _Contents:
        """A copy for another watch."""
        new = copy.copy(self)
        new._slots = slots
        return new

    def unchanged(self) -> bool:
        """Whether all is as it was."""
        names, values = self._read()
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
        self._take(*self._read())
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


class _Attributes(_Contents):
    """Some attributes of a module; the root, which keeps the watch, is not kept by it."""


def _attributes(
    module: nn.Module, names: list[str], slots: set[tuple[int, Any]], *, is_root: bool
) -> _Contents:
    reference, place = weakref.ref(module), id(module.__dict__)

    def some() -> Inside:
        attributes = _required(reference()).__dict__
        return names, [attributes.get(name, MISSING) for name in names]

    def everything() -> Inside:
        attributes = _required(reference()).__dict__
        kept = {k: v for k, v in attributes.items() if k not in _INTERNALS and not is_runner(k)}
        return [*kept], [*kept.values()]

    owner = None if is_root else module
    if EVERYTHING in names:
        return _Contents(owner, everything, place, slots)
    return _Attributes(owner, some, place, slots)


def _same_geometry(tensors: list[torch.Tensor], geometry: list[Any]) -> bool:
    """Whether tensors have their geometry still; makes no objects that stay, which is faster."""
    for t, known in zip(tensors, geometry, strict=True):
        if known in _LAZY:
            if type(t) is not known:
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


def _geometry(t: torch.Tensor) -> Any:
    if type(t) in _LAZY:
        return type(t)
    plain = type(t), t.dtype, t.requires_grad, t.shape, t.stride(), t.device
    return *plain, spread.geometry(t)


def _required(value: Any) -> Any:
    assert value is not None
    return value
