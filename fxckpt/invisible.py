"""What hides a capture from the captured program, and keeps the program within its bounds."""

from __future__ import annotations

import contextlib
import logging
import random
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn
from torch._functorch import config as functorch_config
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.function import _HookMixin
from torch.nn.modules import module as nn_module
from torch.utils._python_dispatch import _disable_current_modes

from fxckpt.contents import is_self_contained
from fxckpt.errors import CaptureError
from fxckpt.modes import collected_outputs
from fxckpt.state import HOOKS

# Functions of libraries that ask whether a tensor is fake, in order to take another branch.
_FAKE_CHECKS = (("transformers.utils.import_utils", "is_fake_tensor"),)

# Modules of libraries whose hooks only compute, and the one whose hooks collect at times.
_COMPUTING, _COLLECTING = "torch.nn.utils", "transformers.utils.output_capturing"


@contextlib.contextmanager
def no_fake_tensors_seen() -> Iterator[None]:
    """Library checks for fake tensors answer no, as they would in eager mode."""
    with contextlib.ExitStack() as stack:
        for module, name in _FAKE_CHECKS:
            if hasattr(sys.modules.get(module), name):
                stack.enter_context(mock.patch(f"{module}.{name}", _no))
        yield


def _no(*_: Any) -> bool:
    """A function and not a mock, which would keep the tensors that it is asked about."""
    return False


@contextlib.contextmanager
def unchanged_random_states() -> Iterator[None]:
    """Restores all random number generators, and refuses a program that advanced one of them.

    Raises:
        CaptureError: if the program drew random numbers outside of recorded operations.
    """
    before = _random_states()
    try:
        yield
        names = [n for n, a, b in zip(_GENERATORS, before, _random_states(), strict=True) if a != b]
        if names:
            raise CaptureError(
                f"forward draws random numbers from {' and '.join(names)}",
                hint="Use torch operations for random numbers that steer a model.",
                may_pass=True,  # another thread may have drawn them
            )
    finally:
        python, numpy_, torch_ = before
        random.setstate(python)
        np.random.set_state(numpy_)
        with outside_of_modes():
            state = torch.frombuffer(bytearray(torch_), dtype=torch.uint8)
            torch.default_generator.set_state(state)


_GENERATORS = ("`random`", "`numpy.random`", "the default torch generator")


def _random_states() -> tuple[Any, Any, bytes]:
    name, keys, *rest = np.random.get_state(legacy=True)
    with outside_of_modes():
        torch_ = bytes(torch.default_generator.get_state().numpy())
    return random.getstate(), (name, tuple(np.asarray(keys).tolist()), *rest), torch_


@contextlib.contextmanager
def fresh_autocast_cache() -> Iterator[None]:
    """Autocast's cache of cast weights holds no fake ones after a capture outside of autocast.

    Inside, eager code around needs what is in it, and what fakes put there dies with the region.
    """
    on = any(map(torch.is_autocast_enabled, ("cpu", "cuda")))
    try:
        yield
    finally:
        if not on:
            torch.clear_autocast_cache()


@contextlib.contextmanager
def no_saved_tensor_hooks() -> Iterator[None]:
    """Hooks of `torch.autograd.graph.saved_tensors_hooks` around the call see no fake tensor."""
    autograd = torch._C._autograd
    hooks = []
    while (top := autograd._top_saved_tensors_default_hooks(True)) is not None:
        hooks.append(top)
        autograd._pop_saved_tensors_default_hooks()
    try:
        yield
    finally:
        for pack, unpack in reversed(hooks):
            autograd._push_saved_tensors_default_hooks(pack, unpack)


@contextlib.contextmanager
def leaves_as(real: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """`is_leaf` answers for the tensor that a fake stands for: fakes of arguments are leaves."""
    plain = torch.Tensor.is_leaf.__get__  # type: ignore[attr-defined]
    answer = property(lambda tensor: plain(real(tensor)))
    with mock.patch.object(torch.Tensor, "is_leaf", answer):
        yield


@contextlib.contextmanager
def literals_read() -> Iterator[None]:
    """`torch.tensor([a, 2, b])` with tensors in it reads their values as `item` does.

    Otherwise it looks into their memory by itself, which fake tensors do not have.
    """
    originals = {name: getattr(torch, name) for name in ("tensor", "as_tensor")}
    thread = threading.get_ident()

    def reading(original: Callable[..., Any]) -> Callable[..., Any]:
        def read(data: Any, *args: Any, **kwargs: Any) -> Any:
            mine = threading.get_ident() == thread and isinstance(data, (list, tuple))
            return original(_with_values(data) if mine else data, *args, **kwargs)

        return read

    with contextlib.ExitStack() as stack:
        for name, original in originals.items():
            stack.enter_context(mock.patch.object(torch, name, reading(original)))
        yield


def _with_values(data: Any) -> Any:
    if isinstance(data, torch.Tensor):
        return data.tolist()
    if type(data) in (list, tuple):
        return type(data)(map(_with_values, data))
    return data


def fake_mode(environment: Any = None) -> FakeTensorMode:
    """A mode for fakes that programs run on; `environment` is the `ShapeEnv`, if sizes are symbols.

    Their address is refused; by default it would be zero, with a warning the first time.
    """
    with functorch_config.patch(fake_tensor_allow_unsafe_data_ptr_access=False):
        mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=environment)
    # What is kept of operations on symbols costs more than it saves.
    mode.cache_enabled = mode.cache_enabled and environment is None
    _own_modes.add(mode)
    return mode


def stands_for_real(tensor: torch.Tensor) -> bool:
    """Whether a fake was made for a real tensor, not by a program that runs on fakes itself."""
    return getattr(tensor, "fake_mode", None) in _own_modes


_own_modes: weakref.WeakSet[FakeTensorMode] = weakref.WeakSet()


@contextlib.contextmanager
def outside_of_modes() -> Iterator[None]:
    """Runs real computations in the middle of a capture."""
    with _disable_current_modes():
        yield


_AROUND_FORWARD = ("_forward_pre_hooks", "_forward_hooks")


_WRAPPERS = ("torch.nn.parallel.", "torch.distributed.fsdp.fully_sharded_data_parallel.")


def refuse_hooks(root: nn.Module) -> None:
    """Raises if a hook of a submodule, or a wrapper, would run during capture and never again.

    Hooks of the root itself run around the captured forward, as always; those of `torch.nn.utils`
    (weight norm and the like) only compute, and are captured, as are those around forward that can
    do nothing else; those of transformers collect hidden states for the forward in which they run,
    unless one that is around it has asked for them.

    Raises:
        CaptureError: naming the hook or the wrapper.
    """
    harmless = _COMPUTING if collected_outputs() else (_COMPUTING, _COLLECTING)
    for path, m in root.named_modules():
        if any(f"{cls.__module__}.".startswith(_WRAPPERS) for cls in type(m).__mro__):
            raise CaptureError(
                f"{type(m).__name__} synchronises what the module in it computes",
                path=path,
                hint="Rewrite the module, then wrap it.",
            )
        for kind in HOOKS:
            for hook in getattr(m, kind).values():
                owner = getattr(hook, "__module__", "")
                computes = kind in _AROUND_FORWARD and _only_computes(hook)
                if path and not computes and not owner.startswith(harmless):
                    name = getattr(hook, "__qualname__", type(hook).__name__)
                    raise CaptureError(f"a hook is registered ({name} in {kind})", path=path)
    if any(getattr(nn_module, f"_global{kind}") for kind in HOOKS):
        raise CaptureError("a hook is registered for all modules")


_SPREADING = "torch.distributed.tensor."


def _only_computes(hook: Any) -> bool:
    """Whether a hook does nothing but compute.

    `parallelize_module` registers lambdas around functions of the styles that it was given.
    """
    if not getattr(hook, "__module__", "").startswith(_SPREADING):
        return is_self_contained(hook)
    around = [cell.cell_contents for cell in getattr(hook, "__closure__", None) or ()]
    functions = [getattr(each, "func", each) for each in around if callable(each)]
    return all(
        is_self_contained(f) or getattr(f, "__module__", "").startswith(_SPREADING)
        for f in functions
    )


@contextlib.contextmanager
def side_effects_refused() -> Iterator[None]:
    """Refuses hooks that the program registers on its own tensors, and setting random states.

    The hooks of `torch.utils.checkpoint` only compute again; those of intermediate results that can
    do nothing but compute are part of backward.

    Raises:
        CaptureError: naming the hook or the function.
    """
    thread = threading.get_ident()

    def refusing(what: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def refuse(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != thread or "checkpoint" in type(args[0]).__module__:
                return original(*args, **kwargs)
            if (
                what == "register_hook"
                and args[0].grad_fn
                and all(map(is_self_contained, args[1:]))
            ):
                return original(*args, **kwargs)
            hooks = (getattr(a, "__qualname__", "") for a in args[1:])
            name = next(filter(None, hooks), type(args[0]).__name__)
            raise CaptureError(f"forward registers a hook ({what} of {name})")

        return refuse

    def refusing_seed(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def refuse(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != thread:
                return original(*args, **kwargs)
            raise CaptureError(
                f"forward sets the state of a random number generator ({name})",
                hint="Draw from where the generator is, or keep that part out of the model.",
            )

        return refuse

    with contextlib.ExitStack() as stack:
        for owner, name, what in _REGISTERING:
            new: Any = refusing(what, getattr(owner, name))
            new = staticmethod(new) if owner is _HookMixin else new
            stack.enter_context(mock.patch.object(owner, name, new))
        for module, name in _SEEDING:
            stack.enter_context(
                mock.patch.object(module, name, refusing_seed(name, getattr(module, name)))
            )
        yield


_SEEDING = tuple(
    (owner, name)
    for owner in (torch, torch.random, torch.cuda, torch.cuda.random)
    for name in ("manual_seed", "manual_seed_all", "seed", "seed_all", "set_rng_state")
    if hasattr(owner, name)
)
_REGISTERING = (
    (torch.Tensor, "register_hook", "register_hook"),
    (torch.Tensor, "register_post_accumulate_grad_hook", "register_post_accumulate_grad_hook"),
    (torch.Tensor, "retain_grad", "retain_grad"),
    (torch.autograd.graph.saved_tensors_hooks, "__enter__", "saved_tensors_hooks"),
    (_HookMixin, "_register_hook", "grad_fn.register_hook"),
)


@contextlib.contextmanager
def other_branches_refused() -> Iterator[None]:
    """Functions that take another branch while a dispatch mode is on, before it sees them.

    `cross_entropy` with class weights and label smoothing divides by a sum of weights: in eager
    mode of those that count, else of all, the others zero, which may be rounded in another way.
    """
    original: Any = torch._C._nn.cross_entropy_loss

    def cross_entropy_loss(
        input: Any,
        target: Any,
        weight: Any = None,
        reduction: int = 1,
        ignore_index: Any = -100,
        label_smoothing: float = 0.0,
    ) -> Any:
        indices = not target.is_floating_point()
        if weight is not None and reduction == 1 and label_smoothing > 0 and indices:
            raise CaptureError("forward smooths the labels of a weighted cross entropy")
        return original(input, target, weight, reduction, ignore_index, label_smoothing)

    with mock.patch.object(torch._C._nn, "cross_entropy_loss", cross_entropy_loss):
        yield


@contextlib.contextmanager
def errors_not_logged() -> Iterator[None]:
    """Errors of this thread are reported by us: what computes shapes does not log them."""
    thread = threading.get_ident()

    def is_elsewhere(_: logging.LogRecord) -> bool:
        return threading.get_ident() != thread

    _SHAPES_LOG.addFilter(is_elsewhere)
    try:
        yield
    finally:
        _SHAPES_LOG.removeFilter(is_elsewhere)


_SHAPES_LOG = logging.getLogger(FakeTensorMode.__module__)


@contextlib.contextmanager
def module_calls(enter: Callable[[nn.Module], None], leave: Callable[[], None]) -> Iterator[None]:
    """Calls `enter(module)` and `leave()` around each call of a module in this thread."""
    thread = threading.get_ident()

    def before(m: nn.Module, _: Any) -> None:
        if threading.get_ident() == thread:
            enter(m)

    def after(*_: Any) -> None:
        if threading.get_ident() == thread:
            leave()

    handles = (
        nn_module.register_module_forward_pre_hook(before),
        nn_module.register_module_forward_hook(after, always_call=True),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
