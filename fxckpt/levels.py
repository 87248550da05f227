"""The transforms of `torch.func` around a call, and what stands for their tensors."""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Hashable, Iterable, Iterator
from typing import Any
from unittest import mock

import torch
from torch._functorch import pyfunctorch
from torch.autograd import forward_ad

from fxckpt.invisible import fake_mode

_functorch = torch._C._functorch


def is_active() -> bool:
    """Whether a call is transformed by `torch.func`, or in forward mode."""
    return _functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def are_known() -> bool:
    """Whether all transforms around the call are such that the graph can run under them.

    For `functionalize`, torch has no rule for an `autograd.Function`.
    """
    kinds = {level.key().name for level in _functorch.get_interpreter_stack() or ()}
    return kinds <= {"Grad", "Vmap", "Jvp"}


_samples_around: contextvars.ContextVar[int] = contextvars.ContextVar("samples", default=1)


def samples() -> int:
    """How many samples a call is run for at once, by all `vmap` that are around it."""
    stack = pyfunctorch.retrieve_all_functorch_interpreters()
    batches = [s.batch_size() for s in stack if isinstance(s, pyfunctorch.VmapInterpreter)]
    return math.prod(batches, start=_samples_around.get())


@contextlib.contextmanager
def outside_of_transforms() -> Iterator[None]:
    """Nothing is transformed while this is active; only `samples` knows of the call."""
    token = _samples_around.set(samples())
    try:
        with (
            pyfunctorch.temporarily_clear_interpreter_stack(),
            mock.patch.object(forward_ad, "unpack_dual", _unpacked),
        ):
            yield
    finally:
        _samples_around.reset(token)


_unpack_dual = forward_ad.unpack_dual


def _unpacked(tensor: torch.Tensor, **options: Any) -> forward_ad.UnpackedDualTensor:
    """`unpack_dual`, also below autograd, where it leaves torch in a state that nothing works in.

    Kernels that compute shapes print tensors, and so call it if there is a level.
    """
    if torch._C._dispatch_tls_is_dispatch_key_excluded(torch._C.DispatchKey.ADInplaceOrView):
        return forward_ad.UnpackedDualTensor(tensor, None)
    return _unpack_dual(tensor, **options)


def is_transformed(tensor: torch.Tensor) -> bool:
    """Whether a tensor is that of a transform, or has a tangent."""
    return _functorch.is_functorch_wrapped_tensor(tensor) or _is_dual(tensor)


def _is_dual(tensor: torch.Tensor) -> bool:
    return forward_ad.unpack_dual(tensor).tangent is not None


def is_differentiated(tensor: torch.Tensor, *, forward: bool) -> bool:
    """Whether a gradient of a tensor is wanted at any level; with `forward`, or it has tangents."""
    levels = _functorch.get_interpreter_stack() or ()
    while not tensor.requires_grad:
        if not _functorch.is_functorch_wrapped_tensor(tensor):
            return forward and not levels and _is_dual(tensor)
        level = _functorch.maybe_get_level(tensor)
        if forward and 0 < level <= len(levels) and levels[level - 1].key().name == "Jvp":
            return True
        tensor = _functorch.get_unwrapped(tensor)
    return True


_MOST_TWINS = 10_000


class Twins:
    """Fakes that stand for transformed tensors, with the shapes that the program sees.

    The same place gets the same twin in the next call, so that nothing looks new then.

    Args:
        forward: Whether what has tangents is to be differentiated, too.
    """

    def __init__(self, *, forward: bool = False) -> None:
        self._forward = forward
        self._mode = fake_mode()
        self._kept: dict[Hashable, torch.Tensor] = {}

    def of(self, tensors: Iterable[tuple[Hashable, torch.Tensor]]) -> dict[int, torch.Tensor]:
        """The twins, by `id`, of those tensors that are transformed.

        Args:
            tensors: Pairs of a place and the tensor that is there.
        """
        if len(self._kept) > _MOST_TWINS:
            self._kept.clear()
        found: dict[int, torch.Tensor] = {}
        for place, tensor in tensors:
            if is_transformed(tensor) and id(tensor) not in found:
                found[id(tensor)] = self._twin(place, tensor)
        return found

    def _twin(self, place: Hashable, tensor: torch.Tensor) -> torch.Tensor:
        wanted = is_differentiated(tensor, forward=self._forward)
        size, stride = tensor.size(), tensor.stride()
        key = (place, wanted, size, stride, tensor.dtype, tensor.device)
        if key not in self._kept:
            options: Any = {"dtype": tensor.dtype, "device": tensor.device}
            with outside_of_transforms(), self._mode:
                self._kept[key] = torch.empty_strided(size, stride, **options, requires_grad=wanted)
        return self._kept[key]
