"""`explain`: a report on what a training step holds, and on what a policy or budget makes of it."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fxckpt import composed, policies
from fxckpt.account import AS_IT_IS, Account, Input, Row
from fxckpt.accounting import Circumstances, Subject, account_of
from fxckpt.arguments import Call
from fxckpt.blocks import Blocks
from fxckpt.budgets import parse_budget
from fxckpt.errors import CaptureError, FxckptError
from fxckpt.foreseen import foreseen
from fxckpt.functional import Called, is_checkpointed, module_of
from fxckpt.installation import installed, runner_of
from fxckpt.joint import Joint
from fxckpt.module import rewrite
from fxckpt.nests import with_nests
from fxckpt.planner import AnyDevice, Planner
from fxckpt.quantities import readable
from fxckpt.report import Report
from fxckpt.runtime import Captured
from fxckpt.saved import parameters_of, shown_input
from fxckpt.schedule import Choice
from fxckpt.steps import measured_peak


def explain(
    model_or_fn: Callable[..., Any],
    *args: Any,
    policy: Any = None,
    budget: int | str | float | None = None,
    save: Any = (),
    recompute: Any = (),
    device: AnyDevice = None,
    planning_seconds: float = 10.0,
    measure: bool = False,
    **kwargs: Any,
) -> Report:
    """What a training step holds at every moment, what is saved and computed again, and why.

    Of a rewritten model, or a function that `checkpoint` returned, this is about what it was
    rewritten with: for a call with these arguments, or without arguments for its latest call.
    Anything else is explained as `rewrite` with these options would make it, without any as it is.
    Nothing is run unless `measure` is set, so models on fake tensors can be explained, too.

    Args:
        model_or_fn: A module in training mode, or a function of tensors.
        *args: Arguments of a call.
        policy: See `rewrite`.
        budget: See `rewrite`.
        save: See `rewrite`.
        recompute: See `rewrite`.
        device: The device whose speed is assumed, see `plan`.
        planning_seconds: See `rewrite`.
        measure: Whether to run the step, and to measure its peak: three times forward and
            backward, after which model, gradients and random states are as before. On CUDA, the
            peak statistics of the allocator are reset.
        **kwargs: Keyword arguments of the call.

    Raises:
        CaptureError: if the call cannot be captured as a whole.
        BudgetError: if the budget or device mean nothing, or no plan fits.
        PolicyError: if the policy makes no sense.
        FxckptError: if there is nothing to explain.

    Example:
        >>> import torch, fxckpt
        >>> model = torch.nn.Sequential(*[torch.nn.Linear(64, 64), torch.nn.Tanh()] * 8)
        >>> report = fxckpt.explain(model, torch.ones(512, 64), policy="nothing", device="a100")
        >>> {row.action for row in report.rows}
        {'recomputed'}
    """
    module = _module(model_or_fn)
    options = {"policy": policy, "budget": budget, "save": save, "recompute": recompute}
    given = {name: value for name, value in options.items() if value not in (None, ())}
    if measure and not args and not kwargs:
        raise FxckptError(
            "explain(model, measure=True): a step needs the arguments of the call: "
            "explain(model, x, measure=True)"
        )
    why = ""
    if installed(module) is not None and not given:
        subjects, why = _of_rewritten(module, args, kwargs)
        runs = module
    else:
        subject = _of_plain(module, args, kwargs, given, device, planning_seconds)
        subjects = [("", subject)]
        runs = _as_explained(module, subject, given) if measure else module
    about = Circumstances(
        getattr(model_or_fn, "__name__", type(model_or_fn).__name__),
        _inputs(subjects[0][1].given, parameters_of(model_or_fn)),
        sum(t.untyped_storage().nbytes() for t in storages_of(module)),
        device,
    )
    account = _of_parts(subjects, about, why) if why else account_of(subjects[0][1], about)
    if installed(runs) is not None and not given:
        account = _with_units(account, runner_of(runs))
    history = _history(module, account)
    account = dataclasses.replace(account, allocated=_allocated(module), **history)
    if measure:
        account = dataclasses.replace(account, measured=measured_peak(runs, args, kwargs))
    return Report(**{f.name: getattr(account, f.name) for f in dataclasses.fields(account)})


def _module(model_or_fn: Any) -> nn.Module:
    if isinstance(model_or_fn, nn.Module):
        return model_or_fn
    if not callable(model_or_fn):
        raise FxckptError(
            "explain(model_or_fn, ...): expected a module or a function, got "
            f"{type(model_or_fn).__name__}"
        )
    return module_of(model_or_fn) if is_checkpointed(model_or_fn) else Called(model_or_fn)


# --- what there is to explain ---------------------------------------------------------------------


def _of_rewritten(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[tuple[str, Subject]], str]:
    """What runs for a call, or ran in the latest, and where; and why that are parts, if it is."""
    runner = runner_of(module)
    if args or kwargs:
        _require_training(module)
        found = runner.found(module, args, kwargs)
        if isinstance(found, CaptureError):
            raise found
        captured, why = [("", found)] if found is not None else [], ""
        if found is not None:
            found.latest = found.sizes_of(Call.of(args, kwargs).inputs)
        runner = runner_of(module)  # it may have been undecided
    else:
        captured = runner.captured()
        why = _why_parts(runner, len(captured))
    if not captured:
        raise FxckptError(
            "explain(model): nothing was captured. Call the model once in training mode with "
            "gradients enabled, or give the arguments of a call: explain(model, x)"
            + (f". It runs eagerly: {runner.failure}" if runner.failure is not None else "")
        )
    return [(path, _of_captured(each, runner.options)) for path, each in captured], why


def _history(module: nn.Module, account: Account) -> dict[str, Any]:
    """What an account says of the captures so far, if these are to serve many sizes."""
    runner = runner_of(module) if installed(module) is not None else None
    if runner is None or not runner.options.dynamic:
        return {}
    histories = runner.histories()
    reasons = dict.fromkeys(why for each in histories for why in each.of_one_size.values())
    warned = tuple(f"captured size by size: {why}" for why in reasons)
    return {
        "captures": sum(each.count for each in histories),
        "warnings": (*account.warnings, *warned),
    }


def _why_parts(runner: Any, count: int) -> str:
    """Why parts of a model run by themselves; nothing if it runs as a whole."""
    if runner.failure is not None:
        return f"the model runs eagerly, but for {count} of its parts: {runner.failure}"
    if isinstance(runner, Blocks):
        return f"{count} blocks run as units, what lies outside of them runs eagerly"
    return ""


def _of_captured(captured: Captured, options: Any) -> Subject:
    given, joint, choice = captured.seen(captured.latest)
    plan_of = getattr(options.decide, "plan_of", None)
    plan = plan_of(given) if plan_of is not None and not joint.position.path else None
    how = options.told if plan is None else f"budget {readable(plan.budget)}"
    return Subject(given, joint, choice, how, plan)


def _of_plain(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    given: Mapping[str, Any],
    device: AnyDevice,
    planning_seconds: float,
) -> Subject:
    """What `rewrite` with these options would run."""
    bytes_of = parse_budget(given["budget"]) if "budget" in given else None
    if bytes_of is not None and len(given) > 1:
        raise FxckptError(
            f"explain(..., budget={given['budget']!r}): the planner decides alone; leave out "
            "policy=, save= and recompute="
        )
    decide = policies.resolve(**given) if given and bytes_of is None else None
    _require_training(module)
    joint = foreseen(module, args, kwargs)
    if bytes_of is not None:
        planner = Planner(joint, device=device, seconds=planning_seconds)
        plan = planner.plan(bytes_of(planner.eager_peak))
        how = f"budget {readable(plan.budget)}"
        runs = planner.graph_of(plan)
        return Subject(joint, runs, plan.choice(runs), how, plan)
    if decide is None:
        everything = Choice.of({value.node for value in joint.values()})
        return Subject(joint, joint, everything, AS_IT_IS)
    choice = with_nests(joint, Choice.of(decide(joint)))
    return Subject(joint, joint, choice, policies.described(**given))


def _as_explained(module: nn.Module, subject: Subject, given: Mapping[str, Any]) -> nn.Module:
    """The module that runs a step as it is explained."""
    if subject.plan is not None:
        return rewrite(module, plan=subject.plan)
    return rewrite(module, **given) if given else module


def _require_training(module: nn.Module) -> None:
    if not module.training:
        raise FxckptError(
            "explain(model, ...): the model is in evaluation mode, where it keeps nothing. Call "
            "model.train() first"
        )


def _of_parts(subjects: Sequence[tuple[str, Subject]], about: Circumstances, why: str) -> Account:
    """Parts of a model: what they save is there at once, and the peak of all is not known."""
    known: dict[tuple[int, int], Account] = {}  # blocks that look the same share these
    accounts = []
    for path, subject in subjects:
        key = id(subject.joint), id(subject.choice)
        if key not in known:
            known[key] = account_of(subject, about)
        accounts.append((known[key], _moved(known[key].rows, subject.joint.position.path, path)))
    first = accounts[0][0]
    return dataclasses.replace(
        first,
        inputs=(),
        budget=None,
        bound=None,
        saved=sum(a.saved for a, _ in accounts),
        eager_saved=sum(a.eager_saved for a, _ in accounts),
        seconds=math.fsum(a.seconds for a, _ in accounts),
        step_seconds=math.fsum(a.step_seconds for a, _ in accounts),
        before=(),
        after=(),
        at_peak=(),
        rows=tuple(row for _, rows in accounts for row in rows),
        warnings=(f"the figures are about parts: {why}",),
    )


def _with_units(account: Account, runner: Any) -> Account:
    """The same, with what is known of the step as a whole if a budget is planned over blocks."""
    account = dataclasses.replace(account, units=runner.why)
    plan = runner.budgeting.latest if isinstance(runner, Blocks) and runner.budgeting else None
    if plan is None:
        return account
    return dataclasses.replace(
        account,
        how=f"budget {readable(plan.budget)}",
        budget=plan.budget,
        bound=plan.bound,
        seconds=plan.seconds,
        before=composed.before(plan),
        after=composed.after(plan),
        at_peak=composed.at_peak(plan),
        warnings=("values and times are those of blocks; what lies outside of them was measured",),
    )


def _moved(rows: Sequence[Row], start: str, path: str) -> Sequence[Row]:
    """The rows of a block as those of another one that looks the same."""
    if start == path:
        return rows
    return [row._replace(path=path + row.path.removeprefix(start)) for row in rows]


# --- what else is told ----------------------------------------------------------------------------


def _inputs(joint: Joint, parameters: list[str]) -> tuple[Input, ...]:
    found = []
    for name, node in joint.primals.items():
        if node.meta["kind"] == "input":
            val = node.meta["val"]
            short = re.sub(r"^kwargs\['(\w+)'\]", r"\1", shown_input(name, parameters))
            dtype = str(val.dtype).removeprefix("torch.")
            found.append(Input(short, dtype, tuple(val.shape)))
    return tuple(found)


def storages_of(module: nn.Module) -> list[torch.Tensor]:
    """One tensor for each storage of parameters and buffers."""
    tensors = (*module.parameters(), *module.buffers())
    return [*{t.untyped_storage()._cdata: t for t in tensors}.values()]


def _allocated(module: nn.Module) -> int | None:
    """See `Account.allocated`."""
    device = next((t.device for t in module.parameters()), None)
    if device is None or device.type != "cuda" or not torch.cuda.is_available():
        return None
    return torch.cuda.max_memory_allocated(device)
