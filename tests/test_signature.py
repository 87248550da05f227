"""What a rewritten module notices between two calls."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from helpers import captures
from torch import Tensor, nn

import fxckpt


class Config:
    """A plain object with settings and a tensor."""

    def __init__(self) -> None:
        self.factor = 2.0
        self.shift = torch.ones(4)


class Configured(nn.Module):
    """Reads everything that a module can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.config = Config()
        self.scales = [1.0, {"inner": 2.0}]
        self.seen = {1}
        self.table = torch.ones(4)

    def forward(self, x: Tensor) -> Tensor:
        scaled = self.linear(x) * self.scales[0] * self.scales[1]["inner"] * self.config.factor
        return (scaled + self.config.shift) * self.table * len(self.seen)


CHANGES: dict[str, Callable[[Configured], object]] = {
    "number in a list": lambda m: m.scales.__setitem__(0, 3.0),
    "number in a dictionary in a list": lambda m: m.scales[1].update(inner=5.0),
    "number in a plain object": lambda m: setattr(m.config, "factor", 7.0),
    "tensor in a plain object": lambda m: setattr(m.config, "shift", torch.full((4,), 2.0)),
    "set": lambda m: m.seen.add(2),
    "tensor attribute": lambda m: setattr(m, "table", torch.full((4,), 3.0)),
    "contents of a tensor attribute": lambda m: m.table.mul_(3),
    "forward hook": lambda m: m.linear.register_forward_hook(lambda *_: torch.zeros(3, 4)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.filterwarnings("ignore::fxckpt.FallbackWarning")
def test_change_is_noticed(change: str) -> None:
    model = Configured()
    rewritten = fxckpt.rewrite_(copy.deepcopy(model), "nothing")
    x = torch.randn(3, 4)
    assert torch.equal(model(x), rewritten(x))
    CHANGES[change](model)
    CHANGES[change](rewritten)
    assert torch.equal(model(x), rewritten(x))


def test_nothing_changed_is_noticed_too() -> None:
    rewritten = fxckpt.rewrite(Configured(), "nothing", strict=True)
    for _ in range(3):
        rewritten(torch.randn(3, 4)).sum().backward()
        rewritten.table = torch.ones(4)
    assert len(captures(rewritten)) == 1


@pytest.mark.parametrize("inner", [False, True])
def test_attributes_that_forward_does_not_read_may_change(inner: bool) -> None:
    model = Configured()
    if inner:
        fxckpt.rewrite_(model.linear, "nothing", strict=True)
    fxckpt.rewrite_(model, "nothing", strict=True)
    for step in range(3):
        model.step = model.linear.step = step  # as a training library may count
        model(torch.randn(3, 4)).sum().backward()
    assert len(captures(model)) == 1


def test_hook_in_another_dictionary_of_hooks_is_noticed() -> None:
    model = fxckpt.rewrite_(Configured(), "nothing")
    x = torch.randn(3, 4)
    model(x)
    model.linear._forward_hooks = type(model.linear._forward_hooks)()  # as some remove all hooks
    model(x)
    model.linear.register_forward_hook(lambda *_: torch.zeros(3, 4))
    assert torch.equal(model(x), torch.ones(3, 4))


def test_attribute_in_place_of_another_is_noticed() -> None:
    model = fxckpt.rewrite_(Configured(), "nothing")
    model.linear.tag = "not read"
    x = torch.randn(3, 4)
    assert not torch.equal(model(x), torch.ones(3, 4))
    del model.linear.tag
    model.linear.forward = lambda _: torch.zeros(3, 4)  # the number of attributes is the same
    assert torch.equal(model(x), torch.ones(3, 4))
