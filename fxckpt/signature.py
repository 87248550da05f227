"""The signature: all that a captured graph depends on, read anew at each call.

A signature has three parts: the arguments (structure, static leaves, geometry of the tensors), the
global modes (autocast, default dtype, attention backends, ...), and the state of the module
(training flags, plain attributes, geometry of its tensors). The last is the longest, so `Watch`
compares it with what it was at the previous call and hands out a small number for it.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from operator import is_
from typing import Any

import torch
from torch import nn

from fxckpt import tree
from fxckpt.capture import autocast_state
from fxckpt.state import held_tensors

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
        self._modules = list(module.modules())
        self._children = [(m._modules, list(m._modules.values())) for m in self._modules]
        held = [h for h in held_tensors(module).values() if h.slots]
        self._slots = [h.slots[0] for h in held]
        self._tied = [h.slots for h in held if len(h.slots) > 1]
        self._counts = [
            (members, len(members))
            for m in self._modules
            for members in (m._parameters, m._buffers)
        ]
        self._numbers: dict[Hashable, tuple[int, Any]] = {}
        self._attributes: list[tuple[dict[str, Any], bool, list[Any]]] = []
        self._tensors: list[Any] = []
        self._geometry: list[Any] = []
        self._number: int | None = None

    def state(self) -> int | None:
        """The same number for the same state; None if the structure of the module changed.

        After None everything that was captured is void: a submodule was replaced, a parameter
        added, weights were tied or untied.
        """
        if any(list(d.values()) != children for d, children in self._children):
            return None
        if any(len(members) != n for members, n in self._counts):
            return None
        tensors = [members.get(key) for members, key in self._slots]
        if not (len(tensors) == len(self._tensors) and all(map(is_, tensors, self._tensors))):
            if not self._same_ties(tensors):
                return None
            self._tensors, self._number = tensors, None
        geometry = [(t.dtype, t.requires_grad, t.shape, t.stride(), t.device) for t in tensors]
        if geometry != self._geometry:
            self._geometry, self._number = geometry, None
        if self._number is None or not all(map(_unchanged, self._attributes)):
            self._number = self._look_up()
        return self._number

    def _same_ties(self, tensors: list[Any]) -> bool:
        if any(t is None for t in tensors) or len(set(map(id, tensors))) != len(tensors):
            return False
        return all(len({id(d.get(k)) for d, k in slots}) == 1 for slots in self._tied)

    def _look_up(self) -> int:
        self._attributes = [
            (d, _holds_tensor(d), list(d.values())) for d in (m.__dict__ for m in self._modules)
        ]
        key = (
            tuple(self._geometry),
            tuple(tuple(map(_attribute_key, d.items())) for d, _, _ in self._attributes),
        )
        # The objects are kept, so that no other object gets an id that is part of a key.
        return self._numbers.setdefault(key, (len(self._numbers), self._attributes))[0]


def _unchanged(attributes: tuple[dict[str, Any], bool, list[Any]]) -> bool:
    now, by_identity, before = attributes
    if not by_identity:
        return list(now.values()) == before
    return len(now) == len(before) and all(map(is_, now.values(), before))


def _attribute_key(item: tuple[str, Any]) -> Hashable:
    key, value = item
    return (key, tree.static_key(value) if isinstance(value, _PLAIN) else id(value))


def _holds_tensor(attributes: dict[str, Any]) -> bool:
    """Whether equality of attributes could mean an elementwise comparison."""
    return any(hasattr(v, "__array__") for v in attributes.values())
