"""Hooks act as in eager, as often as in eager, or the module falls back with a warning."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import Stack, chain
from torch import Tensor, nn
from torch.autograd import graph
from torch.nn.modules import module as global_hooks

from fxckpt import capture, invisible
from fxckpt.escapes import Escapes
from traps import (
    EITHER,
    HOOKS_AND_CHILDREN,
    Guard,
    Make,
    Stage,
    Trap,
    all_of,
    constant,
    function,
    rows,
    same,
    wanted,
)

Seen = list[Any]
UNREFUSED = all_of(
    HOOKS_AND_CHILDREN,
    constant(invisible, "refuse_hooks"),
    constant(invisible, "side_effects_refused", contextlib.nullcontext()),
    constant(Escapes, "find", []),
)


def hooked(
    name: str,
    add: Callable[[Any, Seen], Any],
    make: Make = lambda: chain(2, 4),
    batch: Callable[[], Tensor] = wanted,
    guard: Guard | None = None,
    **options: Any,
) -> list[Trap]:
    """Two steps with a hook, two without it, two with it: from the start, and after two without.

    Args:
        name: Of the trap.
        add: (model, list for what the hook sees) to handles.
        make: Makes the model.
        batch: Makes its input.
        guard: Against both.
        **options: Of `same`.
    """

    def play(stage: Stage, phases: list[bool]) -> None:
        for active in phases:
            seen: Seen = []
            handles = add(stage.model, seen) if active else []
            try:
                for _ in range(2):
                    stage.step(batch())
            finally:
                for handle in handles if isinstance(handles, list) else [handles]:
                    handle.remove()
            stage.note("hook", seen)

    def run(phases: list[bool]) -> None:
        same(make, lambda stage: play(stage, phases), **options)

    return [
        Trap(name, lambda: run([True, False, True]), guard),
        # What a capture must not see of hooks is not there at a capture without them.
        Trap(
            f"{name}, later",
            lambda: run([False, True, False]),
            None if guard is hook_like else guard,
        ),
    ]


def see(seen: Seen, result: Callable[[Any], Any] = lambda args: None) -> Callable[..., Any]:
    """A hook that records the tensors it gets, and returns `result` of them."""

    def hook(*args: Any) -> Any:
        seen.append([t.detach().clone() for t in _tensors(args)])
        return result(args)

    return hook


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for child in tree:
            yield from _tensors(child)


def on(method: str, path: str = "", result: Any = None, **options: Any) -> Callable[..., Any]:
    """Adds a hook of one kind to a submodule that sees what it gets."""

    def add(model: Any, seen: Seen) -> Any:
        hook = see(seen, result or (lambda args: None))
        return getattr(model.get_submodule(path), method)(hook, **options)

    return add


def everywhere(method: str, result: Any = None, **options: Any) -> Callable[..., Any]:
    """Adds a hook for all modules."""
    return lambda model, seen: getattr(global_hooks, method)(
        see(seen, result or (lambda args: None)), **options
    )


def double_output(args: Any) -> Any:
    return args[-1] * 2


def double_first(args: Any) -> Any:
    return (args[1][0] * 2,)


KINDS = (
    "register_forward_pre_hook",
    "register_forward_hook",
    "register_full_backward_pre_hook",
    "register_full_backward_hook",
)


def on_parameters(method: str, hook: Callable[[Seen, Any], Any]) -> Callable[..., Any]:
    """Hooks of all parameters; each sees its own, as their order is not specified."""

    def add(model: nn.Module, seen: Seen) -> list[Any]:
        seen.extend([] for _ in model.parameters())
        return [
            getattr(p, method)(lambda x, own=own: hook(own, x))
            for p, own in zip(model.parameters(), seen, strict=True)
        ]

    return add


def on_nodes(method: str) -> Callable[..., Any]:
    """Hooks of the nodes that accumulate gradients."""

    def add(model: nn.Module, seen: Seen) -> list[Any]:
        seen.extend([] for _ in model.parameters())
        nodes = [graph.get_gradient_edge(p).node for p in model.parameters()]
        return [
            getattr(node, method)(lambda *grads, own=own: own.append(list(_tensors(grads))))
            for node, own in zip(nodes, seen, strict=True)
        ]

    return add


def optimize(own: Seen, p: Tensor) -> None:
    """An optimizer in backward."""
    with torch.no_grad():
        p.sub_(p.grad, alpha=0.01)
    own.append(p.grad)
    p.grad = None


def hook_like(patch: pytest.MonkeyPatch) -> None:
    """The fake of a parameter has the hooks of the parameter."""
    real = capture._fake_like

    def fake_like(tensor: Tensor, *args: Any) -> Tensor:
        fake = real(tensor, *args)
        for hook in (tensor._backward_hooks or {}).values():
            fake.register_hook(hook)
        return fake

    patch.setattr(capture, "_fake_like", fake_like)


ON_MODULES = [
    *(t for k in KINDS for t in hooked(k, on(k, "2"), warns="hook", guard=UNREFUSED)),
    *(t for k in KINDS for t in hooked(f"{k} of the model", on(k))),
    *(t for k in KINDS for t in hooked(f"{k} of all", everywhere(k.replace("_", "_module_", 1)),
                                       warns="hook", guard=UNREFUSED)),
    *hooked("keyword arguments", on(KINDS[1], "2", with_kwargs=True), warns="hook",
            guard=UNREFUSED),
    *hooked("keyword arguments of the model", on(KINDS[1], with_kwargs=True)),
    *hooked("always called", on(KINDS[1], "2", always_call=True), warns="hook", guard=UNREFUSED),
    *hooked("always called for all", everywhere("register_module_forward_hook", always_call=True),
            warns="hook", guard=UNREFUSED),
    *hooked("changes the output", on(KINDS[1], "2", double_output), warns="hook",
            guard=UNREFUSED),
    *hooked("changes the output of the model", on(KINDS[1], "", double_output)),
    *hooked("changes the gradient", on(KINDS[3], "2", double_first), warns="hook",
            guard=UNREFUSED),
    *hooked("changes the gradient of the model", on(KINDS[3], "", double_first)),
    *hooked("hidden module", lambda model, seen: model.it[0].register_forward_hook(see(seen)),
            function(lambda m, x: m.it[0](x @ m.weight), it=lambda: [nn.Tanh()]), warns=EITHER),
    *hooked("in one of two blocks", on(KINDS[1], "blocks.0"), Stack,
            lambda: rows(6, 8).view(2, 3, 8), warns="but for"),
    *hooked("parameters", on_parameters("register_hook", lambda own, g: own.append(g) or g * 2),
            guard=hook_like),
    *hooked("accumulated", on_parameters("register_post_accumulate_grad_hook",
                                         lambda own, p: own.append(p.grad.clone()))),
    *hooked("optimizer in backward",
            on_parameters("register_post_accumulate_grad_hook", optimize)),
    *hooked("nodes of parameters", on_nodes("register_hook")),
    *hooked("before nodes of parameters", on_nodes("register_prehook")),
    *hooked("all gradients", lambda model, seen: graph.register_multi_grad_hook(
        list(model.parameters()), lambda grads: seen.append([g.clone() for g in grads]))),
]  # fmt: skip

# --- hooks around the call ------------------------------------------------------------------------


def on_results(stage: Stage) -> None:
    """Hooks of the result, and a gradient that it retains."""
    for _ in range(3):
        stage.steps += 1
        x, seen = wanted(), []
        out = stage.model(x)
        out.register_hook(lambda g, seen=seen: seen.append(g.clone()) or g * 2)
        out.retain_grad()
        out.grad_fn.register_prehook(lambda grads, seen=seen: seen.append(grads[0].clone()))
        graph.register_multi_grad_hook([out, x], lambda gs, seen=seen: seen.append(list(gs)))
        out.sin().sum().backward()
        stage.note("seen", (seen, out.grad, x.grad))
        stage.update()


def counted_hooks(stage: Stage) -> None:
    """What hooks around the call pack is unpacked once, and is no fake tensor."""
    for _ in range(3):
        stage.steps += 1
        packed: list[Any] = []
        unpacked: list[Any] = []
        hooks = graph.saved_tensors_hooks(
            see(packed, lambda a: a[0]), see(unpacked, lambda a: a[0])
        )
        with hooks:
            out = stage.model(wanted())
        out.sum().backward()
        stage.note("unpacked", len(packed) == len(unpacked))
        stage.note("kinds", {type(t).__name__ for each in packed for t in each})
        stage.update()


def rounded_at_first(stage: Stage) -> None:
    """Hooks that change what is saved, around the first call alone."""
    with graph.saved_tensors_hooks(lambda t: t.bfloat16(), lambda t: t.float()):
        out = stage.model(wanted())
    out.sum().backward()
    stage.model.zero_grad()
    for _ in range(2):
        stage.step(wanted())


def nan(stage: Stage) -> None:
    """Anomaly mode finds it."""
    for _ in range(2):
        stage.steps += 1
        with torch.autograd.detect_anomaly():
            out = stage.model(wanted())
            with pytest.raises(RuntimeError, match="nan"):
                out.sum().backward()
        stage.update()


ROOT = function(lambda m, x: (x @ m.weight - 10).sqrt())
AROUND = [
    Trap("results", lambda: same(lambda: chain(2, 4), on_results)),
    Trap("saved tensors around", lambda: same(lambda: chain(2, 4), counted_hooks)),
    Trap("saved tensors rounded at first", lambda: same(
        lambda: chain(2, 4), rounded_at_first, graph=3)),
    Trap("anomaly mode and NaN", lambda: same(ROOT, nan)),
]  # fmt: skip

TRAPS = ON_MODULES + AROUND
