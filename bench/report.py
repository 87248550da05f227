"""The comparison as a table and as data."""

import os
import platform
import re
import statistics
import textwrap
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from bench.measure import METHOD, Memory
from bench.models import default_sizes
from bench.rows import EAGER
from bench.step import STEP, Setup
from bench.timing import Failure, Timing, quartiles

# By the first part of a row's name; Okabe and Ito.
_COLOURS = {"fxckpt": "#0072B2", "torch": "#E69F00", "transformers": "#009E73"}

HEADERS = (
    "row",
    "peak\nMiB",
    "x\neager",
    "above params\nMiB",
    "x\neager",
    "saved\nMiB",
    "first call\ns",
    "step\nms",
    "x eager\n[quartiles]",
    "gradients\nvs eager",
)


@dataclass(frozen=True, slots=True)
class Result:
    """All that was measured of one row; a part that failed holds the reason."""

    memory: Memory | Failure
    timing: Timing | Failure

    def measured(self) -> Memory:
        """The memory; ValueError where it could not be measured."""
        if isinstance(self.memory, Failure):
            raise ValueError(self.memory.reason)
        return self.memory

    def timed(self) -> Timing:
        """The timing; ValueError where there is none."""
        if isinstance(self.timing, Failure):
            raise ValueError(self.timing.reason)
        return self.timing

    @property
    def failure(self) -> Failure | None:
        """Why the row failed, where it did."""
        parts = (self.memory, self.timing)
        return next((part for part in parts if isinstance(part, Failure)), None)

    @property
    def peak(self) -> int:
        """Peak bytes of a step."""
        return self.measured().total

    @property
    def first_call(self) -> float:
        """Seconds of the first call."""
        return self.measured().first_call

    def time_ratio(self, reference: "Result") -> float:
        """Median over rounds of this row's step time over the reference's."""
        return statistics.median(self.timed().ratios(reference.timed()))


def table(results: Mapping[str, Result], *, markdown: bool = False) -> str:
    """The table, and under it in full why rows failed."""
    eager = results[EAGER]
    lines = [[name, *_cells(result, eager)] for name, result in results.items()]
    failures = [
        textwrap.shorten(f"{name}: {result.failure.reason}", 300)
        for name, result in results.items()
        if result.failure
    ]
    align = ("left", *("right" for _ in HEADERS[1:-1]), "left")
    headers = [header.replace("\n", " ") for header in HEADERS] if markdown else HEADERS
    style = "github" if markdown else "simple"
    shown = tabulate(lines, headers, style, colalign=align, disable_numparse=True)
    return "\n\n".join([shown, *failures]) if markdown else "\n".join([shown, *failures])


def page(setup: Setup, repeats: int, results: Mapping[str, Result], command: str) -> str:
    """The comparison in Markdown."""
    head = heading(setup, repeats).replace("\n", "\n\n")
    parts = [f"# {head}", f"By `{command}`.", table(results, markdown=True)]
    return "\n\n".join([*parts, footer(setup, repeats)]) + "\n"


def plot(setup: Setup, results: Mapping[str, Result], path: Path) -> None:
    """Draws memory and time of each row that could be measured, beside eager."""
    from matplotlib.figure import Figure

    eager = results[EAGER]
    rows = [(name, r) for name, r in reversed(results.items()) if r.failure is None]
    figure = Figure(figsize=(9, 1.4 + 0.32 * len(rows)), layout="constrained")
    memory, time = figure.subplots(1, 2, sharey=True)
    names = [name for name, _ in rows]
    colours = [_COLOURS.get(re.split(r"[.@]", name)[0], "#999999") for name in names]
    memory.barh(names, [r.measured().above / 2**20 for _, r in rows], color=colours)
    ratios = [quartiles(r.timed().ratios(eager.timed())) for _, r in rows]
    middles = [middle for _, middle, _ in ratios]
    reach = [
        [middle - low for low, middle, _ in ratios],
        [high - middle for _, middle, high in ratios],
    ]
    time.barh(names, middles, xerr=reach, color=colours, error_kw={"linewidth": 1})
    for axes, most in ((memory, eager.measured().above / 2**20), (time, 1.0)):
        axes.axvline(most, color="black", linewidth=1, linestyle=":")
        axes.spines[["top", "right"]].set_visible(False)
    memory.set_xlabel("peak above parameters, MiB")
    time.set_xlabel("step time, times eager (median, quartiles)")
    figure.suptitle(heading(setup, 0).split("\n")[0], x=0.01, ha="left", fontsize=10)
    figure.savefig(path, dpi=150)


def _cells(result: Result, eager: Result) -> list[str]:
    return [*_memory_cells(result.memory, eager), *_time_cells(result, eager), _verdict(result)]


def _memory_cells(memory: Memory | Failure, eager: Result) -> list[str]:
    if isinstance(memory, Failure):
        return ["-"] * 6
    base = eager.measured()
    return [
        _mib(memory.total),
        f"{memory.total / base.total:.2f}",
        _mib(memory.above),
        f"{memory.above / base.above:.2f}",
        _mib(memory.saved),
        f"{memory.first_call:.2f}",
    ]


def _time_cells(result: Result, eager: Result) -> list[str]:
    if isinstance(result.timing, Failure):
        return ["-", "-"]
    low, middle, high = quartiles(result.timing.ratios(eager.timed()))
    milliseconds = statistics.median(result.timing.seconds) * 1e3
    shown = f"{milliseconds:.0f}" if milliseconds >= 1000 else f"{milliseconds:.4g}"
    return [shown, f"{middle:.2f} [{low:.2f}-{high:.2f}]"]


def _verdict(result: Result) -> str:
    """How the gradients compare, or why there are none."""
    if result.failure:
        return textwrap.shorten(result.failure.reason, 40, placeholder=" ...")
    timing = result.timed()
    gradients = "bitwise" if timing.gradients == 0 else f"differ by {timing.gradients:.1e}"
    return gradients if timing.buffers_equal else f"{gradients}; buffers differ"


def _mib(count: int) -> str:
    mib = count / 2**20
    return f"{mib:.1f}" if mib >= 10 else f"{mib:.3f}"


def heading(setup: Setup, repeats: int) -> str:
    """What is trained, where, with which versions."""
    sizes = " ".join(f"{name}={value}" for name, value in all_sizes(setup).items())
    about = environment(setup)
    return (
        f"{setup.model} {sizes}\n{setup.dtype}{'' if setup.dtype == 'fp32' else ' autocast'}, "
        f"{about['device']}, {setup.threads} threads, {repeats} rounds, torch {about['torch']}"
    )


def footer(setup: Setup, repeats: int) -> str:
    """What the columns mean."""
    text = (
        f"A step is {STEP}. Times are medians of {repeats} rounds in which all rows take turns in "
        "one process; the ratio is the median of each round's. "
        f"{METHOD[setup.device]}, after two warm-up steps: peak counts parameters, buffers and "
        "batch, saved is what lives between forward and backward. Gradients are compared "
        "after the first and the second step (eager's own row: with a second run of itself); a "
        "difference is relative to the tensor's largest element. Inductor draws other dropout "
        "masks: with dropout its gradients cannot agree."
    )
    return textwrap.fill(text, 100)


def all_sizes(setup: Setup) -> dict[str, float]:
    """The model's sizes, defaults included."""
    return {**default_sizes(setup.model), **setup.sizes}


def environment(setup: Setup) -> dict[str, Any]:
    """Versions and device."""
    cuda = setup.device == "cuda"
    return {
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if cuda else f"CPU {platform.machine()}",
        "cpus": os.cpu_count(),
    }


def raw(setup: Setup, repeats: int, results: Mapping[str, Result]) -> dict[str, Any]:
    """Everything measured, all samples included, for `json.dump`."""
    return {
        "setup": {**asdict(setup), "sizes": all_sizes(setup)},
        "repeats": repeats,
        "step": STEP,
        "memory": METHOD[setup.device],
        "environment": environment(setup),
        "rows": {name: asdict(result) for name, result in results.items()},
    }
