"""Weights of other kinds than single precision: few bits, complex, double and half precision."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.architectures.case import Architecture
from bench.architectures.tables import Composed, architectures_of, batches, normal, weight


class Step(torch.autograd.Function):
    """Signs forward, a clipped identity backward (Courbariaux et al. 2016)."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        """Signs."""
        ctx.save_for_backward(x)
        return x.sign()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        """Passes where the input was small."""
        (x,) = ctx.saved_tensors
        return grad * (x.abs() <= 1)


class BinaryLinear(nn.Linear):
    """Weights and inputs of one bit."""

    def forward(self, x: Tensor) -> Tensor:
        """Multiplies signs."""
        return F.linear(Step.apply(x), Step.apply(self.weight), self.bias)


class TernaryLinear(nn.Linear):
    """Weights -1, 0 and 1, straight-through by detaching (Ma et al. 2024)."""

    def forward(self, x: Tensor) -> Tensor:
        """Multiplies rounded weights."""
        scale = self.weight.abs().mean().clamp(min=1e-5)
        rounded = (self.weight / scale).round().clamp(-1, 1) * scale
        return F.linear(x, self.weight + (rounded - self.weight).detach(), self.bias)


class FakeQuantised(nn.Module):
    """Weights and activations rounded to eight bits, the range of activations observed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 2)
        self.register_buffer("high", torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        """Quantises between the layers."""
        x = self.first(x).relu()
        self.high.lerp_(x.detach().amax(), 0.1)
        scale, zero = (self.high / 255).reshape(1), torch.zeros(1, dtype=torch.int32)
        x = torch.fake_quantize_per_tensor_affine(x, scale, zero, 0, 255)
        steps = self.second.weight.detach().abs().amax(1) / 127
        zeros = torch.zeros(2, dtype=torch.int32)
        w = torch.fake_quantize_per_channel_affine(self.second.weight, steps, zeros, 0, -127, 127)
        return F.linear(x, w, self.second.bias)


class LearntStep(nn.Module):
    """Quantisation with a learnt step size (Esser et al. 2019), as torch implements it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(6, 4), nn.Parameter(torch.tensor([0.05]))
        self.register_buffer("zero", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """Quantises the weight."""
        w = torch._fake_quantize_learnable_per_tensor_affine(
            self.layer.weight, self.scale, self.zero, -8, 7, 1.0
        )
        return F.linear(x, w, self.layer.bias)


def _complex(m: nn.Module, x: Tensor) -> Tensor:
    """Complex linear layers with a real nonlinearity between them."""
    z = torch.complex(x, x.flip(1)) @ m.first
    z = torch.polar(F.softplus(z.abs()), z.angle())
    return torch.view_as_real(z.conj() @ m.second).sum(-1)


def _wide(m: nn.Module, x: Tensor) -> Tensor:
    """Single precision outside, double inside."""
    return m.out(m.inner(x.double()).float())


_X = batches(normal(5, 6))


def all_of() -> list[Architecture]:
    """The networks of the zoo whose numbers are of another kind."""
    return architectures_of(
        "number format",
        ("binary weights", lambda: nn.Sequential(
            BinaryLinear(6, 8), nn.BatchNorm1d(8), BinaryLinear(8, 2)
        ), _X),
        ("ternary weights", lambda: nn.Sequential(TernaryLinear(6, 8), nn.GELU()), _X),
        ("fake quantisation", FakeQuantised, _X),
        ("learnt quantisation", LearntStep, _X),
        ("complex weights", lambda: Composed(
            _complex, first=weight(6, 5, dtype=torch.complex64),
            second=weight(5, 2, dtype=torch.complex64),
        ), _X),
        ("double precision", lambda: nn.Sequential(
            nn.Linear(6, 4), nn.LayerNorm(4), nn.Dropout(0.3), nn.Linear(4, 2)
        ).double(), batches(normal(5, 6, dtype=torch.float64))),
        ("double inside of single", lambda: Composed(
            _wide, inner=nn.Linear(6, 4).double(), out=nn.Linear(4, 2)
        ), _X),
        ("half precision", lambda: nn.Sequential(
            nn.Linear(6, 4), nn.LayerNorm(4), nn.GELU(), nn.Linear(4, 2)
        ).bfloat16(), batches(normal(5, 6, dtype=torch.bfloat16))),
    )  # fmt: skip
