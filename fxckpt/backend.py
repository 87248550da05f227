"""A backend for `torch.compile` that checkpoints what Dynamo has traced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule
from torch.fx._lazy_graph_module import _LazyGraphModule
from typing_extensions import Unpack

from fxckpt.functional import Options, checkpoint

Backend = Callable[[GraphModule, Sequence[torch.Tensor]], Callable[..., Any]]


def backend(**options: Unpack[Options]) -> Backend:
    """A backend: `torch.compile(model, backend=fxckpt.backend(budget="8GiB"))`.

    Dynamo follows the Python of the model and hands over graphs, cut where it cannot follow; each
    of them becomes a unit. So models are checkpointed whose Python depends on data, which `rewrite`
    could capture in parts only. A policy and a budget are those of one graph. Results are
    bit-identical to those of the graphs that Dynamo has traced, as a rule those of eager.

    Args:
        **options: Those of `fxckpt.checkpoint`; with `compile=True` Inductor compiles both halves
            of each graph.

    Raises:
        PolicyError: if the policy makes no sense.
        BudgetError: if the budget means nothing; when the model is called, if no plan fits.

    Example:
        >>> import torch, fxckpt
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh())
        >>> compiled = torch.compile(model, backend=fxckpt.backend(policy="dots"))
        >>> compiled(torch.ones(2, 4)).sum().backward()
    """
    checkpoint(_nothing, **options)  # raises if they make no sense

    def checkpointed(graph: GraphModule, inputs: Sequence[torch.Tensor]) -> Callable[..., Any]:
        _LazyGraphModule.force_recompile(graph)  # else its first call changes it
        return checkpoint(graph.forward, **options)

    return checkpointed


def _nothing() -> None:
    """Stands in for a graph."""
