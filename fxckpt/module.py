"""Rewrites an `nn.Module`: `rewrite`, `rewrite_`, `restore_`, `is_rewritten`, `graphs`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import nn
from torch.fx import GraphModule

from fxckpt import policies
from fxckpt.blocks import Blocks, Undecided, Units
from fxckpt.budgets import AsPlanned, WithinBudget
from fxckpt.captures import Options
from fxckpt.errors import BudgetError, FxckptError, PolicyError
from fxckpt.installation import install, installed, runner_of, twin, uninstall
from fxckpt.plans import Plan
from fxckpt.programs import Decide
from fxckpt.unit import Unit

M = TypeVar("M", bound=nn.Module)


def rewrite(
    model: M,
    policy: Any = None,
    *,
    budget: int | str | float | None = None,
    plan: Plan | None = None,
    save: Any = (),
    recompute: Any = (),
    units: Units = None,
    example_inputs: tuple[Any, ...] | Mapping[str, Any] | None = None,
    cache_size: int = 32,
    strict: bool = False,
    planning_seconds: float = 10.0,
    profile: bool = False,
    decompose: bool = False,
    compile: bool = False,
    dynamic: bool = False,
) -> M:
    """A module like `model` whose training step keeps fewer activations and recomputes the rest.

    Outputs, gradients, buffers and random states are bit-identical to those of `model`. The graph
    is captured at the first call in training mode with gradients enabled, and again whenever
    something that it depends on changes (shapes, training flags, autocast, ...); calls in
    evaluation mode or under `torch.no_grad` run the original forward.

    Args:
        model: Any module. It is left as it was; parameters, buffers and submodules are shared.
        policy: What to recompute: a name ("attention", "mlp", "norm", "block", "dots", "sqrt",
            "nothing", "everything"; see `fxckpt.policies`) or a callable from a `Value` to
            `fxckpt.SAVE` or `fxckpt.RECOMPUTE`.
        budget: Instead of a policy: the most that one forward and backward may hold at any moment
            above what was allocated when forward was called. Bytes (int), a string ("8GiB",
            "500MB"), or a fraction (float, at most 1) of what the step of `model` itself holds. The
            fastest plan that is found to fit is used. What happens outside of `model` (a loss
            computed from its output, gradients that are accumulated) is not part of it, and nothing
            is promised for a model that falls back to eager. With blocks as units, the first call
            of each signature runs the step two times more, to measure what lies outside of them.
        plan: Instead of a policy or a budget: what `fxckpt.plan` returned or `Plan.load` read, for
            the first call. Calls with other shapes get plans of their own, for the same budget.
        save: Selectors of values to save: module-path globs, module classes, operations.
        recompute: Selectors of values to recompute.
        units: What is captured at once: "model", the whole; "blocks", each repeated block by
            itself, while the rest runs eagerly; or the modules at these paths ("encoder.layer.*").
            A policy sees one unit at a time. The gradients of a unit come when its backward is
            done, which overlaps with communication if units are blocks. By default it is the whole
            model; but blocks where at least 32 of them are alike, and in distributed training, if
            the policy is not one of the whole ("sqrt", a plan) and a budget, if there is one, can
            be planned over blocks.
        example_inputs: Captures now, for these arguments: a tuple of positional or a dictionary of
            keyword arguments. The model has to be in training mode.
        cache_size: How many signatures are kept; the least recently used is dropped.
        strict: Raise `CaptureError` where the default is to run eagerly and warn once.
        planning_seconds: How long to look for a better plan, about, at each capture.
        profile: Whether to time each distinct operation for planning, instead of taking its time
            from rates of the device.
        decompose: Whether to differentiate torch's own decomposition of an operation (fused
            attention, `hardsigmoid`, ...) where torch has no rule for a second derivative or for
            forward mode, instead of raising torch's error. Such derivatives are those of plain
            operations up to rounding, and cost more memory. Values and gradients of first order
            stay what they are, bit by bit.
        compile: Whether to compile both graphs with Inductor, at the second step. What is saved
            and recomputed stays as decided, random draws stay those of eager; other numbers are
            equal up to rounding, as with `torch.compile`. A budget is then that of the graphs
            before they are compiled. Inside of `torch.compile` with Inductor, this is so anyway.
        dynamic: Whether one capture shall serve calls with other sizes, too, such as batches of
            texts of any length: sizes of arguments are symbols, and what forward asks about them
            is checked at each call. Where that is not possible, each size is captured by itself,
            as without this option.

    Returns:
        A new module of the same class (its name and `isinstance` included).

    Raises:
        PolicyError: if the policy or a selector makes no sense; selectors are matched, and a plan
            is compared with the graph that it was made for, when the model is captured.
        BudgetError: if the budget means nothing; when the model is captured, if no plan fits.
        CaptureError: with `strict`, if the model cannot be captured exactly.
        FxckptError: if `model` is not a module that can be rewritten.

    Example:
        >>> import torch, fxckpt
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.GELU())
        >>> lean = fxckpt.rewrite(model, policy="dots")
        >>> lean(torch.ones(2, 4)).sum().backward()
        >>> model[0].weight.grad.shape
        torch.Size([4, 4])
    """
    _require_module("rewrite", model)
    return rewrite_(
        twin(model),
        policy,
        budget=budget,
        plan=plan,
        save=save,
        recompute=recompute,
        units=units,
        example_inputs=example_inputs,
        cache_size=cache_size,
        strict=strict,
        planning_seconds=planning_seconds,
        profile=profile,
        decompose=decompose,
        compile=compile,
        dynamic=dynamic,
    )


def rewrite_(
    model: M,
    policy: Any = None,
    *,
    budget: int | str | float | None = None,
    plan: Plan | None = None,
    save: Any = (),
    recompute: Any = (),
    units: Units = None,
    example_inputs: tuple[Any, ...] | Mapping[str, Any] | None = None,
    cache_size: int = 32,
    strict: bool = False,
    planning_seconds: float = 10.0,
    profile: bool = False,
    decompose: bool = False,
    compile: bool = False,
    dynamic: bool = False,
) -> M:
    """Like `rewrite`, in place: `model` itself is rewritten, and returned.

    A module that is rewritten already gets the new policy instead. `restore_` undoes it.
    """
    _require_module("rewrite_", model)
    decide: Decide
    if budget is None and plan is None:
        decide = policies.resolve(policy, save=save, recompute=recompute)
    elif policy is None and not save and not recompute:
        decide = _planned(budget, plan, planning_seconds, profile)
    else:
        raise BudgetError(
            f"rewrite(..., {f'budget={budget!r}' if plan is None else 'plan=...'}): the planner "
            "decides alone; leave out policy=, save= and recompute="
        )
    nests = budget is None and plan is None  # a plan is one for the whole
    if units not in (None, "model") and plan is not None:
        raise PolicyError(
            f"rewrite(..., plan=..., units={units!r}): a plan is for the model as one unit. Leave "
            f"out units=, or give budget={plan.budget}"
        )
    if units not in (None, "model") and budget is not None and dynamic:
        raise BudgetError(
            f"rewrite(..., budget={budget!r}, units={units!r}, dynamic=True): the step is measured "
            "for each size. Leave out dynamic=True"
        )
    _require_combinable(dynamic=dynamic, compile=compile)
    if is_rewritten(model):
        restore_(model)
    by_index = nests and policies.may_tell_apart(policy, save, recompute)
    told = policies.described(policy, save=save, recompute=recompute) if nests else "planned"
    options = Options(
        decide, cache_size, strict, nests, by_index, decompose, compile, dynamic, told
    )
    # Of the whole speak a plan and "sqrt", and a budget that is to serve any size.
    whole = plan is not None or policy == "sqrt" or (budget is not None and dynamic)
    install(model, _runner(model, options, units, whole))
    if example_inputs is not None:
        try:
            args, kwargs = _example(example_inputs)
            runner_of(model).prepare(model, args, kwargs)
        except FxckptError:
            restore_(model)
            raise
    return model


def restore_(model: M) -> M:
    """Undoes `rewrite_`: the module has its original class and forward again.

    Raises:
        FxckptError: if the module is not rewritten.
    """
    _require_rewritten("restore_", model)
    uninstall(model)
    return model


def is_rewritten(model: nn.Module) -> bool:
    """Whether `model` itself (not a submodule of it) was rewritten."""
    return isinstance(model, nn.Module) and installed(model) is not None


def graphs(model: nn.Module) -> tuple[GraphModule, GraphModule]:
    """The forward and backward graphs of the latest call of a rewritten module.

    Both take a list, which they empty: forward all primals, backward saved primals, residuals and
    gradients of the outputs. Printing one shows its code, with comments that name the modules and
    what is recomputed.

    Raises:
        FxckptError: if the module is not rewritten, or was not called yet.
    """
    _require_rewritten("graphs", model)
    latest = runner_of(model).latest
    if latest is None:
        raise FxckptError(
            "graphs(model): nothing was captured yet. Call the model once in training mode with "
            "gradients enabled, or pass example_inputs= to rewrite"
        )
    return latest.program.split.forward, latest.program.split.backward


def _runner(model: nn.Module, options: Options, units: Units, whole: bool) -> Any:
    """What runs the model, or its blocks."""
    if units is None:
        return Undecided(options, whole)
    return Unit(model, options) if units == "model" else Blocks(model, options, units)


def _planned(
    budget: int | str | float | None, plan: Plan | None, seconds: float, profile: bool
) -> Decide:
    """What decides by a budget, or as planned."""
    if plan is None:
        return WithinBudget(budget, seconds, profile=profile)
    if budget is not None:
        raise BudgetError(
            f"rewrite(..., budget={budget!r}, plan=...): a plan has its budget; leave out one"
        )
    if not isinstance(plan, Plan):
        raise PolicyError(
            f"rewrite(..., plan={plan!r}): expected what fxckpt.plan or fxckpt.Plan.load return, "
            f"got {type(plan).__name__}"
        )
    return AsPlanned(plan, WithinBudget(plan.budget, seconds, profile=profile))


# -- checks


def _require_combinable(*, dynamic: bool, compile: bool) -> None:
    if not isinstance(dynamic, bool):
        raise FxckptError(f"rewrite(..., dynamic={dynamic!r}): expected True or False")
    if dynamic and compile:
        raise FxckptError(
            "rewrite(..., dynamic=True, compile=True): graphs are compiled for the sizes of one "
            "call. Leave out one of the two"
        )


def _require_module(call: str, model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise FxckptError(
            f"{call}(model, ...): expected a torch.nn.Module, got {type(model).__name__}. "
            "For a function use fxckpt.checkpoint"
        )
    if isinstance(model, torch.jit.ScriptModule | torch._dynamo.eval_frame.OptimizedModule):
        raise FxckptError(
            f"{call}(model, ...): {type(model).__name__} is compiled already. "
            "Rewrite the original module, then compile"
        )
    if isinstance(model, torch.nn.parallel.DistributedDataParallel):
        raise FxckptError(
            f"{call}(model, ...): {type(model).__name__} communicates with other processes. "
            "Rewrite the module inside (model.module), before or after it is wrapped"
        )


def _require_rewritten(call: str, model: Any) -> None:
    if not is_rewritten(model):
        raise FxckptError(
            f"{call}(model): expected a module that `rewrite` or `rewrite_` returned, "
            f"got {type(model).__name__}, which is not rewritten"
        )


def _example(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, tuple):
        return inputs, {}
    raise FxckptError(
        "rewrite(..., example_inputs=...): expected a tuple of positional or a dictionary of "
        f"keyword arguments, got {type(inputs).__name__}"
    )
