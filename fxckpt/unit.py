"""A unit: one module whose forward was replaced. It runs what was captured, or else its parts."""

from __future__ import annotations

import contextlib
import itertools
import re
import warnings
import weakref
from typing import Any

import torch
from torch import nn
from torch.utils._device import DeviceContext

from fxckpt import levels
from fxckpt.arguments import Call
from fxckpt.budgets import AsPlanned
from fxckpt.capture import is_capturing
from fxckpt.captures import Captures, Options
from fxckpt.errors import CaptureError, FallbackWarning, FxckptError
from fxckpt.first_run import Misfit
from fxckpt.installation import original_forward
from fxckpt.kin import Kin
from fxckpt.nests import Nested
from fxckpt.parts import CastOnce, Parts, submodules
from fxckpt.places import ROOT, Position, stack_level_of_user
from fxckpt.recorder import current_recorder
from fxckpt.runtime import Captured


class Unit:
    """Runs the forward of a module that was rewritten.

    Args:
        module: The module; only a weak reference is kept.
        options: What `rewrite` was called with.
        position: Where it stands in the model that was rewritten.
        kin: What was captured of modules that may look the same.
    """

    passing = False  # on the module until it is restored
    why = "the model as a whole"  # what is captured at once

    def __init__(
        self,
        module: nn.Module,
        options: Options,
        position: Position = ROOT,
        kin: Kin | None = None,
    ) -> None:
        self.options = options
        self.captures = Captures(module, options, position, kin)
        self.latest: Captured | None = None
        self.failure: CaptureError | None = None  # for which the latest call ran eagerly
        self._owner = weakref.ref(module)
        self.parts: Parts | None = None  # if it cannot be captured as a whole
        self._generation = 0  # of the structure that the parts belong to
        self._told: set[str] = set()  # lines, or reasons, that were warned of
        self._may_pass = False  # whether the next call may do better, so that nothing is told

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs the module's forward: the captured one if gradients may be wanted."""
        if not (module.training and torch.is_grad_enabled()):
            return original_forward(module)(*args, **kwargs)
        if torch.compiler.is_compiling():
            return run_traced(module, args, kwargs)
        if is_capturing():
            return run_within(self.options, module, args, kwargs)
        if is_traced(module):
            return original_forward(module)(*args, **kwargs)
        if levels.is_active():
            return self._run_transformed(module, args, kwargs)
        found, call = self.captures.find(module, args, kwargs)
        self.failure = found if isinstance(found, CaptureError) else None
        if isinstance(found, CaptureError):
            return self._run_eagerly(module, args, kwargs, found)
        if found is None:
            return original_forward(module)(*args, **kwargs)
        with contextlib.suppress(Misfit):
            return self._run(found, _required(call))
        return Unit.__call__(self, module, args, kwargs)  # captured anew

    def prepare(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Captures the call without running it."""
        if not module.training:
            raise FxckptError(
                "rewrite(..., example_inputs=...): the model is in evaluation mode, where the "
                "original forward runs. Call model.train() first"
            )
        found = self.found(module, args, kwargs)
        if isinstance(found, Captured):
            self.latest = found

    def found(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Captured | CaptureError | None:
        """What is captured for a call, see `Captures.find`."""
        with torch.enable_grad():
            return self.captures.find(module, args, kwargs)[0]

    @property
    def called(self) -> bool:
        """Whether the module was ever called in training."""
        return self.captures.tried

    def require(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raises the `CaptureError` for which a call runs eagerly, no part of it captured."""
        found = self.found(module, args, kwargs)
        if isinstance(found, CaptureError) and not self._saving_parts():
            raise found

    def for_module(self, module: nn.Module) -> Unit:
        """This unit, or a new one with the same options if `module` is a copy of its owner."""
        return self if self._owner() is module else self.for_copy(module)

    def for_copy(self, module: nn.Module) -> Unit:
        """A new unit with the same options."""
        return Unit(module, self.options)

    def __deepcopy__(self, _: Any) -> Unit:
        return self  # until `for_module` sees that its module is a copy

    def _run(self, found: Captured, call: Call) -> Any:
        """Runs what was captured for a call."""
        self.latest = found
        return found(call)

    def _run_transformed(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Runs the forward under transforms of `torch.func`."""
        try:
            return self.captures.run_transformed(module, args, kwargs)
        except CaptureError as error:
            if self.options.strict:
                raise
            failure = error
        result = original_forward(module)(*args, **kwargs)
        if self.is_new(failure):
            _warn(f"{type(module).__name__} runs eagerly under torch.func", failure)
        return result

    # -- parts

    def _run_eagerly(self, module: nn.Module, args: Any, kwargs: Any, failure: CaptureError) -> Any:
        """Runs the original forward, with the parts of the module captured where possible."""
        self.failure, self._may_pass = failure, failure.may_pass
        first = not self._told and self.is_new(failure)
        # A plan is for the whole, which the next call may capture.
        waits = failure.may_pass and isinstance(self.options.decide, AsPlanned)
        with contextlib.nullcontext() if waits else self.parts_in_place(module):
            result = original_forward(module)(*args, **kwargs)  # its own errors come first
        if first:
            _warn(f"{type(module).__name__} {_how_it_runs(self._saving_parts())}", failure)
        return result

    def captured(self) -> list[tuple[str, Captured]]:
        """What ran in the latest call, and where: the module as a whole, or its parts."""
        if self.failure is None:
            return [] if self.latest is None else [("", self.latest)]
        runners = self.parts.runners() if self.parts is not None else []
        return [(path, part.latest) for path, part in runners if part.latest is not None]

    def histories(self) -> list[Captures]:
        """What was captured, of the module as a whole and of its parts."""
        runners = self.parts.runners() if self.parts is not None else []
        return [self.captures, *(part.captures for _, part in runners)]

    def _saving_parts(self) -> list[str]:
        runners = self.parts.runners() if self.parts is not None else []
        return [path for path, part in runners if part.latest is not None]

    def parts_in_place(self, module: nn.Module) -> contextlib.AbstractContextManager[None]:
        """While active, the parts run what was captured of them."""
        if self.parts is None or self._generation != self.captures.generation:
            self.parts = Parts(module, submodules(module), lambda m, at: Part(m, at, self))
            self._generation = self.captures.generation
        return self.parts.in_place()

    def is_new(self, failure: CaptureError) -> bool:
        """Whether nothing failed at this line before, or for this reason if it has no line."""
        if self._may_pass:
            return False
        cause = failure.source or failure.reason
        known = cause in self._told
        self._told.add(cause)
        return not known


def run_within(options: Options, module: nn.Module, args: Any, kwargs: Any) -> Any:
    """Runs the forward of a rewritten module while something around it is captured."""
    recorder = current_recorder()
    if recorder is None or not options.nests:
        return original_forward(module)(*args, **kwargs)
    checkpoint = Nested(options.decide)
    return recorder.run_within(checkpoint, lambda: original_forward(module)(*args, **kwargs))


def run_traced(module: nn.Module, args: Any, kwargs: Any) -> Any:
    """Runs the forward of a rewritten module inside of `torch.compile`."""
    if torch.compiler._is_exporting_flag:  # to Dynamo, is_exporting() is always true in 2.11
        return original_forward(module)(*args, **kwargs)
    from fxckpt import traced  # and with it Dynamo, which takes seconds

    return traced.forward(module, args, kwargs)


class Part:
    """Runs the forward of a part of a module that cannot be captured as a whole.

    Args:
        module: The part; only a weak reference is kept.
        position: Where it stands in the whole.
        whole: The unit of the whole; likewise.
    """

    passing = True  # on the module while the whole runs

    def __init__(self, module: nn.Module, position: Position, whole: Unit) -> None:
        self._cast = CastOnce(position.path, waits=True)
        self.captures = Captures(module, whole.options, position)
        self.latest: Captured | None = None  # set if it saves memory
        self._owner, self._whole = weakref.ref(module), weakref.ref(whole)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs the forward: the captured one if that saves memory."""
        whole = self._whole()
        parts = whole.parts if whole is not None else None
        if whole is None or parts is None or not (parts.active() and torch.is_grad_enabled()):
            return original_forward(module)(*args, **kwargs)
        if is_traced(module) or levels.is_active():
            return original_forward(module)(*args, **kwargs)
        if self._owner() is not module or self._cast.may_be(parts):
            return original_forward(module)(*args, **kwargs)
        found, call = self.captures.find(module, args, kwargs)
        if isinstance(found, Captured) and found.saves_memory:
            self.latest = found
            with contextlib.suppress(Misfit):
                return found(_required(call))
            self._cast.take_back()
            return self(module, args, kwargs)  # captured anew
        failure = found if isinstance(found, CaptureError) and not found.may_pass else None
        new = failure is not None and whole.is_new(failure)
        result = original_forward(module)(*args, **kwargs)
        if failure is not None and new:
            _warn(f"{type(module).__name__} runs eagerly", failure)
        return result

    def for_module(self, _: nn.Module) -> Part:
        """This part, which runs the original forward of other modules."""
        return self

    def for_copy(self, _: nn.Module) -> None:
        """None: parts are rewritten only while the whole runs."""

    def __deepcopy__(self, _: Any) -> Part:
        return self


def _required(call: Call | None) -> Call:
    assert call is not None, "something was captured for it"
    return call


def _how_it_runs(saving: list[str]) -> str:
    if not saving:
        return "runs eagerly, without saving memory"
    names = list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", path) for path in saving))
    shown = ", ".join(itertools.islice(names, 4)) + (", ..." if len(names) > 4 else "")
    return f"runs eagerly, but for {len(saving)} of its parts ({shown})"


def _warn(start: str, failure: CaptureError) -> None:
    warnings.warn(f"{start}: {failure}", FallbackWarning, stacklevel=stack_level_of_user())


def is_traced(module: nn.Module) -> bool:
    """Whether the call is part of something else that has to see the original forward."""
    return (
        is_capturing()
        or torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch.fx._symbolic_trace.is_fx_symbolic_tracing()
        or (levels.is_active() and not levels.are_known())
        or _has_function_mode()
        or torch.nn.utils.parametrize._cache_enabled > 0
        or getattr(module, "_is_replica", False)
    )


def _has_function_mode() -> bool:
    """Whether the program looks at each call of a function of torch, other than by a device."""
    if not torch._C._len_torch_function_stack():
        return False
    modes = torch.overrides._get_current_function_mode_stack()
    return any(type(mode) is not DeviceContext for mode in modes)
