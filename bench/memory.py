"""Peaks as planned and as allocated, for several budgets.

    python bench/memory.py                      all models, on the CPU
    python bench/memory.py --units blocks       the blocks as units, what is around them measured
    python bench/memory.py --device cuda --write bench/results/memory.md

Each model computes its loss itself, so that all of a step is planned. The budget is a fraction of
the planned peak without recomputation; where nothing fits, it is the least that does.
"""

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from tabulate import tabulate
from torch import Tensor, nn

import fxckpt
from bench.measure import peak_and_saved
from bench.models import Case, build

BUDGETS = (1.0, 0.7, 0.5, 0.3)
SIZES: dict[str, dict[str, float]] = {
    "gpt2": {"layers": 12, "width": 256, "batch": 8, "seq": 128},
    "bert": {"layers": 12, "width": 256, "batch": 8, "seq": 128},
    "llama": {"layers": 12, "width": 256, "batch": 8, "seq": 128},
    "resnet": {"layers": 50, "width": 32, "batch": 16, "image": 96},
    "unet": {"layers": 4, "width": 16, "batch": 8, "image": 128},
}


class WithLoss(nn.Module):
    """A model of a case that returns the loss."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.model, self.loss = case.model, case.loss

    def forward(self, **batch: Tensor) -> Tensor:
        """The loss of a batch."""
        return self.loss(self.model(**batch))


@dataclass(frozen=True)
class Training:
    """A step of it, as `bench.measure` runs it."""

    model: nn.Module
    batch: dict[str, Tensor]

    def run(self, between: Callable[[], None] = lambda: None) -> None:
        """Forward and backward, from gradients set to None."""
        self.model.zero_grad(set_to_none=True)
        loss = self.model(**self.batch)
        between()
        loss.backward()


def rows(name: str, device: str) -> Iterator[list[Any]]:
    """Budget, planned and measured peak, their ratio, and what runs again in ms as planned."""
    case = build(name, **SIZES[name])
    model = WithLoss(case).to(device)
    batch = {key: x.to(device) for key, x in case.batch(0).items()}
    eager = Training(model, batch)
    eager.run()
    model.zero_grad(set_to_none=True)
    measured, _ = peak_and_saved(eager, device)
    least = fxckpt.frontier(model, points=1, **batch)[0]
    eager_peak = least.eager_peak
    yield [name, "eager", eager_peak, measured, eager_peak / measured, 0.0]
    for fraction in BUDGETS:
        budget = max(int(fraction * eager_peak), least.peak)
        plan = fxckpt.plan(model, budget=budget, **batch)
        training = Training(fxckpt.rewrite(model, plan=plan, strict=True), batch)
        for _ in range(2):
            training.run()
        model.zero_grad(set_to_none=True)
        gc.collect()
        measured, _ = peak_and_saved(training, device)
        share, ratio = f"{budget / eager_peak:.0%}", plan.peak / measured
        yield [name, share, plan.peak, measured, ratio, plan.seconds * 1e3]


def rows_of_blocks(name: str, device: str) -> Iterator[list[Any]]:
    """The same with blocks as units; budgets below the least that fits are left out."""
    case = build(name, **SIZES[name])
    model = WithLoss(case).to(device)
    batch = {key: x.to(device) for key, x in case.batch(0).items()}
    for fraction in BUDGETS:
        training = Training(fxckpt.rewrite(model, budget=fraction, units="blocks"), batch)
        try:
            for _ in range(2):
                training.run()
        except fxckpt.BudgetError:
            return
        model.zero_grad(set_to_none=True)
        gc.collect()
        report = fxckpt.explain(training.model)
        measured, _ = peak_and_saved(training, device)
        assert report.peak is not None
        seconds = report.seconds * 1e3
        yield [name, f"{fraction:.0%}", report.peak, measured, report.peak / measured, seconds]


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", choices=[*SIZES], default=[*SIZES])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--units", choices=["model", "blocks"], default="model")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the page in Markdown")
    options = parser.parse_args(arguments)
    rows_for = rows if options.units == "model" else rows_of_blocks
    table = [
        [name, shown, planned / 2**20, measured / 2**20, *rest]
        for model in options.model
        for name, shown, planned, measured, *rest in rows_for(model, options.device)
    ]
    headers = ["model", "budget", "planned MiB", "measured MiB", "planned / measured", "again ms"]
    text = tabulate(table, headers, "github", floatfmt=("", "", ".2f", ".2f", ".4f", ".1f"))
    print(text)
    if options.write:
        command = " ".join(["python bench/memory.py", *(arguments or sys.argv[1:])])
        about = f"`{command}`, {time.strftime('%Y-%m-%d')}, torch {torch.__version__}"
        options.write.write_text(f"# Peaks as planned and as allocated\n\n{about}\n\n{text}\n")


if __name__ == "__main__":
    main()
