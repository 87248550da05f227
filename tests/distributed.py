"""Two processes that train side by side, and what they do: the cases of test_distributed.py.

Starting processes takes seconds, so all cases run in the same two, one after the other.
"""

from __future__ import annotations

import contextlib
import datetime
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
import torch.multiprocessing
from helpers import captures
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import fxckpt

Result = dict[str, Any]
STEPS = 4


class Block(nn.Module):
    """A residual block with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop = nn.LayerNorm(16), nn.Dropout(0.1)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        """x + f(x)."""
        return x + self.down(self.drop(nn.functional.gelu(self.up(self.norm(x)))))


class Blocks(nn.Module):
    """Some blocks, of which one may be used twice; and perhaps parameters that nobody uses."""

    def __init__(self, *, unused: bool = False, shared: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        if shared:
            self.blocks.append(self.blocks[0])
        self.norm = nn.BatchNorm1d(16)
        self.unused = nn.Linear(4, 4) if unused else None

    def forward(self, x: Tensor) -> Tensor:
        """All blocks, one after the other."""
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def whole(tensor: Tensor) -> Tensor:
    """A copy, gathered from all processes if it is spread over them."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def train(net: nn.Module, optimizer: Any = None, accumulate: bool = False, seed: int = 0) -> Result:
    """A few steps on data of one's own."""
    optimizer = optimizer or torch.optim.AdamW(net.parameters(), lr=1e-2, foreach=False)
    torch.manual_seed(1 + seed)
    losses = []
    for step in range(STEPS):
        last = not accumulate or step % 2 == 1
        with contextlib.nullcontext() if last else net.no_sync():
            loss = net(torch.randn(8, 16)).square().mean()
            loss.backward()
        if last:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    tensors = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    return {
        "losses": losses,
        "tensors": [whole(t) for t in tensors.values()],
        "keys": [*net.state_dict()],
    }


def captured(net: nn.Module) -> int:
    """How many graphs were captured of all rewritten modules."""
    return sum(len(captures(m)) for m in net.modules() if "_fxckpt_unit" in m.__dict__)


# --- data parallel ------------------------------------------------------------------------------


def data_parallel(rank: int, how: str, kind: str) -> Result:
    """Trained by DistributedDataParallel; rewritten before it is wrapped, or after."""
    sizes = {"unused": kind in ("unused", "static"), "shared": kind.startswith("shared")}
    options = {
        "unused": {"find_unused_parameters": True},
        "static": {"static_graph": True},
        "shared, static": {"static_graph": True},
        "buckets": {"bucket_cap_mb": 0.001, "gradient_as_bucket_view": True},
    }
    model = Blocks(**sizes)
    if how == "before":
        fxckpt.rewrite_(model, "nothing", units="model", strict=True)
    net = DistributedDataParallel(model, **options.get(kind, {}))
    if how == "after":
        fxckpt.rewrite_(net.module, "nothing", units="model", strict=True)
    optimizer = None
    if kind == "zero":
        from torch.distributed.optim import ZeroRedundancyOptimizer  # warns when it is imported

        adam = torch.optim.AdamW
        optimizer = ZeroRedundancyOptimizer(net.parameters(), optimizer_class=adam, lr=1e-2)
    found = train(net, optimizer, accumulate=kind == "no_sync", seed=rank)
    return {**found, "captured": captured(net)}


KINDS = ("plain", "unused", "static", "shared", "shared, static", "no_sync", "zero", "buckets")


# --- sharded and tensor parallel ----------------------------------------------------------------


def sharded(rank: int, how: str, kind: str) -> Result:
    """Trained by FSDP2, each block a group of its own."""
    mesh, model = init_device_mesh("cpu", (2,)), Blocks()
    if how == "before":
        rewrite_each(model.blocks)
    options: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": kind != "kept"}
    low = MixedPrecisionPolicy(torch.bfloat16, torch.float32, torch.float32)
    precision = {"mp_policy": low} if kind == "bfloat16" else {}
    for block in model.blocks:
        fully_shard(block, **options, **precision)
    fully_shard(model, **options)
    if how == "after":
        rewrite_each(model.blocks)
    return {**train(model, seed=rank), "captured": captured(model)}


def rewrite_each(modules: Any) -> None:
    """Each module a unit of its own."""
    for module in modules:
        fxckpt.rewrite_(module, "nothing", strict=True)


def tensor_parallel(rank: int, how: str, _: str) -> Result:
    """Trained with weights that are spread over the processes."""
    mesh, model = init_device_mesh("cpu", (2,)), Blocks()
    for block in model.blocks:
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    if how == "after":
        fxckpt.rewrite_(model, "nothing", units="model")
    return {**train(model), "captured": captured(model)}


# --- collectives inside of a model --------------------------------------------------------------


class Counter(TorchDispatchMode):
    """Counts the collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation."""
        if func.namespace in ("c10d", "_c10d_functional") and "wait" not in str(func):
            self.count += 1
        return func(*args, **(kwargs or {}))


class Summed(torch.autograd.Function):
    """Sums over the processes, in backward only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """x."""
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """The sum."""
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient


def mean_in_place(x: Tensor) -> Tensor:
    mean = x.detach().mean()
    dist.all_reduce(mean)
    return x / (1 + mean)


def first_of_all(x: Tensor) -> Tensor:
    everything = [torch.empty_like(x) for _ in range(2)]
    dist.all_gather(everything, x.detach())
    return x + everything[0]


def after_a_barrier(x: Tensor) -> Tensor:
    dist.barrier()
    return x.exp()


COLLECTIVES: dict[str, Callable[[Tensor], Tensor]] = {
    "all_reduce": mean_in_place,
    "all_gather": first_of_all,
    "barrier": after_a_barrier,
    "functional all_reduce": lambda x: functional.all_reduce(x, "sum", dist.group.WORLD),
    "in backward": Summed.apply,
}


class Communicates(nn.Module):
    """Something that processes do together, between two blocks."""

    def __init__(self, together: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.together = Block(), Block(), together

    def forward(self, x: Tensor) -> Tensor:
        """All in a row."""
        return self.second(self.together(self.first(x)).tanh())


def collective(rank: int, how: str, kind: str) -> Result:
    """Trained with communication in its forward or backward."""
    model = Communicates(COLLECTIVES[kind])
    if how == "after":
        fxckpt.rewrite_(model, "nothing", units="model")
    with Counter() as counter:
        found = train(model, seed=rank)
    return {**found, "count": counter.count}


# --- checkpoints --------------------------------------------------------------------------------


def checkpoint(rank: int, how: str, folder: str) -> Result:
    """A distributed checkpoint, of a rewritten model or of eager, read by eager."""
    model = Blocks()
    if how == "before":
        fxckpt.rewrite_(model, "nothing", units="model", strict=True)
    net = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    train(net, optimizer, seed=rank)
    state, optimizer_state = get_state_dict(net, optimizer)
    path = f"{folder}/{how}"
    dist.checkpoint.save({"model": state, "optimizer": optimizer_state}, checkpoint_id=path)
    fresh = Blocks()
    read = {"model": fresh.state_dict()}
    dist.checkpoint.load(read, checkpoint_id=path)
    set_model_state_dict(fresh, read["model"])
    return {
        "tensors": [whole(t) for t in fresh.state_dict().values()],
        "keys": [*state, *optimizer_state["state"]],
    }


# --- the processes ------------------------------------------------------------------------------


def cases(folder: str) -> dict[str, Callable[[int], Result]]:
    """All cases by name; each gets the rank."""
    families = {
        "data parallel": (data_parallel, ("eager", "before", "after"), KINDS),
        "sharded": (sharded, ("eager", "before", "after"), ("plain", "kept", "bfloat16")),
        "tensor parallel": (tensor_parallel, ("eager", "after"), ("plain",)),
        "collective": (collective, ("eager", "after"), tuple(COLLECTIVES)),
        "checkpoint": (checkpoint, ("eager", "before"), (folder,)),
    }
    return {
        f"{name}, {'' if kind == folder else kind}, {how}": _case(run, how, kind)
        for name, (run, hows, kinds) in families.items()
        for kind in kinds
        for how in hows
    }


def _case(run: Any, how: str, kind: str) -> Callable[[int], Result]:
    return lambda rank: run(rank, how, kind)


def _work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    method, patience = f"file://{folder}/meeting", datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", method, world_size=2, rank=rank, timeout=patience)
    results = {}
    for name, run in cases(folder).items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", fxckpt.FallbackWarning)
            try:
                result = run(rank)
            except Exception:
                result = {"error": traceback.format_exc()}
        said = [str(w.message) for w in caught if w.category is fxckpt.FallbackWarning]
        results[name] = {**result, "warnings": said}
    torch.save(results, f"{folder}/results-{rank}")
    dist.destroy_process_group()


def results(folder: Path) -> list[dict[str, Result]]:
    """What both processes found in all cases."""
    torch.multiprocessing.spawn(_work, (str(folder),), nprocs=2)
    return [torch.load(folder / f"results-{rank}") for rank in range(2)]
