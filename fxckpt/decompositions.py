"""Operations without rules of differentiation, as compositions of operations that have them.

These are the decompositions that torch itself has, not ours: fused kernels without a second
derivative or without forward mode are the same function as plain operations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._decomp import decomposition_table
from torch._ops import OpOverload
from torch.fx import Node

from fxckpt import ops

aten = torch.ops.aten

# Not that of `pdist`: its derivatives are not numbers.
_BY_TORCH = {
    op: decomposition_table[op]
    for op in (
        aten.grid_sampler_2d.default,
        aten.hardsigmoid.default,
        aten.huber_loss.default,
        aten.multi_margin_loss.default,
        aten.multilabel_margin_loss_forward.default,
        aten.soft_margin_loss.default,
        aten._weight_norm_interface.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
    )
}

# With dropout, they draw numbers that nothing else draws.
_FUSED_ATTENTION = (
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
)


_IN_PLACE = {aten.hardsigmoid_.default: aten.hardsigmoid.default}


def lacks_rules(node: Node) -> bool:
    """Whether torch cannot differentiate an operation in all ways, but `run` can."""
    op, args = ops.operation(node), ops.op_arguments(node)
    if node.target is ops.inplace:
        plan: Any = node.args[1]
        return op in _IN_PLACE and plan[0][1] is None
    if op in _FUSED_ATTENTION:
        return not _named(op, args, node.kwargs).get("dropout_p")
    return op in _BY_TORCH


def run(op: OpOverload, /, *args: Any, **kwargs: Any) -> Any:
    """What an operation computes, up to rounding, by others that can be differentiated in all ways.

    Of several results only those are right that can be differentiated.
    """
    if op in _FUSED_ATTENTION:
        return _attention(**_named(op, args, kwargs))
    return _BY_TORCH[_IN_PLACE.get(op, op)](*args, **kwargs)


def _attention(
    query: Any,
    key: Any,
    value: Any,
    attn_bias: Any = None,
    is_causal: bool = False,
    scale: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor]:
    out, _weights = aten._scaled_dot_product_attention_math.default(
        query, key, value, attn_bias, 0.0, is_causal, scale=scale
    )
    return (out,)


def _named(op: OpOverload, args: Any, kwargs: Any) -> dict[str, Any]:
    names = (argument.name for argument in op._schema.arguments)
    return dict(zip(names, args, strict=False)) | kwargs
