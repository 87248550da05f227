"""One training step of a model that leaves the model as it was, to look at what happens in it."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from fxckpt import ops, tree
from fxckpt.meter import metered

_WARM_UP = 2  # a first call keeps more, and the second one is confirmed


def backward(results: list[torch.Tensor]) -> None:
    """A backward like that of a loss: of the scalars in the result, else of everything."""
    unique = list({id(t): t for t in results if t.requires_grad}.values())
    scalars = [t for t in unique if t.dim() == 0]
    chosen = scalars or unique
    if chosen:
        torch.autograd.backward(chosen, [torch.ones_like(t) for t in chosen])


def devices(model: nn.Module) -> list[torch.device]:
    """The devices of a model that are there, and the CPU."""
    found = {t.device for t in (*model.parameters(), *model.buffers())}
    there = {d for d in found if d.type == "cpu" or torch.get_device_module(d).is_available()}
    return sorted(there | {torch.device("cpu")}, key=str)


@contextlib.contextmanager
def same_random_states(model: nn.Module) -> Iterator[None]:
    """Restores the states of all random generators afterwards."""
    states = [(ops.generator(d), ops.generator(d).get_state()) for d in devices(model)]
    python, numpy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)
        random.setstate(python)
        np.random.set_state(numpy)


@contextlib.contextmanager
def undone(model: nn.Module) -> Iterator[None]:
    """Restores gradients, buffers and random states afterwards."""
    grads = [(p, p.grad) for p in model.parameters()]
    buffers = [(b, b.clone()) for b in model.buffers()]
    for p, _ in grads:
        p.grad = None
    try:
        with same_random_states(model):
            yield
    finally:
        for p, grad in grads:
            p.grad = grad
        with torch.no_grad():
            for b, contents in buffers:
                b.copy_(contents)


def measured_peak(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """The most bytes that a step allocates above what is there before it, by running three.

    See `meter`. The model is left as it was.
    """
    (device, *_) = (*(t.device for t in model.parameters()), torch.device("cpu"))
    with undone(model):
        inputs, spec = tree.flatten((args, kwargs), open_objects=True)
        fresh = [t.detach().clone().requires_grad_(t.requires_grad) for t in inputs]
        call_args, call_kwargs = tree.unflatten(spec, fresh)

        def step() -> None:
            with torch.enable_grad():
                results, _ = tree.flatten(model(*call_args, **call_kwargs))
            backward(results)

        for _ in range(_WARM_UP):
            step()
            _without_gradients(model, fresh)
        with metered(device) as meter:
            step()
        _without_gradients(model, fresh)
    return max(span.peak for span in meter.spans)


def _without_gradients(model: nn.Module, inputs: list[torch.Tensor]) -> None:
    for tensor in (*model.parameters(), *inputs):
        tensor.grad = None
