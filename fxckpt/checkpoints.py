"""`torch.utils.checkpoint` inside of a captured program.

What it computes again in backward is recorded as operations of backward. Only random numbers are
not drawn again: it would put the generator back into the state that it had in forward, so these are
the numbers of forward.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch.utils.checkpoint

from fxckpt.recorder import Recorder


class _Again:
    """A checkpointed function, as backward calls it."""

    def __init__(self, fn: Any, recorder: Recorder) -> None:
        self._fn, self._recorder, self._draws = fn, recorder, range(0)

    def followed(self, steps: Iterator[None]) -> Iterator[None]:
        """Notes what is drawn between the steps of a checkpoint: before and after forward."""
        first = self._recorder.draws
        yield from steps
        self._draws = range(first, self._recorder.draws)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._recorder.drawing_again(self._draws):
            return self._fn(*args, **kwargs)


def _noted(recorder: Recorder, steps: Iterator[None]) -> Iterator[None]:
    """The steps of a checkpoint; what forward records in between is noted."""
    recorder.checkpoints += 1
    try:
        yield from steps
    finally:
        recorder.checkpoints -= 1


# What `torch.utils.checkpoint` calls: the latter since 2.15, which gets all options by name.
_OLD = "_checkpoint_without_reentrant_generator"
_NAME = f"{_OLD}_impl" if hasattr(torch.utils.checkpoint, f"{_OLD}_impl") else _OLD


@contextlib.contextmanager
def followed(recorder: Recorder) -> Iterator[None]:
    """While active, checkpoints of this thread tell the recorder what they draw again."""
    original: Any = getattr(torch.utils.checkpoint, _NAME)
    thread = threading.get_ident()

    def checkpointing(fn: Any, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != thread:
            return original(fn, *args, **kwargs)
        keeps_state = args[0] if _NAME == _OLD else kwargs["preserve_rng_state"]
        if not keeps_state:
            return _noted(recorder, original(fn, *args, **kwargs))
        again = _Again(fn, recorder)
        return _noted(recorder, again.followed(original(again, *args, **kwargs)))

    with mock.patch.object(torch.utils.checkpoint, _NAME, checkpointing):
        yield
