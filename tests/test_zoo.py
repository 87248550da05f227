"""Every architecture of the zoo trains to the same bits as eager, and is captured as expected."""

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fxckpt
from bench.architectures import architectures
from bench.architectures.case import Architecture, total
from bench.architectures.coverage import markdown, public, totals
from bench.architectures.examine import Row, examine

ZOO = architectures()

REPRESENTATIVES = frozenset(
    "hf/gpt2 hf/llama hf/xlnet hf/mixtral hf/qwen3_moe hf/mamba hf/bert hf/albert hf/deberta-v2 "
    "hf/longformer hf/t5 hf/bart hf/m2m_100 hf/vit hf/convnext hf/swin hf/segformer+segments "
    "hf/yolos hf/wav2vec2 hf/whisper hf/clip+contrast hf/llava hf/time_series_transformer hf/sam "
    "hf/funnel".split()
)
TWO_POLICIES = frozenset("hf/gpt2 hf/mixtral hf/bert hf/t5 hf/convnext hf/m2m_100".split())

_ROWS = re.findall(
    r"^\| `(.*?)` \| .*? \| (\w+) \|.*\| ([\d.]+) \|$",
    Path(__file__).parents[1].joinpath("docs/coverage.md").read_text(encoding="utf-8"),
    re.MULTILINE,
)
STATUSES = {name: status for name, status, _ in _ROWS}
"""Those of the committed table; what is captured less has to be exact all the same."""
# The rest takes minutes; `python bench/zoo.py` examines them.
EXAMINED = [name for name, _, seconds in _ROWS if float(seconds) < 5 or name in REPRESENTATIVES]


def parametrized() -> list[Any]:
    """The names, those marked as slow that do not stand for many others."""
    marks = {name: () if name in REPRESENTATIVES else (pytest.mark.slow,) for name in EXAMINED}
    return [pytest.param(name, marks=marks[name], id=name) for name in EXAMINED]


@pytest.mark.parametrize("name", parametrized())
def test_architecture_is_exact(name: str) -> None:
    row = examine(ZOO[name], ("nothing",), measured=False)
    expected = ("whole",) if STATUSES[name] == "whole" else ("whole", "parts", "eager")
    assert row.status in expected, row.reason


@pytest.mark.parametrize("name", sorted(TWO_POLICIES))
def test_architecture_is_exact_and_smaller(name: str) -> None:
    row = examine(ZOO[name], ("nothing", "dots"))
    assert row.status == STATUSES[name], row.reason
    assert row.ratios["nothing"] < row.ratios["dots"] < 1


def test_table_is_complete_and_has_no_failures() -> None:
    assert STATUSES.keys() == ZOO.keys()
    assert set(STATUSES.values()) == {"whole", "parts", "eager"}


def test_names_above_exist() -> None:
    assert ZOO.keys() >= REPRESENTATIVES | TWO_POLICIES


@pytest.mark.parametrize("name", sorted(REPRESENTATIVES))
def test_batches_differ_from_step_to_step(name: str) -> None:
    """Otherwise the second step would not test that a graph runs on other data."""
    first, again, second = (ZOO[name].batch(step) for step in (0, 0, 1))
    flat = [[repr(value) for value in batch[1].values()] for batch in (first, again, second)]
    assert flat[0] == flat[1] != flat[2]


# --- the examination itself ---------------------------------------------------------------------


class Tiny(nn.Module):
    """A layer, and a method that a test gives it."""

    def __init__(self, extra: Callable[[torch.Tensor], torch.Tensor] | None = None) -> None:
        super().__init__()
        self.layer, self.extra = nn.Linear(4, 4), extra

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.layer(x))
        return x if self.extra is None else self.extra(x)


def tiny(extra: Callable[[torch.Tensor], torch.Tensor] | None = None) -> Architecture:
    return Architecture("tiny", "test", lambda: Tiny(extra), lambda step: ((torch.ones(2, 4),), {}))


def tampered(model: nn.Module, change: Callable[[nn.Module], Any]) -> nn.Module:
    """The rewritten model; `change` runs before each call."""

    def hook(m: nn.Module, _: Any) -> None:
        change(m)

    model = fxckpt.rewrite(model, "nothing")
    model.register_forward_pre_hook(hook)
    return model


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (lambda m: m.layer.bias.data.add_(1e-6), "output"),
        (lambda m: torch.rand(1), "random states"),
        (lambda m: random.random(), "random states"),
        (lambda m: np.random.rand(), "random states"),
        (lambda m: m.layer.weight.register_hook(lambda g: -g), "gradient of layer.weight"),
    ],
)
def test_difference_is_noticed(
    change: Callable[[nn.Module], Any], difference: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewrite = fxckpt.rewrite

    def install(model: nn.Module, policy: str) -> nn.Module:
        monkeypatch.setattr(fxckpt, "rewrite", rewrite)
        return tampered(model, change)

    monkeypatch.setattr(fxckpt, "rewrite", install)
    row = examine(tiny(), ("nothing",))
    assert row.status == "wrong"
    assert row.reason == f"nothing: step 0: {difference}"


def test_exception_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(model: nn.Module, policy: str) -> nn.Module:
        raise ValueError("no")

    monkeypatch.setattr(fxckpt, "rewrite", fail)
    row = examine(tiny(), ("nothing",))
    assert (row.status, row.reason) == ("raises", "nothing: ValueError: no")


def test_exception_in_eager_is_told_from_ours() -> None:
    def fail(x: torch.Tensor) -> torch.Tensor:
        raise ValueError("no")

    assert examine(tiny(fail)).reason == "eager: ValueError: no"


def test_fallback_is_noticed() -> None:
    row = examine(tiny(lambda x: x * 2 if x.mean() > 9 else x), ("nothing",))
    assert row.status == "eager"
    assert "depends on floating-point data" in row.reason


def test_what_eager_does_not_repeat_is_not_compared() -> None:
    calls = iter(range(1000))
    row = examine(tiny(lambda x: x * next(calls)), ("nothing",))
    assert "step 0: output" in row.unreproducible
    assert row.status == "whole"


def test_what_is_kept_is_measured() -> None:
    row = examine(tiny(lambda x: x.sin().exp()), ("nothing", "everything"))
    assert row.eager_bytes == 2 * 32 + 4  # the results of tanh and exp, and the loss
    assert row.ratios["everything"] == 1
    assert row.ratios["nothing"] < 1


def test_loss_reaches_every_output() -> None:
    a, b = torch.ones(2, requires_grad=True), torch.ones(3, dtype=torch.cfloat, requires_grad=True)
    total({"x": [a, (b,)], "constant": torch.ones(1)}).backward()
    assert torch.equal(a.grad, torch.ones(2))
    assert torch.equal(b.grad, torch.full((3,), 2 / 3, dtype=torch.cfloat))


# --- the page -----------------------------------------------------------------------------------


def test_page_counts_and_explains() -> None:
    rows = [
        Row("a", "f", ratios={"nothing": 0.25}, first_call=1.25),
        Row("b", "f", "parts", "in\n/some/where/x.py", ["step 0: loss"], share={"nothing": 0.5}),
        Row("c", "g", "raises", "no"),
    ]
    assert "| **all** | 3 | 1 | 1 |  |  | 1 |" in totals(rows)
    page = markdown(rows, ("nothing",))
    assert "| `a` | f | whole | 0.25 | 1.2 |" in page
    assert "- `b` (parts): in x.py; two eager runs differ, first in `step 0: loss`; of what" in page
    assert "`gpt2`" in page.partition("## Not in the zoo")[2]


def test_folders_are_left_out() -> None:
    assert public("at /a/b.c/d.py:3, 1/2 of x/y") == "at d.py:3, 1/2 of x/y"
