"""Puts another forward on an `nn.Module`, and takes it off again.

NOTE [How a module is rewritten]

The class of a rewritten module is a subclass of its class, with the same name, whose `forward` runs
what lies in the module's `__dict__`. That is the one way which keeps `isinstance`, attributes,
`inspect.signature(model.forward)`, `super().forward`, `copy`, `pickle` and the wrappers of training
libraries working. Copies and pickles are made of the module without its unit: a copy gets a unit of
its own, a pickle loads as the original class.
"""

from __future__ import annotations

import copy
import copyreg
import inspect
import weakref
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from torch import nn

from fxckpt.errors import FxckptError

M = TypeVar("M", bound=nn.Module)
_UNIT = "_fxckpt_unit"
_HIDDEN = "_fxckpt_forward"  # a forward that was an attribute of the instance
_MARK = "_fxckpt_original"  # the class that a class of ours stands for
_NAMING = ("__name__", "__qualname__", "__module__", "__doc__", "__annotations__")


class Runner(Protocol):
    """What runs the forward of a module instead of the module."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs the forward."""

    def for_module(self, module: nn.Module) -> Any:
        """This runner, or another one if `module` is a copy of the module that it was made for."""

    def for_copy(self, module: nn.Module) -> Any:
        """The runner that a copy of the module gets; None for none."""


def install(model: nn.Module, runner: Any) -> None:
    """Makes a module run its forward by `runner`."""
    sub = _subclass(type(model))
    model.__dict__[_UNIT] = runner
    if "forward" in model.__dict__:  # as accelerate does
        model.__dict__[_HIDDEN] = model.__dict__.pop("forward")
    model.__class__ = sub


def uninstall(model: nn.Module) -> None:
    """Gives a module its own forward back.

    Raises:
        FxckptError: if its class was changed after it was rewritten.
    """
    cls = original_class(model)
    if cls is not type(model).__mro__[1]:
        raise FxckptError(
            f"restore_(model): the class of the model was changed to {type(model)} after it was "
            "rewritten (parametrize and fully_shard do so). Undo that first"
        )
    model.__class__ = cls
    model.__dict__.update(_without_runner(model.__dict__))
    for key in (_UNIT, _HIDDEN):
        model.__dict__.pop(key, None)


def installed(model: nn.Module) -> Any:
    """The runner that was installed on the module, or on the one that it is a copy of, or None."""
    return model.__dict__.get(_UNIT)


def runner_of(model: nn.Module) -> Any:
    """The runner of a module; one of its own if the module is a copy of another."""
    runner = model.__dict__[_UNIT].for_module(model)
    model.__dict__[_UNIT] = runner
    return runner


def original_forward(model: nn.Module) -> Callable[..., Any]:
    """The forward that the module has without a runner, as a function of (module, *arguments)."""
    sub = _subclass(original_class(model))

    def forward(m: nn.Module, *args: Any, **kwargs: Any) -> Any:
        own = m.__dict__.get(_HIDDEN) or super(sub, m).forward
        return own(*args, **kwargs)

    return forward


def original_class(model: nn.Module) -> Any:
    """The class of a module without its runner."""
    return next((vars(c)[_MARK] for c in type(model).__mro__ if _MARK in vars(c)), type(model))


def plain(model: M) -> M:
    """A module with the same attributes, without the runner."""
    cls = original_class(model)
    new: M = object.__new__(cls)
    new.__dict__.update(_without_runner(model.__dict__))
    for name in copyreg._slotnames(cls):  # type: ignore[attr-defined]
        if hasattr(model, name):
            setattr(new, name, getattr(model, name))
    return new


def _without_runner(attributes: dict[str, Any]) -> dict[str, Any]:
    kept = {k: v for k, v in attributes.items() if k not in (_UNIT, _HIDDEN)}
    return {**kept, "forward": attributes[_HIDDEN]} if _HIDDEN in attributes else kept


class _Silent:
    """In front of a class, keeps its `__init_subclass__` from hearing of a subclass."""

    def __init_subclass__(cls, **_: Any) -> None:
        pass


_SUBCLASSES: weakref.WeakValueDictionary[type, Any] = weakref.WeakValueDictionary()


def _subclass(cls: Any) -> Any:
    """The class of modules of class `cls` that have a runner.

    It is made without the class's metaclass and `__init_subclass__`, which may want arguments or
    register what they see.
    """
    known = _SUBCLASSES.get(cls)
    if known is not None:
        return known
    names = {"__qualname__": cls.__qualname__, "__module__": cls.__module__, "__doc__": cls.__doc__}
    new: Any = type.__new__(type(cls), cls.__name__, (_Silent, cls), {**names, _MARK: cls})
    new.__bases__ = (cls,)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if _UNIT not in self.__dict__:  # made by `type(model)(...)`
            return super(new, self).forward(*args, **kwargs)
        return runner_of(self)(self, args, kwargs)

    new.forward = _disguised(forward, cls)
    new.__reduce_ex__ = _reduce
    new.__copy__ = _copy
    new.__deepcopy__ = _deepcopy
    _SUBCLASSES[cls] = new
    return new


def _disguised(forward: Any, cls: Any) -> Any:
    """`forward` with the name, documentation and signature of the forward of `cls`.

    Without `__wrapped__`, which accelerate follows.
    """
    theirs = inspect.getattr_static(cls, "forward")
    function = getattr(theirs, "__func__", theirs)
    for name in _NAMING:
        if hasattr(function, name):
            setattr(forward, name, getattr(function, name))
    try:
        signature = inspect.signature(function)
    except ValueError:  # a built-in function
        return forward
    if isinstance(theirs, staticmethod) or not inspect.isfunction(function):
        self = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        rest = list(signature.parameters.values())
        signature = signature.replace(parameters=[self, *rest])
    forward.__signature__ = signature
    return forward


# -- copies


def _reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
    """Pickles the module as its original class, loadable without fxckpt."""
    reduced: Any = plain(self).__reduce_ex__(protocol)
    func, args, *rest = reduced
    if func is copyreg.__newobj__:  # type: ignore[attr-defined]
        # pickle refuses this function for an object of another class than the one it names.
        func, args = copyreg._reconstructor, (args[0], object, None)  # type: ignore[attr-defined]
    return func, args, *rest


def _copy(self: M) -> M:
    return _with_runner(copy.copy(plain(self)), self)


def _deepcopy(self: M, memo: dict[int, Any]) -> M:
    model = plain(self)
    if hasattr(type(model), "__deepcopy__"):
        new = copy.deepcopy(model, memo)
        if new is model:
            return self
    else:
        reduced: Any = model.__reduce_ex__(4)
        func, args, state, *_ = reduced
        new = func(*args)
        memo[id(self)] = new  # before the state is copied: it may refer to the module
        new.__setstate__(copy.deepcopy(state, memo))
    memo[id(self)] = _with_runner(new, self)
    return new


def _with_runner(new: M, old: M) -> M:
    runner = runner_of(old).for_copy(new)
    if runner is not None:
        install(new, runner)
    return new
