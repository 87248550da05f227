"""Rewritten models in several threads and processes.

Threads meet at events, not by chance: a function that a model calls waits in the middle of forward,
where it is captured, or of backward. It waits for a while only, since a lock of ours may keep the
other thread from coming: then the test goes on without the meeting, and has to pass as well.
"""

import contextlib
import copy
import multiprocessing
import os
import pickle
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    Function,
    Stack,
    assert_same_training,
    captures,
    chain,
    content,
    is_fake,
    joint_of,
    seed_all,
    tensors_in,
    total,
)
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

import fxckpt
from fxckpt import FallbackWarning

_PATIENCE = 0.5  # seconds that a thread waits for a meeting that a lock may prevent
_LONG = 60.0  # seconds until a test is given up


def batch(length: int = 5) -> Tensor:
    return torch.linspace(-1, 1, 2 * length * 8).view(2, length, 8).sin()


def rows(count: int = 3) -> Tensor:
    return torch.linspace(-1, 2, 4 * count).view(count, 4).cos()


Gradients = Callable[..., list[Any]]


def gradients_of(model: nn.Module) -> Gradients:
    """Computes result and gradients, for an input and a loss, without touching `.grad`.

    The parameters are looked up now: in threads, the modules may be in the middle of a capture.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]

    def compute(x: Tensor, loss: Callable[[Any], Tensor] = total) -> list[Any]:
        out = model(x)
        grads = torch.autograd.grad(loss(out), parameters, allow_unused=True)
        assert not any(map(is_fake, (*tensors_in(out), *tensors_in(grads))))
        return [content(t) for t in (*tensors_in(out), *grads)]

    return compute


def gradients(model: nn.Module, *args: Any) -> list[Any]:
    """The same at once."""
    return gradients_of(model)(*args)


def training(model: nn.Module, lengths: tuple[int, ...] = (5, 7), count: int = 3) -> list[Any]:
    """Some steps of training; everything that came of it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = []
    for number in range(count):
        for length in lengths:
            out = model(batch(length) * (number + 1))
            optimizer.zero_grad()
            total(out).backward()
            optimizer.step()
            found.append(content(out))
    return found + [content(p) for p in model.parameters()]


@contextlib.contextmanager
def switching() -> Iterator[None]:
    """Python changes threads as often as it can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def together(*functions: Callable[[], Any]) -> list[Any]:
    """Runs functions in threads that start at once; their results, or the first error."""
    barrier = threading.Barrier(len(functions))
    results: list[Any] = [None] * len(functions)
    errors: list[BaseException] = []

    def run(i: int, function: Callable[[], Any]) -> None:
        try:
            barrier.wait(_LONG)
            results[i] = function()
        except BaseException as error:
            errors.append(error)

    threads = [
        threading.Thread(target=run, args=pair, daemon=True) for pair in enumerate(functions)
    ]
    with switching():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(_LONG)
    assert not any(t.is_alive() for t in threads), "a thread hangs"
    if errors:
        raise errors[0]
    return results


class Meeting:
    """Where a thread stops in the middle of something until another has done what it wants."""

    def __init__(self) -> None:
        self._here, self._done = threading.Event(), threading.Event()
        self.thread: int | None = None  # the one that stops; the first that comes, if None

    def __call__(self) -> None:
        """Called in the middle: stops the first time."""
        if self.thread not in (None, threading.get_ident()) or self._here.is_set():
            return
        self._here.set()
        self._done.wait(_PATIENCE)

    def meanwhile(self, stops: Callable[[], Any], works: Callable[[], Any]) -> tuple[Any, Any]:
        """Runs `works` while `stops` stands at the meeting."""

        def first() -> Any:
            self.thread = threading.get_ident()
            return stops()

        def second() -> Any:
            assert self._here.wait(_LONG), "nobody came to the meeting"
            try:
                return works()
            finally:
                self._done.set()

        a, b = together(first, second)
        return a, b


def stopping(model: nn.Module, meeting: Meeting) -> nn.Module:
    """Around a model: stops at the meeting in the middle of forward, that is while captured."""

    def forward(m: Function, x: Tensor) -> Tensor:
        meeting()
        return m.inner(x)

    outer = Function(forward)
    outer.inner = model
    outer.weight.requires_grad_(False)
    return outer


def assert_nothing_left() -> None:
    """What a capture disguises for a while is as it was."""
    import_utils = sys.modules["transformers.utils.import_utils"]
    assert import_utils.is_fake_tensor.__module__ == "transformers.utils.import_utils"
    assert not nn_module._global_forward_hooks
    assert not nn_module._global_forward_pre_hooks
    assert not torch.is_anomaly_enabled()
    assert torch.is_grad_enabled()
    assert not fxckpt.capture.is_capturing()


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    yield
    assert_nothing_left()


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
    found = together(*(lambda m=m: [gradients(m, batch(n)) for n in (5, 6, 7)] for m in models * 2))
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


# --- backward -------------------------------------------------------------------------------------


class Several(nn.Module):
    """Returns several tensors, so that backward comes in many patterns."""

    def __init__(self, between: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self.body, self.between = Stack(1, dropout=0.0), between

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = _Stops.apply(self.body(x), self.between)
        return y.sum(), y, y.sin(), y.transpose(0, 1).contiguous()


class _Stops(torch.autograd.Function):
    """The identity, with something to do in the middle of backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, between: Callable[[], None]) -> Tensor:
        ctx.between = between
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        ctx.between()
        return grad.clone(), None


PATTERNS: list[Callable[[Any], Tensor]] = [
    lambda out: out[0],
    lambda out: out[1].pow(2).sum(),
    lambda out: out[0] + out[2].pow(2).sum(),
    lambda out: out[3].sum(),
    lambda out: out[1].exp().sum() + out[3].pow(2).sum(),
]


def test_new_patterns_of_gradients_in_two_threads() -> None:
    """Each makes another backward graph of the same captured forward."""
    base = Several()
    expected = [gradients(base, batch(), p) for p in PATTERNS]
    model = fxckpt.rewrite(base, "nothing", strict=True)
    gradients(model, batch(), PATTERNS[0])
    orders, run = ((1, 2, 3, 4), (4, 3, 2, 1), (2, 4, 1, 3)), gradients_of(model)
    found = together(*(lambda o=o: [run(batch(), PATTERNS[i]) for i in o] for o in orders))
    for order, results in zip(orders, found, strict=True):
        assert results == [expected[i] for i in order]
    assert len(captures(model)) == 1


def test_backward_is_derived_while_another_is() -> None:
    meeting = Meeting()
    base = Several(meeting)
    meeting.thread = -1
    expected = [gradients(base, batch(), p) for p in PATTERNS]
    model = fxckpt.rewrite(base, "nothing", strict=True)
    run = gradients_of(model)
    run(batch(), PATTERNS[0])
    found = meeting.meanwhile(
        lambda: run(batch(), PATTERNS[1]), lambda: [run(batch(), p) for p in PATTERNS]
    )
    assert found == (expected[1], expected)


def test_forward_is_captured_while_a_backward_is_derived() -> None:
    meeting = Meeting()
    base = Several(meeting)
    meeting.thread = -1
    expected = gradients(base, batch(), PATTERNS[1]), gradients(base, batch(7))
    model = fxckpt.rewrite(base, "nothing", strict=True)
    run = gradients_of(model)
    run(batch(), PATTERNS[0])
    found = meeting.meanwhile(lambda: run(batch(), PATTERNS[1]), lambda: run(batch(7)))
    assert found == expected


@pytest.mark.parametrize("captured_by", ["main", "forward", "backward"])
def test_forward_and_backward_in_different_threads(captured_by: str) -> None:
    """With dropout and autocast, whose states belong to threads or to all."""
    base = Stack(1, dropout=0.3)

    def run(model: nn.Module) -> list[Any]:
        if captured_by == "main":
            total(model(batch())).backward()
        losses: list[Tensor] = []

        def forward() -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=captured_by == "forward"):
                losses.append(total(model(batch())))

        together(forward)
        torch.manual_seed(7)
        together(lambda: losses[0].backward(retain_graph=True))
        together(lambda: losses[0].backward())
        return [content(p.grad) for p in model.parameters()] + [content(torch.get_rng_state())]

    results = []
    for rewritten in (False, True):
        model = copy.deepcopy(base)
        if rewritten:
            model = fxckpt.rewrite(model, "nothing", strict=True)
        seed_all(0)
        results.append(run(model))
    assert results[0] == results[1]
    assert captures(model)


def test_double_backward_in_another_thread() -> None:
    """Which runs the original forward again, in the modes of the call."""
    base = chain(2, 4)

    def run(model: nn.Module) -> Any:
        x = rows().requires_grad_()
        out = model(x)
        grads: list[Tensor] = []

        def penalty() -> None:
            (grad,) = torch.autograd.grad(out.sum(), x, create_graph=True)
            grad.pow(2).sum().backward()
            grads.append(grad.detach())

        together(penalty)
        return [content(t) for t in (*grads, *(p.grad for p in model.parameters()))]

    expected = run(copy.deepcopy(base))
    assert run(fxckpt.rewrite(base, "nothing", strict=True)) == expected


def test_autograd_of_several_threads_sums_into_the_same_parameters() -> None:
    """As in Hogwild training: every contribution arrives, whatever the order."""
    base = chain(2, 4)
    model = fxckpt.rewrite(base, "nothing", strict=True)
    with torch.no_grad():
        for p in base.parameters():
            p.copy_((p * 8).round() / 8)
    for p in base.parameters():
        p.grad = torch.zeros_like(p)
    barrier = threading.Barrier(3)

    def run() -> None:
        barrier.wait(_LONG)
        for _ in range(5):
            model(rows()).sum().backward()

    together(run, run, run)
    expected = torch.autograd.grad(base(rows()).sum(), list(base.parameters()))
    for p, grad in zip(base.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, 15 * grad)


# --- processes ------------------------------------------------------------------------------------


def in_child(function: Callable[[], Any]) -> Any:
    """What a function returns in a forked process; it is killed if it hangs."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        status = 1
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(int(_LONG) // 2)
            warnings.simplefilter("ignore")
            with os.fdopen(writing, "wb") as file:
                pickle.dump(function(), file)
            status = 0
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading, "rb") as file:
        data = file.read()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status == 0, f"the child ended with {status}" + (": it hung" if status == -14 else "")
    return pickle.loads(data)


forks = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
pytestmark = forks


def test_forked_before_and_after_the_first_call() -> None:
    base = Stack(1, dropout=0.2)

    def run(model: nn.Module) -> list[Any]:
        seed_all(1)
        return training(copy.deepcopy(model), count=2)

    expected = run(base)
    model = fxckpt.rewrite(base, "nothing", strict=True)

    def child() -> tuple[Any, int]:
        return run(model), len(captures(model))

    assert in_child(child) == (expected, 0)
    gradients(model, batch())
    before = captures(model)
    seed_all(2)
    here = gradients(model, batch())

    def again() -> tuple[Any, Any, bool]:
        seed_all(2)
        found = gradients(model, batch())
        return found, gradients(model, batch(6))[0][0], captures(model)[:1] == before

    assert in_child(again) == (here, (2, 6, 3), True)
    assert captures(model) == before, "what the child captures is its own"
    assert run(model) == expected


def test_backward_in_a_child_of_a_graph_of_the_parent() -> None:
    base = Stack(1, dropout=0.2)

    def run(model: nn.Module) -> tuple[Any, Any]:
        seed_all(3)
        loss = total(model(batch()))

        def backward() -> list[Any]:
            loss.backward()
            return [content(p.grad) for p in model.parameters()]

        there = in_child(backward)
        assert all(p.grad is None for p in model.parameters())
        return there, backward()

    expected = run(copy.deepcopy(base))
    assert run(fxckpt.rewrite(base, "nothing", strict=True)) == expected
    assert expected[0] == expected[1]


def test_shared_memory_is_trained_by_children() -> None:
    """As in Hogwild training: the parent sees what the children did, and goes on."""

    def run(model: nn.Module) -> list[Any]:
        model.share_memory()
        for length in (5, 6):
            in_child(lambda n=length: len(training(model, (n,), 1)))
        return training(model, count=1)

    base = Stack(1, dropout=0.0)
    expected = run(copy.deepcopy(base))
    model = fxckpt.rewrite(base, "nothing", strict=True)
    gradients(model, batch())
    assert run(model) == expected


@pytest.mark.parametrize("child_runs", ["another model", "the same model", "original"])
def test_forked_while_another_thread_captures(child_runs: str) -> None:
    """The child has no such thread: it finds no lock held, no fakes and no hooks."""
    base, meeting = chain(2, 4), Meeting()
    expected = gradients(base, rows())
    slow = fxckpt.rewrite(stopping(base, meeting), "nothing", strict=True)
    other = fxckpt.rewrite(copy.deepcopy(base), "nothing", strict=True)
    model = {"another model": other, "the same model": slow, "original": base}[child_runs]

    found, there = meeting.meanwhile(
        lambda: gradients(slow, rows()), lambda: in_child(lambda: gradients(model, rows()))
    )
    assert found == expected
    assert there == expected


def _in_spawned_child(data: bytes, connection: Any) -> None:
    torch.set_num_threads(1)
    model = pickle.loads(data)
    rewritten = fxckpt.is_rewritten(model)
    seed_all(4)
    eager = training(copy.deepcopy(model), count=1)
    seed_all(4)
    ours = training(fxckpt.rewrite(model, "nothing", strict=True), count=1)
    connection.send((rewritten, eager, ours))


def test_spawned() -> None:
    """A model is sent as its original class, and can be rewritten there."""
    model = fxckpt.rewrite(Stack(1, dropout=0.2), "nothing", strict=True)
    gradients(model, batch())
    seed_all(4)
    expected = training(copy.deepcopy(model), count=1)
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_in_spawned_child, args=(pickle.dumps(model), sending))
    process.start()
    sending.close()
    assert receiving.poll(_LONG)
    assert receiving.recv() == (False, expected, expected)
    process.join(_LONG)
    assert process.exitcode == 0


class Numbers(torch.utils.data.Dataset):
    """Random numbers of all generators, drawn by the workers."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> Tensor:
        return torch.randn(5, 8) + random.random() + i


@pytest.mark.parametrize("workers", [0, 2])
def test_data_loader(workers: int) -> None:
    """Its workers are forked while the model trains; the order and the seeds are those of eager."""

    def run(model: nn.Module) -> list[Any]:
        seed_all(5)
        loader = torch.utils.data.DataLoader(
            Numbers(), batch_size=2, shuffle=True, num_workers=workers
        )
        found = []
        for _ in range(2):
            for x in loader:
                total(model(x)).backward()
                found.append(content(x))
        return [*found, *(content(p.grad) for p in model.parameters()), torch.rand(2).tolist()]

    base = Stack(1, dropout=0.2)
    expected = run(copy.deepcopy(base))
    assert run(fxckpt.rewrite(base, "nothing", strict=True)) == expected


def test_data_loader_that_prepares_batches_by_a_model() -> None:
    """A rewritten model runs within the workers, and another one outside."""
    features = fxckpt.rewrite(chain(1, 4), "nothing", strict=True)

    def prepare(items: list[Tensor]) -> Tensor:
        x = torch.stack(items)
        (grad,) = torch.autograd.grad(total(features(x)), features[0].weight)
        return x @ grad

    def run(model: nn.Module, collate: Callable[..., Tensor]) -> list[Any]:
        loader = torch.utils.data.DataLoader(
            [rows()[i % 3] * i for i in range(6)], batch_size=3, num_workers=1, collate_fn=collate
        )
        return [gradients(model, x) for x in loader]

    base = chain(2, 4)
    model = fxckpt.rewrite(base, "nothing", strict=True)
    found = run(model, prepare)
    fxckpt.restore_(features)
    assert found == run(base, prepare)
    assert captures(model)


def test_nothing_is_shared_between_models() -> None:
    """Two models of one class, captured in two threads, one dropped: the other is not affected."""
    models = [fxckpt.rewrite(Stack(1, dropout=0.0), "nothing", strict=True) for _ in range(2)]
    together(*(lambda m=m: gradients(m, batch()) for m in models))
    first, second = (captures(m)[0] for m in models)
    assert first is not second
    assert first.tape is not second.tape
    del first, second
    expected = gradients(fxckpt.restore_(copy.deepcopy(models[1])), batch())
    models.pop(0)
    assert gradients(models[0], batch()) == expected
    assert_same_training(lambda: Stack(1, dropout=0.0), lambda i: (batch(),))
