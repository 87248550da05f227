"""Batches of two samples: other data at each step, the same at the same step."""

from typing import Any

import torch
from torch import Tensor

from bench.architectures.tiny import PLAIN

SIZE = 2
LENGTH = 16
CLASSES = torch.tensor([0, 1])


def generator(step: int) -> torch.Generator:
    """The source of a step's data."""
    return torch.Generator().manual_seed(1000 + step)


def ids(step: int, length: int = LENGTH) -> Tensor:
    """Ordinary tokens."""
    return torch.randint(PLAIN.start, PLAIN.stop, (SIZE, length), generator=generator(step))


def noise(step: int, *shape: int) -> Tensor:
    """Two samples of normally distributed numbers."""
    return torch.randn(SIZE, *shape, generator=generator(step))


def tokens(step: int) -> dict[str, Any]:
    """Tokens, each of which is to be predicted."""
    return {"input_ids": ids(step), "labels": ids(step)}


def padded_tokens(step: int) -> dict[str, Any]:
    """Tokens, some of which are to be predicted; the second sample is shorter."""
    mask = torch.ones(SIZE, LENGTH, dtype=torch.int64)
    mask[1, -3:] = 0
    tokens = torch.where(mask == 1, ids(step), 0)
    chosen = (torch.arange(LENGTH) % 3 == step % 3) & (mask == 1)
    return {
        "input_ids": tokens,
        "attention_mask": mask,
        "labels": torch.where(chosen, tokens, -100),
    }


def classified_tokens(step: int) -> dict[str, Any]:
    """Padded tokens, a class for each sample."""
    return {**padded_tokens(step), "labels": CLASSES}


def translated_tokens(step: int) -> dict[str, Any]:
    """Padded tokens, and others to be predicted from them."""
    return {**padded_tokens(step), "labels": ids(step + 100)}


def images(step: int, size: int = 32) -> dict[str, Any]:
    """Images, a class for each."""
    return {"pixel_values": noise(step, 3, size, size), "labels": CLASSES}
