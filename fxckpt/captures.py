"""What was captured of the calls of one module, by signature."""

from __future__ import annotations

import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import nn

from fxckpt import signature, tree
from fxckpt.capture import capture
from fxckpt.errors import CaptureError
from fxckpt.places import Position
from fxckpt.runtime import Captured, Decide


@dataclasses.dataclass(frozen=True, slots=True)
class Options:
    """What `rewrite` was called with."""

    decide: Decide
    cache_size: int
    strict: bool


class Captures:
    """Finds what was captured for a call, and captures what was not.

    Args:
        module: The module.
        original: Its forward, a function of (module, *args, **kwargs).
        options: What `rewrite` was called with.
        position: Where the module stands in the model that was rewritten.
    """

    def __init__(
        self,
        module: nn.Module,
        original: Callable[..., Any],
        options: Options,
        position: Position,
    ) -> None:
        self._original, self._options, self._position = original, options, position
        # By signature; the error where the graph cannot be captured. Several per signature if
        # Python read values of the arguments: then their guards decide.
        self._known: OrderedDict[Hashable, list[Captured] | CaptureError] = OrderedDict()
        self._watch = signature.Watch(module)
        self._lock = threading.RLock()
        self.generation = 0  # how often the structure of the module changed

    def find(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        inputs: Sequence[torch.Tensor],
        spec: tree.Spec,
    ) -> Captured | CaptureError | None:
        """What was captured for this call, captured now if it is the first of its kind.

        Args:
            module: The module.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
            inputs: The tensors in both.
            spec: The rest of both.

        Returns:
            Why it cannot be captured, if it cannot; None if there is nothing to differentiate.

        Raises:
            CaptureError: instead of returning it, if the option `strict` is set.
        """
        with self._lock:
            key = self._signature(module, inputs, spec)
            known = self._latest(key)
            if isinstance(known, CaptureError):
                return known
            captured = next((c for c in known if c.guards_hold(inputs)), None)
            if captured is None:
                try:
                    captured = self._capture(module, args, kwargs, spec, len(known))
                except CaptureError as error:
                    if self._options.strict:
                        raise
                    self._known[key] = error = _without_frames(error)
                    return error
                known.append(captured)
        return captured if captured.differentiable else None

    def _signature(
        self, module: nn.Module, inputs: Sequence[torch.Tensor], spec: tree.Spec
    ) -> Hashable:
        state = self._watch.state()
        if state is None:  # the structure of the module changed
            self._known.clear()
            self._watch, self.generation = signature.Watch(module), self.generation + 1
            state = self._watch.state()
        return state, signature.of_modes(), signature.of_arguments(spec, inputs)

    def _latest(self, key: Hashable) -> list[Captured] | CaptureError:
        """What is known for a signature, which is the latest used from now on."""
        known = self._known.setdefault(key, [])
        self._known.move_to_end(key)
        while len(self._known) > self._options.cache_size:
            self._known.popitem(last=False)
        return known

    def _capture(
        self, module: nn.Module, args: Any, kwargs: Any, spec: tree.Spec, before: int
    ) -> Captured:
        if before >= self._options.cache_size:
            raise CaptureError(
                f"forward reads a value that differed {before} times",
                hint="Keep decisions that change at each call outside of the model.",
            )

        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._original(module, *args, **kwargs)

        tape = capture(forward, args, kwargs, module=module, position=self._position)
        return Captured(tape, self._options.decide, forward, spec, module, self._watch.state)


def _without_frames(error: CaptureError) -> CaptureError:
    """The error without what keeps the tensors of its frames alive."""
    return CaptureError(error.reason, path=error.path, source=error.source, hint=error.hint)
