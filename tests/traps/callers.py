"""What the caller does with results, between forward and backward and afterwards."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import graph

from fxckpt import ops
from fxckpt.runtime import Captured
from traps import Guard, Stage, Trap, rows, wanted
from traps.results import loss_of
from traps.uses import Use, backward, quietly, uses


def two(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Two results of everything, of which eager's backward reads the second."""
    h = (x @ m.weight).sin()
    return h @ m.weight, (h * m.weight[0]).exp() + 0 * m.seen


def retained(stage: Stage, args: Any, result: Any) -> None:
    loss = loss_of(result)
    for last in (False, False, True):
        loss.backward(retain_graph=not last)
        stage.note("so far", (stage.model.weight.grad, args[0].grad))


def again(stage: Stage, args: Any, result: Any) -> None:
    loss = loss_of(result)
    loss.backward()
    loss.backward()


def parts(stage: Stage, args: Any, result: Any) -> None:
    for i in (1, 0):
        result[i].sum().backward(retain_graph=i == 1)
        stage.note("so far", (stage.model.weight.grad, args[0].grad))


def part(which: int) -> Use:
    return lambda stage, args, result: result[which].sum().backward()


def changed(which: Callable[[Stage, Any, Any], Tensor]) -> Use:
    """Something is changed in place, then backward runs."""

    def use(stage: Stage, args: Any, result: Any) -> None:
        loss = loss_of(result)
        quietly(lambda: which(stage, args, result).mul_(2))
        loss.backward()

    return use


def changed_under_grad(stage: Stage, args: Any, result: Any) -> None:
    result[0].mul_(2)
    result[1][0].add_(result[0].sum())
    backward(stage, args, result)


def second_order(stage: Stage, args: Any, result: Any) -> None:
    (grad,) = torch.autograd.grad(result[0].sum(), args[0], create_graph=True)
    grad.square().sum().backward()


def batched(stage: Stage, args: Any, result: Any) -> None:
    each = torch.eye(12).view(12, 3, 4)
    stage.note("all", torch.autograd.grad(result[0], args[0], each, is_grads_batched=True))


def from_edges(stage: Stage, args: Any, result: Any) -> None:
    edge = graph.get_gradient_edge(result[0])
    inputs = [graph.get_gradient_edge(args[0])]
    stage.note("all", torch.autograd.grad([edge], inputs, [torch.ones(3, 4)]))


def strided(stage: Stage, args: Any, result: Any) -> None:
    result[0].backward(rows(4)[:, :3].t(), retain_graph=True)
    result[0].backward(torch.ones(1, 4).expand(3, 4))


def seeded(stage: Stage, args: Any, result: Any) -> None:
    torch.manual_seed(7)
    backward(stage, args, result)


def unversioned(patch: pytest.MonkeyPatch) -> None:
    """What is saved does not share version counters with what the caller has."""
    context = torch.autograd.function.FunctionCtx
    real = context.save_for_backward
    patch.setattr(
        context, "save_for_backward", lambda ctx, *saved: real(ctx, *(t.data for t in saved))
    )


def as_expected(patch: pytest.MonkeyPatch) -> None:
    """Each backward runs the graph that was made for the expected gradients."""
    patch.setattr(
        Captured,
        "backward_for",
        lambda self, program, key, sizes: next(iter(program.backwards.values())),
    )


def undrawn(patch: pytest.MonkeyPatch) -> None:
    """Random operations that are recomputed draw anew."""
    patch.setattr(
        ops, "with_rng_state", lambda state, device, op, *args, **kwargs: op(*args, **kwargs)
    )


def with_dropout(m: Any, x: Tensor) -> tuple[Tensor, ...]:
    return tuple(F.dropout(y, 0.5).sin() for y in two(m, x))


def caller(
    name: str, use: Use, guard: Guard | None = None, forward: Any = two, batch: Any = wanted
) -> Trap:
    """Something that callers do with two results of a batch that wants a gradient."""
    return uses(f"caller: {name}", forward, batch, use=use, guard=guard)


TRAPS = [
    caller("graph retained", retained),
    caller("backward a second time", again),
    caller("one result, then the other", parts, as_expected),
    caller("first result", part(0), as_expected),
    caller("second result", part(1), as_expected),
    caller("strided gradients", strided, as_expected),
    caller("second order", second_order),
    caller("many gradients at once", batched),
    caller("from edge to edge", from_edges, as_expected),
    caller("seed before backward", seeded, undrawn, with_dropout, lambda: wanted(400)),
    caller("inputs alone", lambda stage, args, out: out[0].sum().backward(inputs=[args[0]])),
    caller("parameter changed", changed(lambda stage, args, out: stage.model.weight),
           unversioned),
    caller("input changed", changed(lambda stage, args, out: args[0]), unversioned),
    caller("result changed", changed_under_grad),
    caller("first result changed", changed(lambda stage, args, out: out[0]), None,
           lambda m, x: (x @ m.weight, x.sin() @ m.weight)),
    caller("buffer changed", changed(lambda stage, args, out: stage.model.seen)),
    caller("result detached", lambda stage, args, out: (out[0].detach().add_(0), backward(
        stage, args, [out[0] * out[0].detach(), out[1]]))),
]  # fmt: skip
