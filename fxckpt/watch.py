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
from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import nn

from fxckpt.contents import globals_of, is_leaf, reader
from fxckpt.description import Description
from fxckpt.errors import CaptureError
from fxckpt.installation import original_class
from fxckpt.likeness import Likeness, conditions_beyond
from fxckpt.reads import EVERYTHING, Reads
from fxckpt.state import HOOKS, Variables, held_tensors
from fxckpt.watched import (
    GLOBAL_HOOKS,
    INTERNALS,
    LAZY,
    MEMBERS,
    Condition,
    Contents,
    attributes,
    geometry,
    members,
    required,
    same_attributes,
    same_dictionaries,
    same_geometry,
    same_objects,
    some_of,
)

_DEPTH = 6
_MOST = 5000


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class Alike:
    """What a watch knows that helps to watch modules that may look the same.

    Attributes:
        names: What is watched besides members: attributes, by position of the module.
        contents: What is in objects without tensors, by `id`: most of them are shared.
        likeness: What the module looks like, if that is simple.
    """

    names: list[list[str]]
    contents: dict[int, Contents]
    likeness: Likeness | None


class Watch:
    """Watches one module; see the note.

    Attributes:
        latest: The state when it was last looked at; None if that has to be done anew.

    Args:
        module: The module; only a weak reference to it is kept.
        most: How many states are remembered.
    """

    def __init__(self, module: nn.Module, most: int) -> None:
        self._root, self._most = weakref.ref(module), most
        self._inner = [*module.modules()][1:]
        self._names_of: dict[int, list[str]] = {}  # of what was read, sorted, by id of the module
        self._globals: dict[int, list[str]] = {}  # names that functions read, by id of the globals
        self._class_attributes: list[tuple[Any, str]] = []
        self._structure = self._structure_now()
        self._contents: list[Contents] = []
        self._beyond: list[Contents] = []  # the modules, also what never changes itself
        self._tensors: list[torch.Tensor] = []
        self._geometry: list[Any] = []
        self.latests: OrderedDict[Hashable, tuple[int, Any]] = OrderedDict()
        self._count = 0
        self.latest: int | None = None
        self._unchanged: list[Condition] = []
        self._alike: Alike | None = None  # that of a module that may look the same
        self._current: Alike | None = None  # its own, in the present state

    def state(self) -> int | None:
        """The same number for the same state; None if the structure of the module changed.

        After None everything that was captured is void: a submodule was replaced, a class was
        changed, a hook was registered or removed.

        Raises:
            CaptureError: if there is too much to watch.
        """
        if self.latest is not None and all(unchanged() for unchanged in self._unchanged):
            return self.latest
        if not same_objects(self._structure_now(), self._structure):
            return None
        self._current = None
        self.latest = self._look_up()
        beyond = conditions_beyond(self._beyond, self._class_attributes)
        self._unchanged = [*self._conditions(), *beyond]
        return self.latest

    def is_lazy(self) -> bool:
        """Whether a parameter has no shape yet."""
        return any(g in LAZY for g in self._geometry)

    def add(self, reads: Reads) -> None:
        """Watches these attributes too."""
        known = {id(m) for m in self._modules()}
        names_of: dict[int, set[str]] = {id(self._root()): {"forward"}}
        for m, name in reads:
            if m in known and (name not in INTERNALS or name == EVERYTHING):
                names_of.setdefault(m, set()).add(name)
        if all(names <= {*self._names_of.get(m, ())} for m, names in names_of.items()):
            return
        for m, names in names_of.items():
            self._names_of[m] = sorted(names.union(self._names_of.get(m, ())))
        self.latest = self._current = None
        self._contents = []
        self.latests.clear()
        self._class_attributes = self._found_in_classes()
        self._structure = self._structure_now()

    def alike(self) -> Alike:
        """What helps to watch modules that may look the same as this one does now."""
        self.state()
        if self._current is None:
            modules = self._modules()
            names = [self._names(m) for m in modules]
            contents = {
                c.place: copy.copy(c)
                for c in self._contents
                if c.owner is not None and not c.tensors()
            }
            likeness = Likeness.of(
                modules, names, self._class_attributes, self._beyond, self._geometry
            )
            self._current = Alike(names, contents, likeness)
        return self._current

    def add_as(self, alike: Alike) -> None:
        """Watches what is watched of a module that may look the same."""
        if alike in (self._alike, self._current):
            return
        self._alike, modules = alike, self._modules()
        pairs = zip(modules, alike.names, strict=False)
        self.add({(id(m), name) for m, names in pairs for name in names})

    def takes_as(self, alike: Alike) -> bool:
        """Whether the module, not yet watched, looks the same in short; then it is watched so."""
        likeness, modules = alike.likeness, self._modules()
        tensors = None if likeness is None or self._names_of else likeness.of_others(modules)
        if likeness is None or tensors is None:
            return False
        self._names_of = dict(zip(map(id, modules), likeness.names, strict=True))
        self._class_attributes = likeness.class_attributes
        self._structure = self._structure_now()
        self._tensors, self._geometry = tensors, likeness.geometry
        self._count = self.latest = 1
        self._alike = self._current = alike
        self._unchanged = [*self._conditions(), *likeness.conditions]
        return True

    def is_known_as(self, alike: Alike) -> bool:
        """Whether the module looks the same, as is known without a description."""
        return self._current is alike

    def tensors(self) -> list[torch.Tensor]:
        """All that it holds, as far as they are watched."""
        return self._tensors

    def described(self) -> tuple[Hashable, list[Any]]:
        """The state, without reference to which modules these are, and objects that it names.

        Modules whose descriptions are equal look the same to a forward that reads what is watched.
        The description is valid while the objects exist that it names by their `id`.
        """
        self.state()
        if not self._contents:
            self._look_up()
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
        around = tuple(described.of(tuple(hooks.values())) for hooks in GLOBAL_HOOKS)
        classes = tuple(described.of(vars(cls).get(n)) for cls, n in self._class_attributes)
        held = tuple(c.described(described) for c in self._contents)
        key = kinds, hooks, around, classes, held, tuple(self._geometry), self._ties()
        return key, described.named

    def _modules(self) -> list[nn.Module]:
        root = self._root()
        assert root is not None, "a module that is called exists"
        return [root, *self._inner]

    def _structure_now(self) -> list[Any]:
        """The objects of which the structure consists."""
        found: list[Any] = [v for hooks in GLOBAL_HOOKS for v in (*hooks, *hooks.values())]
        for m in self._modules():
            found += [original_class(type(m)), *members(m.__dict__)]
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
            own, self._beyond = self._collect()
            self._contents = [*own, *(c for c in self._beyond if c.may_change())]
        self._tensors = [t for c in self._contents for t in c.tensors()]
        self._geometry = [*map(geometry, self._tensors)]
        numbers = {c.place: i for i, c in enumerate(self._contents) if c.is_data()}
        key = tuple(c.key(numbers) for c in self._contents), tuple(self._geometry), self._ties()
        if key not in self.latests:
            if self._current is None:  # else it has a number
                self._count += 1
            # The owners are kept, so that no other object gets an id that is part of a key.
            self.latests[key] = self._count, [c.owner for c in self._contents]
            if len(self.latests) > self._most:
                self.latests.popitem(last=False)
        self.latests.move_to_end(key)
        return self.latests[key][0]

    def _ties(self) -> tuple[int, ...]:
        """For each tensor, where it comes first."""
        first: dict[int, int] = {}
        return tuple(first.setdefault(id(t), i) for i, t in enumerate(self._tensors))

    def _collect(self) -> tuple[list[Contents], list[Contents]]:
        """All that is to be watched now: of modules, and beyond them."""
        modules = self._modules()
        held = held_tensors(modules[0]).values()
        slots = {(id(_holder(container)), key) for h in held for container, key in h.slots}
        known = {id(m) for m in modules}
        self._globals = {}
        found: dict[int, Contents] = {}
        queue: deque[tuple[Any, int]] = deque()

        def add(contents: Contents, depth: int) -> None:
            found[contents.place] = contents
            queue.extend((v, depth) for v in contents.before if not is_leaf(v))

        own = [*self._of_modules(modules, slots)]
        for contents in own:
            add(contents, 1)
        functions = [vars(cls).get(name) for cls, name in self._class_attributes]
        queue.extend((f, 1) for f in functions)
        while queue or functions:
            if not queue:  # what the functions found so far read of globals
                for namespace, names_read in globals_of(functions).values():
                    names = sorted({*names_read, *self._globals.get(id(namespace), ())})
                    self._globals[id(namespace)] = names
                    add(Contents(None, some_of(namespace, names), id(namespace), slots), 1)
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
        return own, [*found.values()][len(own) :]

    def _of_modules(
        self, modules: list[nn.Module], slots: set[tuple[int, Any]]
    ) -> Iterator[Contents]:
        """The tensors of modules, and what was read of them."""
        for m in modules:
            for held in (m._parameters, m._buffers):
                yield Contents(held, required(reader(held)), id(held), slots)
            if names := self._names(m):
                yield attributes(m, names, slots, is_root=m is modules[0])

    def _contents_of(self, value: Any, slots: set[tuple[int, Any]]) -> Contents | None:
        """What is in an object; None if that is not looked into."""
        known = self._alike.contents.get(id(value)) if self._alike is not None else None
        if known is not None and known.owner is value and known.unchanged():
            return known.with_slots(slots)
        read = reader(value)
        return None if read is None else Contents(value, read, id(value), slots)

    # -- whether all is as it was

    def _conditions(self) -> Iterator[Condition]:
        """Functions that tell whether something is as it is now, mostly in C loops.

        None of them refers to the root, which keeps them.
        """
        root, inner, modules = self._root, self._inner, self._modules()
        types_now, root_members = [*map(type, modules)], members(modules[0].__dict__)
        yield lambda: [type(root()), *map(type, inner)] == types_now
        yield lambda: same_objects(members(required(root()).__dict__), root_members)
        listed = [EVERYTHING not in self._names(m) for m in inner]
        yield same_attributes(
            [
                (m.__dict__, self._names(m) if some else ())
                for m, some in zip(inner, listed, strict=True)
            ]
        )
        yield same_dictionaries([m.__dict__[kind] for m in modules for kind in MEMBERS])
        tensors, looks = self._tensors, self._geometry
        yield lambda: same_geometry(tensors, looks)
        whole = [m for m, some in zip(inner, listed, strict=True) if not some]
        rest = [attributes(m, self._names(m), set(), is_root=False) for m in whole]
        if names := self._names(modules[0]):
            rest.append(attributes(modules[0], names, set(), is_root=True))
        yield lambda: all(c.unchanged() for c in rest)


def _holder(container: Any) -> Any:
    return container.function if isinstance(container, Variables) else container
