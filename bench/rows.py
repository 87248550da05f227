"""The rows of the comparison: ways to train one model with less memory, ours and the peers'.

A row takes a fresh `Case` and returns what to call instead of its model.
"""

import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from bench.models import Case

EAGER = "eager"
BUDGETS = (0.6, 0.4)
"""Of the rows with a planner, relative to eager's peak, parameters not counted."""
POLICIES = ("everything", "norm", "attention", "mlp", "dots", "block", "sqrt", "nothing")
COMPILED = ("dots", "block")  # policies of the rows of ours that are compiled, too

_aten = torch.ops.aten
MATRIX_PRODUCTS = [
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten.baddbmm.default,
    _aten.convolution.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
]
"""What selective checkpointing saves: matrix products, convolutions, attention products."""


@dataclass(frozen=True, slots=True)
class Row:
    """A named way to run a model.

    Attributes:
        name: shown in the table, selected by `--rows`.
        install: fresh case to the callable that the training step calls.
        applies: whether the model has this way at all.
    """

    name: str
    install: Callable[[Case], Callable[..., Any]]
    applies: Callable[[Case], bool] = lambda case: True


def all_rows(budgets: Sequence[float] | None) -> list[Row]:
    """Every row, eager first.

    Args:
        budgets: values of Inductor's `activation_memory_budget`; None leaves out what compiles.
    """
    rows = [
        Row(EAGER, lambda case: case.model),
        Row("torch.checkpoint", _checkpoint_blocks, _has_blocks),
        Row("torch.SAC", _selective_checkpoint_blocks, _has_blocks),
        Row("transformers", _own_checkpointing, lambda case: case.has_own_checkpointing),
    ]
    if budgets is not None:
        rows.append(Row("compile.aot_eager", lambda case: _compile(case.model, "aot_eager", 1.0)))
        rows += [
            Row(f"compile.inductor@{budget:g}", functools.partial(_inductor, budget=budget))
            for budget in budgets
        ]
        rows += [
            Row(
                f"fxckpt.{policy}+compile", functools.partial(_rewrite, policy=policy, compile=True)
            )
            for policy in COMPILED
        ]
        rows += [
            Row(f"compile.fxckpt.{policy}", functools.partial(_compiled_outside, policy=policy))
            for policy in COMPILED
        ]
    rows += [
        Row(f"fxckpt.{policy}", functools.partial(_rewrite, policy=policy)) for policy in POLICIES
    ]
    return rows + [
        Row(f"fxckpt@{budget:g}", functools.partial(_rewrite, budget=budget)) for budget in BUDGETS
    ]


def select(rows: Sequence[Row], patterns: Sequence[str]) -> list[Row]:
    """The rows that match a glob of `patterns`, and eager, to which all are compared.

    Raises:
        ValueError: a pattern matches no row.
    """
    for pattern in patterns:
        if not any(fnmatchcase(row.name, pattern) for row in rows):
            names = ", ".join(row.name for row in rows)
            raise ValueError(f"no row matches {pattern!r}; choose from {names}")
    wanted = [EAGER, *patterns]
    return [row for row in rows if any(fnmatchcase(row.name, pattern) for pattern in wanted)]


def _has_blocks(case: Case) -> bool:
    return bool(case.blocks)


def _checkpoint_blocks(case: Case, **options: Any) -> nn.Module:
    for name in case.blocks:
        block = case.model.get_submodule(name)
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, **options)
    return case.model


def _selective_checkpoint_blocks(case: Case) -> nn.Module:
    context = functools.partial(create_selective_checkpoint_contexts, MATRIX_PRODUCTS)
    return _checkpoint_blocks(case, context_fn=context)


def _own_checkpointing(case: Case) -> nn.Module:
    # transformers 5.20 renamed it; the old name warns.
    new = getattr(case.model, "activation_checkpointing_enable", None)
    (new or case.model.gradient_checkpointing_enable)({"use_reentrant": False})
    return case.model


def _compile(model: nn.Module, backend: str, budget: float) -> Callable[..., Any]:
    """Compiles afresh, with a backend of its own: Dynamo shares graphs between equal backends."""
    lower = torch._dynamo.lookup_backend(backend)
    uncached = torch._inductor.config.patch(force_disable_caches=True)

    def compile_graph(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        with uncached, torch._functorch.config.patch(activation_memory_budget=budget):
            return lower(graph, inputs)

    return torch.compile(model, backend=compile_graph)


def _inductor(case: Case, budget: float) -> Callable[..., Any]:
    return _compile(case.model, "inductor", budget)


def _compiled_outside(case: Case, policy: str) -> Callable[..., Any]:
    return _compile(_rewrite(case, policy=policy), "inductor", 1.0)


def _rewrite(case: Case, **options: Any) -> nn.Module:
    rewritten: nn.Module = importlib.import_module("fxckpt").rewrite(case.model, **options)
    return rewritten
