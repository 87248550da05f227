"""Policies that are functions of a value, and how they combine.

The first ones are those of `jax.checkpoint_policies`, under the same names, with the same meaning.
All that are made here combine by `|` (saved by either), `&` (saved by both) and `~` (the other way
round), with each other and with any function that is a policy:

    save_only_these_names("attention") | save_ops(torch.ops.aten.mm)
    dots_saveable & ~save_larger_than("64MiB")
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable
from typing import Any

from fxckpt import ops
from fxckpt.cost import Costs
from fxckpt.errors import PolicyError
from fxckpt.joint import Value, producer
from fxckpt.quantities import parse_bytes
from fxckpt.rates import DEVICES, Device
from fxckpt.selectors import flat, is_below, is_operation


class Decision(enum.Enum):
    """What a policy answers for a value."""

    SAVE = "save"
    RECOMPUTE = "recompute"


SAVE, RECOMPUTE = Decision.SAVE, Decision.RECOMPUTE


SAVE, RECOMPUTE = Decision.SAVE, Decision.RECOMPUTE

Policy = Callable[[Value], Decision | bool]


def answer(policy: Policy, value: Value) -> Decision:
    """The decision of a policy; the one place where booleans are understood."""
    answer = policy(value)
    if isinstance(answer, Decision):
        return answer
    if isinstance(answer, bool):
        return SAVE if answer else RECOMPUTE
    raise PolicyError(
        f"the policy {getattr(policy, '__qualname__', policy)} returned {answer!r} for {value!r}; "
        "expected fxckpt.SAVE, fxckpt.RECOMPUTE, True or False"
    )


class Predicate:
    """A policy that combines with others; called with a value, it answers as policies do."""

    def __init__(self, function: Policy) -> None:
        self._function = function
        functools.update_wrapper(self, function)

    def __call__(self, value: Value) -> Decision:
        return answer(self._function, value)

    def __or__(self, other: Policy) -> Predicate:
        return save_from_both_policies(self, other)

    __ror__ = __or__

    def __and__(self, other: Policy) -> Predicate:
        both = _policy(other)
        return Predicate(lambda value: SAVE is self(value) and SAVE is answer(both, value))

    __rand__ = __and__

    def __invert__(self) -> Predicate:
        return Predicate(lambda value: self(value) is RECOMPUTE)


def _policy(policy: Any) -> Policy:
    if not callable(policy) or isinstance(policy, type):
        raise PolicyError(
            f"{policy!r} is no function from a value to fxckpt.SAVE or fxckpt.RECOMPUTE; only such "
            "functions combine"
        )
    function: Policy = policy
    return function


# --- those of JAX ---------------------------------------------------------------------------------


@Predicate
def everything_saveable(value: Value) -> Decision:
    """Saves all, as eager does."""
    return SAVE


@Predicate
def nothing_saveable(value: Value) -> Decision:
    """Recomputes all from the arguments."""
    return RECOMPUTE


@Predicate
def dots_saveable(value: Value) -> bool:
    """Saves matrix products, convolutions, recurrent layers and attention; recomputes the rest."""
    return ops.is_matrix_like(value.op)


@Predicate
def dots_with_no_batch_dims_saveable(value: Value) -> bool:
    """Saves products with weights, not the batched ones such as attention scores."""
    return ops.schema_name(value.op) in _UNBATCHED


_UNBATCHED = frozenset(
    f"aten::{name}" for name in ("mm", "addmm", "mv", "addmv", "dot", "linear", "_scaled_mm")
)


def save_only_these_names(*names: str) -> Predicate:
    """Saves the values that `fxckpt.name` gave one of these names; recomputes the rest."""
    return Predicate(lambda value: bool({*names} & {*value.tags}))


def save_anything_except_these_names(*names: str) -> Predicate:
    """Saves all but the values that `fxckpt.name` gave one of these names."""
    return ~save_only_these_names(*names)


def save_any_names_but_these(*names: str) -> Predicate:
    """Saves the values that `fxckpt.name` gave a name, if it is none of these."""
    return Predicate(lambda value: bool({*value.tags} - {*names}))


def save_from_both_policies(first: Policy, second: Policy) -> Predicate:
    """Saves what either of two policies saves."""
    either = _policy(first), _policy(second)
    return Predicate(lambda value: any(answer(policy, value) is SAVE for policy in either))


# --- ours -----------------------------------------------------------------------------------------


def save_ops(*operations: Any) -> Predicate:
    """Saves what some operations compute; recomputes the rest.

    Args:
        *operations: `torch.ops.aten.mm`, one of its overloads, or a name: "mm", "aten.mm".
    """
    wanted = flat(operations, "save_ops")
    return Predicate(lambda value: any(is_operation(value.op, each) for each in wanted))


def recompute_ops(*operations: Any) -> Predicate:
    """Recomputes what some operations compute (see `save_ops`); saves the rest."""
    return ~save_ops(*operations)


def save_modules(*modules: Any) -> Predicate:
    """Saves what is computed in some modules; recomputes the rest.

    Args:
        *modules: Paths such as "layers.*.mlp", the beginning of which may be left out, or classes.
    """
    wanted = flat(modules, "save_modules")
    return Predicate(lambda value: any(_is_in(value, each) for each in wanted))


def recompute_modules(*modules: Any) -> Predicate:
    """Recomputes what is computed in some modules (see `save_modules`); saves the rest."""
    return ~save_modules(*modules)


def save_larger_than(size: int | str) -> Predicate:
    """Saves values of more bytes than that ("1MiB"); recomputes the rest."""
    limit = parse_bytes(size)
    if limit is None:
        raise PolicyError(f"save_larger_than({size!r}): expected bytes (int), or such as '1MiB'")
    return Predicate(lambda value: value.bytes > limit)


def recompute_cheaper_than(seconds: float, device: Device | str = "a100") -> Predicate:
    """Recomputes what takes less time to compute, by itself, on a device; saves the rest.

    Args:
        seconds: The time.
        device: A `Device`, or a name in `fxckpt.rates.DEVICES`.
    """
    known = DEVICES.get(device) if isinstance(device, str) else device
    if known is None:
        names = ", ".join(DEVICES)
        raise PolicyError(f"device={device!r} is not known: the names are {names}")
    costs = Costs(known)
    return Predicate(lambda value: costs.seconds(producer(value.node)) >= seconds)


def _is_in(value: Value, module: Any) -> bool:
    if isinstance(module, type):
        return any(issubclass(cls, module) for cls in value.module_types)
    return isinstance(module, str) and is_below(value.path, module)
