"""Two processes on the CPU: bit for bit as without fxckpt, and nothing is communicated twice."""

from __future__ import annotations

from typing import Any

import distributed
import pytest
import torch
from helpers import captures
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import fxckpt


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both processes found."""
    return distributed.results(tmp_path_factory.mktemp("distributed"))


def compared(results: list[dict[str, Any]], case: str, how: str) -> list[dict[str, Any]]:
    """What was found of a rewritten model in each process, after comparing it with eager."""
    found = []
    for process in results:
        eager, ours = process[f"{case}, eager"], process[f"{case}, {how}"]
        assert "error" not in eager, eager["error"]
        assert "error" not in ours, ours["error"]
        assert ours.get("losses") == eager.get("losses")
        assert ours["keys"] == eager["keys"]
        for a, b in zip(ours["tensors"], eager["tensors"], strict=True):
            assert torch.equal(a, b)
        assert ours.get("count") == eager.get("count")
        found.append(ours)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("how", ["before", "after"])
@pytest.mark.parametrize("kind", distributed.KINDS)
def test_data_parallel(kind: str, how: str, results: list[dict[str, Any]]) -> None:
    for found in compared(results, f"data parallel, {kind}", how):
        assert found["captured"] == 1
        assert not found["warnings"]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["before", "after"])
@pytest.mark.parametrize("kind", ["plain", "kept", "bfloat16"])
def test_each_block_sharded(kind: str, how: str, results: list[dict[str, Any]]) -> None:
    for found in compared(results, f"sharded, {kind}", how):
        assert found["captured"] == 3  # one for each block
        assert not found["warnings"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", distributed.TENSOR_PARALLEL)
def test_tensor_parallel(kind: str, results: list[dict[str, Any]]) -> None:
    for found in compared(results, f"tensor parallel, {kind}", "after"):
        assert found["used"] == (3 if "blocks" in str(distributed.TENSOR_PARALLEL[kind]) else 1)
        assert bool(found["recomputed"]) == ("kept" not in kind)
        assert not found["warnings"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", distributed.FOREIGN)
def test_other_distributed_tensors(kind: str, results: list[dict[str, Any]]) -> None:
    for found in compared(results, f"foreign, {kind}", "after"):
        reason = {"in place": "a DTensor, in place", "hook": "a hook is registered"}.get(kind)
        assert bool(found["warnings"]) == bool(reason)
        assert all(str(reason) in warning for warning in found["warnings"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", distributed.COLLECTIVES)
def test_nothing_is_communicated_twice(kind: str, results: list[dict[str, Any]]) -> None:
    for found in compared(results, f"collective, {kind}", "after"):
        assert found["count"] >= distributed.STEPS
        (warning,) = found["warnings"]
        assert "communicates with other processes" in warning
        assert "but for 2 of its parts (first, second)" in warning


@pytest.mark.slow
@pytest.mark.parametrize("how", ["after", "budget"])
@pytest.mark.parametrize("kind", distributed.FUNCTIONAL)
def test_functional_collectives_run_once(
    kind: str, how: str, results: list[dict[str, Any]]
) -> None:
    for found in compared(results, f"functional, {kind}", how):
        assert found["count"] >= distributed.STEPS
        assert found["captured"] == 1
        assert not found["warnings"]


@pytest.mark.slow
def test_distributed_checkpoint(results: list[dict[str, Any]]) -> None:
    compared(results, "checkpoint, ", "before")


class Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight.tanh().exp().sum().full_tensor() * x


def test_placements_are_part_of_a_signature() -> None:
    distributed.alone(captures_for_placements)


def captures_for_placements() -> None:
    mesh = init_device_mesh("cpu", (1,))
    model = Product()
    lean = fxckpt.rewrite(model, "nothing", strict=True)
    there = (Shard(0), Shard(1), Replicate(), Shard(0))
    for placement, number in zip(there, (1, 2, 3, 3), strict=True):
        weight = distribute_tensor(torch.randn(4, 4), mesh, [placement])
        model.weight = lean.weight = nn.Parameter(weight)
        found = []
        for each in (model, lean):
            model.weight.grad = None
            result = each(torch.tensor(3.0))
            result.backward()
            gradient = model.weight.grad
            assert gradient.placements == (placement,)
            found.append((result, gradient.to_local()))
        assert all(map(torch.equal, *found))
        assert len(captures(lean)) == number


def test_wrapper_is_refused() -> None:
    wrapper = DistributedDataParallel.__new__(DistributedDataParallel)
    nn.Module.__init__(wrapper)
    for call in (fxckpt.rewrite, fxckpt.rewrite_):
        with pytest.raises(fxckpt.FxckptError, match=r"Rewrite the module inside .*\.module"):
            call(wrapper, "block")
