"""Bytes that are allocated while something runs, from one mark to the next.

On CUDA by the statistics of the caching allocator, which are reset; on the CPU by the allocation
events of torch's profiler (see docs/measuring-memory.md).
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol
from unittest import mock

import torch
from torch.autograd.profiler import profile, record_function

_MARK = "fxckpt: mark"
_EVENT = "[memory]"
_BACKWARD = "autograd::engine::evaluate_function: "


class Span(NamedTuple):
    """From a mark to the next.

    Attributes:
        label: That of the mark; None of the start.
        live: Bytes at the mark that are allocated above those at the start.
        peak: The most until the next mark.
        operation: What ran then; empty where that is not known.
    """

    label: Any
    live: int
    peak: int
    operation: str


class Meter(Protocol):
    """Notes what is allocated.

    Attributes:
        spans: From the start to the end, once that is reached.
    """

    spans: list[Span]

    def mark(self, label: Any) -> None:
        """Starts another span."""


@contextlib.contextmanager
def metered(device: torch.device) -> Iterator[Meter]:
    """Measures what is allocated on a device while active; garbage stays meanwhile."""
    gc.collect()
    collecting = gc.isenabled()
    gc.disable()
    try:
        with _OnCuda.running(device) if device.type == "cuda" else _OnCpu.running() as meter:
            yield meter
    finally:
        if collecting:
            gc.enable()


def is_busy(device: torch.device) -> bool:
    """Whether somebody else uses what is needed to measure."""
    return device.type == "cpu" and bool(torch._C._autograd._profiler_enabled())


class _OnCuda:
    def __init__(self, device: torch.device) -> None:
        self._device, self._label = device, None
        self._start = self._live = torch.cuda.memory_allocated(device)
        self.spans: list[Span] = []
        torch.cuda.reset_peak_memory_stats(device)

    def mark(self, label: Any) -> None:
        peak = torch.cuda.max_memory_allocated(self._device) - self._start
        self.spans.append(Span(self._label, self._live - self._start, peak, ""))
        self._label, self._live = label, torch.cuda.memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)

    @classmethod
    @contextlib.contextmanager
    def running(cls, device: torch.device) -> Iterator[_OnCuda]:
        torch.cuda.synchronize(device)
        meter = cls(device)
        yield meter
        meter.mark(None)


class _OnCpu:
    def __init__(self) -> None:
        self._labels: list[Any] = []
        self.spans: list[Span] = []

    def mark(self, label: Any) -> None:
        with record_function(f"{_MARK} {len(self._labels)}"):
            self._labels.append(label)

    @classmethod
    @contextlib.contextmanager
    def running(cls) -> Iterator[_OnCpu]:
        meter = cls()
        # Else each profile prints two lines.
        with mock.patch.dict(os.environ, {"KINETO_LOG_LEVEL": "99"}):
            with profile(profile_memory=True) as profiler:
                yield meter
        events = profiler.kineto_results.events()
        meter.spans = [*meter._spans(sorted(events, key=lambda event: event.start_ns()))]

    def _spans(self, events: list[Any]) -> Iterator[Span]:
        label, start, most = None, 0, (0, "")
        live, running, until = 0, "", 0
        for event in events:
            name = event.name()
            if name.startswith(_MARK):
                yield Span(label, start, *most)
                label = self._labels[int(name.removeprefix(_MARK))]
                start, most = live, (live, running)
            elif name == _EVENT:
                live += event.nbytes()
                most = max(most, (live, running), key=lambda m: m[0])
            elif event.start_ns() >= until:  # not inside of another one
                running, until = name.removeprefix(_BACKWARD), event.end_ns()
        yield Span(label, start, *most)
