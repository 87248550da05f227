"""Rewritten models and what was captured of them are freed."""

import copy
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import (
    Function,
    Stack,
    captures,
    chain,
    total,
)
from test_leaks_of_steps import FORWARDS, Eager, bad_arguments, differentiated_twice
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from weighing import (
    alive,
    assert_steady,
    batch,
    no_collector,
    quiet,
    resident,
    step,
)

import fxckpt

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("others_frozen")]

# --- models ---------------------------------------------------------------------------------------

USES: dict[str, Callable[[nn.Module], Any]] = {
    "never called": lambda m: None,
    "called": step,
    "two shapes": lambda m: (step(m), step(m, batch(7))),
    "forward only": lambda m: m(batch()),
    "eval": lambda m: m.eval()(batch()),
    "double backward": lambda m: differentiated_twice(m, lambda: 0),
    "graphs": lambda m: (step(m), fxckpt.graphs(m)),
    "copied": lambda m: (step(m), copy.deepcopy(m)),
    "verified": lambda m: fxckpt.verify(m, batch()),
    "rewritten again": lambda m: (step(m), step(fxckpt.rewrite_(m, "dots"))),
    "restored": lambda m: (step(m), fxckpt.restore_(m)),
    "raised": lambda m: bad_arguments(m, lambda: 0),
    "tensor attribute": lambda m: (setattr(m, "table", torch.ones(3)), step(m)),
}


@pytest.mark.parametrize("rewrite", [fxckpt.rewrite, fxckpt.rewrite_])
@pytest.mark.parametrize("use", USES)
def test_model_is_freed_at_once(use: str, rewrite) -> None:
    """As in eager: with the last reference, not when the collector runs."""
    model = rewrite(Stack(1), "nothing")
    with quiet():
        USES[use](model)
    gc.collect()
    watched = [weakref.ref(model), *(weakref.ref(m) for m in model.children())]
    watched += [weakref.ref(p) for p in model.parameters()]
    with no_collector():
        del model
        assert alive(watched) == 0


def test_model_that_fell_back_is_freed_at_once() -> None:
    model = fxckpt.rewrite(Eager(), "nothing")
    with quiet():
        step(model)
        step(model)
    watched = [weakref.ref(model), *(weakref.ref(p) for p in model.parameters())]
    with no_collector():
        del model
        assert alive(watched) == 0


def test_eager_model_is_freed_at_once() -> None:
    """What the tests above compare with."""
    model = Stack(1)
    step(model)
    watched = [weakref.ref(model), *(weakref.ref(p) for p in model.parameters())]
    with no_collector():
        del model
        assert alive(watched) == 0


def test_parts_of_a_model_are_freed_at_once() -> None:
    """Layers that are replaced or removed, as when a model grows or is pruned."""
    model = fxckpt.rewrite(Stack(3), "nothing", strict=True)
    step(model)
    watched = [weakref.ref(p) for p in model.blocks[2].parameters()]
    del model.blocks[2]
    step(model)
    gc.collect()
    assert alive(watched) == 0
    old = weakref.ref(model.head.weight)
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    step(model)
    gc.collect()
    assert old() is None


def test_graphs_do_not_keep_the_model() -> None:
    model = fxckpt.rewrite(Stack(1), "nothing", strict=True)
    step(model)
    graphs = fxckpt.graphs(model)
    watched = [weakref.ref(p) for p in model.parameters()]
    del model
    gc.collect()
    assert alive(watched) == 0
    assert "mm" in graphs[1].code


def test_model_of_a_thread_that_ended() -> None:
    watched: list[Any] = []

    def run() -> None:
        model = fxckpt.rewrite(Stack(1), "nothing", strict=True)
        step(model)
        watched.extend(weakref.ref(p) for p in model.parameters())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    gc.collect()
    assert alive(watched) == 0


def test_local_classes_are_freed() -> None:
    """And with them the classes of their rewritten modules."""
    watched = []
    for _ in range(3):

        class Local(Stack):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x).tanh()

        model = fxckpt.rewrite(Local(), "nothing", strict=True)
        step(model)
        watched += [weakref.ref(Local), weakref.ref(type(model))]
        del Local, model
    gc.collect()
    gc.collect()  # a class of ours goes first
    assert alive(watched) == 0


# --- what was captured ----------------------------------------------------------------------------


def test_steps_with_alternating_shapes_hold_steady() -> None:
    """A thousand steps of twenty shapes: the same objects after as before, the same memory."""
    model = fxckpt.rewrite(chain(1, 8), "nothing", strict=True)

    def work(steps: int = 20) -> None:
        for number in range(steps):
            step(model, batch(3 + number % 20))

    work()
    assert_steady(work, rounds=3)
    before = resident()
    work(1000)
    gc.collect()
    assert resident() - before < 2 << 20
    assert len(captures(model)) == 20


def test_captures_that_are_evicted_leave_nothing() -> None:
    """More shapes than the cache holds: each call captures, and as much is freed."""
    model = fxckpt.rewrite(chain(1, 8), "nothing", strict=True, cache_size=3)

    def work() -> None:
        for number in range(6):
            step(model, batch(3 + number))

    assert_steady(work)
    assert len(captures(model)) == 3


def test_evicted_captures_die() -> None:
    model = fxckpt.rewrite(chain(1, 8), "nothing", strict=True, cache_size=2)
    step(model, batch(3))
    old = captures(model)[0]
    graphs = fxckpt.graphs(model)
    watched = [weakref.ref(old), *map(weakref.ref, graphs), *(weakref.ref(g.graph) for g in graphs)]
    watched += [weakref.ref(type(g)) for g in graphs]
    del old, graphs
    step(model, batch(4))
    gc.collect()
    assert alive(watched) == len(watched)
    step(model, batch(5))
    gc.collect()
    assert alive(watched) == 0


def test_evicted_capture_lives_until_its_backward_is_done() -> None:
    model = fxckpt.rewrite(chain(1, 8), "nothing", strict=True, cache_size=1)
    loss = total(model(batch(3)))
    watched = [weakref.ref(captures(model)[0])]
    step(model, batch(4))
    gc.collect()
    assert alive(watched) == 1
    loss.backward()
    gc.collect()
    assert alive(watched) == 0


def test_failures_are_evicted_too() -> None:
    """A model that falls back, at shapes that never come again."""
    model = fxckpt.rewrite(Function(FORWARDS["read"], 8), "nothing", cache_size=4)

    def work() -> None:
        for number in range(12):
            step(model, torch.ones(3 + number, 8))

    with quiet():
        assert_steady(work)


def test_falling_back_by_parts_holds_steady() -> None:
    model = fxckpt.rewrite(Eager(), "nothing", cache_size=2)

    def work() -> None:
        for number in range(3):
            step(model, batch(3 + number))

    with quiet():
        assert_steady(work)


def test_errors_hold_steady() -> None:
    model = fxckpt.rewrite(Function(FORWARDS["raises"], 8), "nothing")
    model.bad = True

    def work() -> None:
        for _ in range(3):
            with pytest.raises(ValueError, match="the text"):
                model(torch.ones(3, 8))

    assert_steady(work)


def test_patterns_of_gradients_hold_steady() -> None:
    """Once all graphs are made: forward for one pattern, backward for another, of each two."""
    model = fxckpt.rewrite(Function(lambda m, x: (x @ m.weight, m.weight.sin())), "dots")

    def work() -> None:
        for chosen in ([0], [0, 1], [1], [0]):
            out = model(torch.ones(3, 4))
            sum(out[i].pow(2).sum() for i in chosen).backward()
            model.zero_grad()

    for _ in range(3):
        work()
    assert_steady(work, rounds=3)


def test_rewriting_again_and_again_holds_steady() -> None:
    model = chain(1, 8)

    def work() -> None:
        for policy in ("nothing", "dots"):
            step(fxckpt.rewrite_(model, policy, strict=True))
        step(fxckpt.rewrite(model, "everything", strict=True))
        step(copy.deepcopy(model))
        fxckpt.restore_(model)

    assert_steady(work)


@pytest.mark.parametrize("kind", ["number", "text", "object", "container", "in a container"])
def test_attributes_that_change_hold_steady(kind: str) -> None:
    """A training loop that keeps its state on the model: old values die."""

    class Value:
        """What can be watched."""

        def __init__(self) -> None:
            self.tensor = torch.ones(100)

    model = fxckpt.rewrite_(chain(1, 8), "nothing", strict=True, cache_size=3)
    model.history = {"latest": None}
    watched: list[Any] = []
    numbers = iter(range(1000))

    def work() -> None:
        for _ in range(4):
            value, number = Value(), next(numbers)
            watched.append(weakref.ref(value))
            if kind == "in a container":
                model.history["latest"] = value
            else:
                values = {"number": number, "text": f"step {number}", "object": value}
                model.state = values.get(kind, {"activations": value})
            del value
            step(model)

    assert_steady(work, rounds=1)
    assert alive(watched) <= 3, "as many as there are signatures"


def test_fake_results_are_cached_once() -> None:
    """The cache of torch is global and unbounded: it knows operations and shapes, not models."""

    def work() -> None:
        step(fxckpt.rewrite(Stack(1), "nothing", strict=True))

    work()
    before = len(FakeTensorMode.cache)
    work()
    assert len(FakeTensorMode.cache) == before
