"""What autograd takes to deliver the gradients that a graph returns, all of them at once.

Its engine first adds up those of one tensor, and then hands each sum to its parameter (see
torch/csrc/autograd/input_buffer.cpp and functions/accumulate_grad.h):

    sum         in place, if nobody else holds the memory of what is there; views hold their base
    parameter   keeps the very tensor if that is laid out like the parameter, and nobody else holds
                it; else it gets a copy
"""

from __future__ import annotations

import dataclasses
from collections import Counter

import torch
from torch.fx import Node

from fxckpt.joint import Joint
from fxckpt.ledger import allocated, rounded
from fxckpt.shapes import Geometry, alike


def delivery(joint: Joint) -> int:
    """Bytes that autograd takes at most, besides the gradients that it is given.

    Args:
        joint: The graph.
    """
    books = _Books(joint)
    sums = {name: books.summed(grads) for name, grads in joint.grads.items() if grads}
    for name, gradient in sums.items():
        primal = joint.primals[name]
        if primal.meta["kind"] != "input":
            books.deliver(gradient, primal)
    return books.peak


@dataclasses.dataclass(frozen=True)
class _Gradient:
    """A gradient on its way.

    Attributes:
        looks: A tensor without memory that is laid out like it.
        node: What returned it; None for a sum in new memory.
        size: Bytes that a copy takes.
    """

    looks: torch.Tensor
    node: Node | None
    size: int

    @staticmethod
    def of(node: Node) -> _Gradient:
        """As it was returned."""
        geometry = Geometry.of(node.meta["val"])
        looks = dataclasses.replace(geometry, device=torch.device("meta")).empty()
        return _Gradient(looks, node, rounded(looks.nbytes, geometry.device))

    def plus(self, other: _Gradient) -> _Gradient:
        """Their sum in new memory."""
        return _Gradient(self.looks + other.looks, None, max(self.size, other.size))


class _Books:
    """Bytes beyond those of the gradients as they were given."""

    def __init__(self, joint: Joint) -> None:
        given = [g for grads in joint.grads.values() for g in grads]
        self._times = Counter(given)
        self._holders = Counter(map(_memory, [*given, *joint.cotangents]))
        self._now = self.peak = 0

    def summed(self, grads: tuple[Node, ...]) -> _Gradient:
        """The gradients of one tensor become one."""
        total, *others = map(_Gradient.of, grads)
        for other in others:
            if not self._is_alone(total):
                before, total = total, total.plus(other)
                self._take(total.size)
                self._drop(before)
            self._drop(other)
        return total

    def deliver(self, gradient: _Gradient, parameter: Node) -> None:
        """A parameter gets its gradient."""
        shared = gradient.node is not None and self._times[gradient.node] > 1
        if shared or not alike(Geometry.of(parameter.meta["val"]), gradient.looks):
            self._take(gradient.size)
            self._drop(gradient)

    def _is_alone(self, gradient: _Gradient) -> bool:
        node = gradient.node
        if node is None:
            return True
        is_view = node.meta.get("alias") is not None
        return not is_view and self._times[node] == self._holders[_memory(node)] == 1

    def _take(self, size: int) -> None:
        self._now += size
        self.peak = max(self.peak, self._now)

    def _drop(self, gradient: _Gradient) -> None:
        node = gradient.node
        if node is None:
            self._now -= gradient.size
            return
        self._times[node] -= 1
        self._holders[_memory(node)] -= 1
        if not self._holders[_memory(node)]:
            self._now -= allocated(node.meta["val"])


def _memory(node: Node) -> int:
    return int(node.meta["val"].untyped_storage()._cdata)
