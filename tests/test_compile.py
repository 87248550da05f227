"""Inductor compiles what was decided; as a backend, fxckpt decides on what Dynamo has traced."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import kept_bytes
from torch import Tensor, nn

import fxckpt
from fxckpt import BudgetError, PolicyError

WIDTH = 16


class Net(nn.Module):
    """Dropout, buffers, an in-place operation; noise, and a choice that depends on data."""

    def __init__(self, *, noisy: bool = False, chooses: bool = False) -> None:
        super().__init__()
        self.noisy, self.chooses = noisy, chooses
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.Linear(WIDTH, WIDTH, bias=False),
                nn.BatchNorm1d(WIDTH),
                nn.ReLU(inplace=True),
                nn.Dropout(0.1),
            )
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        for layer in self.layers:
            x = x + layer(x)
            if self.noisy:
                x = x + 0.1 * torch.rand_like(x)
            if self.chooses and x.sum() > 1e6:
                x = -x
        return x, {"loss": x.square().mean()}


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def steps(model: nn.Module, forward: Callable[..., Any]) -> list[list[Tensor]]:
    """Three steps: loss, gradients, buffers and the state of the generator."""
    seen = []
    for seed in range(3):
        torch.manual_seed(seed)
        model.zero_grad()
        loss = forward(torch.randn(32, WIDTH))[1]["loss"]
        loss.backward()
        grads = [p.grad for p in model.parameters()]
        seen.append([loss, *grads, *model.buffers(), torch.get_rng_state()])
        seen[-1] = [t.detach().clone() for t in seen[-1]]
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"units": "blocks"}], ids=["model", "blocks"])
@pytest.mark.parametrize("policy", ["dots", "nothing"])
@pytest.mark.filterwarnings("ignore")  # Inductor's
def test_compiled_halves_are_close_and_draw_as_eager(policy: str, options: Any) -> None:
    eager = Net(noisy=True)
    ours = fxckpt.rewrite(copy.deepcopy(eager), policy, compile=True, **options)
    for expected, got in zip(steps(eager, eager), steps(ours, ours), strict=True):
        assert torch.equal(expected[-1], got[-1])
        for a, b in zip(expected, got, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Inductor's
def test_compiled_halves_keep_what_was_decided() -> None:
    model, x = Net(), torch.randn(64, WIDTH)
    kept = {}
    for compiled in (False, True):
        lean = fxckpt.rewrite(model, "dots", compile=compiled)
        for _ in range(2):
            lean(x)[1]["loss"].backward()
        kept[compiled] = kept_bytes(lambda lean=lean: lean(x)[1]["loss"])
    assert kept[True] == kept[False] < kept_bytes(lambda: model(x)[1]["loss"])


@pytest.mark.parametrize("chooses", [False, True])
def test_backend_is_exact(chooses: bool) -> None:
    """Also where Dynamo cuts the model into several graphs, which `rewrite` cannot capture."""
    eager = Net(chooses=chooses)
    ours = copy.deepcopy(eager)
    compiled = torch.compile(ours, backend=fxckpt.backend(policy="nothing", strict=True))
    for expected, got in zip(steps(eager, eager), steps(ours, compiled), strict=True):
        assert all(map(torch.equal, expected, got))


def test_backend_without_gradients() -> None:
    model = Net().eval()
    compiled = torch.compile(model, backend=fxckpt.backend(budget=0.9))
    x = torch.randn(4, WIDTH)
    with torch.no_grad():
        assert torch.equal(compiled(x)[0], model(x)[0])


def test_errors_come_before_anything_is_compiled() -> None:
    with pytest.raises(PolicyError, match="dotz"):
        fxckpt.backend(policy="dotz")
    with pytest.raises(BudgetError):
        fxckpt.backend(budget="many")
