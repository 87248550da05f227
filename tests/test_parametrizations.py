"""Rewritten modules with parametrizations, pruning and the norms of weights."""

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from helpers import (
    assert_same,
    captures,
    total,
)
from installing import both, recorded, step, steps, x
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import fxckpt
from fxckpt import FallbackWarning, FxckptError


class Symmetric(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w.triu() + w.triu(1).t()

    def right_inverse(self, w: Tensor) -> Tensor:
        return w


REPARAMETRIZED: dict[str, Callable[[nn.Linear], Any]] = {
    "parametrize": lambda m: parametrize.register_parametrization(m, "weight", Symmetric()),
    "weight_norm": nn.utils.parametrizations.weight_norm,
    "spectral_norm": nn.utils.parametrizations.spectral_norm,
    "orthogonal": nn.utils.parametrizations.orthogonal,
    "old weight_norm": nn.utils.weight_norm,
    "old spectral_norm": nn.utils.spectral_norm,
    "prune": lambda m: prune.l1_unstructured(m, "weight", amount=0.5),
    "prune twice": lambda m: prune.random_unstructured(
        prune.l1_unstructured(m, "weight", amount=0.5), "weight", amount=0.25
    ),
}
UNDO: dict[str, Callable[[nn.Linear], Any]] = {
    "old weight_norm": nn.utils.remove_weight_norm,
    "old spectral_norm": nn.utils.remove_spectral_norm,
    "prune": lambda m: prune.remove(m, "weight"),
    "prune twice": lambda m: prune.remove(m, "weight"),
}


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """The old ones say that they are."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*weight_norm.*", FutureWarning)
        yield


@pytest.mark.parametrize("rewritten", ["whole", "layer"])
@pytest.mark.parametrize("when", ["before", "after", "between"])
@pytest.mark.parametrize("kind", REPARAMETRIZED)
def test_reparametrized(kind: str, when: str, rewritten: str) -> None:
    def apply(model: nn.Module) -> None:
        with _quietly():
            REPARAMETRIZED[kind](model if isinstance(model, nn.Linear) else model[0])

    def make() -> nn.Module:
        layer = nn.Linear(4, 4)
        model = layer if rewritten == "layer" else nn.Sequential(layer, nn.Tanh())
        if when == "before":
            apply(model)
        return model

    def use(model: nn.Module) -> Any:
        seen = [step(model)] if when == "between" else []
        if when != "before":
            apply(model)
        return seen, steps(model), model.eval()(x()), steps(model.train())

    assert captures(both(make, use, fxckpt.rewrite_))


@pytest.mark.parametrize("kind", REPARAMETRIZED)
def test_reparametrization_removed(kind: str) -> None:
    def make() -> nn.Module:
        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        with _quietly():
            REPARAMETRIZED[kind](model[0])
        return model

    def use(model: nn.Module) -> Any:
        seen = steps(model)
        if kind in UNDO:
            UNDO[kind](model[0])
        else:
            parametrize.remove_parametrizations(model[0], "weight")
        return seen, steps(model), type(model[0]).__name__

    both(make, use, fxckpt.rewrite_)


def test_parametrized_root_is_restored_or_refused() -> None:
    """torch changes the class of the module on its own: nothing is left half done."""
    model = fxckpt.rewrite_(nn.Linear(4, 4), "nothing", strict=True)
    step(model)
    parametrize.register_parametrization(model, "weight", Symmetric())
    expected = step(copy.deepcopy(model))
    with pytest.raises(FxckptError, match="class of the model was changed"):
        fxckpt.restore_(model)
    assert_same(recorded(expected), recorded(step(model)))
    assert fxckpt.is_rewritten(model)
    parametrize.remove_parametrizations(model, "weight")
    step(model)
    assert type(fxckpt.restore_(model)) is nn.Linear
    step(model)


def test_rewritten_parametrized_root_is_restored() -> None:
    model = nn.Linear(4, 4)
    parametrize.register_parametrization(model, "weight", Symmetric())
    cls = type(model)
    fxckpt.rewrite_(model, "nothing", strict=True)
    step(model)
    assert type(fxckpt.restore_(model)) is cls
    parametrize.remove_parametrizations(model, "weight")
    assert type(model) is nn.Linear
    step(model)


@pytest.mark.parametrize("called", [True, False])
def test_cached_parametrization(called: bool) -> None:
    """Inside of `parametrize.cached`, a weight is computed once for all readers."""

    def make() -> nn.Module:
        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        parametrize.register_parametrization(model[0], "weight", Symmetric())
        return model

    def use(model: nn.Module) -> Any:
        seen = [step(model)] if called else []
        with parametrize.cached():
            first = model(x())
            weight = model[0].weight
            second = model(x(5))
            same = model[0].weight is weight
        (total((first, second)) + weight.sum()).backward()
        assert type(weight) is Tensor
        return seen, first, second, weight, same, [p.grad for p in model.parameters()]

    both(make, use)


@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
@pytest.mark.parametrize("root", [True, False])
def test_lazy_modules(root: bool) -> None:
    """They get their shapes, and another class, when they are first called."""

    def make() -> nn.Module:
        return nn.LazyLinear(4) if root else nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d())

    def use(model: nn.Module) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FallbackWarning)
            first = step(model)
        assert type(model if root else model[0]).__name__ == "Linear"
        return first, steps(model)

    model = both(make, use, fxckpt.rewrite_, strict=False)
    assert captures(model), "what is lazy at the first call is captured later"
    known = len(captures(model))
    step(model, x(9))
    assert len(captures(model)) == known + 1
    assert type(fxckpt.restore_(model)) is (nn.Linear if root else nn.Sequential)
    step(model)
