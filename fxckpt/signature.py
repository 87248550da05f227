"""The signature: all that a captured graph depends on, read anew at each call.

A signature has three parts: the arguments (structure, static leaves, geometry of the tensors), the
global modes (autocast, default dtype, attention backends, ...), and the state of the module
(training flags, plain attributes, geometry of its tensors). The last is the longest, so `Watch`
compares it with what it was at the previous call and hands out a small number for it.
"""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Iterable, Sequence
from operator import is_
from typing import Any

import torch
from torch import nn

from fxckpt import tree
from fxckpt.invisible import HOOKS
from fxckpt.modes import autocast_state
from fxckpt.state import attributes, held_tensors

_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)


def of_arguments(spec: tree.Spec, tensors: Sequence[torch.Tensor]) -> Hashable:
    """The part of a signature that comes from the arguments of a call."""
    first: dict[int, int] = {}
    return (
        spec,
        tuple(
            (
                type(t),
                t.shape,
                t.stride(),
                t.dtype,
                t.device,
                t.requires_grad,
                first.setdefault(id(t), i),
            )
            for i, t in enumerate(tensors)
        ),
    )


def of_modes() -> Hashable:
    """The part of a signature that comes from global state."""
    cuda = torch.backends.cuda
    return (
        autocast_state(),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_inference_mode_enabled(),
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
    )


class Watch:
    """Tells whether a module is still in a state in which it was captured.

    The common case, nothing changed since the last call, is decided by comparing object identities
    in C loops. Otherwise the whole state is looked up among those seen before.
    """

    def __init__(self, module: nn.Module) -> None:
        modules = list(module.modules())
        self._children = [(m._modules, list(m._modules.values())) for m in modules]
        held = [h for h in held_tensors(module).values() if h.tensor.layout == torch.strided]
        self._slots = [h.slots[0] for h in held]
        self._tied = [h.slots for h in held if len(h.slots) > 1]
        # Containers by identity: each is counted once, however many tensors it holds.
        containers = {id(c): c for h in held for c, _ in h.slots}
        containers |= {id(d): d for m in modules for d in (m._parameters, m._buffers)}
        containers |= {id(d): d for m in modules for d in _hooks(m)}
        self._containers = list(containers.values())
        self._counts = list(map(len, self._containers))
        found = _containers(modules)
        slots = {id(m.__dict__) for m in modules} | {id(c) for h in held for c, _ in h.slots}
        self._contents = [_Contents(c, slots=id(c) in slots) for c in found]
        self._numbers: dict[Hashable, tuple[int, Any]] = {}
        self._tensors: list[Any] = []
        self._geometry: list[Any] = []
        self._number: int | None = None

    def state(self) -> int | None:
        """The same number for the same state; None if the structure of the module changed.

        After None everything that was captured is void: a submodule was replaced, a parameter
        added, weights were tied or untied, a hook was registered or removed.
        """
        if any(list(d.values()) != children for d, children in self._children):
            return None
        if list(map(len, self._containers)) != self._counts:
            return None
        try:
            tensors: list[Any] = [container[key] for container, key in self._slots]
        except LookupError:
            return None
        if not self._still_tied():
            return None
        if not (len(tensors) == len(self._tensors) and all(map(is_, tensors, self._tensors))):
            if not self._distinct(tensors):
                return None
            self._tensors, self._number = tensors, None
        geometry = [(t.dtype, t.requires_grad, t.shape, t.stride(), t.device) for t in tensors]
        if geometry != self._geometry:
            self._geometry, self._number = geometry, None
        if self._number is None or not all(a.unchanged() for a in self._contents):
            self._number = self._look_up()
        return self._number

    def _still_tied(self) -> bool:
        return all(len({id(c[k]) for c, k in slots}) == 1 for slots in self._tied)

    def _distinct(self, tensors: list[Any]) -> bool:
        """Whether there is one tensor for each that was there when the watch began."""
        if not all(isinstance(t, torch.Tensor) for t in tensors):
            return False
        return len(set(map(id, tensors))) == len(tensors)

    def _look_up(self) -> int | None:
        if any(a.other_tensors() for a in self._contents):
            return None
        values = [a.read() for a in self._contents]
        key = tuple(self._geometry), tuple(a.key() for a in self._contents)
        # The objects are kept, so that no other object gets an id that is part of a key.
        return self._numbers.setdefault(key, (len(self._numbers), values))[0]


def _hooks(m: nn.Module) -> list[Any]:
    return [m.__dict__[name] for name in HOOKS]


class _Contents:
    """What a container holds: training flags, numbers, objects.

    With `slots`, tensors in it are slots of the watch, which compares their geometry.
    """

    def __init__(self, container: Any, *, slots: bool) -> None:
        self._container = container
        self._slots = slots
        self._tensors = self._tensor_keys()
        self._before: list[Any] = []
        self._simple = True  # no value whose comparison could be elementwise

    def unchanged(self) -> bool:
        """Whether all values are those of the last `read`."""
        if self._simple:
            return list(self._values()) == self._before
        now = self._compared()
        return len(now) == len(self._before) and all(map(is_, now, self._before))

    def other_tensors(self) -> bool:
        """Whether other places hold tensors than when the watch began."""
        return self._tensor_keys() != self._tensors

    def read(self) -> list[Any]:
        """Remembers the present values, and returns them."""
        self._simple = not any(hasattr(v, "__array__") for v in self._values())
        self._before = self._compared()
        return self._before

    def key(self) -> Hashable:
        """The present state: plain values by value, other objects by identity."""
        return tuple(
            (name, torch.Tensor) if self._slots and isinstance(v, torch.Tensor) else (name, _key(v))
            for name, v in self._items()
        )

    def _compared(self) -> list[Any]:
        """The values, without tensors that are compared by their geometry, like parameters."""
        return [v for v in self._values() if not (self._slots and isinstance(v, torch.Tensor))]

    def _values(self) -> Iterable[Any]:
        return self._container.values() if isinstance(self._container, dict) else self._container

    def _items(self) -> Iterable[tuple[Any, Any]]:
        if isinstance(self._container, dict):
            return self._container.items()
        return enumerate(self._container)

    def _tensor_keys(self) -> set[Any]:
        return {k for k, v in self._items() if isinstance(v, torch.Tensor)}


def _key(value: Any) -> Hashable:
    return tree.static_key(value) if isinstance(value, _PLAIN) else id(value)


def _containers(modules: Iterable[nn.Module]) -> list[Any]:
    """The dictionaries and lists in which modules keep their state.

    These are the attributes of modules, of objects among them (configurations), and containers in
    them, each once.
    """
    found: dict[int, Any] = {id(m.__dict__): m.__dict__ for m in modules}
    stack = [(value, 0) for m in modules for _, value in attributes(m)]
    while stack:
        value, depth = stack.pop()
        container = _state_of(value)
        if container is None or id(container) in found or depth > _DEPTH:
            continue
        if not isinstance(container, tuple):
            found[id(container)] = container
        inner = container.values() if isinstance(container, dict) else container
        stack.extend((v, depth + 1) for v in inner)
    return list(found.values())


_DEPTH = 4


def _state_of(value: Any) -> Any:
    """The container in which a value keeps its state, if it has one that is watched."""
    if isinstance(value, (dict, list, tuple, set)):
        return value
    if isinstance(value, (nn.Module, torch.Tensor, type)) or inspect.isroutine(value):
        return None
    if inspect.ismodule(value) or type(value).__module__.startswith("fxckpt."):
        return None
    return getattr(value, "__dict__", None)
