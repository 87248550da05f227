"""Operations of which ATen does something else while a dispatch mode is on, as during capture."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same, captures, content, grads_of, leaves, seed_all
from torch import Tensor, nn

import fxckpt
from fxckpt import CaptureError, FallbackWarning


class Around(nn.Module):
    """Linear layers around a function."""

    def __init__(self, function: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(6, 6, dtype=dtype), nn.Linear(6, 6, dtype=dtype)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x).sin()
        return self.after(x) * self.function(x).sum()


def with_zeros(x: Tensor) -> Tensor:
    return x * (torch.arange(x.numel()).view(x.shape) % 5 != 2)


def positive(x: Tensor) -> Tensor:
    return x.mH @ x + torch.eye(6, dtype=x.dtype)


def weighted(x: Tensor, **options: Any) -> Tensor:
    weight = torch.linspace(0.1, 1.7, 6) ** 2
    target = torch.arange(len(x)) % 6
    target[::3] = -100
    return F.cross_entropy(x * 3, target, weight=weight, **options)


REAL: dict[str, Callable[[Tensor], Tensor]] = {
    "prod": lambda x: (x + 1).prod(),
    "prod with zeros": lambda x: with_zeros(x).prod(),
    "prod of a row": lambda x: x.prod(1),
    "prod of a row with zeros": lambda x: with_zeros(x).prod(-1, keepdim=True),
    "masked prod": lambda x: torch.masked.prod(x, 1, mask=x > 0),
    "masked_fill with a tensor": lambda x: x.masked_fill(x > 0, x.mean()),
    "masked_fill_ with a tensor": lambda x: (x * 2).masked_fill_(x > 0, x.mean()),
    "ormqr": lambda x: torch.ormqr(x, x[0], x.t()),
    "householder product": lambda x: torch.linalg.householder_product(x.t(), x[0]),
    "weighted loss with smooth labels": lambda x: weighted(x, label_smoothing=0.1),
    "eig": lambda x: torch.linalg.eig(x)[0].real,
}
COMPLEX: dict[str, Callable[[Tensor], Tensor]] = {
    "prod": lambda x: (x + 1).prod(),
    "prod of a row": lambda x: x.prod(1),
    "cumprod": lambda x: x.cumprod(1),
    "cumprod with zeros": lambda x: with_zeros(x).cumprod(0),
    "svd": lambda x: torch.linalg.svd(x)[1],
    "eigh": lambda x: torch.linalg.eigh(positive(x))[0],
    "reshaped conjugate": lambda x: x.conj().reshape(2, 3, 6) @ x.reshape(2, 6, 3).conj(),
}


def train(function: Any, dtype: torch.dtype, *, rewritten: bool) -> tuple[Any, nn.Module]:
    seed_all(0)
    model: nn.Module = Around(function, dtype)
    if rewritten:
        model = fxckpt.rewrite(model, "everything")
    record: list[tuple[str, Any]] = []
    for seed in range(3):
        x = torch.randn(6, 6, dtype=dtype, generator=torch.Generator().manual_seed(seed))
        model.zero_grad()
        out = model(x)
        out.abs().sum().backward()
        record += [("result", content(out)), *((n, content(g)) for n, g in leaves(grads_of(model)))]
    return record, model


KINDS = [(n, torch.float32) for n in REAL] + [(n, torch.complex64) for n in COMPLEX]


@pytest.mark.parametrize(("name", "dtype"), KINDS)
def test_is_differentiated_as_in_eager(name: str, dtype: torch.dtype) -> None:
    function = (COMPLEX if dtype.is_complex else REAL)[name]
    eager, _ = train(function, dtype, rewritten=False)
    with pytest.warns(FallbackWarning):
        ours, _ = train(function, dtype, rewritten=True)
    assert_same(eager, ours)


EXACT: dict[str, Callable[[Tensor], Tensor]] = {
    "max": lambda x: -x.max(),
    "min": lambda x: -x.t().min(),
    "median": lambda x: -x.median(),
    "nanmedian": lambda x: -x.nanmedian(),
    "several maxima": lambda x: -x.round().max(),
    "nothing but nan": lambda x: -(x * float("nan")).max().nan_to_num(),
    "without gradient": lambda x: x.detach().prod() * x,
    "cumprod": lambda x: with_zeros(x).cumprod(1),
    "masked_fill with a number": lambda x: x.masked_fill(x > 0, -1.0),
    "weighted loss": lambda x: weighted(x),
    "sum of a loss with smooth labels": lambda x: weighted(x, label_smoothing=0.1, reduction="sum"),
    "svd": lambda x: torch.linalg.svd(x)[1],
    "eigh": lambda x: torch.linalg.eigh(positive(x))[0],
    "pinv": lambda x: torch.linalg.pinv(x),
}  # fmt: skip


EXACT_COMPLEX: dict[str, Callable[[Tensor], Tensor]] = {
    "pinverse": lambda x: x.pinverse(),
    "pinv": lambda x: torch.linalg.pinv(x),
    "hermitian pinv": lambda x: torch.linalg.pinv(positive(x), hermitian=True),
    "conjugate": lambda x: x.conj() @ x.mH,
    "solve": lambda x: torch.linalg.solve(positive(x), x.conj()),
}
EXACTLY = [(n, torch.float32) for n in EXACT] + [(n, torch.complex64) for n in EXACT_COMPLEX]


@pytest.mark.parametrize(("name", "dtype"), EXACTLY)
def test_is_captured_exactly(name: str, dtype: torch.dtype) -> None:
    function = (EXACT_COMPLEX if dtype.is_complex else EXACT)[name]
    eager, _ = train(function, dtype, rewritten=False)
    ours, model = train(function, dtype, rewritten=True)
    assert_same(eager, ours)
    assert captures(model)


def test_message() -> None:
    model = Around(lambda x: x.prod(), torch.float32)
    with pytest.raises(CaptureError, match=r"backward of aten.prod.default .* zeros") as caught:
        fxckpt.rewrite(model, "nothing", strict=True, example_inputs=(torch.ones(6, 6),))
    assert caught.value.source.startswith("test_subclass_like.py:")


def test_infinite_gradient_of_a_maximum() -> None:
    """As an overflow with a loss scale gives: zero elsewhere, not NaN."""
    grads = []
    for rewritten in (False, True):
        seed_all(0)
        model: nn.Module = Around(lambda x: x.max(), torch.float32)
        model = fxckpt.rewrite(model, "nothing", strict=True) if rewritten else model
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            (model(torch.ones(6, 6)).sum() * float("inf")).backward()
        grads.append([(n, content(g)) for n, g in leaves(grads_of(model))])
    assert_same(*grads)
