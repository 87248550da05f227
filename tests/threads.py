"""What the tests of threads and processes share."""

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import (
    Function,
    content,
    is_fake,
    tensors_in,
    total,
)
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

import fxckpt

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
