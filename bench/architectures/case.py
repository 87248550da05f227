"""What an architecture of the zoo is: how to make it, its data and its loss."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """The tensors in nested lists, tuples, mappings and dataclasses, in order.

    Example:
        >>> [len(t) for t in tensors_in({"a": [torch.ones(1)], "b": torch.ones(2)})]
        [1, 2]
    """
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from tensors_in(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from tensors_in(value)
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        for field in dataclasses.fields(tree):
            yield from tensors_in(getattr(tree, field.name))


def total(output: Any) -> Tensor:
    """The (mean) `loss` of an output that has one, else the mean squares of what is differentiable.

    Example:
        >>> total([torch.full((2,), 3.0, requires_grad=True)])
        tensor(9., grad_fn=<AddBackward0>)
    """
    loss = getattr(output, "loss", None)
    if isinstance(loss, Tensor):
        return loss.mean() if loss.dim() else loss
    parts = [t.abs() if t.is_complex() else t for t in tensors_in(output) if t.requires_grad]
    return sum((part.float().square().mean() for part in parts), torch.zeros(()))


def adamw(parameters: list[Tensor]) -> torch.optim.Optimizer:
    """The optimizer of most architectures."""
    return torch.optim.AdamW(parameters, lr=1e-3)


@dataclass(frozen=True, slots=True)
class Architecture:
    """A kind of model, at a size that trains a step in a fraction of a second.

    Attributes:
        name: what `--only` selects, unique in the zoo.
        family: heading under which it is counted.
        make: a model with random weights under the current seed, in train mode.
        batch: number of the step to positional and keyword arguments, on the CPU; other data at
            other steps, the same at the same step.
        loss: output of the model to a scalar.
        whole: makes the model without what keeps it from being captured whole, if that can be
            switched off (layer drop, for example).
        optimizer: parameters to an optimizer.
    """

    name: str
    family: str
    make: Callable[[], nn.Module]
    batch: Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]]
    loss: Callable[[Any], Tensor] = total
    whole: Callable[[], nn.Module] | None = None
    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer] = adamw
