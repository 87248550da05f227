"""Blocks as units in two processes: DDP and sharded parameters, equal to eager bit by bit."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from distributed import group, spawn
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import GPT2Config, GPT2LMHeadModel

import fxckpt
from fxckpt.installation import installed


def gpt2() -> nn.Module:
    sizes = {"n_layer": 3, "n_embd": 16, "n_head": 2, "vocab_size": 50}
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**sizes, **ids, use_cache=False)).train()


def shard(model: nn.Module, **options: object) -> nn.Module:
    for block in model.transformer.h:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def lean(model: nn.Module) -> nn.Module:
    return fxckpt.rewrite_(model, "nothing")  # blocks are the default in distributed training


def within(model: nn.Module) -> nn.Module:
    return fxckpt.rewrite_(model, budget=0.8)


def inside(
    model: nn.Module, rewrite: Callable[[nn.Module], nn.Module] = lean
) -> DistributedDataParallel:
    rewrite(model.module)
    return model


MIXED = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
WAYS: dict[str, tuple[Callable[[nn.Module], nn.Module], Callable[[nn.Module], nn.Module]]] = {
    "ddp": (DistributedDataParallel, lambda m: DistributedDataParallel(lean(m))),
    "ddp first": (DistributedDataParallel, lambda m: inside(DistributedDataParallel(m))),
    "ddp, a budget": (DistributedDataParallel, lambda m: DistributedDataParallel(within(m))),
    "ddp first, a budget": (
        DistributedDataParallel,
        lambda m: inside(DistributedDataParallel(m), within),
    ),
    "fsdp": (shard, lambda m: shard(lean(m))),
    "fsdp first": (shard, lambda m: lean(shard(m))),
    "fsdp mixed": (lambda m: shard(m, mp_policy=MIXED), lambda m: shard(lean(m), mp_policy=MIXED)),
}


def trained(model: nn.Module, rank: int) -> list[Tensor]:
    """Losses, gradients and parameters of three steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    seen: list[Tensor] = []
    for number in range(3):
        torch.manual_seed(10 * number + rank)
        ids = torch.randint(0, 50, (2, 12))
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        tensors = [t for p in model.parameters() for t in (p.grad, p)]
        seen += [loss, *(t.full_tensor() if hasattr(t, "full_tensor") else t for t in tensors)]
        seen = [t.detach().clone() for t in seen]
        optimizer.step()
        optimizer.zero_grad()
    return [*seen, torch.get_rng_state()]


def in_process(rank: int, way: str, path: str) -> None:
    warnings.simplefilter("error", fxckpt.FallbackWarning)
    with group(rank, init_method=f"file://{path}"):
        assert_equal_to_eager(rank, way)


def assert_equal_to_eager(rank: int, way: str) -> None:
    torch.manual_seed(0)
    model = gpt2()
    eager, ours = (wrap(copy.deepcopy(model)) for wrap in WAYS[way])
    expected, got = trained(eager, rank), trained(ours, rank)
    runner = next(filter(None, map(installed, ours.modules())))
    assert all(unit.latest is not None for _, unit in runner.parts.runners())
    assert all(map(torch.equal, expected, got))
    if "budget" in way:
        plan = runner.budgeting.latest
        assert plan.peak <= plan.budget < plan.eager_peak
    assert [*eager.state_dict()] == [*ours.state_dict()]


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_equal_to_eager(way: str, tmp_path: Path) -> None:
    spawn(in_process, way, str(tmp_path / "meeting"))
