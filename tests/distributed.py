"""Two processes that train side by side, and what they do: the cases of test_distributed.py.

Starting processes takes seconds, so all cases run in the same two, one after the other.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import gc
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
import torch.distributed.nn.functional as nn_functional
import torch.multiprocessing
from helpers import captures
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fxckpt
from fxckpt.installation import installed

Result = dict[str, Any]
STEPS = 4
PATIENCE = 400  # seconds, less than a test may take


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


def train(
    net: nn.Module,
    optimizer: Any = None,
    accumulate: bool = False,
    seed: int = 0,
    low: bool = False,
) -> Result:
    """A few steps on data of one's own."""
    optimizer = optimizer or torch.optim.AdamW(net.parameters(), lr=1e-2, foreach=False)
    torch.manual_seed(1 + seed)
    losses = []
    for step in range(STEPS):
        last = not accumulate or step % 2 == 1
        with contextlib.nullcontext() if last else net.no_sync():
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
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


def _plan(kind: str) -> dict[str, Any]:
    """How the parts of a block are spread over processes."""
    if not kind.startswith(("sequence", "DTensor")):
        return {"up": ColwiseParallel(), "down": RowwiseParallel()}
    plain = not kind.startswith("DTensor")
    return {
        "norm": SequenceParallel(sequence_dim=0, use_local_output=plain),
        "up": ColwiseParallel(input_layouts=Shard(0)),
        "down": RowwiseParallel(output_layouts=Shard(0), use_local_output=plain),
    }


def _spread(model: nn.Module, kind: str) -> nn.Module:
    mesh = init_device_mesh("cpu", (2,))
    for block in model.blocks:
        parallelize_module(block, mesh, _plan(kind))
    if kind.startswith("DTensor"):  # are what blocks get and return; gathered only at the end
        options = {"input_layouts": Shard(0), "desired_input_layouts": Shard(0)}
        parallelize_module(model.blocks[0], mesh, PrepareModuleInput(**options))
        model.norm = Local()
    return model


class Local(nn.Module):
    """The local part of a tensor."""

    def forward(self, x: Tensor) -> Tensor:
        """What other processes have, as well."""
        return x.redistribute(placements=[Replicate()]).to_local()


TENSOR_PARALLEL: dict[str, dict[str, Any]] = {
    "columns": {"policy": "nothing", "units": "model"},
    "columns, blocks": {"policy": "nothing", "units": "blocks"},
    "columns, kept": {"policy": "everything", "units": "model"},
    "columns, budget": {"budget": 0.8, "units": "model"},
    "columns, autocast": {"policy": "nothing", "units": "blocks"},
    "sequence": {"policy": "nothing", "units": "model"},
    "sequence, blocks": {"policy": "dots", "units": "blocks"},
    "DTensor": {"policy": "nothing", "units": "model"},
    "DTensor, blocks": {"policy": "nothing", "units": "blocks"},
}


def tensor_parallel(rank: int, how: str, kind: str) -> Result:
    """Trained with weights that are spread over the processes."""
    model = _spread(Blocks(), kind)
    if how == "after":
        fxckpt.rewrite_(model, strict=True, **TENSOR_PARALLEL[kind])
    with Counter() as counter:
        found = train(model, low="autocast" in kind)
        model(torch.randn(8, 16)).square().mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return {
        **found,
        "tensors": [*found["tensors"], *map(_local, gradients.values())],
        "keys": [*found["keys"], *((n, _spreading(g)) for n, g in gradients.items())],
        "count": counter.count,
        "used": 1 if how == "eager" else len(_latest(model)),
        "recomputed": sum("recomputed" in c.program.split.forward.code for c in _latest(model)),
    }


def _latest(model: nn.Module) -> list[Any]:
    runner = installed(model)
    return [] if runner is None else [latest for _, latest in runner.captured()]


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _spreading(tensor: Tensor) -> str:
    placements = tensor.placements if isinstance(tensor, DTensor) else None
    return f"{type(tensor).__name__} {tuple(tensor.shape)} {tensor.stride()} {placements}"


def foreign(rank: int, how: str, kind: str) -> Result:
    """Trained by DTensors that the model does not hold, or changes, or under a transform."""
    model = _spread(Blocks(), "columns")
    model.blocks[0].drop = FOREIGN[kind](model.blocks[1].up.weight)
    if how == "after":
        fxckpt.rewrite_(model, "nothing", units=["blocks.0"])
    return train(model)


class Scaled(nn.Module):
    """Reads a DTensor that is no parameter of its own."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.hidden = Hidden(weight)

    def forward(self, x: Tensor) -> Tensor:
        """x, scaled."""
        return x * (1 + self.hidden.weight.sum().full_tensor())


class Hooked(nn.Module):
    """Counts its calls in a hook of a style."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.count, self.inner = 0, nn.Identity()
        distribute_module(self.inner, weight.device_mesh, input_fn=self.noting)

    def noting(self, module: nn.Module, inputs: Any, mesh: Any) -> Any:
        """The inputs."""
        self.count += 1
        return tuple(x * self.count for x in inputs)

    def forward(self, x: Tensor) -> Tensor:
        """x, scaled."""
        return self.inner(x)


class Hidden:
    """Something that holds a tensor."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight


class Counted(nn.Module):
    """Changes a DTensor in place."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("count", weight.detach() * 0)

    def forward(self, x: Tensor) -> Tensor:
        """x, scaled."""
        self.count += 1
        return x * self.count.to_local().mean()


class Recomputed(nn.Module):
    """Runs again what it does in backward, where other tensors are in the model."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        """x, scaled."""
        return checkpoint(lambda x: x * self.weight.exp().sum().full_tensor(), x, **PLAIN)


class Named(nn.Module):
    """Gives names to a DTensor."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        """x, scaled."""
        named = fxckpt.name(self.weight.exp(), "scale")
        return x * named.sum().full_tensor()


PLAIN: dict[str, Any] = {"use_reentrant": False}
FOREIGN: dict[str, Callable[[Tensor], nn.Module]] = {
    "elsewhere": Scaled,
    "in a checkpoint": Recomputed,
    "named": Named,
    "in place": Counted,
    "hook": Hooked,
}


# --- collectives inside of a model --------------------------------------------------------------


class Counter(TorchDispatchMode):
    """Counts the collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation."""
        passive = any(each in str(func) for each in ("wait_tensor", "_wrap_tensor"))
        if func.namespace in ("c10d", "_c10d_functional") and not passive:
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


def mean_of_all(x: Tensor) -> Tensor:
    return x / (1 + functional.all_reduce(x.detach().mean(), "avg", dist.group.WORLD))


def gathered(x: Tensor) -> Tensor:
    everything = functional.all_gather_tensor_autograd(x, 0, dist.group.WORLD)
    return functional.reduce_scatter_tensor_autograd(everything, "sum", 0, dist.group.WORLD)


def unread(x: Tensor) -> Tensor:
    functional.all_reduce(x.detach(), "sum", dist.group.WORLD).sum()
    return x.exp()


def several(x: Tensor) -> Tensor:
    parts = [x.detach(), x.detach().exp()]
    first, second = functional.all_reduce_coalesced(parts, "sum", dist.group.WORLD)
    return x * second.sigmoid() + first


COLLECTIVES: dict[str, Callable[[Tensor], Tensor]] = {
    "all_reduce": mean_in_place,
    "all_gather": first_of_all,
    "barrier": after_a_barrier,
    "in backward": Summed.apply,
    "differentiable": nn_functional.all_reduce,
}
FUNCTIONAL: dict[str, Callable[[Tensor], Tensor]] = {
    "functional all_reduce": lambda x: functional.all_reduce(x, "sum", dist.group.WORLD),
    "functional mean": mean_of_all,
    "functional all_gather": gathered,
    "functional, unread": unread,
    "functional, several": several,
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
    model = Communicates({**COLLECTIVES, **FUNCTIONAL}[kind])
    if how in ("after", "budget"):
        policy = {"budget": 0.9} if how == "budget" else {"policy": "nothing"}
        fxckpt.rewrite_(model, units="model", **policy)
    with Counter() as counter:
        found = train(model, seed=rank)
    return {**found, "count": counter.count, "captured": captured(model)}


# --- checkpoints --------------------------------------------------------------------------------


def saved_and_read(rank: int, how: str, folder: str) -> Result:
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
        "tensor parallel": (tensor_parallel, ("eager", "after"), tuple(TENSOR_PARALLEL)),
        "foreign": (foreign, ("eager", "after"), tuple(FOREIGN)),
        "collective": (collective, ("eager", "after"), tuple(COLLECTIVES)),
        "functional": (collective, ("eager", "after", "budget"), tuple(FUNCTIONAL)),
        "checkpoint": (saved_and_read, ("eager", "before"), (folder,)),
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
    results = {}
    with group(rank, init_method=f"file://{folder}/meeting"):
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


@contextlib.contextmanager
def group(rank: int, size: int = 2, **options: Any) -> Iterator[None]:
    """A group of processes while active; at its end, nobody may hold models that communicate.

    If the reducer of one is the last to hold the group, it waits for threads of the group without
    letting go of the interpreter, and one of these may wait for that (torch 2.13).
    """
    patience = datetime.timedelta(seconds=PATIENCE)
    dist.init_process_group("gloo", rank=rank, world_size=size, timeout=patience, **options)
    yield
    gc.collect()
    dist.destroy_process_group()


def results(folder: Path) -> list[dict[str, Result]]:
    """What both processes found in all cases."""
    spawn(_work, str(folder))
    return [torch.load(folder / f"results-{rank}") for rank in range(2)]


def alone(function: Callable[[], None]) -> None:
    """Runs a function in a process of its own, with a group of that one.

    Torch's caches of placements hold a group as long as the main thread lives. A process that is
    forked from another thread destroys it, and waits for threads that it does not have.
    """
    spawn(_alone, function, processes=1)


def _alone(rank: int, function: Callable[[], None]) -> None:
    with group(rank, 1, store=dist.HashStore()):
        function()


def spawn(function: Callable[..., None], *args: Any, processes: int = 2) -> None:
    """Runs a function in new processes, with their ranks; one that hangs says where, and ends."""
    torch.multiprocessing.spawn(_watched, (function, *args), nprocs=processes)


def _watched(rank: int, function: Callable[..., None], *args: Any) -> None:
    faulthandler.dump_traceback_later(PATIENCE, exit=True)
    function(rank, *args)
