"""What tables of architectures are written with: drawn arguments, and modules as compositions."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bench.architectures.case import Architecture
from bench.architectures.data import generator

Draw = Callable[[torch.Generator], Any]
Batch = Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]]


def normal(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Draw:
    """Draws normally distributed numbers; with `grad`, a leaf that gets a gradient."""
    return lambda g: torch.randn(shape, generator=g, dtype=dtype).requires_grad_(grad)


def uniform(*shape: int) -> Draw:
    """Draws numbers from 0 to 1."""
    return lambda g: torch.rand(shape, generator=g)


def below(high: int, *shape: int, low: int = 0) -> Draw:
    """Draws integers from `low` to below `high`."""
    return lambda g: torch.randint(low, high, shape, generator=g)


def mask(*shape: int) -> Draw:
    """Draws booleans, two of three true."""
    return lambda g: torch.rand(shape, generator=g) < 2 / 3


def fixed(value: Any) -> Draw:
    """The same value at each step."""
    return lambda _: value


def batches(*args: Draw, **kwargs: Draw) -> Batch:
    """The `batch` of an architecture whose arguments are drawn in this way.

    Example:
        >>> args, kwargs = batches(normal(2, 3), labels=below(4, 2))(0)
        >>> args[0].shape, kwargs["labels"].dtype
        (torch.Size([2, 3]), torch.int64)
    """

    def batch(step: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        g = generator(step)
        return tuple(draw(g) for draw in args), {name: draw(g) for name, draw in kwargs.items()}

    return batch


def architectures_of(family: str, *rows: tuple[Any, ...]) -> list[Architecture]:
    """A table: each row has a name, what makes the model, its batch, and perhaps a loss."""
    return [Architecture(name, family, make, batch, *loss) for name, make, batch, *loss in rows]


class Composed(nn.Module):
    """Modules and parameters by name, and a function of (self, *inputs) that composes them.

    Example:
        >>> model = Composed(lambda m, x: m.out(x).relu(), out=nn.Linear(2, 3))
        >>> model(torch.ones(1, 2)).shape
        torch.Size([1, 3])
    """

    def __init__(self, function: Callable[..., Any], **members: nn.Module | Tensor) -> None:
        super().__init__()
        self.function = function
        for name, member in members.items():
            if isinstance(member, nn.Module | nn.Parameter):
                setattr(self, name, member)
            else:
                self.register_buffer(name, member)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the function."""
        return self.function(self, *args, **kwargs)


def weight(*shape: int, scale: float = 0.3, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    """A parameter, normally distributed."""
    return nn.Parameter(scale * torch.randn(shape, dtype=dtype))


class Residual(nn.Sequential):
    """Its input plus what its modules make of it."""

    def forward(self, x: Tensor) -> Tensor:
        """Adds the input."""
        return x + super().forward(x)
