"""Plans without a training step: `plan`, `frontier` and `fit_batch`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import nn
from torch._guards import detect_fake_mode

from fxckpt.budgets import parse_budget
from fxckpt.errors import BudgetError, FxckptError
from fxckpt.foreseen import foreseen
from fxckpt.frontiers import Frontier
from fxckpt.joint import Joint
from fxckpt.planner import AnyDevice, Planner
from fxckpt.plans import Plan
from fxckpt.plotting import Spot


def plan(
    model: nn.Module,
    *args: Any,
    budget: int | str | float,
    device: AnyDevice = None,
    profile: bool = False,
    planning_seconds: float = 10.0,
    **kwargs: Any,
) -> Plan:
    """What `rewrite(model, budget=budget)` would save and recompute; the model is not run.

    Works on fake tensors, so one can plan for models that do not fit this machine. Only a model
    that prepares something at its first call is run, once and without gradients, and put back.

    Args:
        model: The module, in training mode; it is left as it is.
        *args: Arguments of a call.
        budget: See `rewrite`.
        device: What to plan for: a name ("h200", "v100": `fxckpt.rates.DEVICES`), a `Device`, or
            a device to be measured ("cuda"), which by default is that of the model.
        profile: Whether to time each distinct operation, on random operands, on the device of the
            model instead. Takes the memory that the largest operation needs.
        planning_seconds: How long to look for a better plan, about.
        **kwargs: Keyword arguments of the call.

    Raises:
        BudgetError: if budget or device mean nothing, or no plan fits.
        CaptureError: if the model cannot be captured exactly.

    Example:
        >>> import torch, fxckpt
        >>> layers = [torch.nn.Linear(64, 64), torch.nn.Tanh()] * 8
        >>> model = torch.nn.Sequential(*layers)
        >>> found = fxckpt.plan(model, torch.ones(512, 64), budget=0.7)
        >>> found.peak <= 0.7 * found.eager_peak
        True
    """
    bytes_of = parse_budget(budget)
    joint = _captured(model, args, kwargs)
    planner = Planner(joint, device=device, profile=profile, seconds=planning_seconds)
    return planner.plan(bytes_of(planner.eager_peak))


def frontier(
    model: nn.Module,
    *args: Any,
    points: int = 12,
    device: AnyDevice = None,
    profile: bool = False,
    planning_seconds: float = 10.0,
    **kwargs: Any,
) -> Frontier:
    """The curve of memory and time: plans from the least memory to that of the model as it is.

    Args:
        model: See `plan`, as for the other arguments.
        *args: Arguments of a call.
        points: How many budgets, equally far from each other.
        device: What to plan for.
        profile: Whether to time operations.
        planning_seconds: For each budget.
        **kwargs: Keyword arguments of the call.

    Returns:
        Plans by growing budget; none is slower than the one before it. What usual strategies come
        to is in `peers`, plans in the memory of each in `beside`, and `plot` draws all.
    """
    joint = _captured(model, args, kwargs)
    planner = Planner(joint, device=device, profile=profile, seconds=planning_seconds)
    peers = {name: Spot(*found) for name, found in planner.peers().items()}
    beside: dict[str, Plan] = {}
    for name, peer in peers.items():
        if peer.peak < planner.eager_peak:
            with contextlib.suppress(BudgetError):  # gradients come earlier in torch's own backward
                beside[name] = planner.plan(peer.peak)
    return Frontier(tuple(planner.frontier(points)), peers, beside)


class Fit(NamedTuple):
    """The largest batch that fits, and the plan with which it does."""

    batch: int
    plan: Plan


def fit_batch(
    make_batch: Callable[[int], tuple[Any, ...] | Mapping[str, Any]],
    model: nn.Module,
    *,
    memory: int | str,
    most: int = 1 << 16,
    device: AnyDevice = None,
    planning_seconds: float = 10.0,
) -> Fit:
    """The largest batch whose step a budget allows; planned, not tried: nothing is run.

    Sizes are doubled until one does not fit, and bisected then: a batch of the size that is found
    fits, and one that is larger by one does not.

    Args:
        make_batch: Makes the arguments of a call for a size: a tuple of positional or a dictionary
            of keyword arguments. For a model on fake tensors, it is called in their mode.
        model: The module, in training mode.
        memory: The budget, see `rewrite`; a fraction means nothing here.
        most: No larger batch is looked for.
        device: What to plan for, see `plan`.
        planning_seconds: For each size.

    Raises:
        BudgetError: if the budget means nothing, or not even a batch of one fits.
        CaptureError: if the model cannot be captured exactly.

    Example:
        >>> import torch, fxckpt
        >>> layers = [torch.nn.Linear(64, 64), torch.nn.Tanh()] * 8
        >>> model = torch.nn.Sequential(*layers)
        >>> fit = fxckpt.fit_batch(lambda n: (torch.ones(n, 64),), model, memory="1MiB")
        >>> lean = fxckpt.rewrite(model, budget="1MiB")
        >>> lean(torch.ones(fit.batch, 64)).sum().backward()
    """
    if isinstance(memory, float):
        raise BudgetError(f"fit_batch(..., memory={memory!r}): expected bytes, such as '8GiB'")
    budget = parse_budget(memory)(0)

    def planner(size: int) -> Planner:
        joint = _captured(model, *_made(make_batch, size, model))
        return Planner(joint, device=device, seconds=planning_seconds)

    batch, fitting, too_large = 1, planner(1), most + 1
    while fitting.fits(budget) and too_large - batch > 1:
        doubled = 2 * batch
        size = doubled if doubled < too_large == most + 1 else (batch + too_large) // 2
        if (other := planner(size)).fits(budget):
            batch, fitting = size, other
        else:
            too_large = size
    return Fit(batch, fitting.plan(budget))


def _made(
    make_batch: Callable[[int], Any], size: int, model: nn.Module
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call, positional and by keyword."""
    with detect_fake_mode([*model.parameters()]) or contextlib.nullcontext():
        batch = make_batch(size)
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, tuple):
        return batch, {}
    raise FxckptError(
        "fit_batch(make_batch, ...): expected make_batch to return a tuple of positional or a "
        f"dictionary of keyword arguments, got {type(batch).__name__}"
    )


def _captured(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Joint:
    if not isinstance(model, nn.Module):
        raise FxckptError(f"expected a torch.nn.Module, got {type(model).__name__}")
    if not model.training:
        raise FxckptError("the model is in evaluation mode. Call model.train() first")
    return foreseen(model, args, kwargs)
