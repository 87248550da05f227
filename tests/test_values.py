"""Values of floating-point tensors that Python reads: truth values, integers and shapes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import Function, assert_same, captures, content, grads_of, leaves, seed_all, total
from torch import Tensor, nn

import fxckpt
from fxckpt import CaptureError, FallbackWarning
from fxckpt.values import MAX_ELEMENTS


def rows(n: int = 3) -> Tensor:
    return torch.linspace(-1, 1, 4 * n).view(n, 4).cos()


def run(forward: Any, batches: list[Any], *, rewritten: bool, **options: Any) -> Any:
    seed_all(0)
    model: nn.Module = Function(forward)
    model.register_buffer("scale", torch.ones(4))
    if rewritten:
        model = fxckpt.rewrite(model, "nothing", **options)
    record = []
    for batch in batches:
        model.zero_grad()
        out = model(*(t.clone() for t in batch))
        total(out).backward()
        record += [("result", content(out)), ("scale", content(model.scale))]
        record += [(n, content(g)) for n, g in leaves(grads_of(model))]
    return record, model


def exact(forward: Any, batches: list[Any]) -> nn.Module:
    """Asserts that the captured graphs do what eager does; returns the rewritten model."""
    eager, _ = run(forward, batches, rewritten=False)
    ours, model = run(forward, batches, rewritten=True, strict=True)
    assert_same(eager, ours)
    return model


MASK, OTHER = torch.tensor([0.0, 1.0, 0.0, 1.0]), torch.tensor([0.0, -1.0, 1.0, 1.0])

# What forward does with a floating-point tensor, and how many graphs MASK and OTHER need.
READS: dict[str, tuple[Callable[..., Any], int]] = {
    "truth": (lambda m, x, k: x @ m.weight if (k < 0).any() else (x @ m.weight).sin(), 2),
    "comparison": (lambda m, x, k: x @ m.weight if k.sum() > 1.5 else (x @ m.weight).sin(), 2),
    "equal": (lambda m, x, k: x @ m.weight * (2 if torch.equal(k, MASK) else 3), 2),
    "allclose": (lambda m, x, k: x @ m.weight * (2 if torch.allclose(k, MASK) else 3), 2),
    "integer": (lambda m, x, k: (x @ m.weight)[:, : int(k.argmax()) + 1], 2),
    "count": (lambda m, x, k: x @ m.weight * k.count_nonzero().item(), 2),
    "rounded": (lambda m, x, k: x @ m.weight * k.sum().long().item(), 2),
    "nonzero": (lambda m, x, k: (x @ m.weight)[:, : len(k.nonzero())], 2),
    "mask": (lambda m, x, k: (x @ m.weight)[:, k > 0], 1),
    "selected": (lambda m, x, k: (x @ m.weight)[:, 0] * k[k > 0].sum(), 1),
    "unique": (lambda m, x, k: x @ m.weight * len(k.unique()), 2),
    "constant": (lambda m, x, k: x @ m.weight if (MASK > 0).any() else x, 1),
    "buffer": (lambda m, x, k: x @ m.weight if (m.scale > 0).all() else x, 1),
    "nothing to tell apart": (lambda m, x, k: x @ m.weight if k.isfinite().all() else x, 1),
}


@pytest.mark.parametrize("kind", READS)
def test_reads(kind: str) -> None:
    forward, graphs = READS[kind]
    model = exact(forward, [(rows(), k) for k in (MASK, MASK, OTHER, MASK, OTHER)])
    assert len(captures(model)) == graphs


def written_first(m: Any, x: Tensor, k: Tensor) -> Tensor:
    k.sub_(0.5)
    y = x @ m.weight * (2 if (k > 0).any() else 3)
    k.mul_(2)
    return y * (k > 0.5).any()


def counting(m: Any, x: Tensor) -> Tensor:
    m.scale.add_(1)
    return x @ m.weight * (2 if (m.scale > 3).all() else 3) * m.scale


def test_values_before_they_are_written() -> None:
    """The guard looks at what forward finds, and at what it makes of that."""
    exact(written_first, [(rows(), k) for k in (MASK, MASK * 0.4, MASK, MASK * 0.4)])
    model = exact(counting, [(rows(),)] * 5)
    assert len(captures(model)) == 2


def test_guards_under_autocast() -> None:
    """A guard computes what was recorded, casts included, and nothing else is cast."""

    def forward(m: Any, x: Tensor, k: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            small = (k @ k) < 1e-6 + 2  # in bfloat16 it would not be
        return x @ m.weight * (2 if small else 3)

    near = torch.tensor([1.0, 1.0, 1e-4, 0.0])
    results = []
    for rewritten in (False, True):
        seed_all(0)
        model: nn.Module = Function(forward)
        model = fxckpt.rewrite(model, "nothing", strict=True) if rewritten else model
        with torch.autocast("cpu", torch.bfloat16):
            results.append([("", content(model(rows(), k))) for k in (near, near * 1.01, near)])
    assert_same(*results)


REFUSED: dict[str, Callable[..., Any]] = {
    "number": lambda m, x, k: x @ m.weight * k.sum().item(),
    "float": lambda m, x, k: x @ m.weight * float(k[1]),
    "list": lambda m, x, k: x @ m.weight * k.tolist()[1],
    "truth of a number": lambda m, x, k: x @ m.weight if k[1] else x @ m.weight * 2,
    "cast in Python": lambda m, x, k: x @ m.weight * int(k[1]),
    "parameter": lambda m, x, k: x @ m.weight if (m.weight > 0).any() else x @ m.weight * 2,
    "activation": lambda m, x, k: (y := x @ m.weight) * (2 if y.sum() > 0 else 3),
    "detached activation": lambda m, x, k: (y := x @ m.weight) * (2 if y.detach().sum() > 0 else 3),
    "input with a gradient": lambda m, x, k: x @ m.weight * (2 if g[0] > 0 else 3) + g,
    "random": lambda m, x, k: x @ m.weight * (2 if (torch.rand(4) * k > 0.5).any() else 3),
    "large": lambda m, x, k: x @ m.weight * (2 if large(k).any() else 3),
}
g = torch.ones(4, requires_grad=True)


def large(k: Tensor) -> Tensor:
    return k[:1].expand(MAX_ELEMENTS + 1) + 1


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(kind: str) -> None:
    batches = [(rows(), k) for k in (MASK, OTHER, MASK)]
    eager, _ = run(REFUSED[kind], batches, rewritten=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        ours, _ = run(REFUSED[kind], batches, rewritten=True)
    assert_same(eager, ours)
    with pytest.raises(CaptureError, match="reads a value"):
        run(REFUSED[kind], batches, rewritten=True, strict=True)


class Translator(nn.Module):
    """`nn.Transformer`, which looks whether a mask is the causal one."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Transformer(8, 2, 1, 1, 16, batch_first=True)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.inner(x, x, tgt_mask=mask)


def test_transformer_with_a_mask() -> None:
    causal = nn.Transformer.generate_square_subsequent_mask(5)
    other = causal.clone()
    other[0, 1] = 0.5
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    results = []
    for rewritten in (False, True):
        seed_all(0)
        model: nn.Module = Translator()
        model = fxckpt.rewrite(model, "dots", strict=True) if rewritten else model
        record = []
        for mask in (causal, other, causal.clone(), other.clone()):
            model.zero_grad()
            out = model(x, mask)
            total(out).backward()
            record += [("", content(out)), *((n, content(t)) for n, t in leaves(grads_of(model)))]
        results.append(record)
    assert_same(*results)
    assert len(captures(model)) == 2


# --- lengths that fix the size of a table --------------------------------------------------------


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_lengths_of_ctc_may_change(reduction: str) -> None:
    """Only the length of the longest target decides on a graph."""

    def forward(m: Any, x: Tensor, targets: Tensor, inputs: Tensor, lengths: Tensor) -> Tensor:
        scores = torch.tanh(x @ m.weight).log_softmax(-1)
        return nn.functional.ctc_loss(scores, targets, inputs, lengths, 0, reduction, True)

    def batch(number: int) -> Any:
        lengths = torch.tensor([3, 1 + number % 3])
        targets = torch.randint(1, 4, (2, 3))
        return torch.randn(9, 2, 4), targets, torch.tensor([9, 8 - number]), lengths

    model = exact(forward, [batch(i) for i in range(4)])
    assert len(captures(model)) == 1
    shorter = (*batch(0)[:3], torch.tensor([2, 1]))
    exact(forward, [batch(0), shorter, batch(1)])
