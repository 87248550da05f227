"""What the tests of rewritten modules in the hands of Python and of torch share."""

import pickle
from collections.abc import Callable
from typing import Any

import torch
from helpers import (
    assert_same,
    content,
    leaves,
    seed_all,
    total,
)
from torch import Tensor, nn

import fxckpt


def x(rows: int = 3) -> Tensor:
    return torch.linspace(-1, 1, 4 * rows).view(rows, 4).cos()


def batch(number: int) -> tuple[Tensor]:
    return (torch.randn(3, 4),)


class Net(nn.Module):
    """A layer and a normalisation, with state of all kinds."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(width, width), nn.BatchNorm1d(width)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        """Doc of forward."""
        return self.norm(self.layer(x)).tanh() * scale


def both(
    make: Callable[[], nn.Module],
    use: Callable[[nn.Module], Any],
    rewrite: Callable[..., nn.Module] = fxckpt.rewrite,
    **options: Any,
) -> nn.Module:
    """Asserts that `use(model)` returns the same bits eager and rewritten; returns the latter."""
    records = []
    for rewritten in (False, True):
        seed_all(0)
        model = make()
        if rewritten:
            model = rewrite(model, "nothing", **{"strict": True, **options})
        seed_all(1)
        found = use(model)
        record = [(n, content(t) if isinstance(t, Tensor) else repr(t)) for n, t in leaves(found)]
        records.append([*record, ("random state", content(torch.get_rng_state()))])
    assert_same(*records)
    return model


def step(model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """One training step's result, gradients and buffers; leaves no gradients."""
    out = model(*(args or (x(),)), **kwargs)
    total(out).backward()
    found = {
        "out": out,
        "grads": {n: p.grad for n, p in model.named_parameters()},
        "buffers": {n: b.clone() for n, b in model.named_buffers()},
    }
    model.zero_grad()
    return found


def steps(model: nn.Module, count: int = 3) -> list[Any]:
    """Some training steps, with an update by hand after each."""
    found = []
    for number in range(count):
        found.append(step(model, x(3 + number)))
        with torch.no_grad():
            for p, g in zip(model.parameters(), found[-1]["grads"].values(), strict=True):
                if g is not None:
                    p.sub_(g, alpha=0.1)
    return found


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def recorded(found: Any) -> list[tuple[str, Any]]:
    return [(n, content(t) if isinstance(t, Tensor) else t) for n, t in leaves(found)]
