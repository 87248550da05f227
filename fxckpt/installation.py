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
import functools
import inspect
import types
import weakref
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from fxckpt.errors import FxckptError

M = TypeVar("M", bound=nn.Module)
_UNIT = "_fxckpt_unit"
_HIDDEN = "_fxckpt_forward"  # a forward that was an attribute of the instance
_OURS = (_UNIT, _HIDDEN)
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
    _by_id[id(model)] = model
    if "forward" in model.__dict__ and not _runs_ours(model.__dict__["forward"]):
        model.__dict__[_HIDDEN] = model.__dict__.pop("forward")
    model.__class__ = sub


def exchange(model: nn.Module, runner: Any) -> None:
    """Lets a module that is rewritten run its forward by another runner."""
    model.__dict__[_UNIT] = runner


def uninstall(model: nn.Module) -> None:
    """Gives a module its own forward back.

    Raises:
        FxckptError: if its class was changed after it was rewritten.
    """
    if not _is_ours(type(model)):
        raise FxckptError(
            f"restore_(model): the class of the model was changed to {type(model)} after it was "
            "rewritten (parametrize and fully_shard do so). Undo that first"
        )
    _settle(model)
    model.__class__ = original_class(type(model))
    model.__dict__.update(_without_runner(model.__dict__))
    for key in _OURS:
        model.__dict__.pop(key, None)


def is_runner(attribute: str) -> bool:
    """Whether an attribute of a module holds what was installed on it."""
    return attribute in _OURS


_by_id: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()


def with_id(number: int) -> nn.Module:
    """The module on which something was installed, by `id`, all that compiled code has of it."""
    return _by_id[number]


def installed(model: nn.Module) -> Any:
    """The runner that was installed on the module, or on the one that it is a copy of, or None."""
    return _unnoticed(model).get(_UNIT)


def runner_of(model: nn.Module) -> Any:
    """The runner of a module; one of its own if the module is a copy of another."""
    attributes = _unnoticed(model)
    runner = attributes[_UNIT] = attributes[_UNIT].for_module(model)
    return runner


def original_forward(model: nn.Module) -> Callable[..., Any]:
    """The forward that a module has without its runner."""
    attributes = _unnoticed(model)
    if _HIDDEN in attributes:
        return attributes[_HIDDEN]
    ours = _outermost(type(model))
    own: Any = model if ours is None else super(ours, model)
    return own.forward


def original_class(cls: Any) -> Any:
    """The class of modules of class `cls` without their runners."""
    return vars(cls).get(_MARK, cls)


def plain(model: M) -> M:
    """A module with the same attributes, without the runner."""
    if installed(model) is not None:
        _settle(model)
    cls = original_class(type(model))
    new: M = object.__new__(cls)
    new.__dict__.update(_without_runner(model.__dict__))
    for name in copyreg._slotnames(cls):  # type: ignore[attr-defined]
        if hasattr(model, name):
            setattr(new, name, getattr(model, name))
    return new


def twin(model: M) -> M:
    """Like `plain`, a module that stands beside `model`: its own methods are bound to itself."""
    new = plain(model)
    own = new.__dict__.get("forward")
    if isinstance(own, types.MethodType) and own.__self__ is model:
        new.__dict__["forward"] = types.MethodType(own.__func__, new)
    return new


def _unnoticed(model: nn.Module) -> dict[str, Any]:
    """The attributes of a module; capture does not note that they are read (see `reads`)."""
    if torch.compiler.is_compiling():  # which cannot trace the other way
        return model.__dict__
    return object.__getattribute__(model, "__dict__")


def _without_runner(attributes: dict[str, Any]) -> dict[str, Any]:
    kept = {k: v for k, v in attributes.items() if k not in _OURS}
    return {**kept, "forward": attributes[_HIDDEN]} if _HIDDEN in attributes else kept


def _is_ours(cls: Any) -> bool:
    """Whether a class was made here: not one that was derived from such a class afterwards."""
    return _MARK in vars(cls)


def _outermost(cls: Any) -> Any:
    """The class among `cls` and its bases that runs the runner."""
    return cls if _is_ours(cls) else next(filter(_is_ours, cls.__mro__), None)


# -- forwards that are attributes of the instance
#
# `Accelerator.prepare` puts one around the forward of a class, for mixed precision, and
# `unwrap_model(keep_fp32_wrapper=False)` binds the innermost function to the module. If the forward
# was ours by then, that is a method, bound for the second time.


def _settle(model: nn.Module) -> bool:
    """Makes a forward of ours that was bound twice what it was meant for: the innermost one."""
    attributes = _unnoticed(model)
    twice = getattr(attributes.get("forward"), "__func__", None)
    if not isinstance(twice, types.MethodType) or not _runs_ours(twice):
        return False
    del attributes["forward"]
    inner = inspect.unwrap(attributes.pop(_HIDDEN, None) or twice)
    inner = getattr(inner, "__func__", inner)
    if inner is not original_class(type(model)).forward and not _runs_ours(inner):
        attributes[_HIDDEN] = types.MethodType(inner, model)
    attributes[_UNIT] = attributes[_UNIT].for_copy(model)  # what was captured is another forward
    return True


def _runs_ours(forward: Any) -> bool:
    """Whether a function leads to the forward of a class that was made here."""
    inner = inspect.unwrap(forward)
    return getattr(inner, "__func__", inner) in {sub.forward for sub in _SUBCLASSES.values()}


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
        if not isinstance(self, new) and _UNIT not in _unnoticed(self):  # restored
            return cls.forward(self, *args, **kwargs)
        if args and args[0] is self and _settle(self):
            args = args[1:]
        if _UNIT not in _unnoticed(self) or _outermost(type(self)) not in (new, None):
            # Made by `type(model)(...)`, or of a class derived from that.
            return super(new, self).forward(*args, **kwargs)
        result = runner_of(self)(self, args, kwargs)
        if not isinstance(self, new):  # a lazy module took its final class
            install(self, _unnoticed(self)[_UNIT].for_copy(self))
        return result

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
    for name in _NAMING:
        if hasattr(cls.forward, name):
            setattr(forward, name, getattr(cls.forward, name))
    try:
        signature = inspect.signature(cls.forward)
    except ValueError:  # a built-in function
        return forward
    if not isinstance(theirs, (types.FunctionType, functools.partialmethod)):
        self = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        rest = list(signature.parameters.values())
        signature = signature.replace(parameters=[self, *rest])
    forward.__signature__ = signature
    return forward


# -- copies


def _reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
    """Pickles the module as its original class, loadable without fxckpt."""
    if not _is_ours(type(self)):
        return object.__reduce_ex__(self, protocol)  # type: ignore[return-value]
    reduced: Any = plain(self).__reduce_ex__(protocol)
    func, args, *rest = reduced
    if func is copyreg.__newobj__:  # type: ignore[attr-defined]
        # pickle refuses this function for an object of another class than the one it names.
        func = args[0].__new__
        if func is object.__new__:
            func, args = copyreg._reconstructor, (args[0], object, None)  # type: ignore[attr-defined]
    return func, args, *rest


def _copy(self: M) -> M:
    if not _is_ours(type(self)):
        return _derived(self, self.__dict__)
    return _with_runner(copy.copy(plain(self)), self)


def _deepcopy(self: M, memo: dict[int, Any]) -> M:
    if not _is_ours(type(self)):
        memo[id(self)] = new = _derived(self, {})
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new
    model = plain(self)
    if hasattr(type(model), "__deepcopy__"):
        new = copy.deepcopy(model, memo)
        if new is model:
            return self
    else:
        # Unlike `copy.deepcopy(model)`, knows what state that refers to the module refers to.
        reduced: Any = model.__reduce_ex__(4)
        new = copy._reconstruct(self, memo, *reduced)  # type: ignore[attr-defined]
    memo[id(self)] = _with_runner(new, self)
    return new


def _derived(model: M, attributes: dict[str, Any]) -> M:
    new: M = object.__new__(type(model))
    new.__dict__.update(attributes)
    _by_id[id(new)] = new
    return new


def _with_runner(new: M, old: M) -> M:
    runner = runner_of(old).for_copy(new) if installed(old) is not None else None
    if runner is not None:
        install(new, runner)
    return new
