"""Inputs of every kind."""

from typing import Any

import torch
from torch import Tensor, nn

from traps import EITHER, LEAF, TAGS, rows, wanted
from traps.uses import nonleaf, uses


def waves() -> Tensor:
    return torch.complex(rows(), rows().sin())


def overlapping() -> tuple[Tensor, Tensor]:
    x = rows(4)
    return x[:3], x[1:]


def separate() -> tuple[Tensor, Tensor]:
    return rows(4)[:3], rows(4)[1:]


def tagged(tag: int) -> Tensor:
    x = rows()
    x.tag = tag
    return x


def reads(m: Any, x: Tensor) -> Tensor:
    """Any dtype, rank and geometry."""
    flat = (x.real if x.is_complex() else x).float()
    return flat * m.weight if x.dim() == 0 else flat.reshape(-1, 4) @ m.weight * x.stride(-1)


def memory_format() -> Tensor:
    return rows(16).view(2, 4, 2, 4).to(memory_format=torch.channels_last)


TRAPS = [
    uses("no rows", reads, lambda: rows(0), lambda: wanted(0)),
    uses("scalar", reads, lambda: torch.tensor(2.0), lambda: torch.tensor(2.0).requires_grad_()),
    uses("repeated", reads, lambda: rows(1).expand(3, 4), lambda: wanted(1).expand(3, 4)),
    uses("channels last", reads, memory_format),
    uses("permuted", reads, lambda: rows(4).t().requires_grad_()),
    uses("slice", reads, lambda: rows(6)[2:5], rows),
    uses("windows", reads, lambda: torch.arange(6.0).as_strided((3, 4), (1, 1))),
    uses("conjugate", reads, lambda: waves().conj(), warns="conjugation"),
    uses("negative", reads, lambda: waves().conj().imag, warns="conjugation"),
    uses("complex", reads, waves, lambda: waves().requires_grad_()),
    uses("double", reads, lambda: rows().double().requires_grad_()),
    uses("half", reads, lambda: rows().half().requires_grad_()),
    uses("boolean", reads, lambda: rows() > 0.8),
    uses("small integers", reads, lambda: (rows() * 10).to(torch.int8)),
    uses("parameter", reads, lambda: nn.Parameter(rows())),
    uses("buffer", reads, lambda: nn.Buffer(rows())),
    uses("overlap", lambda m, x, y: x @ m.weight + y, overlapping, separate),
    uses("tag", lambda m, x: x @ m.weight * getattr(x, "tag", 2), *[lambda: tagged(3)] * 3,
         lambda: tagged(4), rows, warns=EITHER, guard=TAGS),
    uses("leaf or not", lambda m, x: x @ m.weight * (2 if x.is_leaf else 3), *[wanted] * 3,
         nonleaf, warns=EITHER, guard=LEAF),
    uses("memory beyond a slice", lambda m, x: x.as_strided((3, 4), (4, 1), 0) @ m.weight, rows,
         lambda: rows(4)[1:]),
]  # fmt: skip
