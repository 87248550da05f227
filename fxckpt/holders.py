"""Python objects that hold others: where in them something is, and putting something else there."""

from __future__ import annotations

import contextlib
import functools
import gc
import sys
import types
from collections import OrderedDict, deque
from collections.abc import Iterator
from copyreg import _slotnames  # type: ignore[attr-defined]
from typing import Any

import torch
from torch import nn

from fxckpt.contents import globals_of
from fxckpt.state import attributes

GONE: Any = object()  # what is to be held instead is nothing
LRU = type(functools.lru_cache(len))
_SEQUENCES = (list, deque, set)


def keys(holder: Any, value: Any) -> list[Any]:
    """The keys, indices or attributes under which an object holds a value."""
    return [key for key, each in _items(holder) if each is value]


def _items(holder: Any) -> Iterator[tuple[Any, Any]]:
    cls, kind = _class_of(holder), type(holder)  # `isinstance` may run code of the program
    if cls is not None:
        yield from vars(cls).items()
    elif issubclass(kind, dict):
        yield from [*dict.items(holder)]
    elif issubclass(kind, (list, tuple, deque)):
        yield from enumerate([*holder])
    elif kind is types.CellType:
        yield "cell_contents", contents_of_cell(holder)
    elif kind is types.FunctionType:
        yield from ((name, getattr(holder, name)) for name in ("__defaults__", "__kwdefaults__"))
    else:
        yield from {**(attributes_of(holder) or {}), **slots_of(holder)}.items()


def contents_of_cell(cell: types.CellType) -> Any:
    """What a variable of a closure is; `GONE` if it is not set."""
    try:
        return cell.cell_contents
    except ValueError:
        return GONE


def attributes_of(value: Any) -> dict[str, Any] | None:
    """The dictionary of an object's attributes, if it has one."""
    has = type(value).__dictoffset__
    return object.__getattribute__(value, "__dict__") if has else None


def slots_of(value: Any) -> dict[str, Any]:
    """What an object holds in slots."""
    found = {}
    for name in _slotnames(type(value)):
        with contextlib.suppress(AttributeError):
            found[name] = object.__getattribute__(value, name)
    return found


def _class_of(holder: Any) -> type | None:
    """The class of which a dictionary holds the attributes, if it is one."""
    if type(holder) is not dict or "__module__" not in holder:
        return None
    classes = (c for c in gc.get_referrers(holder) if isinstance(c, type))
    return next((c for c in classes if any(r is holder for r in gc.get_referents(c))), None)


def is_namespace(value: Any) -> bool:
    """Whether an object holds the globals of a Python module."""
    if type(value) is not dict or "__name__" not in value:
        return False
    return vars(sys.modules.get(str(value["__name__"]), types)) is value


def replace(holder: Any, old: Any, new: Any, then: Any = None) -> bool:
    """Puts `new` wherever an object holds `old`.

    Args:
        holder: The object.
        old: What it holds.
        new: What it shall hold; `GONE` for what it held before.
        then: What it held before, see `Surroundings.of`; None if that was nothing.

    Returns:
        Whether that was possible.
    """
    kind = type(holder)
    if kind is LRU:
        holder.cache_clear()
        return True
    if issubclass(kind, _SEQUENCES):
        return _replace_in_sequence(holder, old, new, then)
    found = keys(holder, old)
    then = then or {}
    try:
        for key in found:
            _assign(holder, key, then.get(key, GONE) if new is GONE else new)
        if issubclass(kind, dict) and any(k is old for k in holder):
            dict.pop(holder, old)
            return True
    except (AttributeError, TypeError):
        return False
    return bool(found)


def _replace_in_sequence(holder: Any, old: Any, new: Any, then: Any) -> bool:
    if new is not GONE:
        items = [new if x is old else x for x in holder]
    else:
        items = [x for x in holder if x is not old] if then is None else [*then]
    holder.clear()
    (holder.update if issubclass(type(holder), set) else holder.extend)(items)
    return True


def _assign(holder: Any, key: Any, value: Any) -> None:
    """Sets one item or attribute, past whatever the class of the holder does on assignment."""
    cls = holder if isinstance(holder, type) else _class_of(holder)
    if cls is not None:
        type.__delattr__(cls, key) if value is GONE else type.__setattr__(cls, key, value)
    elif issubclass(type(holder), dict):
        base = OrderedDict if issubclass(type(holder), OrderedDict) else dict
        base.__delitem__(holder, key) if value is GONE else base.__setitem__(holder, key, value)
    elif value is GONE:
        object.__delattr__(holder, key)
    else:
        object.__setattr__(holder, key, value)


Prepared = tuple[Any, Any, Any]  # holder, name, value


class Surroundings:
    """What the objects around a program hold, so that it can be put back.

    These are the attributes of modules and of their classes, the globals of the Python modules that
    define these, closures and defaults of functions among them, and what is in all that, a few
    levels deep. Libraries are left out.

    Args:
        module: The module that the program runs, if any.
        program: The program: a function, or several classes.
        with_globals: Whether globals belong to it.
    """

    def __init__(
        self, module: nn.Module | None, program: Any, *, with_globals: bool = True
    ) -> None:
        self._then: dict[int, Any] = {}  # by id: a copy of the contents
        self._seen: dict[int, Any] = {}  # by id, so that these stay what they are
        self._namespaces: dict[str, None] = {}  # names of Python modules to look into
        modules = [] if module is None else [*module.modules()]
        self._seen.update((id(m), m) for m in modules)
        for m in modules:
            for _, value in attributes(m):
                self._add(value, 0)
        self._add(program, 0)
        self._near = dict(self._seen)
        classes = {*map(type, modules)}
        self._classes = {c for t in classes for c in t.__mro__ if _is_programs(c)}
        for cls in self._classes:
            self._add(cls, _OF_GLOBALS)
        classes.update(program if isinstance(program, list) else ())
        self._namespaces.update((c.__module__, None) for c in classes if _is_programs(c))
        for name in (queue := [*self._namespaces] if with_globals else []):
            self._add_globals(name)
            queue += [n for n in self._namespaces if n not in queue]

    def knows(self, value: Any) -> bool:
        """Whether an object was found there."""
        return id(value) in self._seen

    def shows(self, value: Any) -> bool:
        """Whether the program may come across an object: in modules, or globals that it reads."""
        if id(value) in self._near:
            return True
        functions = [f for cls in self._classes for f in vars(cls).values()]
        functions += [f for f in self._near.values() if type(f) is types.FunctionType]
        read = globals_of(functions).values()
        return any(names.get(name) is value for names, wanted in read for name in wanted)

    def of(self, holder: Any) -> Any:
        """What an object held: a mapping or a list; None if that is not known."""
        cls = _class_of(holder)
        if cls is not None:
            return self._then.get(id(cls))
        attributes = holder if issubclass(type(holder), (dict, type)) else attributes_of(holder)
        return self._then.get(id(holder), self._then.get(id(attributes)))

    def put_back(self) -> tuple[bool, list[Prepared]]:
        """Undoes changes, other than those of tensors.

        Returns:
            Whether there were others than preparations, and these: what was nothing, or None, and
            got a plain value.
        """
        changed = False
        prepared: list[Prepared] = []
        for key, then in self._then.items():
            holder = self._seen[key]
            now, _ = _contents(holder)
            if isinstance(then, dict):
                now = now or {}
                different = [k for k in {**then, **now} if _is_other(then, now, k)]
                for name in different:
                    _assign(holder, name, then.get(name, GONE))
                    if then.get(name) is None and type(now.get(name)) in _NUMBERS:
                        prepared.append((holder, name, now[name]))
                different = [k for k in different if (k not in {p[1] for p in prepared})]
            else:
                in_order = not issubclass(type(holder), set)
                different = [*_differences(then, now, in_order)]
                if different:
                    _replace_in_sequence(holder, None, GONE, then)
            changed |= bool(different)
        return changed, prepared

    def _add_globals(self, name: str) -> None:
        names = vars(sys.modules.get(name, types))
        if id(names) not in self._seen:
            self._seen[id(names)] = names
            self._then[id(names)] = dict(names)
            for key, value in self._then[id(names)].items():
                elsewhere = isinstance(value, type) and value.__module__ != name
                if not elsewhere and not (key.startswith("__") and key.endswith("__")):
                    self._add(value, _OF_GLOBALS)

    def _add(self, value: Any, depth: int) -> None:
        if type(value) in _ATOMS or id(value) in self._seen:
            return
        self._seen[id(value)] = value
        if type(value) is types.FunctionType and depth < _OF_GLOBALS and _is_programs(value):
            self._namespaces[value.__module__] = None
        then, inside = _contents(value)
        if then is not None:
            self._then[id(value)] = then
        if depth < _DEPTH:
            for each in inside:
                if type(each) not in _ATOMS:
                    self._add(each, depth + (then is not None))


def _is_other(then: dict[Any, Any], now: dict[Any, Any], key: Any) -> bool:
    if isinstance(key, str) and key.startswith("__") and key.endswith("__"):
        return False  # the interpreter's, such as the registry of warnings
    old, new = then.get(key, GONE), now.get(key, GONE)
    return old is not new and not _is_same_number(old, new) and not _has_tensor((old, new))


def _differences(then: list[Any], now: list[Any], in_order: bool) -> Iterator[Any]:
    before, after = [*map(id, then)], [*map(id, now)]
    if before != after and (in_order or sorted(before) != sorted(after)):
        fresh = [x for x in now if not any(x is y for y in then)]
        if not _has_tensor(fresh):
            yield now


def prepare(prepared: list[Prepared]) -> None:
    """Does again what `put_back` undid."""
    for holder, name, value in prepared:
        _assign(holder, name, value)


def _is_same_number(old: Any, new: Any) -> bool:
    return type(old) is type(new) and type(old) in _NUMBERS and old == new


_NUMBERS = (int, float, bool, str)


def _has_tensor(value: Any, depth: int = 0) -> bool:
    if isinstance(value, torch.Tensor):
        return True
    if depth > 3 or type(value) in _ATOMS or isinstance(value, (type, nn.Module)):
        return False
    _, inside = _contents(value)
    return any(_has_tensor(each, depth + 1) for each in inside)


_DEPTH, _OF_GLOBALS = 5, 3  # how deep to look, and where that begins for globals
_ATOMS = frozenset(
    (
        *(int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device),
        *(torch.Tensor, nn.Parameter, types.ModuleType, types.CodeType, types.BuiltinFunctionType),
    )
)
_OF_ANYONE = {"__main__", "types", "argparse", "collections"}  # namespaces and the like
_LIBRARIES = (sys.stdlib_module_names - _OF_ANYONE) | {"torch", "numpy", "fxckpt"}


def _is_programs(value: Any) -> bool:
    """Whether a class or function belongs to the program, and not to a library that it uses."""
    return (value.__module__ or "torch").partition(".")[0] not in _LIBRARIES


def _contents(value: Any) -> tuple[Any, Any]:
    """A copy of what an object holds, None if that never changes; and what to look into next.

    No code of the object's class runs.
    """
    kind = type(value)
    if issubclass(kind, dict):
        then = dict(dict.items(value))
        return then, then.values()
    if issubclass(kind, _SEQUENCES):
        return [*value], [*value]
    if issubclass(kind, (tuple, frozenset)):
        return None, value
    if kind is types.FunctionType:
        within = (value.__closure__, value.__defaults__, value.__kwdefaults__, value.__dict__)
        return None, [each for each in within if each]
    if kind is types.CellType:
        inside = contents_of_cell(value)
        return {"cell_contents": inside}, [inside]
    if kind is types.MethodType:
        return None, [value.__self__, value.__func__]
    if issubclass(kind, functools.partial):
        return None, [value.func, value.args, value.keywords]
    if issubclass(kind, type):
        then = dict(vars(value)) if _is_programs(value) else {}
        return then or None, then.values()
    if not (_is_programs(kind) or issubclass(kind, nn.Module)):
        return None, ()
    slots = slots_of(value)
    return slots or None, [*slots.values(), attributes_of(value)]
