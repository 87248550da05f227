"""`torch.utils.checkpoint` inside of a model: what it draws again in backward is what it drew."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import Block, assert_same_training
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import fxckpt
from fxckpt import CaptureError

WIDTH = 8


class Net(nn.Module):
    """Blocks with dropout, and what is done with them."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor], dropout: float = 0.3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(WIDTH, dropout) for _ in range(3))
        self.norm = nn.BatchNorm1d(WIDTH)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def again(fn: Any, x: Tensor, **options: Any) -> Any:
    return checkpoint(fn, x, use_reentrant=False, **options)


def each(net: Net, x: Tensor) -> Tensor:
    for block in net.blocks:
        x = again(block, x)
    return x


def some(net: Net, x: Tensor) -> Tensor:
    return net.blocks[2](again(net.blocks[1], net.blocks[0](x)) + torch.rand_like(x))


def several(net: Net, x: Tensor) -> Tensor:
    return again(lambda x: net.blocks[1](net.blocks[0](x)) * torch.randn(WIDTH), x)


def sequential(net: Net, x: Tensor) -> Tensor:
    return checkpoint_sequential(net.blocks, 2, x, use_reentrant=False)


def late(net: Net, x: Tensor) -> Tensor:
    """Backward needs nothing of the last operations, so it does not do them again."""
    return again(lambda x: nn.functional.dropout(net.blocks[0](x) + 1, 0.5).sum(), x)


def nested(net: Net, x: Tensor) -> Tensor:
    return again(lambda x: net.blocks[1](again(net.blocks[0], x)), x)


EXACT = {f.__name__: f for f in (each, some, several, sequential, late, nested)}


@pytest.mark.parametrize("policy", ["nothing", "dots", "everything"])
@pytest.mark.parametrize("name", EXACT)
def test_dropout_in_a_checkpoint(name: str, policy: str) -> None:
    assert_same_training(
        lambda: Net(EXACT[name]), lambda _: torch.randn(2, 5, WIDTH), policy=policy
    )


def test_a_checkpoint_saves_what_it_saves_in_eager() -> None:
    """With the policy that saves everything else."""

    def kept(run: Callable[[Any, Tensor], Tensor]) -> int:
        model = fxckpt.rewrite(Net(run), "everything", strict=True)
        sizes: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        x = torch.randn(16, 32, WIDTH)
        model(x).sum().backward()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            result = model(x)
        assert result.requires_grad
        return sum(sizes.values())

    def plain(net: Net, x: Tensor) -> Tensor:
        for block in net.blocks:
            x = block(x)
        return x

    assert kept(each) < 0.6 * kept(plain)


def other_numbers(net: Net, x: Tensor) -> Tensor:
    return again(net.blocks[0], x, preserve_rng_state=False)


def statistics(net: Net, x: Tensor) -> Tensor:
    """Backward counts the batch once more."""
    return again(lambda x: net.norm(net.blocks[0](x).transpose(1, 2)), x)


@pytest.mark.parametrize("run", [other_numbers, statistics])
def test_what_is_not_done_once_more_alike_runs_eagerly(
    run: Callable[[Any, Tensor], Tensor],
) -> None:
    batch = torch.randn(2, 5, WIDTH)
    with pytest.raises(CaptureError, match=r"backward (draws random numbers|changes a tensor)"):
        fxckpt.rewrite(Net(run), "nothing", strict=True)(batch).sum().backward()


def test_random_numbers_that_a_function_draws_in_backward_are_refused() -> None:
    class Noisy(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * torch.rand(())

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return g * torch.rand(())

    model = fxckpt.rewrite(
        Net(lambda net, x: Noisy.apply(net.blocks[0](x))), "nothing", strict=True
    )
    with pytest.raises(CaptureError, match="backward draws random numbers"):
        model(torch.randn(2, 5, WIDTH)).sum().backward()
