"""Global states as values: autocast, to be read and restored, and what libraries remember."""

from __future__ import annotations

import contextlib
import contextvars
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


_compiled_halves: contextvars.ContextVar[bool] = contextvars.ContextVar("halves", default=False)


def compiles_halves() -> bool:
    """Whether a call is part of what Inductor has compiled, so that it shall compile this, too."""
    return _compiled_halves.get()


@contextlib.contextmanager
def halves_compiled(wanted: bool) -> Iterator[None]:
    """Inductor compiles the halves of what is captured meanwhile, if that is wanted."""
    token = _compiled_halves.set(wanted)
    try:
        yield
    finally:
        _compiled_halves.reset(token)
