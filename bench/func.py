"""Memory and time of gradients by torch.func, with and without checkpoint.

    python bench/func.py

Of a multilayer perceptron; runs are interleaved, times are medians relative to the model as it is.
"""

import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, jvp, vmap

import fxckpt
from bench.measure import peak_and_saved
from bench.networks import MLP

ROUNDS = 5
POLICIES = (None, "sqrt", "dots", "nothing")
Run = Callable[[nn.Module], Any]


def runs(model: nn.Module, x: Tensor) -> dict[str, Run]:
    """What is measured, by name."""
    sequences = x.expand(4, *x.shape)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(module: nn.Module) -> Callable[..., Tensor]:
        return lambda p, sample: functional_call(module, p, (sample,)).square().sum()

    def hvp(module: nn.Module) -> Any:
        gradient = grad(loss(module))
        return jvp(lambda p: gradient(p, x), (parameters,), (parameters,))[1]

    def jacobian(module: nn.Module) -> Any:
        return jacrev(lambda sample: functional_call(module, parameters, (sample,)))(x[:16])

    return {
        "gradient": lambda module: grad(loss(module))(parameters, x),
        "per-sample gradients": lambda m: vmap(grad(loss(m)), (None, 0))(parameters, sequences),
        "Hessian-vector product": hvp,
        "Jacobian": jacobian,
    }


def measure(name: str, run: Run, models: dict[str, nn.Module]) -> list[list[Any]]:
    """Rows of the table: peak and time relative to the model as it is."""
    seconds: dict[str, list[float]] = {policy: [] for policy in models}
    for _ in range(ROUNDS + 1):
        for policy, model in models.items():
            start = time.perf_counter()
            run(model)
            seconds[policy].append(time.perf_counter() - start)
    medians = {policy: statistics.median(each[1:]) for policy, each in seconds.items()}
    peaks = {
        policy: peak_and_saved(SimpleNamespace(run=lambda _, m=model: run(m)), "cpu")[0]
        for policy, model in models.items()
    }
    plain = next(iter(models))
    return [
        [
            name,
            policy,
            peaks[policy] / 2**20,
            peaks[policy] / peaks[plain],
            medians[policy] / medians[plain],
        ]
        for policy in models
    ]


def main() -> None:
    """Prints the table."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, x = MLP(layers=24, width=64, classes=16, dropout=0.0), torch.randn(512, 64)
    models = {
        policy or "without": model if policy is None else fxckpt.rewrite(model, policy, strict=True)
        for policy in POLICIES
    }
    rows = [row for name, run in runs(model, x).items() for row in measure(name, run, models)]
    headers = ["what", "policy", "peak MiB", "memory", "time"]
    print(tabulate(rows, headers, "github", floatfmt=("", "", ".1f", ".2f", ".2f")))


if __name__ == "__main__":
    main()
