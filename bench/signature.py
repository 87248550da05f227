"""What reading the signature of a call costs, beside a step of a launch-bound model.

python bench/signature.py
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import fxckpt
from bench.models import build
from fxckpt.captures import Call
from fxckpt.installation import runner_of

LAYERS = (6, 24, 76)


def median_seconds(run: Callable[[], object], rounds: int) -> float:
    """The median time of one call of `run`."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(layers: int) -> dict[str, str]:
    """A row of the table: a tiny GPT-2 with so many layers."""
    case = build("gpt2", layers=layers, width=32, heads=4, batch=1, seq=8, vocab=128)
    batch = case.batch(0)
    model = fxckpt.rewrite(case.model, "everything", units="model", strict=True)
    case.loss(model(**batch)).backward()
    captures = runner_of(model).captures

    def step() -> None:
        case.loss(case.model(**batch)).backward()
        case.model.zero_grad()

    def read() -> int:
        return hash(captures.signature(model, Call.of((), batch)))

    rounds = max(10, 1800 // layers)
    eager, check = median_seconds(step, rounds), median_seconds(read, rounds)
    modules = list(model.modules())
    attributes = sum(len(vars(m)) for m in modules)
    return {
        "modules": f"{len(modules):,}",
        "their attributes": f"{attributes:,}",
        "eager step (ms)": f"{eager * 1e3:.2f}",
        "signature (us)": f"{check * 1e6:.0f}",
        "of the step": f"{check / eager:.1%}",
        "per attribute (ns)": f"{check / attributes * 1e9:.1f}",
    }


def main() -> None:
    """Prints the table."""
    torch.set_num_threads(1)
    print(tabulate([measure(layers) for layers in LAYERS], headers="keys"))


if __name__ == "__main__":
    main()
