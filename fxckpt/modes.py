"""Autocast as a value: read it, compare it, restore it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

AutocastState = tuple[tuple[str, torch.dtype], ...]  # device types where it is on, and its dtype

_AUTOCAST_DEVICES = ("cpu", "cuda")


def autocast_state() -> AutocastState:
    """The device types for which autocast is on, with the dtype it casts to."""
    return tuple(
        (device, torch.get_autocast_dtype(device))
        for device in _AUTOCAST_DEVICES
        if torch.is_autocast_enabled(device)
    )


@contextlib.contextmanager
def autocast_as(state: AutocastState) -> Iterator[None]:
    """Autocast exactly as in `state`, whatever it was."""
    before = autocast_state()
    _set_autocast(state)
    try:
        yield
    finally:
        _set_autocast(before)


def _set_autocast(state: AutocastState) -> None:
    on = dict(state)
    for device in _AUTOCAST_DEVICES:
        torch.set_autocast_enabled(device, device in on)
        if device in on:
            torch.set_autocast_dtype(device, on[device])
