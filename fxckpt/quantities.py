"""Bytes and seconds as people write them."""

from __future__ import annotations

import re
from typing import Any

_UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def parse_bytes(size: Any) -> int | None:
    """A positive number of bytes, from an int or a string; None if it is neither.

    Example:
        >>> parse_bytes("1.5 KiB"), parse_bytes("2MB"), parse_bytes(77), parse_bytes("8 apples")
        (1536, 2000000, 77, None)
    """
    found = size if isinstance(size, int) and not isinstance(size, bool) else None
    if isinstance(size, str):
        match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([kKMGT]?)(i?)B?\s*", size)
        if match:
            found = int(float(match[1]) * (1024 if match[3] else 1000) ** _UNITS[match[2].upper()])
    return found if found is not None and found > 0 else None


def readable(size: int) -> str:
    """Bytes with a unit.

    Example:
        >>> readable(1536), readable(3 * 2**30)
        ('1.5 KiB', '3 GiB')
    """
    amount, unit = float(size), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if amount < 1024:
            break
        amount, unit = amount / 1024, larger
    return f"{amount:.4g} {unit}"


def readable_seconds(seconds: float) -> str:
    """Seconds with a unit.

    Example:
        >>> readable_seconds(0.0123), readable_seconds(75.5), readable_seconds(0)
        ('12.3 ms', '75.5 s', '0 s')
    """
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * scale >= 1 or not seconds:
            return f"{seconds * scale:.3g} {unit}" if seconds < 1000 else f"{seconds:.0f} s"
    return f"{seconds * 1e9:.3g} ns"
