"""Checkpointing of functions: `checkpoint`, and `name` for values."""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypedDict, TypeVar, overload

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree
from typing_extensions import Unpack

from fxckpt import spread
from fxckpt.contents import is_leaf, reader
from fxckpt.errors import PolicyError
from fxckpt.joint import root
from fxckpt.module import rewrite_
from fxckpt.plans import Plan
from fxckpt.recorder import current_recorder

P = ParamSpec("P")
R = TypeVar("R")


class Options(TypedDict, total=False):
    """The options of `checkpoint`, which are those of `rewrite`."""

    policy: Any
    budget: int | str | float | None
    plan: Plan | None
    save: Any
    recompute: Any
    cache_size: int
    strict: bool
    planning_seconds: float
    profile: bool
    decompose: bool
    compile: bool
    dynamic: bool


@overload
def checkpoint(fn: Callable[P, R], **options: Unpack[Options]) -> Callable[P, R]: ...
@overload
def checkpoint(
    fn: None = None, **options: Unpack[Options]
) -> Callable[[Callable[P, R]], Callable[P, R]]: ...


def checkpoint(fn: Callable[..., Any] | None = None, **options: Unpack[Options]) -> Any:
    """A function like `fn` that keeps less for its backward and computes the rest again.

    As `jax.checkpoint`: results and gradients are those of `fn`, also under the transforms of
    `torch.func` (`grad`, `vjp`, `jvp`, `vmap`, `jacrev`, `jacfwd`, `hessian`), in any nest. The
    graph of `fn` is captured at the first call of each kind (shapes, dtypes, static arguments,
    what it reads from around it). Under `vmap` a budget is that of all samples together, as if
    they shared nothing.

    Args:
        fn: Any function of nested containers of tensors; other arguments are static. It may read
            tensors and modules from around it. Left out, `checkpoint` is a decorator with options.
        **options: Those of `rewrite`: `policy`, `budget`, `plan`, `save`, `recompute`,
            `cache_size`, `strict`, `planning_seconds`, `profile`, `decompose`, `compile`,
            `dynamic`. Without any of the first five, all is recomputed: policy="nothing".

    Raises:
        PolicyError: if `fn` is not callable, or the policy makes no sense.
        BudgetError: if the budget means nothing; when called, if no plan fits.

    Example:
        >>> import torch, fxckpt
        >>> f = fxckpt.checkpoint(lambda x: x.sin().sin().sum())
        >>> torch.func.vmap(torch.func.grad(f))(torch.zeros(2, 3))
        tensor([[1., 1., 1.],
                [1., 1., 1.]])
    """
    if not options.keys() & {"policy", "budget", "plan", "save", "recompute"}:
        options["policy"] = "nothing"
    if fn is None:
        return lambda function: checkpoint(function, **options)
    if not callable(fn):
        raise PolicyError(
            f"checkpoint(fn, ...): expected a function, got {type(fn).__name__}. Options are given "
            "by keyword: checkpoint(policy=...)"
        )
    module = Called(fn)
    rewrite_(module, **options)

    @functools.wraps(fn, updated=())
    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        module.find_modules()
        return module(*args, **kwargs)

    checkpointed.__fxckpt__ = module  # type: ignore[attr-defined]
    return checkpointed


def is_checkpointed(fn: Callable[..., Any]) -> bool:
    """Whether `checkpoint` returned a function."""
    return hasattr(fn, "__fxckpt__")


def module_of(checkpointed: Callable[..., Any]) -> Called:
    """The module that runs a function that `checkpoint` returned."""
    module: Called = checkpointed.__fxckpt__  # type: ignore[attr-defined]
    return module


T = TypeVar("T")


def name(x: T, tag: str) -> T:
    """Names a value for policies such as `policies.save_only_these_names`, and returns it.

    As `jax.ad_checkpoint.checkpoint_name`: an identity everywhere else.

    Args:
        x: A tensor, or a nested container of tensors.
        tag: The name. One value may have several, and one name may be given to several values.

    Raises:
        PolicyError: if the name is no string.

    Example:
        >>> import torch, fxckpt
        >>> f = lambda x: fxckpt.name(x.sin(), "sine").cos()
        >>> lean = fxckpt.checkpoint(f, policy=fxckpt.policies.save_only_these_names("sine"))
        >>> lean(torch.zeros(1))
        tensor([1.])
    """
    if not isinstance(tag, str):
        raise PolicyError(f"name(x, {tag!r}): expected a string, got {type(tag).__name__}")
    recorder = current_recorder()
    if recorder is not None:
        for tensor in pytree.tree_leaves(x):
            if isinstance(tensor, torch.Tensor):
                meta = root(recorder.node_for(spread.local(tensor))).meta
                meta["tags"] = (*meta.get("tags", ()), tag)
    return x


class Called(nn.Module):
    """A function as a module; the modules that the function reads are its submodules."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.find_modules()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the function returns."""
        return self.function(*args, **kwargs)

    def find_modules(self) -> None:
        """Registers the modules that the function reads now, by the names it has for them."""
        function = self.__dict__.get("function")
        found = dict(_modules_of(function)) if function is not None else {}
        registered = {k: m for k, m in self._modules.items() if k != "function"}
        if found.keys() != registered.keys() or any(
            found[k] is not m for k, m in registered.items()
        ):
            for key in registered:
                del self._modules[key]
            self._modules.update(found)


_MOST_LEVELS = 4
_LONG = 1000


def _modules_of(function: Any, depth: int = 0) -> Iterator[tuple[str, nn.Module]]:
    """Modules among what a function reads from around it, by the names it has for them."""
    for name, value in _read_by(function):
        yield from _modules_in(name, value, depth + 1)


def _read_by(function: Any) -> Iterator[tuple[str, Any]]:
    """What a function reads from around it, by name."""
    if isinstance(function, functools.partial):
        yield "arguments", [*function.args, *function.keywords.values()]
        yield "function", function.func
    elif isinstance(function, types.MethodType):
        yield "self", function.__self__
        yield "function", function.__func__
    elif isinstance(function, types.FunctionType):
        code = function.__code__
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            with contextlib.suppress(ValueError):  # not set yet
                yield name, cell.cell_contents
        for name in code.co_names:
            value = function.__globals__.get(name)
            if isinstance(value, (nn.Module, list, tuple, dict)):
                yield name, value


def _modules_in(name: str, value: Any, depth: int) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(value, nn.Module):
        yield name, value
    elif depth >= _MOST_LEVELS or is_leaf(value) or _is_data(value):
        return
    elif isinstance(value, (types.FunctionType, functools.partial, types.MethodType)):
        for inner, module in _modules_of(value, depth):
            yield (inner if name == "function" else f"{name}_{inner}"), module
    elif (read := reader(value)) is not None:
        for key, each in zip(*read(), strict=True):
            yield from _modules_in(f"{name}_{key}", each, depth + 1)


def _is_data(value: Any) -> bool:
    """Whether a container is long, or an array, and holds no modules as far as one can see at once.

    These are not walked through at each call.
    """
    if isinstance(value, (np.ndarray, bytearray)):
        return True
    if not isinstance(value, (list, tuple, dict)) or len(value) <= _LONG:
        return False
    first = next(iter(value.values() if isinstance(value, dict) else value))
    return is_leaf(first) or isinstance(first, torch.Tensor)
