"""What the tests of memory that is not freed share."""

import gc
import linecache
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from helpers import (
    total,
)
from torch import Tensor, nn
from torch.fx import graph_module

from fxckpt import FallbackWarning


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
