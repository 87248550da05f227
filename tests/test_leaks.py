"""Nothing outlives its use: activations, inputs, graphs, models.

Most tests switch the cyclic garbage collector off: eager PyTorch frees activations and parameters
as soon as the last reference goes, and so must a rewritten model, or a training step needs the
memory of several. Host memory (graphs, fake tensors) may wait for the collector, but not grow.
"""

import copy
import gc
import linecache
import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    POLICIES,
    Function,
    LiveBytes,
    Stack,
    all_dispatched,
    captures,
    chain,
    seed_all,
    total,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import graph_module

import fxckpt
from fxckpt import CaptureError, FallbackWarning


@pytest.fixture(scope="module", autouse=True)
def _others_frozen() -> Iterator[None]:
    """The collector and the census pass over what there was before: collecting takes no time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def batch(length: int = 5) -> Tensor:
    return torch.linspace(-1, 1, 2 * length * 8).view(2, length, 8).sin()


def step(model: nn.Module, *args: Tensor) -> None:
    """Forward, backward, and no gradients left."""
    total(model(*(args or (batch(),)))).backward()
    model.zero_grad()


@contextmanager
def no_collector() -> Iterator[None]:
    """Reference cycles stay while active."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.collect()


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        yield


def alive(references: list[Any]) -> int:
    """How many weak references are."""
    return sum(reference() is not None for reference in references)


def census() -> Counter[str]:
    """Live objects of the classes of fxckpt, torch.fx and fake tensors, tensors, and all classes.

    Also the entries of what Python and torch keep of generated code.
    """
    gc.collect()
    gc.collect()
    found: Counter[str] = Counter()
    for thing in gc.get_objects():
        cls = type(thing)
        module = getattr(cls, "__module__", None)
        if issubclass(cls, type):
            found["classes"] += 1
        elif issubclass(cls, Tensor):
            found[cls.__name__] += 1
        elif isinstance(module, str) and module.startswith(("fxckpt.", "torch.fx.", "torch._sub")):
            found[f"{module}.{cls.__qualname__}"] += 1
    found["texts of generated code"] = len(graph_module._loader.eval_cache)
    found["lines of generated code"] = sum(key.startswith("<eval_with") for key in linecache.cache)
    return found


def assert_steady(work: Callable[[], Any], rounds: int = 2) -> None:
    """After a first time, doing something again and again adds no object of the `census`."""
    work()
    before = census()
    for _ in range(rounds):
        work()
    more = {k: (before[k], n) for k, n in census().items() if n > before[k]}
    assert not more, f"grew in {rounds} rounds: {more}"


def resident() -> int:
    """Bytes of this process that are in memory."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


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


def _differentiated_twice(m: nn.Module, live: Callable[[], int]) -> list[int]:
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


def _bad_arguments(m: nn.Module, live: Callable[[], int]) -> list[int]:
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
        _differentiated_twice,
        _graph_of_a_gradient_dropped,
        _result_kept,
        _fed_back,
        _hook_raises,
        _changed_in_place,
        _second_time,
        _bad_arguments,
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


# --- models ---------------------------------------------------------------------------------------

USES: dict[str, Callable[[nn.Module], Any]] = {
    "never called": lambda m: None,
    "called": step,
    "two shapes": lambda m: (step(m), step(m, batch(7))),
    "forward only": lambda m: m(batch()),
    "eval": lambda m: m.eval()(batch()),
    "double backward": lambda m: _differentiated_twice(m, lambda: 0),
    "graphs": lambda m: (step(m), fxckpt.graphs(m)),
    "copied": lambda m: (step(m), copy.deepcopy(m)),
    "verified": lambda m: fxckpt.verify(m, batch()),
    "rewritten again": lambda m: (step(m), step(fxckpt.rewrite_(m, "dots"))),
    "restored": lambda m: (step(m), fxckpt.restore_(m)),
    "raised": lambda m: _bad_arguments(m, lambda: 0),
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
