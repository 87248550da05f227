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


SWAPS: dict[str, Callable[[Configured], object]] = {
    "list and dictionary": lambda m: setattr(m, "scales", copy.deepcopy(m.scales)),
    "set": lambda m: setattr(m, "seen", {*m.seen}),
    "tuple": lambda m: setattr(m, "factors", (*m.factors,)),
    "list in an object": lambda m: setattr(m.config, "names", [*m.config.names]),
}


@pytest.mark.parametrize("swap", SWAPS)
def test_equal_data_in_place_of_another_is_the_same(swap: str) -> None:
    class Model(Configured):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * len(self.config.names) * self.factors[0]

    model = Model()
    model.config.names, model.factors = ["a"], (2.0,)  # as transformers saves a configuration
    rewritten = fxckpt.rewrite_(copy.deepcopy(model), "nothing", strict=True)
    x = torch.randn(3, 4)
    for _ in range(3):
        assert torch.equal(rewritten(x), model(x))
        SWAPS[swap](rewritten)
    assert len(captures(rewritten)) == 1


def test_data_that_is_held_twice_is_not_the_same_as_equal_data() -> None:
    class Compares(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.exp() if self.a is self.b else x.sin() if self.b is self.c else x

    model, x = (
        fxckpt.rewrite_(Compares(), "nothing", strict=True),
        torch.randn(3, requires_grad=True),
    )
    one, other = [1], [1]
    ties = [(one, one, other), (other, one, one), (one, other, [1]), (other, [1], one)]
    for a, b, c in ties:
        model.a, model.b, model.c = a, b, c
        assert torch.equal(model(x), nn.Module.__call__(fxckpt.restore_(copy.copy(model)), x))
    assert len(captures(model)) == 3


def test_list_of_tensors_in_place_of_another_is_noticed() -> None:
    class Listed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.exp() * self.tensors[0]

    model, x = fxckpt.rewrite_(Listed(), "nothing", strict=True), torch.ones(3, requires_grad=True)
    for factor in (2.0, 3.0):
        model.tensors = [torch.full((3,), factor)]
        assert torch.equal(model(x), x.exp() * factor)


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
