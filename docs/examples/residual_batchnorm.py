"""Residual blocks with BatchNorm and in-place ReLU: statistics are updated once, not twice."""

import copy

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fxckpt


class Block(nn.Module):
    """conv, BatchNorm, ReLU, conv, BatchNorm, plus the input, ReLU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """The block's output, of the shape of `x`."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return self.relu(out)


class ByHand(nn.Module):
    """The same blocks under `torch.utils.checkpoint`, only in training."""

    def __init__(self, blocks: nn.Sequential) -> None:
        super().__init__()
        self.blocks = blocks

    def forward(self, x: Tensor) -> Tensor:
        """The output of the last block."""
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.training else block(x)
        return x


def after_one_step(model: nn.Module, x: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Gradients and buffers after one training step, and the output in evaluation mode."""
    model.train()
    model(x).square().mean().backward()
    model.eval()
    return [p.grad for p in model.parameters()], list(model.buffers()), model(x)


def main() -> dict[str, dict[str, int | bool]]:
    """By way of training: how often a batch was counted, and what equals eager bit for bit."""
    torch.manual_seed(0)
    plain = nn.Sequential(*(Block(8) for _ in range(3)))
    x = torch.randn(4, 8, 16, 16)
    models = {
        "eager": plain,
        "torch.utils.checkpoint": ByHand(copy.deepcopy(plain)),
        "fxckpt": fxckpt.rewrite(copy.deepcopy(plain), policy="block"),
    }
    expected = after_one_step(models["eager"], x)
    found = {}
    for name, model in models.items():
        got = expected if name == "eager" else after_one_step(model, x)
        same = [all(map(torch.equal, a, b)) for a, b in zip(expected[:2], got[:2], strict=True)]
        found[name] = {
            "batches": next(b for n, b in model.named_buffers() if "num_batches" in n).item(),
            "gradients": same[0],
            "statistics": same[1],
            "evaluation": torch.equal(expected[2], got[2]),
        }
        print(f"{name:23}", *(f"{key}: {value!s:6}" for key, value in found[name].items()))
    return found


if __name__ == "__main__":
    main()
