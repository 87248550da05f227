"""The signature: all that a captured graph depends on, read anew at each call.

A signature has three parts: the arguments (structure, static leaves, geometry of the tensors), the
global modes (autocast, default dtype, attention backends, ...), and the state of the module, for
which a `Watch` hands out a small number.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch

from fxckpt import spread, tree
from fxckpt.modes import autocast_state, collected_outputs, compiles_halves
from fxckpt.symbols import has_extent, pattern


def of_arguments(
    spec: tree.Spec, tensors: Sequence[torch.Tensor], *, dynamic: bool = False
) -> Hashable:
    """The part of a signature that comes from the arguments of a call.

    Args:
        spec: Their structure.
        tensors: The tensors in them.
        dynamic: Whether calls have the same signature that differ in nothing but sizes.
    """
    first: dict[int, int] = {}
    return (
        spec,
        tuple(
            (
                type(t),
                _extent(t, dynamic),
                t.dtype,
                t.device,
                t.requires_grad,
                t.is_leaf,
                _tags(t),
                first.setdefault(id(t), i),
                spread.geometry(t),
            )
            for i, t in enumerate(tensors)
        ),
    )


def _extent(t: torch.Tensor, dynamic: bool) -> Hashable:
    if not has_extent(t):
        return t.layout
    general = dynamic and t.layout == torch.strided
    return pattern(t.shape, t.stride())[0] if general else (t.shape, t.stride())


def _tags(t: torch.Tensor) -> Hashable:
    """The Python attributes of a tensor, which forward may read."""
    return tree.static_key(t.__dict__) if t.__dict__ else None


def of_modes() -> Hashable:
    """The part of a signature that comes from global state."""
    return (
        autocast_state(),
        collected_outputs(),
        compiles_halves(),
        tuple(get() for get in _MODES),
        torch.get_default_device() if torch._C._len_torch_function_stack() else None,
        tuple(_C._get_fp32_precision_getter(backend, op) for backend, op in _PRECISIONS),
    )


_C = torch._C
_PRECISIONS = [(b, op) for b in ("cuda", "mkldnn") for op in ("matmul", "conv", "rnn")]
_MODES = (
    torch.get_default_dtype,
    torch.are_deterministic_algorithms_enabled,
    torch.is_deterministic_algorithms_warn_only_enabled,
    torch.is_inference_mode_enabled,
    torch.is_anomaly_enabled,
    torch.is_autocast_cache_enabled,
    torch.get_num_threads,
    _C._get_flash_sdp_enabled,
    _C._get_mem_efficient_sdp_enabled,
    _C._get_math_sdp_enabled,
    _C._get_cudnn_sdp_enabled,
    _C._get_overrideable_sdp_enabled,
    _C._get_math_sdp_allow_fp16_bf16_reduction,
    lambda: tuple(_C._get_sdp_priority_order()),
    _C._get_mkldnn_enabled,
    _C._get_cudnn_enabled,
    _C._get_cudnn_benchmark,
    _C._get_cudnn_deterministic,
    _C._get_cublas_allow_fp16_reduced_precision_reduction,
    _C._get_cublas_allow_bf16_reduced_precision_reduction,
)
