"""Memory and time of gradients by torch.func, with and without checkpoint.

    python bench/func.py

Of a multilayer perceptron; runs are interleaved, times are medians relative to the model as it is.
The last rows are the same network in JAX, compiled for the CPU: what XLA says it needs, and times.
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

ROUNDS, SAMPLES = 5, 4
POLICIES = (None, "sqrt", "dots", "nothing")
Run = Callable[[nn.Module], Any]


def runs(model: nn.Module, x: Tensor) -> dict[str, Run]:
    """What is measured, by name."""
    sequences = x.expand(SAMPLES, *x.shape)
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


def jax_rows(layers: int, width: int, x: Tensor) -> list[list[Any]]:
    """Per-sample gradients of the same network in JAX, without and with remat of each layer."""
    import jax
    from jax import numpy as jnp

    keys = iter(jax.random.split(jax.random.key(0), 2 * layers))
    shapes = ((width, 4 * width), (4 * width, width))
    weights = [
        [jax.random.normal(next(keys), s) / s[0] ** 0.5 for s in shapes] for _ in range(layers)
    ]
    samples = jnp.stack([jnp.asarray(x.numpy())] * SAMPLES)

    def layer(w: Any, h: Any) -> Any:
        normed = (h - h.mean(-1, keepdims=True)) / jnp.sqrt(h.var(-1, keepdims=True) + 1e-5)
        return h + jax.nn.gelu(normed @ w[0], approximate=False) @ w[1]

    def gradients(step: Callable[..., Any]) -> Any:
        def loss(ws: Any, h: Any) -> Any:
            for w in ws:
                h = step(w, h)
            return jnp.square(h).sum()

        return jax.jit(jax.vmap(jax.grad(loss), (None, 0))).lower(weights, samples).compile()

    rows, first = [], None
    for policy, step in (("without", layer), ("remat of layers", jax.checkpoint(layer))):
        compiled, seconds = gradients(step), []
        for _ in range(ROUNDS + 1):
            start = time.perf_counter()
            jax.block_until_ready(compiled(weights, samples))
            seconds.append(time.perf_counter() - start)
        found = compiled.memory_analysis()
        measured = (
            found.temp_size_in_bytes + found.output_size_in_bytes,
            statistics.median(seconds[1:]),
        )
        first = first or measured
        ratios = [a / b for a, b in zip(measured, first, strict=True)]
        rows.append(["per-sample gradients, JAX", policy, measured[0] / 2**20, *ratios])
    return rows


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
    rows += jax_rows(24, 64, x)
    headers = ["what", "policy", "peak MiB", "memory", "time"]
    print(tabulate(rows, headers, "github", floatfmt=("", "", ".1f", ".2f", ".2f")))


if __name__ == "__main__":
    main()
