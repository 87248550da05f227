"""Operations on tensors that may be samples of a batch: under the transforms of `torch.func`.

NOTE [Layouts of samples]

What is captured of one sample is what kernels are asked for after composite operations looked at
strides: without the copy that `group_norm` makes of what is not contiguous, say. The samples of a
batch may lie otherwise in memory, along whatever dimension, and so may what batching rules return.
Where this matters (views that are written, fused kernels, `as_strided`), operands are laid out as
they were captured before the operation.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Node

from fxckpt import ops
from fxckpt.ops import Plan

aten = torch.ops.aten


def purely(op: OpOverload, plan: Plan, strides: Any, /, *args: Any, **kwargs: Any) -> Any:
    """`inplace` on tensors that may be wrapped by transforms; on dense ones it does the same.

    What is written is a batch if anything that the operation takes is one. A view is taken of what
    is laid out as it was captured, which the samples of a batch need not be.

    Args:
        op: As for `inplace`, like the rest.
        plan: Likewise.
        strides: Those that each mutated argument was captured with.
    """
    call_args, call_kwargs, bases = list(args), dict(kwargs), []
    batches = [t for t in (*args, *kwargs.values()) if _is_batched(t)]
    for (where, view, _), stride in zip(plan, strides, strict=True):
        holder: Any = call_args if isinstance(where, int) else call_kwargs
        base = holder[where].clone()
        if batches and not _is_batched(base):
            base = _laid_out(base, stride, batches[0])
        elif view is not None and base.stride() != stride:
            base = _laid_out(base, stride, base)
        bases.append(base)
        holder[where] = base if view is None else torch.as_strided(base, *view)
    returned = op(*call_args, **call_kwargs)
    results = (*ops.fresh_results(op, returned), *bases)
    return results[0] if len(results) == 1 else results


def as_captured(op: OpOverload, strides: Any, /, *args: Any, **kwargs: Any) -> Any:
    """An operation on tensors that are laid out as they were captured, None where that is free.

    What is captured of a sample is what a kernel is asked for after all checks of strides, and
    copies for its sake, were made.
    """
    placed = list(args)
    for i, stride in enumerate(strides):
        if stride is not None and placed[i].stride() != stride:
            placed[i] = _laid_out(placed[i], stride, placed[i])
    return op(*placed, **kwargs)


def _laid_out(x: torch.Tensor, stride: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """A copy with these strides, a batch if `like` is one."""
    sizes = zip(x.size(), stride, strict=True)
    if any(n > 1 and s == 0 for n, s in sizes):  # it was expanded
        return x.contiguous()
    new = like.new_empty_strided(x.size(), stride, dtype=x.dtype, device=x.device)
    return new.copy_(x)


def _is_batched(value: Any) -> bool:
    """Whether a tensor is the sample of a batch, at any level."""
    functorch = torch._C._functorch
    while isinstance(value, torch.Tensor) and functorch.is_functorch_wrapped_tensor(value):
        if functorch.is_batchedtensor(value):
            return True
        value = functorch.get_unwrapped(value)
    return False


def made_like(op: OpOverload, like: torch.Tensor, /, *args: Any, **kwargs: Any) -> torch.Tensor:
    """`empty_strided` or `full`, for each of the samples that `like` is a batch of."""
    if op is aten.full.default:
        return like.new_full(*args, **kwargs)
    return like.new_empty_strided(*args, **kwargs)


def masked(x: torch.Tensor, mask: torch.Tensor, p: float) -> torch.Tensor:
    """The result of `native_dropout` for a mask that was drawn."""
    return x * (mask * (0.0 if p == 1 else 1 / (1 - p)))


def reshaped(x: torch.Tensor, size: Sequence[int], _: Sequence[int]) -> torch.Tensor:
    """`_reshape_alias` for any strides of `x`."""
    return x.reshape(size)


# A batch may have other strides than its samples are captured with; results are the same.
ON_ANY_STRIDES: dict[Any, Any] = {
    aten.view.default: aten.reshape.default,
    aten._unsafe_view.default: aten.reshape.default,
    aten._reshape_alias.default: reshaped,
}

# What these read depends on the memory of a tensor, which is another one for a batch.
STRIDED = (aten.as_strided.default, aten.as_strided_scatter.default)

# Besides element-wise operations, reductions and views, these compute the same on any strides.
_LAYOUT_FREE = frozenset(
    "mm bmm addmm baddbmm mv dot cat stack convolution convolution_backward embedding gather "
    "index_select select_backward slice_backward unfold_backward".split()
)


@functools.cache
def _has_free_layout(target: Any) -> bool:
    if target in STRIDED:
        return False
    if not isinstance(target, OpOverload) or target in ON_ANY_STRIDES:
        return True
    of_any = target._schema.name.removeprefix("aten::") in _LAYOUT_FREE
    views = any(a.alias_info is not None for a in target._schema.arguments)
    return of_any or views or not {torch.Tag.pointwise, torch.Tag.reduction}.isdisjoint(target.tags)


def captured_strides(target: Any, args: Any, kwargs: Any) -> list[tuple[int, ...] | None]:
    """The strides that what an operation works on was captured with, where they matter.

    Those of what an `inplace` writes, or else those of the positional arguments.
    """
    if target is ops.inplace:
        _, plan, *rest = args
        mutated = [rest[key] if isinstance(key, int) else kwargs[key] for key, _, _ in plan]
        return [node.meta["val"].stride() for node in mutated]
    if _has_free_layout(target):
        return []
    tensors = (isinstance(a, Node) and isinstance(a.meta["val"], torch.Tensor) for a in args)
    return [a.meta["val"].stride() if t else None for a, t in zip(args, tensors, strict=True)]
