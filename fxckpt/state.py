"""The tensors that a module holds, where it holds them, and putting stand-ins there for a while."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import types
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from fxckpt.errors import CaptureError

_MODULE_INTERNALS = frozenset(nn.Module().__dict__)
_CONTAINERS = (list, dict, set)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

Slot = tuple[Any, Any]  # a container and the key in it


@dataclasses.dataclass(slots=True)
class Held:
    """One tensor that a module tree holds.

    `slots` are the places where it is found: dictionaries of parameters, buffers or attributes of a
    module, or lists among the attributes. A tied weight has several.
    """

    name: str
    kind: str  # "parameter", "buffer" or "attribute"
    tensor: torch.Tensor
    slots: list[Slot] = dataclasses.field(default_factory=list)


def held_tensors(module: nn.Module) -> dict[int, Held]:
    """All tensors held by a module and its submodules, by `id`, in registration order."""
    found: dict[int, Held] = {}

    def add(tensor: torch.Tensor, name: str, kind: str, slot: Slot) -> None:
        found.setdefault(id(tensor), Held(name, kind, tensor)).slots.append(slot)

    modules = [(f"{path}." if path else "", m) for path, m in module.named_modules()]
    for dot, m in modules:
        for kind, members in (("parameter", m._parameters), ("buffer", m._buffers)):
            for key, tensor in members.items():
                if tensor is not None:
                    add(tensor, dot + key, kind, (members, key))
    for dot, m in modules:
        for key, value in attributes(m):
            for tensor, slot in _tensors_in(value, (m.__dict__, key)):
                add(tensor, dot + key, "attribute", slot)
    return found


def attributes(m: nn.Module) -> list[tuple[str, Any]]:
    """The attributes of a module that are its own, not those of `nn.Module`."""
    return [(key, value) for key, value in m.__dict__.items() if key not in _MODULE_INTERNALS]


class Variables:
    """The variables that a function has from around it, by position."""

    def __init__(self, function: types.FunctionType) -> None:
        self.function = function

    def __getitem__(self, i: int) -> Any:
        return self._cells()[i].cell_contents

    def __setitem__(self, i: int, value: Any) -> None:
        self._cells()[i].cell_contents = value

    def items(self) -> list[tuple[int, Any]]:
        """Positions and values of those that are set."""
        return [(i, c.cell_contents) for i, c in enumerate(self._cells()) if _is_set(c)]

    def _cells(self) -> tuple[types.CellType, ...]:
        return self.function.__closure__ or ()


def _is_set(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def _functions(value: Any, depth: int = 0) -> Iterator[Variables]:
    """A function, and those among its variables."""
    if type(value) is types.FunctionType and value.__closure__ and depth < 4:
        variables = Variables(value)
        yield variables
        for _, each in variables.items():
            yield from _functions(each, depth + 1)


def _tensors_in(value: Any, slot: Slot, depth: int = 0) -> Iterator[tuple[torch.Tensor, Slot]]:
    if isinstance(value, torch.Tensor):
        yield value, slot
    elif type(value) is types.FunctionType and value.__closure__ and depth < 4:
        variables = Variables(value)
        for i, child in variables.items():
            yield from _tensors_in(child, (variables, i), depth + 1)
    elif isinstance(value, (list, tuple)) and depth < 4:
        for i, child in enumerate(value):
            yield from _tensors_in(child, (value, i), depth + 1)
    elif isinstance(value, dict) and depth < 4:
        for key, child in value.items():
            yield from _tensors_in(child, (value, key), depth + 1)


@dataclasses.dataclass(frozen=True, slots=True)
class Assignment:
    """An attribute, parameter or buffer of a module that was assigned anew."""

    slot: Slot
    value: Any


@contextlib.contextmanager
def substituted(
    module: nn.Module, stand_ins: dict[int, torch.Tensor]
) -> Iterator[list[Assignment]]:
    """Puts `stand_ins[id(t)]` wherever the module holds `t`; everything is as before afterwards.

    Yields:
        A list that holds, afterwards, what was assigned to modules meanwhile.

    Raises:
        CaptureError: if something else about a module was changed meanwhile.
    """
    modules = [(path, m, _Contents(m)) for path, m in module.named_modules()]
    functions = [f for _, m, _ in modules for _, a in attributes(m) for f in _functions(a)]
    exchanged: list[tuple[Variables, int, Any, Any]] = []
    assignments: list[Assignment] = []
    try:
        for variables in functions:
            for i, value in variables.items():
                if (new := _replaced(value, stand_ins)) is not value:
                    exchanged.append((variables, i, value, new))
                    variables[i] = new
        for _, m, _ in modules:
            for slots in (m._parameters, m._buffers):
                slots.update({k: stand_ins.get(id(t), t) for k, t in slots.items()})
            for key, value in attributes(m):
                m.__dict__[key] = _replaced(value, stand_ins)
        during = [(path, m, _Contents(m)) for path, m, _ in modules]
        yield assignments
        for path, m, contents in during:
            assignments.extend(contents.assignments(m, path))
    finally:
        for variables, i, value, new in exchanged:
            if variables[i] is new:  # else forward assigned to it
                variables[i] = value
        for _, m, contents in modules:
            contents.restore(m)


@contextlib.contextmanager
def exchanged(held: Iterable[Held], stand_ins: dict[int, torch.Tensor]) -> Iterator[None]:
    """Puts `stand_ins[id(t)]` wherever `t` is held, in the very containers.

    Raises:
        CaptureError: if one of these cannot be changed.
    """
    slots = [(h.tensor, slot) for h in held if id(h.tensor) in stand_ins for slot in h.slots]
    if any(isinstance(container, tuple) for _, (container, _) in slots):
        raise CaptureError("a tuple holds a tensor of a torch.func transform")
    try:
        for tensor, (container, key) in slots:
            container[key] = stand_ins[id(tensor)]
        yield
    finally:
        for tensor, (container, key) in slots:
            container[key] = tensor


@contextlib.contextmanager
def restored(module: nn.Module) -> Iterator[None]:
    """Makes a module refer to the same objects afterwards, whatever was assigned meanwhile."""
    contents = [(m, _Contents(m)) for m in module.modules()]
    try:
        yield
    finally:
        for m, then in contents:
            then.restore(m)


class _Contents:
    """All that a module refers to, at one moment."""

    def __init__(self, m: nn.Module) -> None:
        self._slots = [(d, dict(d)) for d in (m._parameters, m._buffers, m.__dict__)]
        structure = (m._modules, *(getattr(m, kind) for kind in HOOKS))
        self._structure = [(d, dict(d)) for d in structure]
        self._inner = [
            (value, copy.copy(value))
            for _, value in attributes(m)
            if isinstance(value, _CONTAINERS)
        ]

    def restore(self, m: nn.Module) -> None:
        """Makes the module refer to the same objects again."""
        for members, then in (*self._structure, *self._slots):
            if not _same_items(members, then):
                members.clear()
                members.update(then)
        for container, contents in self._inner:
            if not _same_items(container, contents):
                container.clear()
                (container.extend if isinstance(container, list) else container.update)(contents)

    def assignments(self, m: nn.Module, path: str) -> Iterator[Assignment]:
        """What was assigned since.

        Raises:
            CaptureError: if a change is not an assignment of something made of tensors.
        """
        told: Any = {"path": path, "may_pass": True}
        for registered, before in self._structure:
            if not _same_items(registered, before):
                what = "submodules" if registered is m._modules else "hooks"
                raise CaptureError(f"forward changes the {what} of a module", **told)
        for container, then in self._inner:
            if not _same_items(container, then):
                raise CaptureError("forward changes a container held by a module", **told)
        for members, then in self._slots:
            for key in then.keys() - members.keys():
                raise CaptureError(f"forward deletes the module attribute {key!r}", **told)
            for key, value in members.items():
                old = then.get(key)
                if value is old or (type(value) is type(old) and _same_value(value, old)):
                    continue
                if not any(_tensors_in(value, (None, None))):
                    raise CaptureError(
                        f"forward changes the module attribute {key!r} from {old!r} to {value!r}",
                        **told,
                        hint="Keep what changes at each step in a tensor buffer.",
                    )
                yield Assignment((members, key), value)


def _same_items(now: Any, then: Any) -> bool:
    if len(now) != len(then):
        return False
    if isinstance(now, set):
        return bool(now == then)
    pairs = zip(now.items(), then.items(), strict=True) if isinstance(now, dict) else [(now, then)]
    return all(x is y for a, b in pairs for x, y in zip(a, b, strict=True))


def _same_value(new: Any, old: Any) -> bool:
    return isinstance(new, (bool, int, float, str, torch.dtype, torch.device)) and old == new


def _replaced(value: Any, stand_ins: dict[int, torch.Tensor], depth: int = 0) -> Any:
    """`value` with the stand-ins of tensors in it; the same object if there are none."""
    if isinstance(value, torch.Tensor):
        return stand_ins.get(id(value), value)
    if isinstance(value, weakref.ref) and id(value()) in stand_ins:
        return weakref.ref(stand_ins[id(value())])  # as recurrent layers remember their weights
    if depth < 4 and type(value) in (list, tuple):
        new = type(value)(_replaced(v, stand_ins, depth + 1) for v in value)
        return value if all(a is b for a, b in zip(new, value, strict=True)) else new
    if depth < 4 and type(value) is dict:
        items = {k: _replaced(v, stand_ins, depth + 1) for k, v in value.items()}
        return value if all(items[k] is v for k, v in value.items()) else items
    return value
