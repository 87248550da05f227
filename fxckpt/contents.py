"""What lies inside objects that modules refer to, as far as a captured forward may depend on it."""

from __future__ import annotations

import copyreg
import dis
import enum
import functools
import inspect
import sys
import types
import zlib
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

_PLAIN = frozenset(
    (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
)
_OF_STANDARD_LIBRARY = sys.stdlib_module_names - {"builtins", "types", "collections", "argparse"}
MISSING: Any = object()


def is_plain(value: Any) -> bool:
    """Whether a value is compared by its type and value."""
    return type(value) in _PLAIN


def is_leaf(value: Any) -> bool:
    """Whether there is nothing in a value that could change."""
    return type(value) in _PLAIN or isinstance(value, torch.Tensor) or value is MISSING


Inside = tuple[Sequence[Any], Sequence[Any]]  # names and values
Read = Callable[[], Inside]


class Entries:
    """Tells what is in a dictionary, all that an object holds.

    Args:
        dictionary: It itself, or the attributes of the object.
    """

    def __init__(self, dictionary: dict[Any, Any]) -> None:
        self.dictionary = dictionary

    def __call__(self) -> Inside:
        """Keys and values."""
        return [*self.dictionary], [*self.dictionary.values()]


def reader(value: Any) -> Read | None:
    """Gives a function that tells what an object holds; None for one that is not looked into."""
    if type(value) in (dict, OrderedDict):
        return Entries(value)
    if isinstance(value, dict):
        return lambda: ([*value], [*value.values()])
    if isinstance(value, (list, tuple, deque, set, frozenset)):
        return lambda: _numbered([*value])
    if isinstance(value, (np.ndarray, bytearray)):
        return lambda: _numbered([_checksum(value)])
    if isinstance(value, functools.partial):
        return lambda: _numbered([value.func, value.args, value.keywords])
    if isinstance(value, types.MethodType):
        return lambda: _numbered([value.__self__, value.__func__])
    if isinstance(value, types.FunctionType):
        return None if _library(value) == "torch" else lambda: _inside_function(value)
    return _object_reader(value)


def is_fixed(value: Any) -> bool:
    """Whether what an object refers to is always the same, though that may change."""
    if isinstance(value, types.FunctionType):
        return not (value.__closure__ or value.__defaults__ or value.__kwdefaults__ or vars(value))
    return isinstance(value, (tuple, frozenset, types.MethodType))


def _numbered(values: list[Any]) -> Inside:
    return range(len(values)), values


def _checksum(value: Any) -> str:
    return sys.intern(str(zlib.crc32(np.ascontiguousarray(value).tobytes())))


def _inside_function(function: types.FunctionType) -> Inside:
    cells = [_cell_contents(c) for c in function.__closure__ or ()]
    attributes = vars(function).values()
    return _numbered([*cells, function.__defaults__, function.__kwdefaults__, *attributes])


def _cell_contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return MISSING


def _object_reader(value: Any) -> Read | None:
    kind = type(value)
    if isinstance(value, (type, enum.Enum, types.ModuleType)) or inspect.isbuiltin(value):
        return None
    library = kind.__module__.partition(".")[0]
    if library in _OF_STANDARD_LIBRARY or library == "fxckpt":
        return None
    attributes = getattr(value, "__dict__", None)
    slots = copyreg._slotnames(kind)  # type: ignore[attr-defined]
    if slots:
        return lambda: (
            [*(attributes or ()), *slots],
            [*(attributes or {}).values(), *(getattr(value, s, MISSING) for s in slots)],
        )
    if attributes is None:
        return None
    if type(attributes) is dict:
        return Entries(attributes)
    return lambda: ([*attributes], [*attributes.values()])


def globals_of(functions: Iterable[Any]) -> dict[int, tuple[dict[str, Any], set[str]]]:
    """The global names that functions read, and those that these functions call.

    Returns:
        By `id`, each dictionary of globals with the names in it that may be data.
    """
    found: dict[int, tuple[dict[str, Any], set[str]]] = {}
    queue, seen = [*functions], set()
    while queue:
        function = queue.pop()
        function = inspect.unwrap(getattr(function, "fget", None) or function)
        code = getattr(function, "__code__", None)
        if code is None or id(code) in seen or _library(function) in _TAKEN_AS_THEY_ARE:
            continue
        seen.add(id(code))
        names = {n for c in _codes(code) for n in c.co_names} & function.__globals__.keys()
        for name in names:
            value = function.__globals__[name]
            if isinstance(value, types.FunctionType):
                queue.append(value)
            if is_leaf(value) or reader(value) is not None:
                _, watched = found.setdefault(
                    id(function.__globals__), (function.__globals__, set())
                )
                watched.add(name)
    return found


_TAKEN_AS_THEY_ARE = _OF_STANDARD_LIBRARY | {"torch", "numpy", "fxckpt"}


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """A code object, and those of the functions and comprehensions in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def is_self_contained(function: Any) -> bool:
    """Whether a function works with its arguments and operations of torch, and nothing else."""
    if type(function) is not types.FunctionType or function.__closure__ or function.__defaults__:
        return False
    steps = [i for code in _codes(function.__code__) for i in dis.get_instructions(code)]
    if any(step.opname in ("IMPORT_NAME", "STORE_GLOBAL", "DELETE_GLOBAL") for step in steps):
        return False
    names = {step.argval for step in steps if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    own = function.__globals__
    return all(_is_torch(own[n]) if n in own else n in _COMPUTING for n in names)


_COMPUTING = frozenset(
    "abs all any bool dict enumerate filter float getattr hasattr int isinstance len list map max "
    "min range reversed set sorted str sum tuple type zip".split()
)


def _is_torch(value: Any) -> bool:
    name = value.__name__ if isinstance(value, types.ModuleType) else _library(value)
    return name.partition(".")[0] == "torch"


def _library(function: Any) -> str:
    return (getattr(function, "__module__", None) or "").partition(".")[0]
