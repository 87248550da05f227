"""Attributes, methods and descriptors of rewritten modules."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import (
    Function,
    captures,
    chain,
)
from installing import Net, both, step, steps, x
from torch import Tensor, nn

import fxckpt
from fxckpt import CaptureError


def test_members_are_set_and_deleted_as_ever() -> None:
    def use(model: nn.Module) -> Any:
        seen = [step(model)]
        model.register_module("extra", nn.Linear(4, 2))
        seen.append(step(model))
        model.add_module("extra", nn.Linear(4, 4))
        seen.append(step(model))
        del model.extra
        model.register_buffer("offset", torch.ones(4))
        seen.append(step(model))
        del model.offset
        model.register_parameter("gain", None)
        seen.append(step(model))
        model.gain = nn.Parameter(torch.ones(4))
        seen.append(step(model))
        model.gain = None
        del model.gain
        model[0].bias = None
        seen.append(step(model))
        del model[1]
        seen.append(step(model))
        return seen, [n for n, _ in model.named_modules()], list(model.state_dict())

    both(lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh()), use)


def test_missing_attributes_are_missing() -> None:
    def use(model: nn.Module) -> Any:
        texts = []
        for look in (
            lambda: model.nothing,
            lambda: delattr(model, "nothing"),
            lambda: model.get_submodule("layer.nothing"),
            lambda: model.get_parameter("layer.nothing"),
            lambda: model.register_buffer("layer", None),
            lambda: setattr(model, "layer", 3),
        ):
            with pytest.raises((AttributeError, KeyError, TypeError)) as caught:
                look()
            texts.append((caught.type, str(caught.value)))
        return texts, step(model)

    both(Net, use)


class Settings:
    """A plain object, as configurations are."""

    def __init__(self, **values: Any) -> None:
        vars(self).update(values)


SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], float], Callable[[Any], None]]] = {
    "dict": (lambda: {"a": 2.0}, lambda s: s["a"], lambda s: s.update(a=3.0)),
    "list": (lambda: [2.0], lambda s: s[0], lambda s: s.append(s.pop() + 1)),
    "set": (lambda: {2.0}, lambda s: max(s), lambda s: s.add(s.pop() + 1)),
    "object": (lambda: Settings(a=2.0), lambda s: s.a, lambda s: setattr(s, "a", 3.0)),
    "nested": (lambda: {"b": [2.0, 3.0]}, lambda s: s["b"][0], lambda s: s["b"].reverse()),
    "inner": (lambda: {"b": [2.0]}, lambda s: s["b"][0], lambda s: s.update(b=[3.0])),
    "deep": (
        lambda: Settings(a=[{"b": 2.0}]),
        lambda s: s.a[0]["b"],
        lambda s: s.a[0].update(b=3.0),
    ),
}


@pytest.mark.parametrize("set_", ["before", "after rewriting", "after a call", "in its place"])
@pytest.mark.parametrize("kind", SETTINGS)
def test_settings_changed_in_place(kind: str, set_: str) -> None:
    """Wherever a container comes from, and whenever: what is in it is looked at anew."""
    make, read, change = SETTINGS[kind]

    def forward(m: Function, x: Tensor) -> Tensor:
        return x @ m.weight * (read(m.settings) if hasattr(m, "settings") else 1)

    def build() -> nn.Module:
        model = Function(forward)
        if set_ in ("before", "in its place"):
            model.settings = make()
        return model

    def use(model: nn.Module) -> Any:
        seen = [step(model)] if set_ in ("after a call", "in its place") else []
        if set_ != "before":
            model.settings = make()
        seen.append(step(model))
        change(model.settings)
        seen.append(step(model))
        if kind == "inner":
            model.settings["b"][0] = 5.0
        return seen, step(model)

    both(build, use, fxckpt.rewrite_)


def test_conversions() -> None:
    def use(model: nn.Module) -> Any:
        seen = [step(model)]
        model.to(torch.float64)
        seen.append(step(model, x().double()))
        model.bfloat16()
        seen.append(step(model, x().bfloat16()))
        model.float().requires_grad_(False)
        model.layer.requires_grad_(True)
        seen.append(step(model))
        model.requires_grad_(True).to(memory_format=torch.channels_last)
        seen.append(step(model))
        model.apply(lambda m: m.reset_parameters() if hasattr(m, "reset_parameters") else None)
        seen.append(step(model))
        model.share_memory()
        seen.append(step(model))
        return seen

    both(Net, use)


@pytest.mark.parametrize("option", ["overwrite", "swap"])
def test_conversions_that_replace_parameters(option: str) -> None:
    setter = getattr(torch.__future__, f"set_{option}_module_params_on_conversion")

    def use(model: nn.Module) -> Any:
        seen = [step(model)]
        setter(True)
        try:
            seen.append(step(model.double(), x().double()))
            model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()})
            seen.append(step(model, x().double()))
            return seen, step(model.float())
        finally:
            setter(False)

    both(Net, use)


def test_load_state_dict_by_assignment() -> None:
    def use(model: nn.Module) -> Any:
        seen = [step(model)]
        model.load_state_dict(
            {k: v.clone() * 2 for k, v in model.state_dict().items()}, assign=True
        )
        return seen, step(model)

    both(lambda: chain(2, 4), use)


def test_from_the_meta_device() -> None:
    def make() -> nn.Module:
        with torch.device("meta"):
            return Net()

    def use(model: nn.Module) -> Any:
        model.to_empty(device="cpu")
        for m in (model.layer, model.norm):
            m.reset_parameters()
        return steps(model)

    assert captures(both(make, use))
    new = fxckpt.rewrite(make(), "nothing", strict=True)
    with pytest.raises(CaptureError, match="meta device"):
        new(x())


def test_state_dict_hooks_and_strictness() -> None:
    model = fxckpt.rewrite(Net(), "nothing", strict=True)
    step(model)
    assert set(model.state_dict()) == set(Net().state_dict())
    model.load_state_dict(Net().state_dict(), strict=True)
    Net().load_state_dict(model.state_dict(), strict=True)
    with pytest.raises(RuntimeError, match=r"Missing key.*layer\.bias"):
        model.load_state_dict({k: v for k, v in model.state_dict().items() if k != "layer.bias"})
    extra = {**model.state_dict(), "other": torch.ones(1)}
    assert model.load_state_dict(extra, strict=False).unexpected_keys == ["other"]
    outer = nn.ModuleDict({"inner": model})
    assert all(k.startswith("inner.") for k in outer.state_dict())


class Decides(nn.Module):
    """Decides at its first call what it does, in an object of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.config = nn.Linear(4, 4), SimpleNamespace(kind=None)

    def forward(self, x: Tensor) -> Tensor:
        """Of rows."""
        if self.config.kind is None:
            self.config.kind = "tanh"
        return getattr(self.linear(x), self.config.kind)()


def test_what_the_first_call_decides_is_no_change_before_its_backward() -> None:
    """Which may have to run forward again."""

    def use(model: nn.Module) -> Any:
        weight = model.linear.weight
        (gradient,) = torch.autograd.grad(model(x()).sum(), weight, create_graph=True)
        return model.config.kind, gradient, torch.autograd.grad(gradient.square().sum(), weight)

    both(Decides, use)
