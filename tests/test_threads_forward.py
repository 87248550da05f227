"""Rewritten models that several threads call."""

import copy
import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    Stack,
    captures,
    chain,
    content,
    joint_of,
)
from threads import Meeting, batch, gradients, gradients_of, rows, stopping, together, training
from torch import Tensor, nn

import fxckpt
from fxckpt import FallbackWarning

# --- two models -----------------------------------------------------------------------------------


@pytest.mark.parametrize("made", ["rewritten copies", "copies of a rewritten one"])
def test_two_copies_train_at_once(made: str) -> None:
    """Their first calls meet, too."""
    base = Stack(1, dropout=0.0)
    expected = training(copy.deepcopy(base))
    if made == "rewritten copies":
        models = [fxckpt.rewrite(copy.deepcopy(base), "nothing", strict=True) for _ in range(3)]
    else:
        first = fxckpt.rewrite(base, "nothing", strict=True)
        models = [copy.deepcopy(first) for _ in range(3)]
    for found in together(*(lambda m=m: training(m) for m in models)):
        assert found == expected
    assert [len(captures(m)) for m in models] == [2] * 3


def test_capture_while_another_model_is_captured() -> None:
    base, meeting = chain(2, 4), Meeting()
    expected = gradients(base, rows())
    slow = fxckpt.rewrite(stopping(copy.deepcopy(base), meeting), "nothing", strict=True)
    fast = fxckpt.rewrite(copy.deepcopy(base), "nothing", strict=True)
    found = meeting.meanwhile(lambda: gradients(slow, rows()), lambda: gradients(fast, rows()))
    assert found == (expected, expected)
    assert captures(slow)
    assert captures(fast)


def test_captured_model_runs_while_another_is_captured() -> None:
    base, meeting = Stack(1, dropout=0.0), Meeting()
    expected = training(copy.deepcopy(base))
    fast = fxckpt.rewrite(copy.deepcopy(base), "nothing", strict=True)
    for length in (5, 7):
        gradients(fast, batch(length))
    slow = fxckpt.rewrite(stopping(copy.deepcopy(base), meeting), "nothing", strict=True)
    slow_found, found = meeting.meanwhile(lambda: gradients(slow, batch()), lambda: training(fast))
    assert found == expected
    assert slow_found == gradients(copy.deepcopy(base), batch())


@pytest.mark.parametrize("strict", [True, False])
def test_unrelated_eager_model_while_one_is_captured(strict: bool) -> None:
    """It sees no fake tensor, its hooks run, and it does not show in what is captured."""
    base, other, meeting = Stack(1, dropout=0.0), Stack(1, dropout=0.0), Meeting()
    expected, expected_other = gradients(base, batch()), training(copy.deepcopy(other))
    slow = fxckpt.rewrite(stopping(base, meeting), "nothing", strict=strict)
    called: list[str] = []
    other.blocks[0].register_forward_hook(lambda m, args, out: called.append(type(m).__name__))
    found, found_other = meeting.meanwhile(
        lambda: gradients(slow, batch()), lambda: training(other)
    )
    assert found == expected
    assert found_other == expected_other
    assert called == ["Block"] * 6
    assert len(captures(slow)) == 1
    nodes = joint_of(slow).forward_nodes()
    calls = {call.path.split(".")[0] for n in nodes for call in n.meta["calls"]}
    assert calls == {"", "inner"}


DRAWS: dict[str, Callable[[], Any]] = {
    "random": random.random,
    "numpy": np.random.random,
    "torch": lambda: torch.rand(3).tolist(),
    "dropout": lambda: torch.dropout(torch.ones(4), 0.5, True).tolist(),
    "torch.Generator": lambda: torch.rand(3, generator=torch.Generator().manual_seed(3)).tolist(),
}


@pytest.mark.parametrize("kind", DRAWS)
def test_random_numbers_of_another_thread(kind: str) -> None:
    """Drawn while a model is captured, which itself draws none: its results are the same.

    What the other thread drew meanwhile is drawn again (docs/limits.md).
    """
    draw, meeting = DRAWS[kind], Meeting()
    base = chain(2, 4)
    expected = gradients(base, rows())
    slow = fxckpt.rewrite(stopping(base, meeting), "nothing")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        found, _ = meeting.meanwhile(
            lambda: gradients(slow, rows()), lambda: [draw() for _ in range(3)]
        )
    assert found == expected
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        assert gradients(slow, rows()) == expected
    assert captures(slow), "the model is captured when nobody interferes"


# --- one model ------------------------------------------------------------------------------------


def test_first_calls_of_one_model_meet() -> None:
    """Each signature is captured once, and each thread gets its own results."""
    base = Stack(1, dropout=0.0)
    lengths = (5, 6, 7, 8)
    expected = {n: gradients(base, batch(n)) for n in lengths}
    model = fxckpt.rewrite(base, "nothing", strict=True)
    orders, run = (lengths, lengths[::-1], lengths[2:] + lengths[:2]), gradients_of(model)
    found = together(*(lambda o=o: [run(batch(n)) for n in o] for o in orders))
    for order, results in zip(orders, found, strict=True):
        assert results == [expected[n] for n in order]
    assert len(captures(model)) == 4


@pytest.mark.parametrize("sharing", ["itself", "another rewritten", "a part", "the whole"])
def test_captured_call_while_shared_modules_are_captured(sharing: str) -> None:
    """The fake tensors that stand in the modules for a while are not what the other one reads."""
    base, meeting = Stack(1, dropout=0.0), Meeting()
    expected = gradients(base, batch(5)), gradients(base, batch(7))
    slow = fxckpt.rewrite(stopping(base, meeting), "nothing", strict=True)
    if sharing == "itself":
        meeting.thread = -1  # nobody stops
        gradients(slow, batch(5))
        fast = slow
    elif sharing == "another rewritten":
        fast = fxckpt.rewrite(base, "nothing", strict=True)
    elif sharing == "a part":
        fast = fxckpt.rewrite(base.blocks[0], "nothing", strict=True)
        expected = gradients(base.blocks[0], batch(5)), expected[1]
    else:
        outer = nn.Sequential(base, nn.Tanh())
        fast = fxckpt.rewrite(outer, "nothing", strict=True)
        expected = gradients(outer, batch(5)), expected[1]
    run_slow, run_fast = gradients_of(slow), gradients_of(fast)
    assert run_fast(batch(5)) == expected[0]

    def works() -> list[Any]:
        return [run_fast(batch(5)) for _ in range(3)]

    found, others = meeting.meanwhile(lambda: run_slow(batch(7)), works)
    assert found == expected[1]
    assert others == [expected[0]] * 3


def test_two_that_share_modules_are_captured_at_once() -> None:
    base = Stack(1, dropout=0.0)
    expected = [gradients(base, batch(n)) for n in (5, 6, 7)]
    models = [fxckpt.rewrite(base, policy, strict=True) for policy in ("nothing", "dots")]
    runs = [gradients_of(m) for m in models * 2]
    found = together(*(lambda run=run: [run(batch(n)) for n in (5, 6, 7)] for run in runs))
    assert found == [expected] * 4


@pytest.mark.parametrize("mode", ["eval", "no_grad", "train"])
def test_original_runs_beside_captured_calls(mode: str) -> None:
    """Eagerly, in another thread: an evaluation beside the training.

    While a call is captured nothing else may run the modules (see limits); afterwards all may.
    """
    base = Stack(1, dropout=0.0)
    original = base
    if mode == "eval":  # in modules of its own, as training flags would be shared
        original = copy.deepcopy(base).eval()
        for a, b in zip(base.parameters(), original.parameters(), strict=True):
            b.data = a.data
    model = fxckpt.rewrite(base, "nothing", strict=True)
    expected = gradients(base, batch()), content(base(batch(6)))
    for _ in range(2):
        assert gradients(model, batch()) == expected[0]

    def evaluate(m: nn.Module) -> list[Any]:
        with torch.set_grad_enabled(mode != "no_grad"):
            return [content(m(batch(6))) for _ in range(20)]

    run = gradients_of(model)
    found, other = together(lambda: [run(batch()) for _ in range(20)], lambda: evaluate(original))
    assert other == [expected[1]] * 20
    assert found == [expected[0]] * 20
    assert len(captures(model)) == 1


def test_threads_of_one_model_that_falls_back() -> None:
    """While one thread runs the parts, another runs the same model, or the original."""
    meeting = Meeting()

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = Stack(1, dropout=0.0), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.body(x)
            if float(y.detach().sum()) > -1e9:  # cannot be captured
                meeting()
            return self.head(y)

    base = Reads()
    meeting.thread = -1
    expected = gradients(base, batch())

    classes = [type(m) for m in base.modules()]
    model, other = (fxckpt.rewrite(base, "nothing") for _ in range(2))
    runs = [gradients_of(m) for m in (model, base, other)]

    def works() -> list[Any]:
        assert "_FunctionBackward" not in _autograd_nodes(base(batch())), "not its own forward"
        return [run(batch()) for run in runs]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        found = meeting.meanwhile(lambda: runs[0](batch()), works)
        assert "_FunctionBackward" in _autograd_nodes(model(batch()))
        assert found == (expected, [expected] * 3)
        for m in (model, other):
            assert [type(s) for s in m.modules()][1:] == classes[1:]
            assert gradients(m, batch()) == expected
            unit = m.__dict__["_fxckpt_unit"]
            assert unit._saving_parts(), "parts were taken for rewritten modules, and left out"
    assert [type(m) for m in base.modules()] == classes


def _autograd_nodes(result: Tensor) -> set[str]:
    """Names of the nodes of an autograd graph."""
    names, stack = set(), [result.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None:
            names.add(type(node).__name__)
            stack.extend(following for following, _ in node.next_functions)
    return names
