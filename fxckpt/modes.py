"""Global states as values: autocast, to be read and restored, and what libraries remember."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch

# Device types where it is on, and its dtype; and ("cache", False) if it casts weights at each use.
AutocastState = tuple[tuple[str, Any], ...]

_AUTOCAST_DEVICES = ("cpu", "cuda")


def autocast_state() -> AutocastState:
    """The device types for which autocast is on, with the dtype it casts to, and its cache."""
    state = tuple(
        (device, torch.get_autocast_dtype(device))
        for device in _AUTOCAST_DEVICES
        if torch.is_autocast_enabled(device)
    )
    return state if not state or torch.is_autocast_cache_enabled() else (*state, ("cache", False))


def collected_outputs() -> Any:
    """What the hooks of transformers collect at the moment: hidden states, attention weights."""
    capturing = sys.modules.get("transformers.utils.output_capturing")
    collector = capturing._active_collector.get() if capturing is not None else None
    return None if collector is None else tuple(collector)


@contextlib.contextmanager
def autocast_as(state: AutocastState) -> Iterator[None]:
    """Autocast exactly as in `state`, whatever it was."""
    before, caches = autocast_state(), torch.is_autocast_cache_enabled()
    _set_autocast(state)
    try:
        yield
    finally:
        _set_autocast(before)
        torch.set_autocast_cache_enabled(caches)


def _set_autocast(state: AutocastState) -> None:
    on = dict(state)
    torch.set_autocast_cache_enabled(on.get("cache", True))
    for device in _AUTOCAST_DEVICES:
        torch.set_autocast_enabled(device, device in on)
        if device in on:
            torch.set_autocast_dtype(device, on[device])
