"""O(sqrt n) memory (Chen et al. 2016): what a chain of n layers keeps for backward."""

import torch
from _memory import Memory, second_step
from torch import nn

import fxckpt


def chain(n: int) -> nn.Sequential:
    """n equal layers with few parameters, so that activations are what counts."""
    return nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(n)))


def main(lengths: tuple[int, ...] = (16, 64, 144)) -> dict[int, tuple[Memory, Memory]]:
    """By n: memory of a training step in eager mode and with `policy="sqrt"`."""
    found = {}
    x = torch.randn(2048, 8)  # 64 KiB, as is the output of every layer
    print("   n   saved, peak: eager MiB    sqrt MiB")
    for n in lengths:
        model = chain(n)
        eager, ours = (
            second_step(lambda m=m: m(x).mean(), model.zero_grad)
            for m in (model, fxckpt.rewrite(model, policy="sqrt"))
        )
        found[n] = eager, ours
        sizes = (b / 2**20 for b in (eager.saved, eager.peak, ours.saved, ours.peak))
        print("{:4}         {:6.2f} {:6.2f}    {:6.2f} {:6.2f}".format(n, *sizes))
    return found


if __name__ == "__main__":
    main()
