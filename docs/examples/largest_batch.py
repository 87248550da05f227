"""How many more samples fit: the largest batch in a given memory, before and after."""

from collections.abc import Callable

import torch
from _memory import second_step
from torch import nn

import fxckpt


class Residual(nn.Module):
    """x plus a two-layer perceptron of x, normalised."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.act = nn.LayerNorm(width), nn.GELU()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The block's output, of the shape of `x`."""
        return x + self.down(self.act(self.up(self.norm(x))))


def peak(model: nn.Module, batch: int) -> int:
    """Bytes that a training step of `batch` samples allocates at most, gradients included."""
    x = torch.randn(batch, 16, 32)
    return second_step(lambda: model(x).square().mean(), model.zero_grad).peak


def largest(fits: Callable[[int], bool]) -> int:
    """The largest number that fits: doubling, then bisection."""
    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def main(limit: int = 4 * 2**20) -> tuple[int, int]:
    """The largest batch in `limit` bytes, in eager mode and checkpointed."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Residual(32) for _ in range(6)))
    rewritten = fxckpt.rewrite(model, policy="block")
    before, after = (largest(lambda n, m=m: peak(m, n) <= limit) for m in (model, rewritten))
    print(f"in {limit / 2**20:.0f} MiB fit {before} samples before, {after} after")
    return before, after


if __name__ == "__main__":
    main()
