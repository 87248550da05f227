"""Which attributes of modules a program reads."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

Reads = set[tuple[int, str]]  # id of the module, name of the attribute

EVERYTHING = "__dict__"  # read as a whole


@contextlib.contextmanager
def attributes_read(reads: Reads) -> Iterator[None]:
    """Adds to `reads` what is read of any module while active."""
    plain_read: Any = object.__getattribute__
    original: Any = nn.Module.__getattr__
    members = ("_parameters", "_buffers", "_modules")

    def read(self: nn.Module, name: str) -> Any:
        reads.add((id(self), name))
        return plain_read(self, name)

    def read_member(self: nn.Module, name: str) -> Any:
        """What `nn.Module.__getattr__` does, which reads `__dict__` as a whole for that."""
        attributes = plain_read(self, "__dict__")
        for kind in members:
            if name in attributes.get(kind, ()):
                return attributes[kind][name]
        raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")

    nn.Module.__getattribute__ = read  # type: ignore
    nn.Module.__getattr__ = read_member  # type: ignore[method-assign]
    try:
        yield
    finally:
        del nn.Module.__getattribute__
        nn.Module.__getattr__ = original  # type: ignore[method-assign]
