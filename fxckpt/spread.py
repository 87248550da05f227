"""Tensors that are spread over processes (`DTensor`), and the local tensors that they consist of.

NOTE [Tensors that are spread over processes]

An operation on a `DTensor` reaches a dispatch mode as one, before the class itself turns it into
operations on local tensors, and collectives. So the recorder passes, and records these. Then

- a primal is the local tensor in the graph, and a `DTensor` to autograd and to Python;
- gradients and outputs leave the graph as local tensors, and are made `DTensor`s again by `Layout`;
- mesh, placements and global geometry are part of the signature, as the local geometry is;
- collectives run where and when eager runs them, once (`ops.is_collective`): all processes take
  part in the same order, whatever each of them decides to recompute.

What torch does on fake tensors to find out the placements of a result is no part of the program.
This is what `torch.compile` does as well (`torch._functorch._aot_autograd.subclass_utils`).
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import sys
from collections.abc import Hashable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch

from fxckpt.errors import CaptureError
from fxckpt.invisible import outside_of_modes

_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """How a local tensor is part of one that is spread over processes.

    Attributes:
        spec: Mesh, placements, and the global shape, strides and dtype.
        shape: That of the local tensor.
    """

    spec: Any
    shape: torch.Size

    def around(self, local: torch.Tensor, *, requires_grad: bool = False) -> torch.Tensor:
        """The tensor that is spread over processes, of which this process has `local`."""
        cls: Any = _class()
        spec = copy.copy(self.spec)  # that of a tensor may be changed when it is used
        made: torch.Tensor = cls(local, spec, requires_grad=requires_grad)
        return made


def is_spread(tensor: torch.Tensor) -> bool:
    """Whether a tensor is spread over processes."""
    return type(tensor) not in _PLAIN and type(tensor) is _class()


def layout(tensor: torch.Tensor) -> Layout | None:
    """How a tensor is spread over processes; None for a tensor of this process."""
    if not is_spread(tensor):
        return None
    return Layout(tensor._spec, tensor._local_tensor.shape)  # type: ignore[attr-defined]


def layout_of_gradient(tensor: torch.Tensor) -> Layout | None:
    """How the gradient of a tensor is likely to be spread: as it is, but for pending sums."""
    there = layout(tensor)
    if there is None:
        return None
    from torch.distributed.tensor import DTensor, Replicate

    spec = there.spec
    placements = [Replicate() if p.is_partial() else p for p in spec.placements]
    meta = spec.tensor_meta
    like = DTensor.from_local(
        tensor._local_tensor.detach(),  # type: ignore[attr-defined]
        spec.mesh,
        placements,
        shape=meta.shape,
        stride=meta.stride,
    )
    return layout(like)


def common_layout(tensors: Sequence[torch.Tensor]) -> Layout | None:
    """How tensors that are added up are spread; None if they are not.

    Raises:
        CaptureError: if each is spread in another way.
    """
    layouts = {layout(t) for t in tensors}
    if len(layouts) > 1:
        raise CaptureError("contributions to a gradient are spread over processes in several ways")
    return next(iter(layouts), None)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this process has of a tensor, once it has arrived."""
    if type(tensor) in _PLAIN:
        return tensor
    if is_spread(tensor):
        tensor = tensor._local_tensor  # type: ignore[attr-defined]
    return tensor.wait() if is_under_way(tensor) else tensor  # type: ignore[attr-defined]


def is_under_way(tensor: torch.Tensor) -> bool:
    """Whether a tensor is the result of a collective for which nobody has waited yet."""
    if type(tensor) in _PLAIN:
        return False
    collectives = sys.modules.get("torch.distributed._functional_collectives")
    return type(tensor) is getattr(collectives, "AsyncCollectiveTensor", None)


def geometry(tensor: torch.Tensor) -> Hashable:
    """What a graph depends on of a tensor, besides what its class tells of all tensors."""
    if not is_spread(tensor):
        return None
    return layout(tensor), tensor._local_tensor.stride()  # type: ignore[attr-defined]


def is_taken_apart(types: Sequence[type]) -> bool:
    """Whether an operation is one on local tensors to the classes of its arguments."""
    collectives = sys.modules.get("torch.distributed._functional_collectives")
    known = (_class(), getattr(collectives, "AsyncCollectiveTensor", None))
    return any(t in known for t in types if t not in _PLAIN)


@contextlib.contextmanager
def placements_found_outside() -> Iterator[None]:
    """While active, nobody sees what torch does to find out the placements of results."""
    if _class() is None:
        yield
        return
    from torch.distributed.tensor._sharding_prop import ShardingPropagator

    name = "propagate_op_sharding_non_cached"
    original = getattr(ShardingPropagator, name)

    def propagate(*args: Any) -> Any:
        with outside_of_modes():
            return original(*args)

    with mock.patch.object(ShardingPropagator, name, propagate):
        yield


def _class() -> type | None:
    """That of such tensors, if there can be any: importing it takes time."""
    module = sys.modules.get("torch.distributed.tensor")
    return getattr(module, "DTensor", None)
