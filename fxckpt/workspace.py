"""What kernels allocate besides results that look as they should.

On the CPU it is measured, see `kernels`, unless the model is on fake tensors. For those it is known
of some operations: oneDNN copies the operands of a convolution into layouts of its own, and the
result back; where it does not run, patches of the input become a matrix. Not counted there:
channels that oneDNN adds to have a multiple of 16, its copies of operands in half precision, and
whatever cuDNN and cuBLAS take.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.fx import Node

from fxckpt import kernels, ops
from fxckpt.joint import storage_bytes

_native: Any = torch._C  # not all of it is declared


def workspace(node: Node) -> int:
    """Bytes that the kernel of an operation takes while it runs, besides its results."""
    if (found := kernels.workspace(node)) is not None:
        return found
    known = _ON_CPU.get(ops.schema_name(ops.operation(node)))
    if known is None:
        return 0
    on_cpu = node.all_input_nodes[0].meta["val"].device.type == "cpu"
    return known(node) if on_cpu else 0


def oversized(node: Node) -> int | None:
    """Bytes of the result of an operation, if its storage is larger than what is seen of it.

    These make room for as many elements as there are in their operands, and leave it at that when
    they reduce these in place, or need less; fake kernels do not.
    """
    if ops.schema_name(node.target) not in _AS_LARGE_AS_OPERANDS:
        return None
    operands = torch.broadcast_shapes(*(value.meta["val"].shape for value in node.all_input_nodes))
    result = node.meta["val"]
    return max(operands.numel(), result.numel()) * result.element_size()


_AS_LARGE_AS_OPERANDS = {
    "aten::binary_cross_entropy",
    "aten::col2im",
    "aten::mse_loss",
    "aten::smooth_l1_loss",
    "aten::soft_margin_loss",
}


def _convolution(node: Node) -> int:
    call = _Convolution.of(node, 0)
    if not call.is_reordered():
        return _made_dense(call.x) + call.columns(node.meta["val"])
    result = storage_bytes(node.meta["val"])
    operands = _bytes(call.x) + _bytes(call.weight)
    return _made_dense(call.x) + (2 * result if call.transposed else max(operands, result))


def _convolution_backward(node: Node) -> int:
    """Copies of the operands and of one result, for the gradient of the input, then the weight."""
    gradient: Any
    mask: Any
    gradient, mask, call = node.args[0], node.args[-1], _Convolution.of(node, 1)
    given, size, weights = _bytes(gradient), _bytes(call.x), _bytes(call.weight)
    dense = _made_dense(gradient) + _made_dense(call.x)
    if not call.is_reordered():
        again = mask[1] or call.transposed
        return dense + again * call.columns(gradient.meta["val"], backward=True)
    copies = 2 if max(call.stride) > 1 else 1  # of the gradient of x, besides itself
    by_input = mask[0] * (max(given + weights, copies * size) - mask[1] * weights)
    return dense + max(by_input, mask[1] * max(given + size, weights))


def _made_dense(node: Any) -> int:
    """Bytes of the copy of an operand with holes, or which repeats elements (see `lean`)."""
    val: torch.Tensor = node.meta["val"]
    formats = (torch.contiguous_format, *((torch.channels_last,) if val.dim() == 4 else ()))
    return 0 if any(val.is_contiguous(memory_format=f) for f in formats) else _bytes(node)


class _Convolution(NamedTuple):
    """Arguments of a convolution, or of its backward."""

    x: Any
    weight: Any
    stride: Any
    padding: Any
    dilation: Any
    transposed: Any
    output_padding: Any
    groups: Any

    @staticmethod
    def of(node: Node, start: int) -> _Convolution:
        """Those of an operation: operands from `start`, a bias or its sizes, and options."""
        arguments: Any = node.args
        x, weight, _, *options = arguments[start : start + 9]
        return _Convolution(x, weight, *options)

    def is_reordered(self) -> bool:
        """Whether oneDNN runs it: that depends on shapes, dtype and the number of threads."""
        x, weight = self.x.meta["val"], self.weight.meta["val"]
        options: list[Any] = [*self[2:]]
        with x.fake_mode:
            if weight.dim() == 3:  # the operation itself makes it two-dimensional before it asks
                x, weight = x.unsqueeze(2), weight.unsqueeze(2)
                fill = (1, 0, 1, None, 0, None)
                options = [o if f is None else [f, *o] for f, o in zip(fill, options, strict=True)]
            backend = _native._select_conv_backend(x, weight, None, *options)
        known = _native._ConvBackend.__members__  # all but oneDNN's for transposed ones
        return backend == known["Mkldnn"] or backend not in known.values()

    def columns(self, result: torch.Tensor, *, backward: bool = False) -> int:
        """Bytes of the patches of the input, side by side, for one product of matrices.

        A transposed convolution is that of its result, of which backward takes one image after the
        other. Groups are computed one by one.
        """
        x, weight = self.x.meta["val"], self.weight.meta["val"]
        apart = result.nbytes if self.groups > 1 else 0
        simple = max(*weight.shape[2:], *self.stride) == 1 and not any(self.padding)
        if simple and (backward or not self.transposed):
            return apart
        images = 1 if self.transposed and backward else result.shape[0]
        pixels = (x if self.transposed else result).shape[2:].numel()
        return apart + images * pixels * weight[0].nbytes


def _bytes(node: Any) -> int:
    val: torch.Tensor = node.meta["val"]
    return val.numel() * val.element_size()


_ON_CPU: dict[str, Callable[[Node], int]] = {
    "aten::convolution": _convolution,
    "aten::convolution_backward": _convolution_backward,
    "aten::native_batch_norm_backward": lambda node: _bytes(node.args[1]),
}
