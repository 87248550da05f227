"""Several rewritten modules: nested, shared, wrapped."""

from typing import Any

import pytest
from helpers import (
    assert_same,
    captures,
    chain,
    seed_all,
    total,
)
from installing import Net, both, recorded, step, x
from torch import nn

import fxckpt
from fxckpt import FxckptError


def test_two_rewritten_models_share_a_layer() -> None:
    def make_two() -> list[nn.Module]:
        shared = nn.Linear(4, 4)
        return [nn.Sequential(shared, nn.Tanh()), nn.Sequential(shared, nn.BatchNorm1d(4))]

    results = []
    for rewritten in (False, True):
        seed_all(0)
        models = make_two()
        if rewritten:
            models = [fxckpt.rewrite(m, "nothing", strict=True) for m in models]
        found = []
        for number in range(3):
            (total(models[0](x())) + total(models[1](x(number + 2)))).backward()
            found.append([p.grad.clone() for m in models for p in m.parameters()])
            models[number % 2].train(number == 1)
            found.append([m(x()) for m in models])
            models[0].train()
            models[1].train()
        results.append(recorded(found))
    assert_same(*results)
    assert all(captures(m) for m in models)
    fxckpt.restore_(models[0])
    assert fxckpt.is_rewritten(models[1])


@pytest.mark.parametrize("order", ["inner first", "outer first", "outer called first"])
def test_submodule_of_a_rewritten_module(order: str) -> None:
    """Within the outer one, the inner is a part of what is captured; alone, it works as well."""

    def make() -> nn.Module:
        return nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.3)), nn.Linear(4, 4))

    def use(model: nn.Module) -> Any:
        if fxckpt.is_rewritten(model) and order != "inner first":
            if order == "outer called first":
                seed_all(5)
                step(model)
            fxckpt.rewrite_(model[0], "nothing", strict=True)
        seed_all(6)
        seen = [step(model), step(model[0]), step(model), step(model[0], x(5)), step(model)]
        if fxckpt.is_rewritten(model):
            assert captures(model)
            assert captures(model[0])
            fxckpt.restore_(model[0])
            assert fxckpt.is_rewritten(model)
        return seen, step(model), step(model[0])

    def rewrite(model: nn.Module, *args: Any, **options: Any) -> nn.Module:
        if order == "inner first":
            fxckpt.rewrite_(model[0], *args, **options)
        return fxckpt.rewrite_(model, *args, **options)

    both(make, use, rewrite)


def test_calling_the_inner_one_alone_captures_the_outer_one_once() -> None:
    """What an inner rewritten module remembers is no reason to capture the outer one again."""
    model = nn.Sequential(chain(1, 4), nn.Linear(4, 4))
    fxckpt.rewrite_(model[0], "nothing", strict=True)
    fxckpt.rewrite_(model, "nothing", strict=True)
    for rows in (3, 4):
        for _ in range(2):
            step(model, x(rows))
            step(model[0], x(rows))
    assert len(captures(model)) == len(captures(model[0])) == 2


def test_rewriting_many_times() -> None:
    """Each time from scratch, with one layer of subclassing; and back."""
    model = Net()
    before = dict(vars(model))
    for policy in ("nothing", "everything", "dots") * 2:
        fxckpt.rewrite_(model, policy, strict=True)
        assert type(model).__mro__[1] is Net
        step(model)
        assert len(captures(model)) == 1
    new = fxckpt.rewrite(fxckpt.rewrite(model, "nothing"), "nothing", strict=True)
    assert type(new).__mro__[1] is Net
    step(new)
    fxckpt.restore_(model)
    assert vars(model) == before
    assert fxckpt.is_rewritten(new)
    step(new)
    with pytest.raises(FxckptError, match="not rewritten"):
        fxckpt.restore_(model)
