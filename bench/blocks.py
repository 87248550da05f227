"""What the first two steps with blocks as units cost on top of eager ones, for few and many layers.

python bench/blocks.py gpt2 llama --policy everything

All equal layers share one capture, so many should take little longer than few.
"""

import argparse
import gc
import statistics
import sys
import time
from pathlib import Path

import torch
from tabulate import tabulate
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import fxckpt
from bench.models import Case, build

SIZES = {"width": 64, "heads": 4, "batch": 2, "seq": 16, "vocab": 128}
STEPS = 2


def steps(model: nn.Module, case: Case) -> float:
    """Processor seconds of two training steps."""
    batch = case.batch(0)
    start = time.process_time()
    for _ in range(STEPS):
        case.loss(model(**batch)).backward()
        model.zero_grad()
    return time.process_time() - start


def measure(name: str, layers: int, policy: str) -> dict[str, float]:
    """One round: seconds of eager steps, and beyond them of the first ones and of later ones."""
    case = build(name, layers=layers, **SIZES)
    steps(case.model, case)
    model = fxckpt.rewrite(case.model, policy, units="blocks", strict=True)
    gc.collect()  # else some rounds pay for what others left
    first = steps(model, case)
    eager = steps(case.model, case)
    return {"eager": eager, "first": first - eager, "later": steps(model, case) - eager}


def rows(name: str, policy: str, counts: list[int], rounds: int) -> list[list[str]]:
    """The table of a model: medians of rounds that alternate between the numbers of layers."""
    measure(name, counts[0], policy)  # what is done once in a process
    found: dict[int, list[dict[str, float]]] = {n: [] for n in counts}
    for _ in range(rounds):
        for n in counts:
            found[n].append(measure(name, n, policy))
    table = []
    for n in counts:
        ratios = [a["first"] / b["first"] for a, b in zip(found[n], found[counts[0]], strict=True)]
        medians = [
            statistics.median(r[key] for r in found[n]) for key in ("eager", "first", "later")
        ]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        times = [f"{1e3 * seconds:.0f}" for seconds in medians]
        table.append([name, str(n), *times, f"{statistics.median(ratios):.2f}", spread])
    return table


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=["gpt2", "llama"])
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 80])
    parser.add_argument("--policy", default="everything")
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    table = [
        row
        for name in chosen.models
        for row in rows(name, chosen.policy, chosen.layers, chosen.rounds)
    ]
    headers = ["model", "layers", "two eager steps (ms)", "first two: more (ms)"]
    headers += ["later two: more (ms)", f"of {chosen.layers[0]} layers (x)", "rounds"]
    print(tabulate(table, headers=headers, disable_numparse=True))


if __name__ == "__main__":
    main()
