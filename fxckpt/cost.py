"""Seconds that the operations of a joint graph take, by a roofline model or by timing them.

    seconds = max(operations / rate, bytes / bandwidth) + launch

A kernel is either limited by arithmetic or by memory. Which operations count as arithmetic, and how
many there are, is taken from `torch.utils.flop_counter`; all others move bytes. A planner compares
sums of these, so what matters are proportions.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from operator import getitem
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_aggregate, map_arg
from torch.utils.flop_counter import flop_registry

from fxckpt import ops
from fxckpt.invisible import outside_of_modes
from fxckpt.joint import Joint

aten = torch.ops.aten

# What kernels achieve of the figures in datasheets, which nothing reaches: large matrix products
# come to 60 to 80 % of the arithmetic, copies to 80 to 90 % of the bandwidth.
ACHIEVED_RATE, ACHIEVED_BANDWIDTH = 0.7, 0.85
_LAUNCH = 5e-6  # of a CUDA kernel from Python


@dataclasses.dataclass(frozen=True)
class Device:
    """How fast a device is.

    Attributes:
        name: What it is called.
        flops: Operations per second of matrix products, by dtype; a dtype that is not there is as
            fast as float32.
        bandwidth: Bytes per second to and from memory.
        launch: Seconds that any operation takes at least.
    """

    name: str
    flops: Mapping[torch.dtype, float]
    bandwidth: float
    launch: float

    def rate(self, dtype: torch.dtype) -> float:
        """Operations per second on a dtype."""
        return self.flops.get(dtype, self.flops[torch.float32])


def _datasheet(
    name: str, fp64: float, fp32: float, fp16: float, bf16: float, bandwidth: float
) -> Device:
    """A device by its datasheet: dense TFLOP/s without TF32, GB/s."""
    by_dtype = {
        torch.float64: fp64,
        torch.float32: fp32,
        torch.float16: fp16,
        torch.bfloat16: bf16,
    }
    rates = {dtype: rate * 1e12 * ACHIEVED_RATE for dtype, rate in by_dtype.items()}
    return Device(name, rates, bandwidth * 1e9 * ACHIEVED_BANDWIDTH, _LAUNCH)


# From NVIDIA's datasheets: of the SXM variants where there are several, without sparsity, matrix
# products in half precision by tensor cores that accumulate in float32. float64 is that of tensor
# cores from the A100 on. The V100 computes bfloat16 as float32; so does the T4.
DEVICES = {
    device.name: device
    for device in (
        _datasheet("v100", 7.8, 15.7, 125, 15.7, 900),
        _datasheet("t4", 0.25, 8.1, 65, 8.1, 320),
        _datasheet("a100", 19.5, 19.5, 312, 312, 2039),
        _datasheet("a10", 0.49, 31.2, 125, 125, 600),
        _datasheet("l4", 0.47, 30.3, 121, 121, 300),
        _datasheet("l40s", 1.4, 91.6, 362, 362, 864),
        _datasheet("rtx3090", 0.56, 35.6, 71, 71, 936),
        _datasheet("rtx4090", 1.3, 82.6, 165.2, 165.2, 1008),
        _datasheet("h100", 67, 67, 989, 989, 3350),
        _datasheet("h200", 67, 67, 989, 989, 4800),
    )
}


# --- measuring a device ---------------------------------------------------------------------------

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@functools.cache
def measured(device: torch.device) -> Device:
    """A device as it is found: matrix products of each dtype, copies, small operations."""
    size, length = (4096, 1 << 26) if device.type == "cuda" else (384, 1 << 24)
    with outside_of_modes(), torch.no_grad(), torch.autocast(device.type, enabled=False):
        return Device(
            str(device),
            {dtype: _matrix_rate(device, dtype, size) for dtype in _DTYPES},
            _bandwidth(device, length),
            _launch(device),
        )


def _matrix_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    a = torch.ones(size, size, dtype=dtype, device=device)
    return float(2 * size**3 / _seconds(lambda: a @ a, device))


def _bandwidth(device: torch.device, length: int) -> float:
    source = torch.ones(length, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * length / _seconds(lambda: target.copy_(source), device)


def _launch(device: torch.device) -> float:
    x = torch.ones(1, device=device)

    def several() -> None:
        for _ in range(100):
            torch.neg(x)

    return _seconds(several, device) / 100


def _seconds(function: Callable[[], object], device: torch.device, repeats: int = 3) -> float:
    """The median time of a few calls, after one that does not count."""

    def timed() -> float:
        _synchronize(device)
        start = time.perf_counter()
        function()
        _synchronize(device)
        return time.perf_counter() - start

    timed()
    return statistics.median(timed() for _ in range(repeats))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --- the model ------------------------------------------------------------------------------------


class Costs:
    """Seconds of the operations of a joint graph on a device.

    Args:
        device: How fast it is.
        known: Seconds that are better known, by `signature` of the operation.
    """

    def __init__(self, device: Device, known: Mapping[Any, float] | None = None) -> None:
        self.device = device
        self._known = known or {}

    def seconds(self, node: Node) -> float:
        """How long an operation takes; zero for views, and for memory without contents."""
        if _is_free(node):
            return 0.0
        if self._known and (found := self._known.get(signature(node))) is not None:
            return found
        moved = bytes_moved(node) / self.device.bandwidth
        counted = self.flops(node)
        arithmetic = counted / self.device.rate(_dtype(node)) if counted else 0.0
        return max(arithmetic, moved) + self.device.launch

    def flops(self, node: Node) -> int:
        """Multiplications and additions, of operations that are known for many of them."""
        target: Any = ops.operation(node)
        formula = flop_registry.get(_FORMULAS.get(target, getattr(target, "overloadpacket", None)))
        if formula is None:
            return 0
        args, kwargs = _values((ops.op_arguments(node), node.kwargs))
        return int(formula(*args, **kwargs, out_val=node.meta["val"]))


# Operations that count as others with the same leading arguments.
_FORMULAS = {
    aten._scaled_dot_product_flash_attention_for_cpu.default: (
        aten._scaled_dot_product_flash_attention
    ),
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: (
        aten._scaled_dot_product_flash_attention_backward
    ),
}


def bytes_moved(node: Node) -> int:
    """Bytes of operands and results, repeated elements counted once for each element."""
    read: list[Any] = [value.meta["val"] for value in node.all_input_nodes]
    return sum(t.numel() * t.element_size() for t in _tensors((read, node.meta["val"])))


def signature(node: Node) -> Any:
    """What the time of an operation depends on: equal for nodes that do the same work."""
    return str((ops.operation(node), _described((ops.op_arguments(node), node.kwargs))))


def _is_free(node: Node) -> bool:
    view = node.meta.get("alias") is not None or node.target in (getitem, aten._unsafe_view.default)
    return view or ops.is_blank(node)


def _dtype(node: Node) -> torch.dtype:
    """The dtype that an operation computes in: that of its first operand."""
    return next(_tensors([value.meta["val"] for value in node.all_input_nodes])).dtype


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for each in tree:
            yield from _tensors(each)


def _values(tree: Any) -> Any:
    return map_arg(tree, lambda node: node.meta["val"])


def _described(tree: Any) -> Any:
    def describe(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return tuple(value.shape), value.stride(), value.dtype, value.device

    return map_aggregate(_values(tree), describe)


# --- timing ---------------------------------------------------------------------------------------


def profiled(joint: Joint, device: torch.device) -> Costs:
    """Costs by timing each distinct operation once, on random operands of the same geometry.

    What cannot run on random operands is left to the model, on the device as it is `measured`.
    """
    known: dict[Any, float] = {}
    for node in (*joint.forward_nodes(), *joint.backward_nodes()):
        if _is_free(node) or (key := signature(node)) in known:
            continue
        with ops.rng_state_as(ops.read_rng_state(device), device), torch.no_grad():
            if (seconds := _timed(node, device)) is not None:
                known[key] = seconds
    return Costs(measured(device), known)


def _timed(node: Node, device: torch.device) -> float | None:
    args, kwargs = map_aggregate(_values((node.args, node.kwargs)), _random_like)
    if node.target is ops.inplace:
        op, plan, *rest = args
        args = (op, [(key, view, False) for key, view, _ in plan], *rest)
    function: Any = node.target
    try:
        return _seconds(lambda: function(*args, **kwargs), device)
    except (RuntimeError, IndexError, TypeError, ValueError):
        return None  # what it computes on has to fit together


def _random_like(value: Any) -> Any:
    """Real contents for a fake tensor: integers are zero, which is an index into anything."""
    if not isinstance(value, torch.Tensor):
        return value
    made = torch.empty_strided(
        value.shape, value.stride(), dtype=value.dtype, device=value.device
    ).zero_()
    return made.uniform_() if made.is_floating_point() else made
