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
        inputs, spec = tree.flatten((args, kwargs), open_objects=True)
        with self._lock:
            key = self._signature(module, inputs, spec)
            failure: CaptureError | None = None
            try:
                captured = self._find(module, args, kwargs, key, inputs, spec)
            except CaptureError as error:
                if self.options.strict:
                    raise
                failure = error
        if failure is not None:
            result = self.original(module, *args, **kwargs)  # its own errors come first
            self._fall_back(module, key, failure)
            return result
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
        inputs, spec = tree.flatten((args, kwargs), open_objects=True)
        with torch.enable_grad(), self._lock:
            key = self._signature(module, inputs, spec)
            try:
                self._find(module, args, kwargs, key, inputs, spec)
            except CaptureError as error:
                if self.options.strict:
                    raise
                self._fall_back(module, key, error)

    def require(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raises the `CaptureError` for which a call would run eagerly, if there is one."""
        inputs, spec = tree.flatten((args, kwargs), open_objects=True)
        with torch.enable_grad(), self._lock:
            key = self._signature(module, inputs, spec)
            if self._known(key) is None:
                del self._captured[key]
            self._find(module, args, kwargs, key, inputs, spec)

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
        key: Hashable,
        inputs: Sequence[torch.Tensor],
        spec: tree.Spec,
    ) -> Captured | None:
        """What was captured for this call, captured now if it is the first of its kind.

        Returns:
            None if this call runs eagerly.

        Raises:
            CaptureError: if the call cannot be captured.
        """
        known = self._known(key)
        if known is None:
            return None
        captured = next((c for c in known if c.guards_hold(inputs)), None)
        if captured is None:
            if len(known) >= self.options.cache_size:
                raise CaptureError(
                    f"forward reads a value that differed {len(known)} times",
                    hint="Keep decisions that change at each call outside of the model.",
                )
            captured = self._capture(module, args, kwargs, spec)
            known.append(captured)
        if not captured.differentiable:
            return None
        self.latest = captured
        return captured

    def _signature(
        self, module: nn.Module, inputs: Sequence[torch.Tensor], spec: tree.Spec
    ) -> Hashable:
        return self._state(module), signature.of_modes(), signature.of_arguments(spec, inputs)

    def _known(self, key: Hashable) -> list[Captured] | None:
        """What was captured for a signature, which is the latest used from now on."""
        known = self._captured.setdefault(key, [])
        self._captured.move_to_end(key)
        while len(self._captured) > self.options.cache_size:
            self._captured.popitem(last=False)
        return known

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
            watch.state,
        )

    def _fall_back(self, module: nn.Module, key: Hashable, error: CaptureError) -> None:
        """Calls of this kind run eagerly from now on; says so once."""
        self._captured[key] = None
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{type(module).__name__} runs eagerly, without saving memory: {error}",
                FallbackWarning,
                stacklevel=6,
            )


def _is_traced(module: nn.Module) -> bool:
    """Whether the call is part of something else that has to see the original forward."""
    return (
        is_capturing()
        or torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        or getattr(module, "_is_replica", False)
    )
