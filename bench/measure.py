"""Memory of one training step, as it was really allocated. See docs/measuring-memory.md.

    python bench/measure.py --validate

measures several models by two independent methods and prints them side by side.
"""

import argparse
import gc
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from tabulate import tabulate
from torch import Tensor
from torch.autograd.profiler import profile, record_function
from torch.nn import Parameter

from bench.rows import all_rows
from bench.step import Setup, Step

METHOD = {
    "cpu": "CPU memory: allocation events of torch's profiler during one step, in a fresh process",
    "cuda": "CUDA memory: torch.cuda.max_memory_allocated of one step, in a fresh process",
}
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else each profile prints two lines
_BACKWARD = "fxckpt bench: backward starts"


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one training step after warm-up.

    Attributes:
        resident: parameters, buffers and the batch.
        total: the most that was allocated at any moment of the step.
        saved: what lived between forward and backward and was not there before forward.
        first_call: seconds from installing the row to the end of its first step, in a fresh
            process that has imported torch and transformers; capturing and compiling included.
    """

    resident: int
    total: int
    saved: int
    first_call: float

    @property
    def above(self) -> int:
        """The peak above parameters, buffers and batch: activations, temporaries, gradients."""
        return self.total - self.resident


def measure(setup: Setup, row_name: str, budgets: tuple[float, ...] | None) -> Memory:
    """Measures one row; to be called in a process of its own."""
    step, first_call = _warmed_up(setup, row_name, budgets)
    before = _allocated(setup.device)
    peak, saved = peak_and_saved(step, setup.device)
    return Memory(_storage_bytes(step.resident()), before + peak, saved, first_call)


def _warmed_up(
    setup: Setup, row_name: str, budgets: tuple[float, ...] | None
) -> tuple[Step, float]:
    """A step that ran before, without its gradients, and the seconds of its first call."""
    torch.set_num_threads(setup.threads)
    row = {row.name: row for row in all_rows(budgets)}[row_name]
    step = Step(setup, row)
    started = time.perf_counter()
    step.run_seeded()
    first_call = step.install_seconds + time.perf_counter() - started
    step.run_seeded()
    step.clear()
    gc.collect()
    return step, first_call


def _allocated(device: str) -> int:
    """Bytes allocated now; on the CPU those of all tensors that Python can reach."""
    if device == "cuda":
        return torch.cuda.memory_allocated()
    # The exact types: a fake tensor owns no memory.
    return _storage_bytes(x for x in gc.get_objects() if type(x) in (Tensor, Parameter))


def _storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages under `tensors`."""
    storages = (x.untyped_storage() for x in tensors if x.device.type != "meta")
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


class Runnable(Protocol):
    """One training step, which calls `between` when forward and loss are done."""

    def run(self, between: Callable[[], None] = ...) -> None:
        """Runs it."""


def peak_and_saved(step: Runnable, device: str) -> tuple[int, int]:
    """Bytes of one step above what is allocated before it.

    Returns:
        The most at any moment, and what lives between forward and backward.
    """
    return (_events_cuda if device == "cuda" else _events_cpu)(step)


def _events_cuda(step: Runnable) -> tuple[int, int]:
    before = torch.cuda.memory_allocated()
    saved = 0

    def between() -> None:
        nonlocal saved
        saved = torch.cuda.memory_allocated() - before

    torch.cuda.reset_peak_memory_stats()
    step.run(between)
    return torch.cuda.max_memory_allocated() - before, saved


def _events_cpu(step: Runnable) -> tuple[int, int]:

    def between() -> None:
        with record_function(_BACKWARD):
            pass

    with profile(profile_memory=True) as profiler:
        step.run(between)
    live = peak = saved = 0
    for event in sorted(profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == _BACKWARD:
            saved = live
        elif event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak, saved


def _resident_peak(step: Step) -> int:
    """Peak of one step above what is resident before it, as the kernel counts pages (Linux)."""
    before = _kernel_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    step.run()
    return _kernel_bytes("VmHWM") - before


def _kernel_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def _both_methods(model: str, sizes: dict[str, float], row: str, threads: int) -> None:
    """Prints the peak of one step above resident, by the profiler and by the kernel."""
    step, _ = _warmed_up(Setup(model, sizes, "cpu", "fp32", threads), row, None)
    kernel = _resident_peak(step)
    step.clear()
    gc.collect()
    events, _ = _events_cpu(step)
    print(json.dumps([events, kernel]))


VALIDATED: tuple[tuple[str, dict[str, float]], ...] = (
    ("gpt2", {"layers": 6, "width": 128, "batch": 2}),
    ("gpt2", {"layers": 12, "width": 256, "batch": 4}),
    ("gpt2", {"layers": 12, "width": 256, "batch": 8, "seq": 256}),
    ("gpt2", {"layers": 4, "width": 768, "heads": 12, "batch": 2, "seq": 256, "vocab": 50257}),
    ("resnet", {"layers": 18, "batch": 8, "image": 96}),
    ("unet", {"layers": 3, "batch": 2, "image": 96}),
)
# Fixed thresholds: each block of 64 KiB and more is mapped alone and returned when it is freed.
_RETURNING_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def validate(threads: int) -> None:
    """Prints the peaks that both methods measure, one process a line of the table."""
    table = []
    for (model, sizes), row in itertools.product(VALIDATED, ("eager", "torch.checkpoint")):
        command = [sys.executable, __file__, "--one", json.dumps([model, sizes, row, threads])]
        environment = os.environ | _RETURNING_MALLOC
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
        events, kernel = json.loads(done.stdout)
        shown = " ".join([model, *(f"{name}={value}" for name, value in sizes.items())])
        table.append([shown, row, events / 2**20, kernel / 2**20, events / kernel])
    headers = ["model", "row", "allocation events MiB", "resident memory MiB", "ratio"]
    print(tabulate(table, headers, floatfmt=("", "", ".1f", ".1f", ".3f")))


def main() -> None:
    """Command line: `--validate`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--validate", action="store_true", help="compare two methods")
    action.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    if arguments.one:
        _both_methods(*arguments.one)
    else:
        validate(arguments.threads)


if __name__ == "__main__":
    main()
