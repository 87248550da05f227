"""Seconds that the operations of a joint graph take, by a roofline model or by timing them.

    seconds = max(operations / rate, bytes / bandwidth) + launch

A kernel is either limited by arithmetic or by memory. Which operations count as arithmetic, and how
many there are, is taken from `torch.utils.flop_counter`; all others move bytes. A planner compares
sums of these, so what matters are proportions.
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import getitem
from typing import Any

import torch
from torch.fx import Node
from torch.utils.flop_counter import flop_registry

from fxckpt import ops
from fxckpt.joint import Joint
from fxckpt.kernels import MISFITS, by_themselves, call_of, signature, tensors_in, values
from fxckpt.rates import Device, measured, seconds_of

aten = torch.ops.aten


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
        args, kwargs = values((ops.op_arguments(node), node.kwargs))
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
    return sum(t.numel() * t.element_size() for t in tensors_in((read, node.meta["val"])))


def _is_free(node: Node) -> bool:
    view = node.meta.get("alias") is not None or node.target in (getitem, aten._unsafe_view.default)
    return view or ops.is_blank(node)


def _dtype(node: Node) -> torch.dtype:
    """The dtype that an operation computes in: that of its first operand."""
    return next(tensors_in([value.meta["val"] for value in node.all_input_nodes])).dtype


# --- timing ---------------------------------------------------------------------------------------


def profiled(joint: Joint, device: torch.device) -> Costs:
    """Costs by timing each distinct operation once, on random operands of the same geometry.

    What cannot run on random operands is left to the model, on the device as it is `measured`.
    """
    known: dict[Any, float] = {}
    for node in (*joint.forward_nodes(), *joint.backward_nodes()):
        if _is_free(node) or (key := signature(node)) in known:
            continue
        if ops.node_is_collective(node):  # other processes would wait, and it is never run again
            continue
        with by_themselves(device):
            if (seconds := _timed(node, device)) is not None:
                known[key] = seconds
    return Costs(measured(device), known)


def _timed(node: Node, device: torch.device) -> float | None:
    try:
        return seconds_of(call_of(node), device)
    except MISFITS:
        return None
