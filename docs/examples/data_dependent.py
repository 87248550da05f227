"""A model whose Python depends on data: Dynamo cuts it into graphs, fxckpt checkpoints each."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import fxckpt


class Chooses(nn.Module):
    """Two layers; a sum decides what follows the first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        """A tensor of the shape of `x`."""
        x = self.first(x).tanh()
        x = x.sin() if x.sum() > 0 else x.cos()
        return self.second(x).tanh()


def main() -> tuple[int, bool]:
    """How many graphs Dynamo makes, and whether gradients have the bits of eager."""
    torch.manual_seed(0)
    model, x, graphs = Chooses(), torch.randn(8, 16), 0
    ours = copy.deepcopy(model)
    checkpoint = fxckpt.backend(policy="nothing", strict=True)

    def counted(graph: GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        return checkpoint(graph, inputs)

    model(x).square().mean().backward()
    torch.compile(ours, backend=counted)(x).square().mean().backward()
    pairs = zip(model.parameters(), ours.parameters(), strict=True)
    equal = all(torch.equal(p.grad, q.grad) for p, q in pairs)
    print(f"{graphs} graphs, gradients equal to eager bit for bit: {equal}")
    return graphs, equal


if __name__ == "__main__":
    main()
