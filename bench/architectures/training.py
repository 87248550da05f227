"""Training and evaluation of an architecture, bit by bit, and the bytes that a step keeps."""

import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else each profile prints two lines,
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # and warns of blocks that are older than it

import torch
from torch import Tensor, nn
from torch.autograd.profiler import profile

from bench.architectures.case import Architecture

STEPS = 2
SEED = 1
Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Training:
    """Two steps of one model, and a call in evaluation mode.

    Attributes:
        record: everything that can be seen of them from outside.
        first_call: seconds of the first forward and backward.
        saved: bytes that a further step allocates in forward and keeps until backward.
    """

    record: Record
    first_call: float
    saved: int


def train(
    architecture: Architecture,
    install: Callable[[nn.Module], nn.Module] = lambda model: model,
    *,
    measured: bool = True,
) -> Training:
    """Trains a fresh model with AdamW.

    Args:
        architecture: makes model and batches; equal at each call.
        install: what is trained instead of the model.
        measured: whether to find out `Training.saved`, which takes two more steps.

    Example:
        >>> linear = lambda: nn.Linear(2, 2)
        >>> batch = lambda step: ((torch.full((1, 2), float(step)),), {})
        >>> train(Architecture("linear", "example", linear, batch)).record["step 1: loss"] is None
        False
    """
    seed_all(0)
    model = install(architecture.make())
    updater = architecture.optimizer([p for p in model.parameters() if p.requires_grad])
    record: Record = {}
    first_call = 0.0
    seed_all(SEED)
    for number in range(STEPS):
        model.zero_grad()
        started = time.perf_counter()
        output, loss = forward(architecture, model, number)
        loss.backward()
        first_call = first_call or time.perf_counter() - started
        seen = [*_of_output(output), ("loss", content(loss)), *_of_model(model)]
        updater.step()
        seen += [(f"parameter {name}", content(p)) for name, p in model.named_parameters()]
        seen.append(("random states", random_states()))
        record.update((f"step {number}: {name}", value) for name, value in seen)
    saved = _saved_bytes(architecture, model) if measured else 0
    record.update(_evaluation(architecture, model))
    return Training(record, first_call, saved)


def forward(architecture: Architecture, model: nn.Module, number: int) -> tuple[Any, Tensor]:
    """Output and loss of a model on the batch of step `number`."""
    args, kwargs = architecture.batch(number)
    output = model(*args, **kwargs)
    return output, architecture.loss(output)


def _evaluation(architecture: Architecture, model: nn.Module) -> Iterator[tuple[str, Any]]:
    """What the trained model does in evaluation mode; an exception is a result, too."""
    args, kwargs = architecture.batch(0)
    try:
        with torch.no_grad():
            output = model.eval()(*args, **kwargs)
    except Exception as error:
        yield "evaluation", f"{type(error).__name__}: {error}"
    else:
        yield from ((f"evaluation: {name}", value) for name, value in _of_output(output))


def _of_output(output: Any) -> Iterator[tuple[str, Any]]:
    for name, tensor in leaves(output):
        yield f"output{name}", (*content(tensor), tensor.requires_grad)


def _of_model(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, parameter in model.named_parameters():
        yield f"gradient of {name}", content(parameter.grad)
    for name, buffer in model.named_buffers():
        yield f"buffer {name}", content(buffer)


def _saved_bytes(architecture: Architecture, model: nn.Module) -> int:
    """What lives after forward and loss and did not before, with the output dropped."""
    for measured in (False, True):  # the first one captures, if it is the first of its kind
        model.zero_grad()
        seed_all(SEED)
        args, kwargs = architecture.batch(0)
        with profile(enabled=measured, profile_memory=True) as profiler:
            output = model(*args, **kwargs)
            loss = architecture.loss(output)
            del output
        loss.backward()
        del loss
    events = profiler.kineto_results.events()
    return sum(event.nbytes() for event in events if event.name() == "[memory]")


def differences(expected: Record, got: Record) -> list[str]:
    """Names of the entries that are not equal bit by bit, in the order in which they arise."""
    names = [*expected, *(name for name in got if name not in expected)]
    return [n for n in names if (n in expected) != (n in got) or expected[n] != got[n]]


def content(tensor: Tensor | None) -> Any:
    """Shape, strides, dtype and bytes of a tensor; None stays None."""
    if tensor is None:
        return None
    if tensor.layout is not torch.strided:
        return repr(tensor)
    raw = tensor.detach().resolve_conj().resolve_neg().contiguous().flatten().view(torch.uint8)
    return tuple(tensor.shape), tensor.stride(), tensor.dtype, raw.numpy().tobytes()


def leaves(tree: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """The tensors in containers and plain objects (caches, outputs), by the path to them."""
    if isinstance(tree, Tensor):
        yield name, tree
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from leaves(value, f"{name}[{key!r}]", depth)
    elif isinstance(tree, (list, tuple)):
        for i, value in enumerate(tree):
            yield from leaves(value, f"{name}[{i}]", depth)
    elif depth < 4 and hasattr(tree, "__dict__") and not isinstance(tree, (type, nn.Module)):
        for key, value in vars(tree).items():
            yield from leaves(value, f"{name}.{key}", depth + 1)


def seed_all(seed: int) -> None:
    """Seeds every generator."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def random_states() -> tuple[Any, ...]:
    """The states of every generator, comparable."""
    name, keys, *rest = np.random.get_state()
    return random.getstate(), name, keys.tobytes(), rest, torch.get_rng_state().numpy().tobytes()
