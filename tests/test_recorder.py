"""Operations that need care in single assignment form."""

from __future__ import annotations

import pytest
import torch
from helpers import Function, assert_same_training
from torch import Tensor, nn

import fxckpt


class Pooled(nn.Module):
    """Adaptive pooling restrides its result in place."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.pool = nn.AdaptiveAvgPool1d(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.linear(x).transpose(1, 2))


class Reshaped(nn.Module):
    """Changes the geometry of tensors in place, then their contents, and the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x[0]).clone()
        y.unsqueeze_(0).transpose_(0, 1)
        y.mul_(2)
        z = y * 3
        z.squeeze_(1)
        z[:, 0].add_(1)
        return z * y[:, 0]


class Masked(nn.Module):
    """Selects by a mask that depends on the input alone: guarded, not refused."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.arange(x.shape[1]) % 2 == 0
        return self.linear(x)[:, mask].exp()


class Profiled(nn.Module):
    """Names a range of time for the profiler."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.profiler.record_function("a range"):
            return self.linear(x).exp()


@pytest.mark.parametrize("policy", ["nothing", "dots", "everything"])
@pytest.mark.parametrize("kind", [Pooled, Reshaped, Masked, Profiled])
def test_is_captured_exactly(kind: type[nn.Module], policy: str) -> None:
    fxckpt.verify(kind(), torch.randn(2, 5, 4), policy=policy)


class Resized(nn.Module):
    """Gives a tensor other memory."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        scratch = torch.zeros(2)
        scratch.resize_(4).fill_(1)
        return self.linear(x) * scratch


class TurnedView(Resized):
    """Changes the shape of a view in place: captured, its gradient would be wrong."""

    def forward(self, x: Tensor) -> Tensor:
        z = self.linear(x) * 3
        view = z[:, 0:2]
        view.t_()
        view.mul_(2)
        return z * 2


class TurnedBase(Resized):
    """Changes the shape of a tensor that has a view."""

    def forward(self, x: Tensor) -> Tensor:
        z = self.linear(x) * 3
        view = z[1:]
        z.t_()
        z.mul_(2)
        return view


@pytest.mark.parametrize("kind", [Resized, TurnedView, TurnedBase])
def test_is_refused(kind: type[nn.Module]) -> None:
    with pytest.raises(fxckpt.CaptureError, match="changes the shape of a tensor in place"):
        fxckpt.verify(kind(), torch.randn(3, 4), policy="nothing")


class Sparse(nn.Module):
    """Makes a sparse tensor on its way."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sparse.mm(x.to_sparse(), self.linear.weight)


def test_sparse_results_are_named() -> None:
    with pytest.raises(fxckpt.CaptureError, match=r"layout torch.sparse_coo is used at test_recor"):
        fxckpt.rewrite(Sparse(), "nothing", strict=True)(torch.ones(2, 4))


def test_a_tensor_that_an_unsafe_view_replaced_is_used_again() -> None:
    """`torch.kron` reshapes its operands so."""

    def forward(m: Function, x: Tensor) -> list[Tensor]:
        h = torch.tanh(x @ m.weight)
        return [torch.kron(h, h[:1]).exp(), torch.kron(h, h).T, h.T * 2]

    assert_same_training(lambda: Function(forward), lambda _: torch.randn(3, 4))
