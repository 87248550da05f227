"""Result geometry of operations whose fake kernels refuse what the real kernels accept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._ops import OpOverload


def grouped_mm(
    a: torch.Tensor,
    b: torch.Tensor,
    offs: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """`torch._grouped_mm` for any floating dtype; its fake kernel knows only bfloat16 (2.13).

    Rows of the result are padded to a multiple of 16 bytes, as the real kernel does.
    """
    dtype = out_dtype or a.dtype
    columns = b.size(-1)
    aligned = 16 // dtype.itemsize
    padded = (columns + aligned - 1) // aligned * aligned
    rows = a.size(-2)
    if (a.dim() == 2) != (b.dim() == 2):
        return torch.empty_strided((rows, columns), (padded, 1), dtype=dtype, device=a.device)
    groups = a.size(0) if a.dim() == 3 or offs is None else offs.size(0)
    return torch.empty_strided(
        (groups, rows, columns), (rows * padded, padded, 1), dtype=dtype, device=a.device
    )


OWN: dict[OpOverload, Callable[..., Any]] = {
    torch.ops.aten._grouped_mm.default: grouped_mm,
}
