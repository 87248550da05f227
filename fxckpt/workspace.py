"""What kernels allocate besides results that look as they should, where that is known and large.

Measured with the profiler's allocation events (see docs/measuring-memory.md). On the CPU, oneDNN
copies the operands of a convolution into layouts of its own, and the result back. What cuDNN and
cuBLAS take is not known beforehand, and not counted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from fxckpt import ops
from fxckpt.joint import storage_bytes


def workspace(node: Node) -> int:
    """Bytes that the kernel of an operation takes while it runs, besides its results."""
    known = _ON_CPU.get(ops.schema_name(ops.operation(node)))
    if known is None:
        return 0
    on_cpu = node.all_input_nodes[0].meta["val"].device.type == "cpu"
    return known(node) if on_cpu else 0


def oversized(node: Node) -> int | None:
    """Bytes of the result of an operation, if its storage is larger than what is seen of it.

    These losses make room for an element each, and reduce in place; fake kernels do not.
    """
    if ops.schema_name(node.target) not in ("aten::mse_loss", "aten::smooth_l1_loss"):
        return None
    operands = torch.broadcast_shapes(*(value.meta["val"].shape for value in node.all_input_nodes))
    return operands.numel() * node.meta["val"].element_size()


def _convolution(node: Node) -> int:
    x, weight, stride, transposed = (node.args[i] for i in (0, 1, 3, 6))
    if not _is_reordered(weight, stride):
        return 0
    result = storage_bytes(node.meta["val"])
    copied = 2 * result if transposed else max(_bytes(x) + _bytes(weight), result)
    return _made_dense(x) + copied


def _convolution_backward(node: Node) -> int:
    """Copies of both operands for the gradient of the weight, or copies of one of the results."""
    stride: Any
    gradient, x, weight, stride = (node.args[i] for i in (0, 1, 2, 4))
    size, weights, dense = _bytes(x), _bytes(weight), _made_dense(gradient) + _made_dense(x)
    if not _is_reordered(weight, stride):
        return dense
    copies = 2 if max(stride) > 1 else 1  # of the gradient of x, before that of the weight is there
    return dense + max(_bytes(gradient) + size, copies * size - weights, weights)


def _made_dense(node: Any) -> int:
    """Bytes of the copy of an operand with holes, or which repeats elements (see `lean`)."""
    val: torch.Tensor = node.meta["val"]
    formats = (torch.contiguous_format, *((torch.channels_last,) if val.dim() == 4 else ()))
    return 0 if any(val.is_contiguous(memory_format=f) for f in formats) else _bytes(node)


def _is_reordered(weight: Any, stride: Any) -> bool:
    """Whether oneDNN runs a convolution; on one thread, it leaves the simplest to others."""
    kernel = weight.meta["val"].shape[2:]
    return max(*kernel, *stride) > 1 or torch.get_num_threads() > 1


def _bytes(node: Any) -> int:
    val: torch.Tensor = node.meta["val"]
    return val.numel() * val.element_size()


_ON_CPU: dict[str, Callable[[Node], int]] = {
    "aten::convolution": _convolution,
    "aten::convolution_backward": _convolution_backward,
    "aten::native_batch_norm_backward": lambda node: _bytes(node.args[1]),
}
