"""Derivatives of functions of several tensors, of which some move and some have a direction."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.autograd import forward_ad

Tensors = Sequence[torch.Tensor]
Maybe = torch.Tensor | None


def given(tensors: Sequence[Maybe]) -> tuple[list[int], list[torch.Tensor]]:
    """Which there are, and these."""
    pairs = [(i, t) for i, t in enumerate(tensors) if t is not None]
    return [i for i, _ in pairs], [t for _, t in pairs]


def pulled(
    run: Callable[..., Tensors],
    values: Tensors,
    moving: Sequence[bool],
    results: Sequence[int],
    cotangents: Tensors,
) -> list[Maybe]:
    """Gradients of the values that move, for cotangents of some results of a function."""
    grads: list[Maybe] = [None] * len(values)
    moved = [i for i, moves in enumerate(moving) if moves]
    if not results:
        return grads

    def some(*arguments: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = run(*_with(values, moved, arguments))
        return tuple(found[i] for i in results)

    pull = torch.func.vjp(some, *(values[i] for i in moved))[1]
    for i, grad in zip(moved, pull(tuple(cotangents)), strict=True):
        grads[i] = grad
    return grads


def pushed(
    run: Callable[..., Tensors],
    values: Tensors,
    tangents: Sequence[Maybe],
    differentiable: Sequence[bool],
) -> tuple[Maybe, ...]:
    """Tangents of the results of a function, called by the `jvp` of an `autograd.Function`.

    Autograd switches forward mode off for that, for all levels, and hands over values that have
    their tangents still. But an outer `jvp` has to see what is computed here.
    """
    moved, directions = given(tangents)
    if not any(differentiable):
        return (None,) * len(differentiable)

    def some(*arguments: torch.Tensor) -> tuple[torch.Tensor, ...]:
        results = run(*_with(values, moved, arguments))
        return tuple(r for r, has in zip(results, differentiable, strict=True) if has)

    with forward_ad._set_fwd_grad_enabled(True):
        values = [forward_ad.unpack_dual(v).primal for v in values]
        directions = [forward_ad.unpack_dual(d).primal for d in directions]
        primals = [values[i] for i in moved]
        found = iter(_jvp(some, primals, directions))
    return tuple(next(found) if has else None for has in differentiable)


def _jvp(run: Callable[..., Tensors], primals: Tensors, directions: Tensors) -> Sequence[Maybe]:
    """The tangents of all results; outside of `torch.func` at the level that there is."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return torch.func.jvp(run, tuple(primals), tuple(directions))[1]
    duals = map(forward_ad.make_dual, primals, directions)
    return [forward_ad.unpack_dual(result).tangent for result in run(*duals)]


def _with(values: Tensors, places: Sequence[int], others: Tensors) -> list[torch.Tensor]:
    """The values, with others in some places."""
    new = [*values]
    for place, other in zip(places, others, strict=True):
        new[place] = other
    return new
