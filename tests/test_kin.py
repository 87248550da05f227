"""Modules that look the same share what was captured; those that nearly do have their own."""

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_same_training, captures
from torch import Tensor, nn

import fxckpt
from fxckpt import FallbackWarning

WIDTH = 8


def batch(number: int) -> Tensor:
    return torch.randn(6, WIDTH)


def programs(model: nn.Module) -> int:
    """How many different things were compiled."""
    return len({id(c._programs) for c in captures(model)})


def blocks(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Sequential(*layers))


def trained(make: Callable[[], nn.Module], **options: Any) -> nn.Module:
    return assert_same_training(make, batch, units="blocks", **options)


class Statistics(nn.Module):
    """A layer that updates a buffer, and reads another one afterwards."""

    def __init__(self, *, overlap: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        memory = torch.ones(2, WIDTH)
        self.register_buffer("mean", memory[0])
        self.register_buffer("factor", memory[0] if overlap else memory[1].clone())

    def forward(self, x: Tensor) -> Tensor:
        self.mean.mul_(0.5).add_(x.detach().mean(0))
        return torch.tanh(self.linear(x)) * self.factor


@pytest.mark.parametrize(("overlap", "shared"), [(False, 2), (True, 1)])
def test_memory_that_is_shared_within_a_layer(overlap: bool, shared: int) -> None:
    """It cannot be captured, nor does it run what was captured of a layer without."""

    def rewrite(model: nn.Module, policy: Any, **options: Any) -> nn.Module:
        return fxckpt.rewrite(model, policy, **options)

    def make() -> nn.Module:
        return blocks(Statistics(), Statistics(overlap=overlap))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        model = trained(make, rewrite=rewrite)
    assert len(captures(model)) == shared
    assert programs(model) == 1


class Remembers(nn.Module):
    """A layer that keeps what came in."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.seen = nn.Linear(WIDTH, WIDTH), torch.zeros(6, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        before, self.seen = self.seen, x.detach() * 2
        return torch.tanh(self.linear(x) + before)


def test_what_layers_assign_is_their_own() -> None:
    assert programs(trained(lambda: blocks(Remembers(), Remembers()))) == 2


def test_values_that_python_read_of_arguments() -> None:
    """The second layer gets another mask in some steps."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return torch.tanh(self.linear(x)) if bool(mask.all()) else self.linear(x) * mask

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(WIDTH, WIDTH)
            self.layers = nn.ModuleList([Masked(), Masked()])

        def forward(self, x: Tensor, masks: Tensor) -> Tensor:
            x = self.stem(x)
            for layer, mask in zip(self.layers, masks, strict=True):
                x = layer(x, mask)
            return x

    def masked(number: int) -> tuple[Tensor, Tensor]:
        return batch(number), torch.tensor([[True] * WIDTH, [number != 1] * WIDTH])

    model = assert_same_training(Net, masked, units="blocks")
    assert programs(model) == 2


def test_forward_that_does_something_else_when_it_is_called_again() -> None:
    """No layer runs what was captured of another one, once that has shown."""
    numbers = itertools.count()

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            x = self.linear(x)
            return x.tanh() if next(numbers) < 1 else x

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        model = fxckpt.rewrite(blocks(Odd(), Odd(), Odd()), "nothing", units="blocks")
        for number in range(4):
            x = batch(number)
            result = model(x)
            if number > 1:
                plain = x
                for linear in (model[0], *(layer.linear for layer in model[1])):
                    plain = linear(plain)
                assert torch.equal(result, plain)


def test_layers_that_come_and_go() -> None:
    """Captures are looked up by what stands at a place now."""
    layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(3)]
    model = fxckpt.rewrite_(blocks(*layers), "nothing", units="blocks", strict=True)
    x = batch(0)
    model(x).sum().backward()
    added = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
    model[1].append(added)
    model(x).sum().backward()
    assert len(captures(model)) == 4, "the new layer is a unit, too"
    del model[1][0]
    assert torch.equal(model(x), added(layers[2](layers[1](model[0](x)))))
    assert len(captures(model)) == 3


def test_functions_that_are_made_anew_tell_layers_apart() -> None:
    """Equal code, other variables around it."""

    class Calls(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)
            self.function = lambda x, by=factor: x * by

        def forward(self, x: Tensor) -> Tensor:
            return self.function(self.linear(x)).tanh()

    assert programs(trained(lambda: blocks(Calls(2.0), Calls(3.0)))) == 2
