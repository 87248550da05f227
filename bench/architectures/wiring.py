"""How data flows: indices, changes in place, arguments and results, linear algebra, modes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.architectures.case import Architecture
from bench.architectures.tables import (
    Batch,
    Composed,
    Draw,
    architectures_of,
    batches,
    below,
    fixed,
    mask,
    normal,
)

Function = Callable[..., Any]


def _in_place(m: nn.Module, x: Tensor) -> Tensor:
    x = m.first(x)
    x *= 2
    x[:, 0] = 1.0
    x[:, 1:3].add_(x[:, 3:5])
    x.mul_(0.5).relu_()
    y = m.second(x)
    y.masked_fill_(y < -1, 0.0)
    y += x.flip(1)
    return y.t_().contiguous().t()


def _written_views(m: nn.Module, x: Tensor) -> Tensor:
    out = torch.empty(len(x), 2, 6)
    out[:, 0] = m.first(x)
    out.select(1, 1).copy_(m.second(out[:, 0].tanh()))
    left, right = out.unbind(1)
    return left * right.detach() + out.view(len(x), -1)[:, ::2]


def _scattered(m: nn.Module, x: Tensor, at: Tensor) -> Tensor:
    x = m.first(x)
    y = torch.zeros(4, 6).scatter_reduce(0, at[:, None].expand_as(x), x, "amax")
    y = y + torch.zeros(4, 6).index_copy(0, at[:1], x[:1])
    return y.index_fill(1, at[:1], 2.0).scatter_add(0, at[:, None].expand_as(x), m.second(x))


def _gathered(m: nn.Module, x: Tensor, at: Tensor) -> Tensor:
    x = m.first(x)
    taken = x.take_along_dim(x.argsort(1), 1) + x.gather(1, at[:, None].expand(-1, 6))
    picked = x[at, at % 6, None] + x[:, [0, 2, -1]].sum(1, keepdim=True) + x[at[None]].sum((0, 1))
    return taken + picked + x.index_select(0, at) + x.flatten().take(at)[:, None] + x[..., None, 1]


def _chosen(m: nn.Module, x: Tensor, keep: Tensor) -> Tensor:
    x = m.first(x)
    kept = x[keep]
    x = x.masked_scatter(~keep, m.second(x)).masked_fill(keep, 0.5)
    return torch.where(x > 0, x, x.exp()).sum() + kept.square().mean()


def _ordered(m: nn.Module, x: Tensor) -> Tensor:
    x = m.first(x)
    high, low = x.topk(3), x.kthvalue(2, keepdim=True)
    middle, most = x.median(1, keepdim=True), x.mode(1, keepdim=True)
    ranked = x.sort(dim=1, stable=True).values + x.cummax(1).values - x.cummin(1).values
    parts = [high.values, low.values, middle.values, most.values, x.quantile(0.3, 1, keepdim=True)]
    return torch.cat([*parts, ranked], 1)


def _accumulated(m: nn.Module, x: Tensor) -> Tensor:
    x = m.first(x)
    y = x.cumsum(1) + x.logcumsumexp(0) + x.sigmoid().cumprod(1) + x.diff(dim=1, prepend=x[:, :1])
    return y + torch.trapezoid(x, dim=1)[:, None] + x.var(1, keepdim=True) + x.norm(p=3, dim=0)


def _reshaped(m: nn.Module, x: Tensor) -> Tensor:
    x = m.first(x).unflatten(1, (2, 3)).movedim(1, 2).swapaxes(0, 1)
    x = torch.cat([x.tile(1, 1, 2), x.repeat_interleave(2, 2)]).roll((1, -1), (0, 2)).rot90()
    x = torch.block_diag(x[0], x[1]).unfold(0, 2, 1).flatten(1)
    return torch.cartesian_prod(x[0, :3], x[1, :2]).sum() + F.pad(x, (1, -1)).tril().diagonal()


def _multiplied(m: nn.Module, x: Tensor) -> Tensor:
    x = m.first(x)
    grid = torch.einsum("bi,bj,ij->bij", x, x, m.first.weight)
    y = torch.baddbmm(grid, grid, grid.mT, beta=0.3) + torch.kron(x[:1].T, x[:1])
    y = torch.tensordot(y, m.second.weight, 1) + torch.linalg.multi_dot([x.T, x, x.T, x])
    return torch.addcmul(torch.addr(y.sum(0), x[0], x[1]), y, y, value=0.1).tanh()


def _decomposed(m: nn.Module, x: Tensor) -> Tensor:
    x = m.first(x)
    spread = x.T @ x + torch.eye(6)
    values, vectors = torch.linalg.eigh(spread)
    q, r = torch.linalg.qr(m.second.weight)
    singular = torch.linalg.svdvals(x)
    solved = torch.linalg.solve(spread, x.T) + torch.cholesky_solve(
        x.T, torch.linalg.cholesky(spread)
    )
    whitened = vectors @ values.rsqrt().diag() @ vectors.T
    parts = (whitened, q.abs(), r.abs(), solved, torch.linalg.inv(spread), torch.matrix_power(r, 2))
    return sum(p.sum() for p in parts) + singular.sum() + spread.logdet()


def _transformed(m: nn.Module, x: Tensor) -> Tensor:
    spectrum = torch.fft.rfft(m.first(x), norm="ortho")
    spectrum = spectrum * torch.fft.rfft(m.second.weight[0]).conj()
    power = spectrum.abs().square() + torch.view_as_real(spectrum).prod(-1).abs()
    frames = torch.stft(x.flatten(), 8, 4, window=torch.hann_window(8), return_complex=True)
    return (
        torch.fft.irfft(spectrum, n=6) + power.sum() + frames.abs().sum() + spectrum.angle().sum()
    )


def _special(m: nn.Module, x: Tensor) -> Tensor:
    x = m.first(x).sigmoid() + 0.1
    y = torch.lgamma(x) + torch.digamma(x) + torch.erf(x) + torch.special.i0e(x) + torch.sinc(x)
    return (
        y + torch.atan2(x, x + 1) + torch.hypot(x, y) + torch.logit(x / 2) + x.frac() + x ** y.abs()
    )


def _drawn(m: nn.Module, x: Tensor) -> Tensor:
    x = m.first(x)
    x = x + torch.randn_like(x) * torch.rand(6) + torch.empty_like(x).exponential_().detach()
    x = x * x.sigmoid().bernoulli() + torch.normal(0.0, 1.0, (6,))
    x = x + torch.poisson(x.exp().detach())
    order, picked = torch.randperm(len(x)), torch.multinomial(x.detach().softmax(1), 2)
    noise = (
        torch.zeros(6).cauchy_().clamp(-1, 1)
        + torch.zeros(6).log_normal_()
        + torch.rand(6).geometric_(0.5)
    )
    return x[order].gather(1, picked).sum(1, keepdim=True) + m.second(x) + noise


def _rounded(m: nn.Module, x: Tensor) -> Tensor:
    x = m.first(x)
    steps = torch.bucketize(x.detach(), torch.linspace(-1, 1, 5)).float()
    y = x + (x.round() - x).detach() + x.floor().detach() + x.sign() * x.trunc().abs() + steps
    return (
        y
        + torch.fmod(x, 0.5)
        + torch.remainder(x, 0.3)
        + x.nan_to_num()
        + x.heaviside(x[0]).detach()
    )


def _frozen(m: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        aim = m.second(x)
    with torch.enable_grad():
        y = m.first(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = m.second(y)
    return (z.float() - aim) * y.detach() + (z.requires_grad * y)


def _listed(m: nn.Module, xs: list[Tensor], names: dict[str, Any]) -> list[Tensor]:
    """As many tensors as came in, each of its own length."""
    return [m.second(m.first(x).relu()[names["skip"] :]) * names["scale"] for x in xs]


def _optional(m: nn.Module, x: Tensor, *more: Tensor, hidden: Tensor | None = None) -> tuple:
    y = m.first(x)
    for other in more:
        y = y + m.second(other)
    return y, None, (hidden if hidden is None else hidden + y), x, 3.5, "name", [y[0], y.T]


def _guarded(m: nn.Module, x: Tensor, lengths: Tensor) -> Tensor:
    """Lengths that Python reads."""
    x = m.first(x)[:, : int(lengths.max())]
    rows = [row[:n].sum() for row, n in zip(x, lengths.tolist(), strict=True)]
    return torch.stack(rows) * (2 if (lengths == 6).any() else 1)


def _packed_rows(m: nn.Module, x: Tensor, lengths: Tensor) -> Tensor:
    """Rows of different lengths without padding, reduced by segments."""
    rows = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    flat = m.first(x).flatten()[: len(rows)]
    return torch.zeros(len(lengths)).index_add(0, rows, flat) / lengths.clamp(min=1)


_X = batches(normal(5, 6, grad=True))
_LENGTHS: Draw = below(7, 5, low=1)
"""Functions of a composition with two layers, `first` and `second`, and their data."""
_FUNCTIONS: dict[str, tuple[Function, Batch]] = {
    "changes in place": (_in_place, _X),
    "writes to views": (_written_views, _X),
    "scatter": (_scattered, batches(normal(5, 6), below(4, 5))),
    "gather": (_gathered, batches(normal(5, 6), below(5, 5))),
    "boolean masks": (_chosen, batches(normal(5, 6), mask(5, 6))),
    "order statistics": (_ordered, _X),
    "cumulative": (_accumulated, _X),
    "reshapes": (_reshaped, _X),
    "products": (_multiplied, batches(normal(6, 6))),
    "decompositions": (_decomposed, _X),
    "spectra": (_transformed, _X),
    "special functions": (_special, _X),
    "random draws": (_drawn, _X),
    "rounding": (_rounded, _X),
    "gradient and autocast modes": (_frozen, batches(normal(5, 6))),
    "list of tensors": (
        _listed,
        batches(lambda g: [normal(n, 6)(g) for n in (2, 4, 3)], fixed({"skip": 1, "scale": 0.5})),
    ),
    "optional arguments": (_optional, batches(*[normal(5, 6)] * 3, hidden=normal(5, 6))),
    "lengths read": (_guarded, batches(normal(5, 6), _LENGTHS)),
    "rows of lengths": (_packed_rows, batches(normal(5, 6), below(6, 5))),
}


def all_of() -> list[Architecture]:
    """The ways of wiring in the zoo."""
    layers = lambda: {"first": nn.Linear(6, 6), "second": nn.Linear(6, 6)}  # noqa: E731
    return architectures_of(
        "wiring",
        *((n, lambda f=f: Composed(f, **layers()), batch) for n, (f, batch) in _FUNCTIONS.items()),
    )
