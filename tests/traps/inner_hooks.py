"""Hooks that forward registers itself, and hooks for saved tensors."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import graph

from traps import EITHER, Stage, Trap, function, same, wanted
from traps.hooks import Seen, see


def inside(
    name: str,
    forward: Callable[..., Any],
    around: Callable[[], Any] = contextlib.nullcontext,
    warns: str = EITHER,
) -> Trap:
    """Four steps of a function of (model, x, list for what its hooks see)."""

    def run() -> None:
        seen: Seen = []

        def play(stage: Stage) -> None:
            seen.clear()
            for _ in range(4):
                with around():
                    stage.step(wanted())
                stage.note("hook", list(seen))
                kept = getattr(stage.model, "kept", None)
                stage.note("retained", kept.grad if kept is not None else None)

        same(function(lambda m, x: forward(m, x, seen)), play, warns=warns)

    return Trap(f"inside: {name}", run)


def registers(method: str, at: str, result: Any = None) -> Callable[..., Tensor]:
    """A forward that hooks its input, its weight, what is in between, its output or a node."""

    def forward(m: Any, x: Tensor, seen: Seen) -> Tensor:
        h = x @ m.weight
        y = h.sin()
        places = {"input": x, "weight": m.weight, "middle": h, "output": y, "node": h.grad_fn}
        getattr(places[at], method)(see(seen, result or (lambda args: None)))
        return y

    return forward


def computes(m: Any, x: Tensor, seen: Seen) -> Tensor:
    """A hook that has no side effect."""
    h = x @ m.weight
    h.register_hook(lambda g: g.clamp(-0.1, 0.1))
    return h.sin()


def retains(m: Any, x: Tensor, seen: Seen) -> Tensor:
    m.kept = x @ m.weight
    m.kept.retain_grad()
    return m.kept.sin()


def several(m: Any, x: Tensor, seen: Seen) -> Tensor:
    h = x @ m.weight
    graph.register_multi_grad_hook([h, x], lambda grads: seen.append(len(grads)))
    return h * x


def packs(m: Any, x: Tensor, seen: Seen) -> Tensor:
    """Hooks for saved tensors that count."""
    with graph.saved_tensors_hooks(see(seen, lambda a: a[0]), see(seen, lambda a: a[0])):
        return (x @ m.weight).sin().tanh()


def rounds(m: Any, x: Tensor, seen: Seen) -> Tensor:
    """Hooks for saved tensors that change them."""
    with graph.saved_tensors_hooks(lambda t: t.bfloat16(), lambda t: t.float()):
        return (x @ m.weight).sin().tanh()


def offloads(m: Any, x: Tensor, seen: Seen) -> Tensor:
    with graph.save_on_cpu():
        return (x @ m.weight).sin().tanh()


def plain(m: Any, x: Tensor, seen: Seen) -> Tensor:
    return (x @ m.weight).sin().tanh()


def numpy_hooks() -> Any:
    return graph.saved_tensors_hooks(lambda t: t.detach().numpy().copy(), torch.from_numpy)


TRAPS = [
    *(inside(f"hook of {at}", registers("register_hook", at))
      for at in ("input", "weight", "middle", "output", "node")),
    inside("hook that changes", registers("register_hook", "middle", lambda args: args[0] * 2)),
    inside("hook before a node", registers("register_prehook", "node")),
    inside("hook after accumulation", registers("register_post_accumulate_grad_hook", "weight")),
    inside("hook that only computes", computes),
    inside("retained gradient", retains),
    inside("several gradients", several),
    inside("saved tensors counted", packs),
    inside("saved tensors rounded", rounds),
    inside("saved tensors on the CPU", offloads),
    inside("around: saved tensors on the CPU", plain, graph.save_on_cpu, warns=""),
    inside("around: saved tensors as arrays", plain, numpy_hooks, warns=""),
    inside("around: no hooks", plain, lambda: graph.disable_saved_tensors_hooks("none"), warns=""),
    inside("around: anomaly mode", plain, torch.autograd.detect_anomaly, warns=""),
]  # fmt: skip
