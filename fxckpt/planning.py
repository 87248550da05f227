"""Plans without a training step: `plan` and `frontier`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fxckpt.capture import capture
from fxckpt.cost import Device
from fxckpt.errors import FxckptError
from fxckpt.installation import original_forward
from fxckpt.planner import Plan, Planner, parse_budget


def plan(
    model: nn.Module,
    *args: Any,
    budget: int | str | float,
    device: Device | str | None = None,
    planning_seconds: float = 10.0,
    **kwargs: Any,
) -> Plan:
    """What `rewrite(model, budget=budget)` would save and recompute; nothing is run.

    Works on fake tensors, so one can plan for models that do not fit this machine.

    Args:
        model: The module, in training mode; it is left as it is.
        *args: Arguments of a call.
        budget: See `rewrite`.
        device: What to plan for: a name ("h200", "v100", see `fxckpt.cost.DEVICES`) or a `Device`;
            by default, the device of the model is measured.
        planning_seconds: How long to look for a better plan, about.
        **kwargs: Keyword arguments of the call.

    Raises:
        BudgetError: if the budget means nothing, or no plan fits.
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
    planner = _planner(model, args, kwargs, device, planning_seconds)
    return planner.plan(bytes_of(planner.eager_peak))


def frontier(
    model: nn.Module,
    *args: Any,
    points: int = 12,
    device: Device | str | None = None,
    planning_seconds: float = 10.0,
    **kwargs: Any,
) -> list[Plan]:
    """The curve of memory and time: plans from the least memory to that of the model as it is.

    Args:
        model: See `plan`, as for the other arguments.
        *args: Arguments of a call.
        points: How many budgets, equally far from each other.
        device: What to plan for.
        planning_seconds: For each budget.
        **kwargs: Keyword arguments of the call.

    Returns:
        Plans by growing budget; none is slower than the one before it.
    """
    return _planner(model, args, kwargs, device, planning_seconds).frontier(points)


def _planner(
    model: nn.Module, args: Any, kwargs: Any, device: Device | str | None, seconds: float
) -> Planner:
    if not isinstance(model, nn.Module):
        raise FxckptError(f"expected a torch.nn.Module, got {type(model).__name__}")
    if not model.training:
        raise FxckptError("the model is in evaluation mode. Call model.train() first")
    with torch.enable_grad():
        tape = capture(original_forward(model), args, kwargs, module=model)
    return Planner(tape.joint(tape.expected_backward()), device=device, seconds=seconds)
