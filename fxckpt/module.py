"""Puts a captured forward on an `nn.Module`: `rewrite`, `rewrite_`, `restore_`, `is_rewritten`.

NOTE [How a module is rewritten]

The class of a rewritten module is a subclass of its class, with the same name, whose `forward` runs
the `Unit` in the module's `__dict__`. That is the one way which keeps `isinstance`, attributes,
`inspect.signature(model.forward)`, `super().forward`, `copy`, `pickle` and the wrappers of training
libraries working. A copy or pickle is made of the module without its unit; a copy gets a unit of
its own, a pickle loads as the original class.
"""

from __future__ import annotations

import copy
import functools
import inspect
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from torch.fx import GraphModule

from fxckpt import signature, tree
from fxckpt.capture import capture
from fxckpt.errors import CaptureError, FallbackWarning, FxckptError
from fxckpt.runtime import Captured, Decide

M = TypeVar("M", bound=nn.Module)
_UNIT = "_fxckpt_unit"


class Unit:
    """One module whose forward was replaced: captured graphs by signature.

    Args:
        module: The module.
        original: Its forward before, a function of (module, *args, **kwargs).
        decide: Chooses the values to save.
        cache_size: How many signatures are kept.
        strict: Raise instead of falling back to eager.
    """

    def __init__(
        self,
        module: nn.Module,
        original: Callable[..., Any],
        decide: Decide,
        *,
        cache_size: int,
        strict: bool,
    ) -> None:
        self.original, self.decide = original, decide
        self.cache_size, self.strict = cache_size, strict
        self._owner = weakref.ref(module)
        self._watch = signature.Watch(module)
        self._captured: OrderedDict[Hashable, list[Captured] | None] = OrderedDict()
        self._warned = False
        self.latest: Captured | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs the module's forward, captured if a gradient may be wanted."""
        if not (module.training and torch.is_grad_enabled()) or _is_traced():
            return self.original(module, *args, **kwargs)
        inputs, spec = tree.flatten((args, kwargs))
        captured = self._find(module, args, kwargs, inputs, spec)
        if captured is None:
            return self.original(module, *args, **kwargs)
        self.latest = captured
        return captured(inputs)

    def for_module(self, module: nn.Module) -> Unit:
        """This unit, or a new one with the same options if `module` is a copy of its owner."""
        if self._owner() is module:
            return self
        return Unit(
            module, self.original, self.decide, cache_size=self.cache_size, strict=self.strict
        )

    def _find(
        self,
        module: nn.Module,
        args: Any,
        kwargs: Any,
        inputs: Sequence[torch.Tensor],
        spec: tree.Spec,
    ) -> Captured | None:
        state = self._watch.state()
        if state is None:
            self._captured.clear()
            self._watch = signature.Watch(module)
            state = self._watch.state()
        key = (state, signature.of_modes(), signature.of_arguments(spec, inputs))
        if key in self._captured:
            self._captured.move_to_end(key)
        known = self._captured.setdefault(key, [])
        if known is None:
            return None
        for captured in known:
            if all(g.holds(lambda name, c=captured: c.lookup(name, inputs)) for g in captured.tape.guards):
                return captured
        try:
            known.append(self._capture(module, args, kwargs, spec))
        except CaptureError as error:
            self._captured[key] = None
            self._fall_back(module, error)
            return None
        while len(self._captured) > self.cache_size:
            self._captured.popitem(last=False)
        return known[-1]

    def _capture(
        self, module: nn.Module, args: Any, kwargs: Any, spec: tree.Spec
    ) -> Captured:
        forward = functools.partial(self.original, module)
        tape = capture(forward, args, kwargs, module=module)
        return Captured(tape, self.decide, forward, spec, module, lambda: self._watch.state())

    def _fall_back(self, module: nn.Module, error: CaptureError) -> None:
        if self.strict:
            raise error
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"fxckpt: {type(module).__name__} runs eagerly, without saving memory: {error}",
                FallbackWarning,
                stacklevel=6,
            )


def _is_traced() -> bool:
    """Whether somebody else is tracing or transforming this call."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def rewrite(
    model: M,
    policy: Any = None,
    *,
    cache_size: int = 32,
    strict: bool = False,
) -> M:
    from fxckpt.policies import resolve

    decide = resolve(policy)
    new = object.__new__(type(model))
    new.__dict__.update(model.__dict__)
    _install(new, decide, cache_size=cache_size, strict=strict)
    return new


def _install(model: nn.Module, decide: Decide, **options: Any) -> None:
    cls = type(model)
    model.__class__ = _subclass(cls)
    object.__setattr__(model, _UNIT, None)
    model.__dict__[_UNIT] = Unit(model, cls.forward, decide, **options)


@functools.lru_cache(maxsize=None)
def _subclass(cls: type) -> type:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        unit = self.__dict__[_UNIT].for_module(self)
        self.__dict__[_UNIT] = unit
        return unit(self, args, kwargs)

    new = type(cls.__name__, (cls,), {"__qualname__": cls.__qualname__, "__module__": cls.__module__})
    forward.__signature__ = inspect.signature(cls.forward)
    new.forward = forward
    return new
