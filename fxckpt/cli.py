"""The command line: will a model fit on that device, and what does it cost?

python -m fxckpt plan --model gpt2 --batch 8 --seq 1024 --dtype bf16 --device h200 --budget 4GiB
python -m fxckpt explain --model bert --batch 32 --policy block --html report.html
python -m fxckpt frontier --model llama --set num_hidden_layers=8 --device a100 --plot curve.png
python -m fxckpt fit-batch --model vit --device rtx4090
python -m fxckpt compare mypackage.training:make_model --device h100

Everything is computed on fake tensors: nothing is downloaded, run or allocated, so any machine can
answer for any device. A model is the type of a configuration of transformers (gpt2, bert, llama,
vit), with its default sizes unless --set changes them, or a function module:factory that returns
(model, arguments), and may take batch=, seq= and image=.

The budget is what forward and backward may hold above what is there before: parameters and states
of the optimizer. Without --budget, it is the memory of --device less these.

Exit codes: 0 it fits, 1 it does not, 2 the question cannot be answered.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from tabulate import tabulate
from torch import nn

from fxckpt.errors import BudgetError, FxckptError
from fxckpt.explaining import explain, storages_of
from fxckpt.frontiers import Frontier
from fxckpt.options import STATES, parser_of
from fxckpt.planning import fit_batch, frontier, plan
from fxckpt.quantities import readable, readable_seconds
from fxckpt.rates import DEVICES
from fxckpt.render import other_kernels
from fxckpt.targets import DTYPES, Sizes, Target, load

FITS, TOO_LARGE, UNKNOWN = 0, 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line, and returns its exit code.

    Args:
        arguments: Those after the name of the program; None for `sys.argv`.
    """
    options = parser_of(__doc__ or "", _RUNS).parse_args(arguments)
    progress = _Progress(quiet=options.quiet)
    try:
        run: Callable[[Any, _Progress], int] = options.run
        return run(options, progress)
    except BudgetError as error:
        print(f"it does not fit: {error}", file=sys.stderr)
        return TOO_LARGE
    except FxckptError as error:
        print(f"fxckpt {options.command}: {error}", file=sys.stderr)
        return UNKNOWN


class _Progress:
    """Says on stderr what is being done, as some of it takes long."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet, self._start = quiet, time.monotonic()

    def __call__(self, what: str) -> None:
        if not self._quiet:
            seconds = time.monotonic() - self._start
            print(f"[{seconds:5.1f} s] {what}", file=sys.stderr, flush=True)


# --- what all commands need -----------------------------------------------------------------------


def _target(options: Any, progress: _Progress) -> Target:
    name = options.target or options.model
    if options.target and ":" not in name:
        raise FxckptError(
            f"{name!r} is no module:factory. A model of transformers is named by --model {name}"
        )
    progress(f"making {name} on fake tensors")
    sizes = Sizes(options.batch, options.seq, options.image)
    return load(name, sizes, DTYPES[options.dtype], dict(options.set))


def _there_before(model: nn.Module, optimizer: str) -> tuple[int, int]:
    """Bytes of parameters and buffers, and of the states of the optimizer."""
    held = sum(t.untyped_storage().nbytes() for t in storages_of(model))
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return held, STATES[optimizer] * trained


def _room(options: Any, target: Target) -> int | float:
    """The budget that was given, or what a device has left.

    Raises:
        BudgetError: if it has not even room for what is there before the step.
        FxckptError: if neither is given.
    """
    if options.budget is not None:
        return float(options.budget) if isinstance(options.budget, float) else options.budget
    device = DEVICES.get(options.device)
    if device is None or device.memory is None:
        raise FxckptError("give --budget, or --device with a known memory: " + ", ".join(DEVICES))
    parameters, states = _there_before(target.model, options.optimizer)
    room = device.memory - parameters - states
    if room <= 0:
        raise BudgetError(
            f"parameters ({readable(parameters)}) and states of the optimizer "
            f"({readable(states)}) alone are more than the memory of {device.name} "
            f"({readable(device.memory)})"
        )
    return room


def _on_the_device(options: Any, target: Target, peak: int) -> str:
    """What a step comes to with what is there before it."""
    parameters, states = _there_before(target.model, options.optimizer)
    whole = f"In all {readable(peak + parameters + states)}: the step {readable(peak)}, "
    whole += f"parameters {readable(parameters)}, {options.optimizer} {readable(states)}"
    device = DEVICES.get(options.device)
    if device is None or device.memory is None:
        return whole
    whole += f"; {device.name} has {readable(device.memory)}"
    return f"{whole}\n{other_kernels('cpu', device.name)}"


def _show(options: Any, data: Any, text: str) -> None:
    print(json.dumps(data) if options.json else text)


# --- commands -------------------------------------------------------------------------------------


def _explain(options: Any, progress: _Progress) -> int:
    target = _target(options, progress)
    args, kwargs = target.call(options.batch)
    if options.policy is not None and options.budget is not None:
        raise FxckptError("--policy and --budget exclude each other")
    given: dict[str, Any] = {"policy": options.policy, "budget": options.budget}
    progress("capturing the step" + (" and planning" if options.budget is not None else ""))
    report = explain(
        target.model,
        *args,
        **{k: v for k, v in given.items() if v is not None},
        device=options.device,
        planning_seconds=options.seconds,
        **kwargs,
    )
    for path, write in ((options.plot, report.plot), (options.html, report.to_html)):
        if path:
            progress(f"writing {path}")
            write(path)
    _show(options, report.to_dict(), report.to_markdown() if options.markdown else str(report))
    device = DEVICES.get(options.device)
    before = sum(_there_before(target.model, options.optimizer))
    fits = device is None or device.memory is None or (report.peak or 0) + before <= device.memory
    return FITS if fits else TOO_LARGE


def _plan(options: Any, progress: _Progress) -> int:
    target = _target(options, progress)
    room = _room(options, target)
    args, kwargs = target.call(options.batch)
    progress("capturing the step and planning")
    planning = {"device": options.device, "planning_seconds": options.seconds}
    made = plan(target.model, *args, budget=room, **planning, **kwargs)
    if options.save:
        made.save(options.save)
    rows = [
        ["budget", readable(made.budget)],
        ["peak as it is", readable(made.eager_peak)],
        ["peak of the plan", readable(made.peak)],
        ["time as it is", f"{readable_seconds(made.step_seconds)} ({made.device})"],
        ["runs again", f"{readable_seconds(made.seconds)} (+{made.overhead:.1%})"],
        ["at least", f"{readable_seconds(made.bound)} (gap {made.gap:.1%})"],
    ]
    verdict = "it fits as it is" if made.eager_peak <= made.budget else "it fits with this plan"
    whole = _on_the_device(options, target, made.peak)
    data = {
        key: getattr(made, key)
        for key in ("budget", "peak", "eager_peak", "seconds", "step_seconds", "bound", "overhead")
    }
    table = tabulate(rows, tablefmt="plain", disable_numparse=True)
    _show(options, {**data, "device": made.device, "fits": True}, f"{verdict}\n{table}\n{whole}")
    return FITS


def _frontier(options: Any, progress: _Progress) -> int:
    target = _target(options, progress)
    args, kwargs = target.call(options.batch)
    progress(f"capturing the step and planning for {options.points} budgets")
    planning = {"device": options.device, "planning_seconds": options.seconds}
    curve: Frontier = frontier(target.model, *args, points=options.points, **planning, **kwargs)
    chosen = None
    if options.budget is not None:
        progress("planning for the budget")
        chosen = plan(target.model, *args, budget=options.budget, **planning, **kwargs)
    if options.plot:
        progress(f"writing {options.plot}")
        curve.plot(options.plot, chosen)
    eager = curve[-1].eager_peak
    lines = [("fxckpt", p.peak, p.overhead, "") for p in curve]
    for name, (peak, overhead) in curve.peers.items():
        ours = f"+{curve.beside[name].overhead:.1%}" if name in curve.beside else ""
        lines.append((name, peak, overhead, ours))
    rows = [
        [name, readable(peak), f"{peak / eager:.0%}", f"+{overhead:.1%}", ours]
        for name, peak, overhead, ours in lines
    ]
    headers = ["", "peak", "of as it is", "time", "fxckpt in that memory"]
    _show(options, curve.to_dict(), tabulate(rows, headers, disable_numparse=True))
    return FITS


def _fit_batch(options: Any, progress: _Progress) -> int:
    target = _target(options, progress)
    room = _room(options, target)
    if isinstance(room, float):
        raise FxckptError("fit-batch needs --budget in bytes: a fraction of which batch?")

    def make(batch: int) -> Any:
        progress(f"planning for a batch of {batch}")
        args, kwargs = target.arguments(batch)
        return kwargs or args

    fit = fit_batch(
        make,
        target.model,
        memory=room,
        device=options.device,
        planning_seconds=options.seconds,
    )
    data = {
        "batch": fit.batch,
        "budget": room,
        "peak": fit.plan.peak,
        "overhead": fit.plan.overhead,
    }
    text = (
        f"a batch of {fit.batch} fits {readable(room)}: peak {readable(fit.plan.peak)} instead of "
        f"{readable(fit.plan.eager_peak)}, time +{fit.plan.overhead:.1%}\n"
        f"{_on_the_device(options, target, fit.plan.peak)}"
    )
    _show(options, data, text)
    return FITS


def _compare(options: Any, progress: _Progress) -> int:
    target = _target(options, progress)
    args, kwargs = target.call(options.batch)
    progress("capturing the step, and planning in the memory of each strategy")
    planning = {"device": options.device, "planning_seconds": options.seconds}
    curve = frontier(target.model, *args, points=1, **planning, **kwargs)
    eager = curve[-1].eager_peak
    data: list[dict[str, Any]] = [{"strategy": "as it is", "peak": eager, "overhead": 0.0}]
    for name, peer in curve.peers.items():
        ours = {"fxckpt": curve.beside[name].overhead} if name in curve.beside else {}
        data.append({"strategy": name, **peer._asdict(), **ours})
    if options.budget is not None:
        progress("planning for the budget")
        made = plan(target.model, *args, budget=options.budget, **planning, **kwargs)
        entry = {"peak": made.peak, "overhead": made.overhead, "fxckpt": made.overhead}
        data.append({"strategy": f"fxckpt, budget {readable(made.budget)}", **entry})
    rows = [
        [
            entry["strategy"],
            readable(entry["peak"]),
            f"{entry['peak'] / eager:.0%}",
            f"+{entry['overhead']:.1%}",
            f"+{entry['fxckpt']:.1%}" if "fxckpt" in entry else "",
        ]
        for entry in data
    ]
    headers = ["strategy", "peak", "of as it is", "time", "fxckpt in that memory"]
    _show(options, data, tabulate(rows, headers, disable_numparse=True))
    return FITS


_RUNS = {
    "explain": _explain,
    "plan": _plan,
    "frontier": _frontier,
    "fit-batch": _fit_batch,
    "compare": _compare,
}
