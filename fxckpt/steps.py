"""One training step of a model that leaves the model as it was, to look at what happens in it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.autograd.profiler import profile

from fxckpt import ops, tree

_WARM_UP = 2  # a first call keeps more, and the second one is confirmed


def backward(results: list[torch.Tensor]) -> None:
    """A backward like that of a loss: of the scalars in the result, else of everything."""
    unique = list({id(t): t for t in results if t.requires_grad}.values())
    scalars = [t for t in unique if t.dim() == 0]
    chosen = scalars or unique
    if chosen:
        torch.autograd.backward(chosen, [torch.ones_like(t) for t in chosen])


def devices(model: nn.Module) -> list[torch.device]:
    """The devices of a model, and the CPU."""
    found = {t.device for t in (*model.parameters(), *model.buffers())}
    return sorted(found | {torch.device("cpu")}, key=str)


@contextlib.contextmanager
def undone(model: nn.Module) -> Iterator[None]:
    """Restores gradients, buffers and random states afterwards."""
    grads = [(p, p.grad) for p in model.parameters()]
    buffers = [(b, b.clone()) for b in model.buffers()]
    states = [(ops.generator(d), ops.generator(d).get_state()) for d in devices(model)]
    for p, _ in grads:
        p.grad = None
    try:
        yield
    finally:
        for p, grad in grads:
            p.grad = grad
        with torch.no_grad():
            for b, contents in buffers:
                b.copy_(contents)
        for generator, state in states:
            generator.set_state(state)


def measured_peak(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """The most bytes that a step allocates above what is there before it, by running three.

    On CUDA by the statistics of the allocator, which are reset; on the CPU by the allocation events
    of the profiler (see docs/measuring-memory.md). The model is left as it was.
    """
    (device, *_) = (*(t.device for t in model.parameters()), torch.device("cpu"))
    measure = _most_on_cuda if device.type == "cuda" else _most_on_cpu
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
        peak = measure(step, device)
        _without_gradients(model, fresh)
    return peak


def _without_gradients(model: nn.Module, inputs: list[torch.Tensor]) -> None:
    for tensor in (*model.parameters(), *inputs):
        tensor.grad = None


def _most_on_cuda(step: Callable[[], None], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    return torch.cuda.max_memory_allocated(device) - before


def _most_on_cpu(step: Callable[[], None], _: torch.device) -> int:
    with profile(profile_memory=True) as profiler:
        step()
    live = peak = 0
    for event in sorted(profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak
