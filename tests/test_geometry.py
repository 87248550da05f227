"""What is recorded has the shapes and strides of the real kernels, or is captured anew."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    Function,
    LiveBytes,
    assert_same,
    assert_same_training,
    call,
    captures,
    sgd,
    total,
    train,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fxckpt
from fxckpt import first_run, shapes
from fxckpt.shapes import Geometry

aten = torch.ops.aten
POLICIES = ("nothing", "dots", "everything")


@pytest.fixture(autouse=True)
def learned(monkeypatch: pytest.MonkeyPatch) -> dict[Any, Any]:
    """What first runs learn in a test, forgotten after it."""
    found: dict[Any, Any] = {}
    monkeypatch.setattr(shapes, "LEARNED", found)
    return found


# --- models whose fake kernels are wrong ----------------------------------------------------------


def turned(module: nn.Module, x: Tensor) -> Tensor:
    return F.linear(x, module.weight).transpose(1, 2)


def softplus(module: nn.Module, x: Tensor) -> Tensor:
    return F.softplus(F.linear(x, module.weight[:3])).transpose(1, 2).contiguous().sin()


def elu(module: nn.Module, x: Tensor) -> Tensor:
    return F.elu(turned(module, x)) + 1


def multilabel_margin(module: nn.Module, x: Tensor) -> Tensor:
    scores, labels = F.linear(x, module.weight)[0, 0], torch.tensor([3, 0, -1, 1])
    return F.multilabel_margin_loss(scores, labels, reduction="none")


def viewed(module: nn.Module, x: Tensor) -> Tensor:
    """`view` fits the real strides alone."""
    return torch.logaddexp(turned(module, x), x.mT[:1]).mT.view(-1).exp()


def losses(module: nn.Module, x: Tensor) -> Tensor:
    y, target = turned(module, x), x.mT.contiguous()
    parts = [f(y, target) for f in (F.mse_loss, F.smooth_l1_loss, F.huber_loss)]
    return sum(parts) + F.hardswish(y).add(F.logsigmoid(y)).div(2, rounding_mode="floor").sum()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("forward", [softplus, elu, multilabel_margin, viewed, losses])
def test_is_captured_exactly(forward: Callable[..., Tensor], policy: str) -> None:
    def batch(_: int) -> Tensor:
        return torch.randn(2, 5, 4)

    for loss in (total, lambda result: result.square().mean(), lambda result: result.sum()):
        assert_same_training(lambda: Function(forward), batch, loss, policy)


# --- trials: every element-wise operation, every layout -------------------------------------------

SIZES = ((3, 7, 2, 9), (6, 6, 1, 6))


def layouts(size: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors that can be broadcast to one size, each laid out in another way."""

    def full(*size: int) -> Tensor:
        return torch.full(size, 0.5 if dtype.is_floating_point else 1, dtype=dtype)

    a, b, c, d = size
    return {
        "contiguous": full(a, b, c, d),
        "transposed": full(d, c, b, a).permute(3, 2, 1, 0),
        "permuted": full(c, a, d, b).permute(1, 3, 0, 2),
        "channels last": full(a, c, d, b).permute(0, 3, 1, 2),
        "expanded": full(c, d).expand(size),
        "expanded at the end": full(b, a, 1, 1).transpose(0, 1).expand(size),
        "sliced": full(a, b, c, 2 * d)[..., :d],
        "transposed and sliced": full(a, 2 * b, d, c).mT[:, :b],
        "row": full(d),
        "column": full(b, 1, 1),
        "turned column": full(1, b, a).permute(2, 1, 0)[..., None],
        "number": full(),
    }


def element_wise() -> Iterator[Any]:
    """All operations that may be tried."""
    for name in sorted(dir(aten)):
        packet = getattr(aten, name)
        if isinstance(packet, torch._ops.OpOverloadPacket):
            for overload in packet.overloads():
                func = getattr(packet, overload)
                if shapes._can_be_tried(func) and not name.startswith("special_"):
                    yield func


def arguments(func: Any, tensors: list[Tensor]) -> tuple[Any, ...]:
    """Arguments of an operation: these tensors, and simple values for the rest."""
    simple = {"float": 0.5, "number": 0.5, "int": 1, "bool": True, "str": "none", "Tensor": None}
    left, found = list(tensors), []
    for a in func._schema.arguments:
        kind = str(a.type).removeprefix("Optional[").removesuffix("]")
        if a.kwarg_only:
            break
        if kind == "Tensor" and not str(a.type).startswith("Optional"):
            found.append(left.pop(0))
        elif a.name == "normalized_shape":
            found.append(tensors[0].size()[-1:])
        elif kind.startswith("List"):
            found.append([True] * a.N if "bool" in kind else [1])
        else:
            found.append(simple[kind] if a.default_value is None else a.default_value)
    return tuple(found)


def operands(func: Any) -> int:
    return sum(str(a.type) == "Tensor" and not a.kwarg_only for a in func._schema.arguments)
