"""Steps of a rewritten model leave no memory behind."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import (
    POLICIES,
    Function,
    LiveBytes,
    Stack,
    all_dispatched,
    seed_all,
    total,
)
from torch import Tensor, nn
from weighing import alive, assert_steady, batch, no_collector, quiet, step

import fxckpt
from fxckpt import CaptureError

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("others_frozen")]

# --- what a step leaves ---------------------------------------------------------------------------

Scenario = Callable[[nn.Module, Callable[[], int]], list[int]]


def _dropped(m: nn.Module, live: Callable[[], int]) -> list[int]:
    loss = total(m(batch()))
    del loss
    return [live()]


def _stepped(m: nn.Module, live: Callable[[], int]) -> list[int]:
    loss = total(m(batch()))
    loss.backward()
    m.zero_grad()
    seen = [live()]
    del loss
    return [*seen, live()]


def _retained(m: nn.Module, live: Callable[[], int]) -> list[int]:
    loss = total(m(batch()))
    loss.backward(retain_graph=True)
    loss.backward(retain_graph=True)
    m.zero_grad()
    seen = [live()]
    loss.backward()
    m.zero_grad()
    seen.append(live())
    del loss
    return [*seen, live()]


def _retained_and_dropped(m: nn.Module, live: Callable[[], int]) -> list[int]:
    loss = total(m(batch()))
    loss.backward(retain_graph=True)
    del loss
    m.zero_grad()
    return [live()]


def _in_part(m: nn.Module, live: Callable[[], int]) -> list[int]:
    x = batch().requires_grad_()
    loss = total(m(x))
    torch.autograd.grad(loss, [x, m.head.weight])
    seen = [live()]
    del loss, x
    return [*seen, live()]


def differentiated_twice(m: nn.Module, live: Callable[[], int]) -> list[int]:
    x = batch().requires_grad_()
    (grad,) = torch.autograd.grad(m(x).sum(), x, create_graph=True)
    grad.pow(2).sum().backward()
    m.zero_grad()
    del grad, x
    return [live()]


def _graph_of_a_gradient_dropped(m: nn.Module, live: Callable[[], int]) -> list[int]:
    x = batch().requires_grad_()
    (grad,) = torch.autograd.grad(m(x).sum(), x, create_graph=True)
    del grad, x
    return [live()]


def _result_kept(m: nn.Module, live: Callable[[], int]) -> list[int]:
    """As for logging."""
    out = m(batch())
    total(out).backward()
    m.zero_grad()
    return [live(), out.numel() * 0]


def _fed_back(m: nn.Module, live: Callable[[], int]) -> list[int]:
    """As in truncated backpropagation through time."""
    state = torch.zeros(2, 5, 8)
    for _ in range(4):
        out = m(batch() + state)
        total(out).backward()
        state = nn.functional.pad(out.detach(), (0, 5))
        m.zero_grad()
    return [live()]


def _hook_raises(m: nn.Module, live: Callable[[], int]) -> list[int]:
    def fail(grad: Tensor) -> None:
        raise KeyError("in a hook")

    loss = total(m(batch()))
    handle = m.blocks[0].norm1.weight.register_hook(fail)
    with pytest.raises(KeyError):
        loss.backward()
    handle.remove()
    del loss
    # What was queued behind the hook stays with the autograd engine until it runs again.
    torch.ones(1, requires_grad=True).exp().backward()
    m.zero_grad()
    return [live()]


def _changed_in_place(m: nn.Module, live: Callable[[], int]) -> list[int]:
    loss = total(m(batch()))
    with torch.no_grad():
        m.head.weight.add_(0)
        m.blocks[0].mlp[0].weight.add_(0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    del loss
    m.zero_grad()
    return [live()]


def _second_time(m: nn.Module, live: Callable[[], int]) -> list[int]:
    loss = total(m(batch()))
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    m.zero_grad()
    return [live()]


def bad_arguments(m: nn.Module, live: Callable[[], int]) -> list[int]:
    with pytest.raises(RuntimeError, match="normalized_shape"):
        m(torch.ones(2, 3, 7))
    return [live()]


SCENARIOS: dict[str, Scenario] = {
    f.__name__.strip("_"): f
    for f in (
        _dropped,
        _stepped,
        _retained,
        _retained_and_dropped,
        _in_part,
        differentiated_twice,
        _graph_of_a_gradient_dropped,
        _result_kept,
        _fed_back,
        _hook_raises,
        _changed_in_place,
        _second_time,
        bad_arguments,
    )
}


class Eager(Stack):
    """A stack that cannot be captured as a whole; its blocks can."""

    def __init__(self) -> None:
        super().__init__(1)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if float(y.detach().sum()) > -1e9 else x


@pytest.mark.parametrize("kind", ["captured", "by parts", "first call"])
@pytest.mark.parametrize("name", SCENARIOS)
def test_no_more_stays_than_in_eager(name: str, kind: str) -> None:
    """Bytes of all tensors that are made and still alive, with the collector off."""
    scenario = SCENARIOS[name]
    results = []
    for rewritten in (False, True):
        seed_all(0)
        model = Eager() if kind == "by parts" else Stack(1)
        if rewritten:
            model = fxckpt.rewrite(model, "nothing")
        with quiet():
            if kind != "first call":
                step(model)
            with no_collector(), all_dispatched(LiveBytes()) as memory:
                results.append(scenario(model, lambda m=memory: m.live))
    eager, ours = results
    assert all(a <= b for a, b in zip(ours, eager, strict=True)), f"{ours} bytes, eager {eager}"


@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_stays_for_any_policy(policy: str) -> None:
    model = fxckpt.rewrite(Stack(), policy, strict=True)
    step(model)
    for name in ("dropped", "stepped", "retained"):
        with no_collector(), all_dispatched(LiveBytes()) as memory:
            *_, after = SCENARIOS[name](model, lambda m=memory: m.live)
        assert after == 0


def test_the_measure_notices() -> None:
    """A leak is not lost on `LiveBytes`, nor on `census`."""
    model, kept = fxckpt.rewrite(Stack(1), "nothing", strict=True), []
    with no_collector(), all_dispatched(LiveBytes()) as memory:
        kept.append(total(model(batch())))
        assert memory.live > 1000
    with pytest.raises(AssertionError, match="grew in 2 rounds"):
        assert_steady(lambda: kept.append(torch.ones(1)))
    with pytest.raises(AssertionError, match=r"Node.*grew|grew.*Node"):
        assert_steady(lambda: kept.append(torch.fx.symbolic_trace(nn.Tanh())))


# --- inputs and results ---------------------------------------------------------------------------


def _raises(m: nn.Module, x: Tensor) -> Tensor:
    if m.bad:
        raise ValueError("the text")
    return x @ m.weight


def _backward_raises(m: nn.Module, x: Tensor) -> Tensor:
    return _Raises.apply(x @ m.weight)


class _Raises(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise ValueError("the text")


FORWARDS: dict[str, Callable[..., Tensor]] = {
    "captured": lambda m, x: (x @ m.weight).tanh(),
    "read": lambda m, x: (x @ m.weight) * float(x.detach().sum()),
    "guarded": lambda m, x: (x @ m.weight)[: int(m.length)],
    "no gradient": lambda m, x: (x @ m.weight).detach(),
    "raises": _raises,
    "backward raises": _backward_raises,
    "closed over": lambda m, x: (x @ m.weight) + _CONSTANT,
    "written": lambda m, x: m.seen.add_(x.detach().sum()) + x @ m.weight,
}
_CONSTANT = torch.ones(8)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("kind", FORWARDS)
def test_input_and_result_die_when_they_are_dropped(kind: str, again: bool) -> None:
    """At the first call, too: whether it is captured, or refused, or raises."""
    for rewritten in (False, True):
        model = Function(FORWARDS[kind], 8)
        model.register_buffer("length", torch.tensor(2))
        model.bad = kind == "raises"
        if rewritten:
            model = fxckpt.rewrite(model, "nothing")
        watched: list[Any] = []

        def call(m: nn.Module = model, watched: list[Any] = watched) -> None:
            x = torch.randn(3, 8, requires_grad=True)
            y = x * 2
            watched += [weakref.ref(x), weakref.ref(y), weakref.ref(y.untyped_storage())]
            try:
                out = m(y)
                watched.append(weakref.ref(out))
                if out.requires_grad:
                    total(out).backward()
            except ValueError:
                pass

        with quiet():
            if again:
                call()
            with no_collector():
                call()
                assert alive(watched) == 0, "rewritten" if rewritten else "eager"


def test_input_of_a_refused_call_dies() -> None:
    """With `strict`, when the error is dropped."""
    model = fxckpt.rewrite(Function(FORWARDS["read"], 8), "nothing", strict=True)
    x = torch.randn(3, 8)
    watched = weakref.ref(x)
    with no_collector():
        with pytest.raises(CaptureError):
            model(x)
        del x
        gc.collect()  # pytest's own record of the error is a cycle
        assert watched() is None


@pytest.mark.parametrize("how", ["example_inputs", "verify"])
def test_examples_die(how: str) -> None:
    x = batch()
    watched = weakref.ref(x)
    model = Stack(1)
    if how == "verify":
        fxckpt.verify(model, x, policy="nothing")
    else:
        model = fxckpt.rewrite(model, "nothing", example_inputs=(x,), strict=True)
    del x
    gc.collect()
    assert watched() is None
    assert all(p.grad is None for p in model.parameters())
