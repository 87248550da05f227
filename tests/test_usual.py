"""Usual strategies as torch runs them: simulated peaks against those of the allocator."""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import Function, joint_of
from test_memory import most_allocated
from torch import Tensor, nn

import fxckpt
from bench.memory import WithLoss
from bench.models import build
from bench.rows import _checkpoint_blocks, _selective_checkpoint_blocks
from fxckpt import ops
from fxckpt.joint import Joint, is_value
from fxckpt.memory import Memory
from fxckpt.regions import Structure
from fxckpt.schedule import Choice
from fxckpt.segments import segment_inputs, segments
from fxckpt.usual import usual

SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"layers": 4, "width": 128, "vocab": 1024},
    "bert": {"layers": 4, "width": 128, "vocab": 64},
    "resnet": {"layers": 50, "width": 16, "batch": 8, "image": 64},
}
INSTALL: dict[str, Callable[..., nn.Module]] = {
    "per-block checkpointing": _checkpoint_blocks,
    "selective, matmuls saved": _selective_checkpoint_blocks,
}


def captured(model: nn.Module, batch: dict[str, Tensor]) -> Joint:
    """The joint graph of a model."""
    rewritten = fxckpt.rewrite(model, "nothing", strict=True)
    rewritten(**batch)
    return joint_of(rewritten)


def measured_peak(model: nn.Module, batch: dict[str, Tensor]) -> int:
    """The most that is allocated in a step after the first one."""
    model(**batch).backward()
    model.zero_grad()
    gc.collect()
    return most_allocated(lambda: model(**batch).backward())


@pytest.mark.parametrize("strategy", INSTALL)
@pytest.mark.parametrize("name", SIZES)
def test_peaks_are_hardly_below_those_of_torch(name: str, strategy: str) -> None:
    """And not above: they would be easier to beat then."""
    model = WithLoss(build(name, **SIZES[name]))
    case = build(name, **SIZES[name])
    joint = captured(model, case.batch(0))
    memory = Memory(joint, outputs_held=False, eager=True)
    found = usual(strategy, memory, joint, lambda node: 1.0)
    INSTALL[strategy](case)
    ratio = found.peak / measured_peak(WithLoss(case), case.batch(0))
    assert 0.95 < ratio < 1.01


def test_early_stop_saves_what_ends_a_region() -> None:
    case = build("gpt2", tiny=True)
    joint = captured(case.model, case.batch(0))
    memory = Memory(joint, eager=True)
    products = lambda node: float(ops.is_matrix_like(ops.operation(node)))  # noqa: E731
    blocks = usual("per-block checkpointing", memory, joint, products)
    assert blocks.whole - blocks.seconds == len(case.blocks)  # the last product of each
    selective = usual("selective, matmuls saved", memory, joint, products)
    assert selective.seconds == selective.whole == 0


def test_a_region_runs_again_all_at_once() -> None:
    """Where policies would wait with the branch that backward reads last."""
    joint = captured(
        Function(lambda m, x: (x @ m.weight).sin() + (x @ m.weight).exp().cos(), 8),
        {"x": torch.randn(8, 8)},
    )
    memory, saved = Memory(joint, eager=True), frozenset()
    nodes = [n for n in joint.forward_nodes() if is_value(n)]
    together = dict.fromkeys(nodes, tuple(nodes[:-1]))
    phases = [
        [m.phase for m in memory.replay(choice).moments if m.phase != "forward"]
        for choice in (Choice(saved), Choice(saved, together=together))
    ]
    assert phases[0].index("backward") < len(phases[0]) - phases[0][::-1].index("recompute") - 1
    assert phases[1] == sorted(phases[1], reverse=True)  # "recompute", then "backward"


def test_segments_are_cut_where_values_cross() -> None:
    case = build("resnet", tiny=True)
    joint = captured(case.model, case.batch(0))
    structure = Structure(joint)
    found = segments(structure)
    assert len(found) > 1
    assert sum(len(region.nodes) for region in found) == len(structure.chains)
    results = {n for r in found for n in structure.results(r.nodes) if is_value(n)}
    assert segment_inputs(structure) <= results


@pytest.mark.parametrize("name", ["per-block checkpointing", "attention recomputed"])
def test_a_model_without_such_regions(name: str) -> None:
    joint = captured(nn.Sequential(nn.Linear(2, 2), nn.Tanh()), {"input": torch.ones(2, 2)})
    with pytest.raises(fxckpt.PolicyError, match="no such regions"):
        usual(name, Memory(joint, eager=True), joint, lambda node: 1.0)
