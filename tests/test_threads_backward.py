"""Backward in several threads, and in several processes."""

import copy
import multiprocessing
import os
import pickle
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import (
    Stack,
    assert_same_training,
    captures,
    chain,
    content,
    seed_all,
    total,
)
from threads import (
    _LONG,
    Meeting,
    batch,
    gradients,
    gradients_of,
    rows,
    stopping,
    together,
    training,
)
from torch import Tensor, nn

import fxckpt

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


@pytest.mark.slow
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


@pytest.mark.slow
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


forks = pytest.mark.filterwarnings("ignore:.*fork.*")  # Python's, and that of an imported JAX
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
