"""What reading the signature of a call costs, beside a step of a launch-bound model.

python bench/signature.py
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import fxckpt
from bench.models import build
from fxckpt import signature, tree


def median_seconds(run: Callable[[], object], rounds: int = 300) -> float:
    """The median time of one call of `run`."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    """Prints both times and their ratio."""
    torch.set_num_threads(1)
    case = build("gpt2", layers=6, width=32, heads=4, batch=1, seq=8, vocab=128)
    batch = case.batch(0)
    model = fxckpt.rewrite(case.model, "everything", strict=True)
    watch = signature.Watch(model)

    def step() -> None:
        case.loss(case.model(**batch)).backward()
        case.model.zero_grad()

    def read() -> int:
        tensors, spec = tree.flatten(((), batch), open_objects=True)
        arguments = signature.of_arguments(spec, tensors)
        return hash((watch.state(), signature.of_modes(), arguments))

    eager, check = median_seconds(step), median_seconds(read)
    print(f"eager step {eager * 1e3:.3f} ms, signature {check * 1e6:.0f} us: {check / eager:.2%}")


if __name__ == "__main__":
    main()
