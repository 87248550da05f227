"""Layers that look the same are told by comparing them, and by nothing else."""

from __future__ import annotations

import copy
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from helpers import assert_same_training, captures
from torch import Tensor, nn

import fxckpt
from fxckpt import captures as captures_module
from fxckpt.watch import Watch

WIDTH = 8


def batch(number: int) -> Tensor:
    return torch.randn(4, WIDTH)


class Layer(nn.Module):
    """A layer that reads plain values, and an object that all layers share."""

    def __init__(self, config: Any, shape: tuple[int, ...] = (1, WIDTH)) -> None:
        super().__init__()
        self.config, self.shape, self.scale = config, shape, 1.0
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.drop = nn.Sequential(OrderedDict(a=nn.Dropout(0.1)))
        self.zero = 0.0
        self.register_buffer("shift", torch.ones(WIDTH))
        self.register_buffer("none", None)

    def forward(self, x: Tensor) -> Tensor:
        first = getattr(self.config, "first", None)
        if first is self or (isinstance(first, tuple) and first[0] is self):
            return x
        x = self.drop(self.linear(self.norm(x))) * self.config.factor * self.scale
        x = x + self.shift.view(self.shape) + self.zero
        return x.tanh() if self.none is None else x.sin()


def layers(count: int = 3) -> nn.Sequential:
    config = types.SimpleNamespace(factor=1.5)
    return nn.Sequential(
        nn.Linear(WIDTH, WIDTH), nn.Sequential(*(Layer(config) for _ in range(count)))
    )


@contextmanager
def counted() -> Iterator[list[str]]:
    """What is done while active: "capture" and "collect", each as often as it happens."""
    done: list[str] = []
    capture, collect = captures_module.capture, Watch._collect

    def one(*args: Any, **kwargs: Any) -> Any:
        done.append("capture")
        return capture(*args, **kwargs)

    def another(watch: Watch) -> Any:
        done.append("collect")
        return collect(watch)

    with (
        mock.patch.object(captures_module, "capture", one),
        mock.patch.object(Watch, "_collect", another),
    ):
        yield done


def test_one_capture_and_one_look_for_all() -> None:
    model = fxckpt.rewrite(layers(20), "nothing", units="blocks", strict=True)
    with counted() as done:
        model(batch(0)).sum().backward()
    assert done.count("capture") == 1
    assert done.count("collect") == 2  # before it is known what forward reads, and afterwards
    with counted() as done:
        for number in range(3):
            model(batch(number)).sum().backward()
    assert done == ["capture"], "at the second call, what was captured is confirmed"


def programs(model: nn.Module) -> int:
    return len({id(c._programs) for c in captures(model)})


def _set(name: str, value: Any) -> Callable[[Layer], None]:
    return lambda layer: setattr(layer, name, value)


def _replace(name: str, new: Callable[[], nn.Module]) -> Callable[[Layer], None]:
    return lambda layer: setattr(layer, name, new())


OTHER: dict[str, Callable[[Layer], Any]] = {
    "number": _set("scale", 2.0),
    "type of a number": _set("scale", 1),
    "sign of zero": _set("zero", -0.0),
    "tuple": _set("shape", (WIDTH,)),
    "object": lambda layer: setattr(layer, "config", copy.copy(layer.config)),
    "mode": lambda layer: layer.drop.eval(),
    "rate": lambda layer: setattr(layer.drop.a, "p", 0.5),
    "name": _replace("drop", lambda: nn.Sequential(OrderedDict(b=nn.Dropout(0.1)))),
    "gradient": lambda layer: layer.norm.weight.requires_grad_(False),
    "no bias": _replace("linear", lambda: nn.Linear(WIDTH, WIDTH, bias=False)),
    "no parameters": _replace("norm", lambda: nn.LayerNorm(WIDTH, elementwise_affine=False)),
    "class": lambda layer: setattr(layer.drop, "a", nn.AlphaDropout(0.1)),
    "buffer": _set("none", torch.ones(2)),
    "strides": lambda layer: setattr(
        layer.linear, "weight", nn.Parameter(torch.randn(WIDTH, WIDTH).t())
    ),
    "tie": lambda layer: setattr(layer.norm, "bias", layer.norm.weight),
    "hook": lambda layer: layer.norm.register_forward_hook(lambda m, args, result: result * 2),
    "method": lambda layer: setattr(
        layer.norm, "forward", types.MethodType(lambda self, x: x.sin(), layer.norm)
    ),
}


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("what", OTHER)
def test_what_tells_layers_apart(what: str, which: int) -> None:
    def make() -> nn.Module:
        model = layers()
        OTHER[what](model[1][which])
        return model

    model = assert_same_training(make, batch, units="blocks")
    assert programs(model) == 2


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: (m,)], ids=["itself", "in a tuple"])
def test_an_object_that_leads_to_one_of_the_layers(which: int, wrap: Callable[[Any], Any]) -> None:
    """All layers have the same object, but it means something else to one of them."""

    def make() -> nn.Module:
        model = layers()
        model[1][0].config.first = wrap(model[1][which])
        return model

    model = assert_same_training(make, batch, units="blocks", policy="dots")
    assert programs(model) > 1


def test_an_object_that_changes_between_layers() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.layers = layers()

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            for i, layer in enumerate(self.layers):
                layer.config.factor = 1.0 + i % 2
                x = layer(x)
            return x

    model = assert_same_training(Model, batch, units="blocks")
    assert programs(model) == 2


def test_what_changes_after_layers_were_told_alike() -> None:
    model = layers()
    ours = fxckpt.rewrite(model, "nothing", units="blocks", strict=True)

    def same() -> None:
        x, results = batch(0), []
        for m in (ours, model):
            torch.manual_seed(1)
            loss = m(x).square().sum()
            results.append([loss, *torch.autograd.grad(loss, [*m.parameters()])])
        assert all(map(torch.equal, *results))

    same()
    with counted() as done:
        same()
        for change in (_set("scale", 3.0), _set("scale", 1.0)):
            change(model[1][2])
            same()
        model[1][0].config.factor = 0.5
        same()
        model[1][1].norm = nn.LayerNorm(WIDTH)
        same()
    assert done.count("capture") <= 5  # two that confirm; the number, the configuration
