"""Mixed precision: autocast in bfloat16, and in float16 with a GradScaler."""

import copy

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import fxckpt


def train(model: nn.Module, x: Tensor, y: Tensor, dtype: torch.dtype | None) -> list[Tensor]:
    """Losses of three steps, then the parameters."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    # bfloat16 has the range of float32: only float16 gradients need scaling.
    scaler = torch.amp.GradScaler("cpu", enabled=dtype is torch.float16)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            loss = mse_loss(model(x).float(), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.detach())
    return [*losses, *(p.detach() for p in model.parameters())]


def main() -> dict[str, bool]:
    """By precision: whether losses and trained parameters equal eager's bit for bit."""
    torch.manual_seed(0)
    layers = [m for _ in range(4) for m in (nn.Linear(32, 32), nn.LayerNorm(32), nn.GELU())]
    model = nn.Sequential(*layers)
    rewritten = fxckpt.rewrite(copy.deepcopy(model), policy="dots")
    x, y = torch.randn(16, 32), torch.randn(16, 32)
    found = {}
    # Three precisions for one rewritten model: each has a captured graph of its own.
    for dtype in (torch.bfloat16, torch.float16, None):
        eager, ours = (train(m, x, y, dtype) for m in (model, rewritten))
        name = "float32" if dtype is None else str(dtype).removeprefix("torch.")
        found[name] = all(map(torch.equal, eager, ours))
        print(f"{name:9} equal to eager bit for bit: {found[name]}")
    return found


if __name__ == "__main__":
    main()
