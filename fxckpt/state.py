"""The tensors that a module holds, where it holds them, and putting stand-ins there for a while."""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from fxckpt.errors import CaptureError

_MODULE_INTERNALS = frozenset(nn.Module().__dict__)


@dataclasses.dataclass(slots=True)
class Held:
    """One tensor that a module tree holds.

    `slots` are the dictionaries and keys where it is registered; a tied weight has several, a
    tensor that is only an attribute, or inside a list, has none and is watched by identity.
    """

    name: str
    kind: str  # "parameter", "buffer" or "attribute"
    tensor: torch.Tensor
    slots: list[tuple[dict[str, Any], str]] = dataclasses.field(default_factory=list)


def held_tensors(module: nn.Module) -> dict[int, Held]:
    """All tensors held by a module and its submodules, by `id`, in registration order."""
    found: dict[int, Held] = {}

    def add(tensor: torch.Tensor, name: str, kind: str) -> Held:
        return found.setdefault(id(tensor), Held(name, kind, tensor))

    modules = list(module.named_modules())
    for prefix, m in modules:
        dot = f"{prefix}." if prefix else ""
        for kind, members in (("parameter", m._parameters), ("buffer", m._buffers)):
            for key, tensor in members.items():
                if tensor is not None:
                    add(tensor, dot + key, kind).slots.append((members, key))
    for prefix, m in modules:
        dot = f"{prefix}." if prefix else ""
        for key, value in _attributes(m):
            for tensor in _tensors_in(value):
                add(tensor, dot + key, "attribute")
    return found


@contextlib.contextmanager
def substituted(module: nn.Module, stand_ins: dict[int, torch.Tensor]) -> Iterator[None]:
    """Puts `stand_ins[id(t)]` wherever the module holds `t`; everything is as before afterwards.

    Raises:
        CaptureError: if the code run meanwhile assigned to an attribute of a module, which a
            captured graph would not do again.
    """
    before = [(m, _snapshot(m)) for m in module.modules()]
    try:
        for m, _ in before:
            for members in (m._parameters, m._buffers):
                for key, tensor in members.items():
                    if tensor is not None:
                        members[key] = stand_ins.get(id(tensor), tensor)  # type: ignore[assignment]
            for key, value in list(_attributes(m)):
                m.__dict__[key] = _replaced(value, stand_ins)
        during = [_snapshot(m) for m, _ in before]
        yield
        for (m, _), expected in zip(before, during, strict=True):
            _refuse_assignments(module, m, expected)
    finally:
        for m, (parameters, buffers, attributes) in before:
            for now, then in ((m._parameters, parameters), (m._buffers, buffers)):
                now.clear()
                now.update(then)
            m.__dict__.clear()
            m.__dict__.update(attributes)


_Snapshot = tuple[dict[str, Any], dict[str, Any], dict[str, Any]]


def _snapshot(m: nn.Module) -> _Snapshot:
    return dict(m._parameters), dict(m._buffers), dict(m.__dict__)


def _refuse_assignments(root: nn.Module, m: nn.Module, expected: _Snapshot) -> None:
    for now, then in zip(_snapshot(m), expected, strict=True):
        for key in now.keys() | then.keys():
            old, new = then.get(key), now.get(key)
            if new is old or (type(new) is type(old) and _same_value(old, new)):
                continue
            path = next(name for name, other in root.named_modules() if other is m)
            raise CaptureError(
                f"forward assigns to the module attribute {key!r}",
                path=path,
                hint="Return the value, or keep it in a registered buffer changed in place.",
            )


def _same_value(old: Any, new: Any) -> bool:
    return isinstance(new, (bool, int, float, str, torch.dtype, torch.device)) and old == new


def _attributes(m: nn.Module) -> Iterator[tuple[str, Any]]:
    for key, value in m.__dict__.items():
        if key not in _MODULE_INTERNALS and next(_tensors_in(value), None) is not None:
            yield key, value


def _tensors_in(value: Any, depth: int = 0) -> Iterator[torch.Tensor]:
    if isinstance(value, weakref.ref):
        value = value()  # recurrent layers remember their weights like this
    if isinstance(value, torch.Tensor):
        yield value
    elif depth < 4 and isinstance(value, (list, tuple)):
        for child in value:
            yield from _tensors_in(child, depth + 1)
    elif depth < 4 and isinstance(value, dict):
        for child in value.values():
            yield from _tensors_in(child, depth + 1)


def _replaced(value: Any, stand_ins: dict[int, torch.Tensor], depth: int = 0) -> Any:
    if isinstance(value, torch.Tensor):
        return stand_ins.get(id(value), value)
    if isinstance(value, weakref.ref) and id(value()) in stand_ins:
        return weakref.ref(stand_ins[id(value())])
    if depth < 4 and type(value) in (list, tuple):
        return type(value)(_replaced(v, stand_ins, depth + 1) for v in value)
    if depth < 4 and type(value) is dict:
        return {k: _replaced(v, stand_ins, depth + 1) for k, v in value.items()}
    return value
