"""Samples of `vmap` that do not lie in memory as those do which were captured."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.func import grad, jacrev, jvp, vjp, vmap

from fxckpt import checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")
Step = Callable[[Tensor], Tensor]


def rows_doubled(x: Tensor) -> Tensor:
    """All rows but the first are changed in place."""
    y = x.sin()
    y[1:].mul_(2)
    return y


def column_copied(x: Tensor) -> Tensor:
    """A column is written."""
    y = x.cos()
    y[:, 0] = x[:, -1]
    return y


def row_of_transposed(x: Tensor) -> Tensor:
    """A row of the transposed is added to another."""
    y = x * 1
    y.t()[0].add_(y.t()[1])
    return y


def blank_filled(x: Tensor) -> Tensor:
    """Rows are written into new memory."""
    y = torch.zeros_like(x)
    y[1:] = x[1:]
    return y + x


def triangle(x: Tensor) -> Tensor:
    """The whole of a product is changed, then its diagonal."""
    y = (x @ x.t()).tril_()
    y.diagonal().mul_(0.5)
    return y


def spectrum(x: Tensor) -> Tensor:
    """A backward that changes a part of a gradient in place."""
    return torch.fft.irfft(x, n=6, dim=0)


def reshaped(x: Tensor) -> Tensor:
    """A tensor gets another shape in place."""
    return x.sin().unsqueeze_(0).squeeze(0)


def attended(x: Tensor) -> Tensor:
    """A kernel that takes rows whose elements lie side by side."""
    x = x[None, None]
    return F.scaled_dot_product_attention(x, x, x)[0, 0]


def normed(x: Tensor) -> Tensor:
    """A kernel that takes contiguous operands."""
    return F.group_norm(x[None], 1)[0]


STEPS: tuple[Step, ...] = (
    rows_doubled,
    column_copied,
    row_of_transposed,
    blank_filled,
    triangle,
    spectrum,
    reshaped,
    normed,
    torch.t,
    torch.relu,
    lambda x: torch.cat([x, x.cos()], 0),
    lambda x: F.pad(x, (1, 0)),
    lambda x: x.flip(0).cumsum(1),
    lambda x: F.layer_norm(x, x.shape[1:]),
    lambda x: x.unsqueeze(0).transpose(0, 2).squeeze(2),
)

TRANSFORMS: dict[str, Callable[[Any, int], Callable[[Tensor], Any]]] = {
    "vmap(grad)": lambda f, d: vmap(grad(f), in_dims=d),
    "grad(vmap)": lambda f, d: grad(lambda x: vmap(f, in_dims=d)(x).sum()),
    "vmap(jacrev)": lambda f, d: vmap(jacrev(f), in_dims=d, out_dims=-1),
    "vmap(vjp)": lambda f, d: vmap(lambda x: vjp(f, x)[1](x.sum())[0], in_dims=d),
    "vmap(jvp)": lambda f, d: vmap(lambda x: jvp(grad(f), (x,), (x.cos(),)), in_dims=d),
    "vmap(vmap)": lambda f, d: vmap(lambda x: vmap(grad(f))(torch.stack([x, x * 2])), in_dims=d),
}


def compare(
    steps: Sequence[Step], transform: str, dim: int, order: Sequence[int] = (0, 1, 2)
) -> None:
    """Compares a program with its checkpointed twin on three samples, which lie along `dim`."""

    def program(x: Tensor) -> Tensor:
        x = x * 1.5
        for step in steps:
            x = step(x)
        return x.sin().square().sum()

    sizes = [3 if d == dim else 4 for d in range(3)]
    places = [order.index(d) for d in range(3)]
    torch.manual_seed(0)
    batch = torch.randn([sizes[d] for d in order], dtype=torch.float64).permute(places)
    expected, found = (TRANSFORMS[transform](f, dim)(batch) for f in (program, checkpoint(program)))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("dim", range(3))
def test_what_is_changed_in_place(dim: int, transform: str) -> None:
    compare([rows_doubled, column_copied], transform, dim)


@pytest.mark.parametrize("step", [reshaped, attended, normed, spectrum])
@pytest.mark.parametrize("dim", range(3))
def test_what_depends_on_strides(step: Step, dim: int) -> None:
    compare([step], "vmap(grad)", dim)


@given(
    st.lists(st.sampled_from(STEPS), min_size=1, max_size=4),
    st.sampled_from([*TRANSFORMS]),
    st.integers(0, 2),
    st.permutations(range(3)),
)
def test_random_programs(steps: list[Step], transform: str, dim: int, order: list[int]) -> None:
    compare(steps, transform, dim, order)
