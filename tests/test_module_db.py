"""Every module of torch, with sample inputs of torch's own tests, is bit-identical to eager.

All samples count, but of one module every ninth: it has hundreds that are much alike. Samples for
which a module raises have to raise the same exception. Torch lists more than a hundred modules with
almost two thousand other samples; the modules are dealt out to the tests in turn.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxckpt
from bench.architectures import torch_modules
from bench.architectures.case import Architecture
from tests.helpers import Record, assert_same, captures, seed_all, tensors_in, total, train

HANDS = 24
MOST = 100
FALL_BACK = {
    "nn.GaussianNLLLoss": "aten._local_scalar_dense",
    "nn.CTCLoss": "aten._ctc_loss",
    "nn.CrossEntropyLoss": "weighted cross entropy",
    "nn.LinearCrossEntropyLoss": "weighted cross entropy",
}
"""Modules of which some samples are refused, and the reason."""

pytestmark = pytest.mark.filterwarnings("ignore", "error::fxckpt.FallbackWarning")
Install = Callable[[nn.Module], nn.Module]


def test_torch_has_samples_of_its_modules() -> None:
    names = torch_modules.names()
    counts = [len(torch_modules.samples(n, torch.float32, training=True)) for n in names]
    assert len(names) > 100
    assert min(counts) > 0
    assert sum(counts) > 900


@pytest.mark.slow
@pytest.mark.parametrize("hand", range(HANDS))
def test_modules_of_torch_are_exact_in_single_precision(hand: int) -> None:
    _check(hand, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("hand", range(HANDS))
def test_modules_of_torch_are_exact_in_double_precision(hand: int) -> None:
    _check(hand, torch.float64)


def _check(hand: int, dtype: torch.dtype) -> None:
    failures = []
    for sample, training in _dealt(hand, dtype):
        try:
            _compare(sample, training)
        except Exception as error:
            mode = "train" if training else "eval"
            failures.append(f"{sample.name} ({mode}): {type(error).__name__}: {error}")
    assert not failures, "\n".join(failures)


def _dealt(hand: int, dtype: torch.dtype) -> Iterator[tuple[Architecture, bool]]:
    for name in torch_modules.names()[hand::HANDS]:
        for training in (True, False):
            samples = torch_modules.samples(name, dtype, training=training)
            for sample in samples[:: -(-len(samples) // MOST)]:
                yield sample, training


def _compare(sample: Architecture, training: bool) -> None:
    eager = _trained(sample, lambda model: model)
    raises = eager[0][0] == "raises"
    rewritten: list[nn.Module] = []

    def install(model: nn.Module, strict: bool) -> nn.Module:
        rewritten.append(fxckpt.rewrite(model, "nothing", strict=strict))
        return rewritten[-1]

    ours = _trained(sample, lambda model: install(model, strict=not raises))
    reason = FALL_BACK.get(sample.name.partition("[")[0])
    refused = ours[0][0] == "raises" and not raises
    if refused:
        assert reason is not None, ours[0][1]
        with pytest.warns(fxckpt.FallbackWarning, match=reason):
            ours = _trained(sample, lambda model: install(model, strict=False))
    assert_same(eager, ours)
    if training and not raises and not refused:
        assert captures(rewritten[0]), "nothing was captured: eager was compared with eager"


def _trained(sample: Architecture, install: Install) -> Record:
    """Two steps on different data, or what they raise."""

    def step(model: nn.Module, number: int) -> tuple[list[Tensor], Any, Tensor]:
        args, kwargs = sample.batch(number)
        result = model(*args, **kwargs)
        inputs = [t for t in tensors_in((args, kwargs)) if t.is_leaf]
        return inputs, result, total(result)

    seed_all(0)
    model = install(sample.make())
    try:
        return train(model, step, steps=2)
    except Exception as error:
        return [("raises", f"{type(error).__name__}: {error}")]
