"""Puts captured forwards on an `nn.Module`: `rewrite`, `rewrite_`, `restore_`, `is_rewritten`.

NOTE [How a module is rewritten]

The class of a rewritten module is a subclass of its class, with the same name, whose `forward` runs
the `Unit` in the module's `__dict__`. That is the one way which keeps `isinstance`, attributes,
`inspect.signature(model.forward)`, `super().forward`, `copy`, `pickle` and the wrappers of training
libraries working. Copies and pickles are made of the module without its unit: a copy gets a unit of
its own, a pickle loads as the original class.
"""

from __future__ import annotations

import copy
import copyreg
import inspect
import types
import weakref
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn
from torch.fx import GraphModule

from fxckpt import policies
from fxckpt.errors import FxckptError
from fxckpt.unit import Options, Unit

M = TypeVar("M", bound=nn.Module)
_UNIT = "_fxckpt_unit"


def rewrite(
    model: M,
    policy: Any = None,
    *,
    save: Any = (),
    recompute: Any = (),
    example_inputs: tuple[Any, ...] | Mapping[str, Any] | None = None,
    cache_size: int = 32,
    strict: bool = False,
) -> M:
    """A module like `model` whose training step keeps fewer activations and recomputes the rest.

    Outputs, gradients, buffers and random states are bit-identical to those of `model`. The graph
    is captured at the first call in training mode with gradients enabled, and again whenever
    something that it depends on changes (shapes, training flags, autocast, ...); calls in
    evaluation mode or under `torch.no_grad` run the original forward.

    Args:
        model: Any module. It is left as it was; parameters, buffers and submodules are shared.
        policy: What to recompute: a name ("attention", "mlp", "norm", "block", "dots", "sqrt",
            "nothing", "everything"; see `fxckpt.policies`) or a callable from a `Value` to
            `fxckpt.SAVE` or `fxckpt.RECOMPUTE`.
        save: Selectors of values to save: module-path globs, module classes, operations.
        recompute: Selectors of values to recompute.
        example_inputs: Captures now, for these arguments: a tuple of positional or a dictionary of
            keyword arguments. The model has to be in training mode.
        cache_size: How many signatures are kept; the least recently used is dropped.
        strict: Raise `CaptureError` where the default is to run eagerly and warn once.

    Returns:
        A new module of the same class (its name and `isinstance` included).

    Raises:
        PolicyError: if the policy or a selector makes no sense; selectors are matched when the
            model is captured.
        CaptureError: with `strict`, if the model cannot be captured exactly.
        FxckptError: if `model` is not a module that can be rewritten.

    Example:
        >>> import torch, fxckpt
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.GELU())
        >>> lean = fxckpt.rewrite(model, policy="dots")
        >>> lean(torch.ones(2, 4)).sum().backward()
        >>> model[0].weight.grad.shape
        torch.Size([4, 4])
    """
    _require_module("rewrite", model)
    new: M = object.__new__(_original_class(model))
    new.__dict__.update(_original_dict(model))
    return rewrite_(
        new,
        policy,
        save=save,
        recompute=recompute,
        example_inputs=example_inputs,
        cache_size=cache_size,
        strict=strict,
    )


def rewrite_(
    model: M,
    policy: Any = None,
    *,
    save: Any = (),
    recompute: Any = (),
    example_inputs: tuple[Any, ...] | Mapping[str, Any] | None = None,
    cache_size: int = 32,
    strict: bool = False,
) -> M:
    """Like `rewrite`, in place: `model` itself is rewritten, and returned.

    A module that is rewritten already gets the new policy instead. `restore_` undoes it.
    """
    _require_module("rewrite_", model)
    decide = policies.resolve(policy, save=save, recompute=recompute)
    if is_rewritten(model):
        restore_(model)
    _install(model, Options(decide, cache_size, strict))
    if example_inputs is not None:
        try:
            args, kwargs = _example(example_inputs)
            _unit(model).prepare(model, args, kwargs)
        except FxckptError:
            restore_(model)
            raise
    return model


def restore_(model: M) -> M:
    """Undoes `rewrite_`: the module has its original class and forward again.

    Raises:
        FxckptError: if the module is not rewritten.
    """
    _require_rewritten("restore_", model)
    original, attributes = _original_class(model), _original_dict(model)
    model.__class__ = original
    model.__dict__.clear()
    model.__dict__.update(attributes)
    return model


def is_rewritten(model: nn.Module) -> bool:
    """Whether `model` itself (not a submodule of it) was rewritten."""
    return isinstance(model, nn.Module) and _UNIT in model.__dict__


def graphs(model: nn.Module) -> tuple[GraphModule, GraphModule]:
    """The forward and backward graphs of the latest call of a rewritten module.

    Both take a list, which they empty: forward all primals, backward saved primals, residuals and
    gradients of the outputs. Printing one shows its code, with comments that name the modules and
    what is recomputed.

    Raises:
        FxckptError: if the module is not rewritten, or was not called yet.
    """
    _require_rewritten("graphs", model)
    latest = _unit(model).latest
    if latest is None:
        raise FxckptError(
            "graphs(model): nothing was captured yet. Call the model once in training mode with "
            "gradients enabled, or pass example_inputs= to rewrite"
        )
    return latest.program.split.forward, latest.program.split.backward


def require_captured(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raises `CaptureError` if a call of a rewritten module would run eagerly."""
    _unit(model).require(model, args, kwargs)


def original_forward(model: nn.Module) -> Callable[..., Any]:
    """The forward that a module has, or had before it was rewritten."""
    if not is_rewritten(model):
        return model.forward
    return types.MethodType(_unit(model).original, model)


# -- installation


def _unit(model: nn.Module) -> Unit:
    """The unit of a rewritten module; one of its own if the module is a copy of another."""
    unit = model.__dict__[_UNIT].for_module(model)
    model.__dict__[_UNIT] = unit
    return unit


def _install(model: nn.Module, options: Options) -> None:
    cls = type(model)
    on_instance = model.__dict__.pop("forward", None)  # as accelerate does
    original = cls.forward if on_instance is None else _without_self(on_instance)
    model.__dict__[_UNIT] = Unit(model, original, options, on_instance)
    model.__class__ = _subclass(cls)


def _without_self(forward: Callable[..., Any]) -> Callable[..., Any]:
    return lambda _, *args, **kwargs: forward(*args, **kwargs)


def _original_class(model: nn.Module) -> type:
    return type(model).__mro__[1] if is_rewritten(model) else type(model)


def _original_dict(model: nn.Module) -> dict[str, Any]:
    attributes = dict(model.__dict__)
    unit = attributes.pop(_UNIT, None)
    if unit is not None and unit.on_instance is not None:
        attributes["forward"] = unit.on_instance
    return attributes


def _plain(model: M) -> M:
    """The module without its unit: the original class, same attributes."""
    plain: M = object.__new__(_original_class(model))
    plain.__dict__.update(_original_dict(model))
    return plain


_SUBCLASSES: weakref.WeakValueDictionary[type, Any] = weakref.WeakValueDictionary()


def _subclass(cls: Any) -> Any:
    """The class of rewritten modules of class `cls`."""
    known = _SUBCLASSES.get(cls)
    if known is not None:
        return known
    names = {"__qualname__": cls.__qualname__, "__module__": cls.__module__, "__doc__": cls.__doc__}
    new: Any = types.new_class(cls.__name__, (cls,), exec_body=lambda ns: ns.update(names))

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return _unit(self)(self, args, kwargs)

    forward.__doc__ = cls.forward.__doc__
    forward.__signature__ = inspect.signature(cls.forward)  # type: ignore[attr-defined]
    # Assigned afterwards: transformers wraps what it finds when the class is created.
    new.forward = forward
    new.__reduce_ex__ = _reduce
    new.__copy__ = _copy
    new.__deepcopy__ = _deepcopy
    _SUBCLASSES[cls] = new
    return new


def _reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
    """Pickles the module as its original class, loadable without fxckpt."""
    reduced: Any = _plain(self).__reduce_ex__(protocol)
    func, args, *rest = reduced
    if func is copyreg.__newobj__:  # type: ignore[attr-defined]
        # pickle refuses this function for an object of another class than the one it names.
        func, args = copyreg._reconstructor, (args[0], object, None)  # type: ignore[attr-defined]
    return func, args, *rest


def _copy(self: M) -> M:
    new = copy.copy(_plain(self))
    _install(new, self.__dict__[_UNIT].options)
    return new


def _deepcopy(self: M, memo: dict[int, Any]) -> M:
    new = copy.deepcopy(_plain(self), memo)
    _install(new, self.__dict__[_UNIT].options)
    memo[id(self)] = new
    return new


# -- checks


def _require_module(call: str, model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise FxckptError(
            f"{call}(model, ...): expected a torch.nn.Module, got {type(model).__name__}. "
            "For a function use fxckpt.checkpoint"
        )
    if isinstance(model, torch.jit.ScriptModule | torch._dynamo.eval_frame.OptimizedModule):
        raise FxckptError(
            f"{call}(model, ...): {type(model).__name__} is compiled already. "
            "Rewrite the original module, then compile"
        )


def _require_rewritten(call: str, model: Any) -> None:
    if not is_rewritten(model):
        raise FxckptError(
            f"{call}(model): expected a module that `rewrite` or `rewrite_` returned, "
            f"got {type(model).__name__}, which is not rewritten"
        )


def _example(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, tuple):
        return inputs, {}
    raise FxckptError(
        "rewrite(..., example_inputs=...): expected a tuple of positional or a dictionary of "
        f"keyword arguments, got {type(inputs).__name__}"
    )
