"""DistributedDataParallel in two processes: rewrite the model, then wrap it."""

import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fxckpt


def train(rank: int, rewritten: bool) -> list[float]:
    """The losses of this process; it has its own data."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True)
    model = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    if rewritten:
        fxckpt.rewrite_(model, policy="block")
    net = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    torch.manual_seed(rank)
    losses = []
    for _ in range(4):
        loss = net(torch.randn(4, 8, 32)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def work(rank: int, folder: str) -> None:
    """One of the two processes."""
    dist.init_process_group("gloo", f"file://{folder}/meeting", world_size=2, rank=rank)
    found = [train(rank, rewritten) for rewritten in (False, True)]
    torch.save(found, f"{folder}/{rank}")
    dist.destroy_process_group()


def main() -> list[tuple[list[float], list[float]]]:
    """For each process, the losses without and with checkpointing."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (folder,), nprocs=2)
        found = [tuple(torch.load(f"{folder}/{rank}")) for rank in range(2)]
    for rank, (without, with_) in enumerate(found):
        print(f"process {rank}: losses without {without}\n           losses with    {with_}")
    return found


if __name__ == "__main__":
    main()
