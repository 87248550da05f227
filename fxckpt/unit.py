"""A unit: one module whose forward was replaced, with its captured graphs by signature."""

from __future__ import annotations

import dataclasses
import functools
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import nn

from fxckpt import signature, tree
from fxckpt.capture import capture, is_capturing
from fxckpt.errors import CaptureError, FallbackWarning, FxckptError
from fxckpt.runtime import Captured, Decide


@dataclasses.dataclass(frozen=True, slots=True)
class Options:
    """How a unit behaves: what `rewrite` was called with."""

    decide: Decide
    cache_size: int
    strict: bool


class Unit:
    """Captures the calls of one module, and runs what was captured.

    Args:
        module: The module; only a weak reference is kept.
        original: Its forward, a function of (module, *args, **kwargs).
        options: What `rewrite` was called with.
        on_instance: A forward that was an attribute of the instance, kept for `restore_`.
    """

    def __init__(
        self, module: nn.Module, original: Callable[..., Any], options: Options, on_instance: Any
    ) -> None:
        self.original, self.options, self.on_instance = original, options, on_instance
        self.latest: Captured | None = None
        self._owner = weakref.ref(module)
        self._watch = signature.Watch(module)
        # By signature; None where the graph cannot be captured. Several per signature if Python
        # read values of the arguments: then their guards decide.
        self._captured: OrderedDict[Hashable, list[Captured] | None] = OrderedDict()
        self._lock = threading.RLock()
        self._warned = False

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs the module's forward: the captured one if gradients may be wanted."""
        if not (module.training and torch.is_grad_enabled()) or _is_traced(module):
            return self.original(module, *args, **kwargs)
        inputs, spec = tree.flatten((args, kwargs))
        with self._lock:
            captured = self._find(module, args, kwargs, inputs, spec)
        if captured is None:
            return self.original(module, *args, **kwargs)
        return captured(inputs)

    def prepare(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Captures the call without running it."""
        if not module.training:
            raise FxckptError(
                "rewrite(..., example_inputs=...): the model is in evaluation mode, where the "
                "original forward runs. Call model.train() first"
            )
        inputs, spec = tree.flatten((args, kwargs))
        with torch.enable_grad(), self._lock:
            self._find(module, args, kwargs, inputs, spec)

    def for_module(self, module: nn.Module) -> Unit:
        """This unit, or a new one with the same options if `module` is a copy of its owner."""
        if self._owner() is module:
            return self
        return Unit(module, self.original, self.options, self.on_instance)

    def _find(
        self,
        module: nn.Module,
        args: Any,
        kwargs: Any,
        inputs: Sequence[torch.Tensor],
        spec: tree.Spec,
    ) -> Captured | None:
        """What was captured for this call, captured now if it is the first of its kind."""
        key = (self._state(module), signature.of_modes(), signature.of_arguments(spec, inputs))
        known = self._captured.setdefault(key, [])
        self._captured.move_to_end(key)
        if known is None:
            return None
        for captured in known:
            if captured.guards_hold(inputs):
                self.latest = captured
                return captured
        try:
            known.append(self._capture(module, args, kwargs, spec))
        except CaptureError as error:
            self._captured[key] = None
            self._fall_back(module, error)
            return None
        finally:
            while len(self._captured) > self.options.cache_size:
                self._captured.popitem(last=False)
        self.latest = known[-1]
        return self.latest

    def _state(self, module: nn.Module) -> int | None:
        state = self._watch.state()
        if state is None:
            self._captured.clear()
            self._watch = signature.Watch(module)
            state = self._watch.state()
        return state

    def _capture(self, module: nn.Module, args: Any, kwargs: Any, spec: tree.Spec) -> Captured:
        forward = functools.partial(self.original, module)
        tape = capture(forward, args, kwargs, module=module)
        watch = self._watch
        return Captured(
            tape,
            self.options.decide,
            forward,
            spec,
            module,
            lambda: (watch.state(), signature.of_modes()),
        )

    def _fall_back(self, module: nn.Module, error: CaptureError) -> None:
        if self.options.strict:
            raise error
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{type(module).__name__} runs eagerly, without saving memory: {error}",
                FallbackWarning,
                stacklevel=7,
            )


def _is_traced(module: nn.Module) -> bool:
    """Whether the call is part of something else that has to see the original forward."""
    return (
        is_capturing()
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or getattr(module, "_is_replica", False)
    )
