"""A rewritten module inside of `torch.compile`: one operation in the graph of Dynamo.

NOTE [Inside of torch.compile]

Dynamo does not follow the forward of a rewritten module, so what it read is not guarded, and nobody
else decides what is kept. What it traces is one call of `_call`, which AOTAutograd follows:

    described   at the call that is traced, the forward is captured, which tells what it returns,
                which buffers it changes, and which gradients there are: all that tracing needs.
    run         an operation takes the parameters, buffers and arguments, and another one what comes
                back in backward; see `opaque`.

What cannot be described (see `capture`) breaks the graph of Dynamo at the call, which then runs as
it does in eager; with `fullgraph=True`, that is an error.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import torch
from torch import nn
from torch._dynamo import nonstrict_trace
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.utils import _pytree as pytree

from fxckpt import opaque, tree
from fxckpt.arguments import Call
from fxckpt.described import Description, describe, described
from fxckpt.errors import CaptureError, FallbackWarning
from fxckpt.installation import runner_of, with_id
from fxckpt.places import stack_level_of_user


def forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The forward of a rewritten module, as Dynamo traces it."""
    held = [*module.parameters(), *module.buffers()]
    return _without_nothing(_call(id(module), held, _with_nothing((args, kwargs))))


@nonstrict_trace
@torch.compiler.disable
def _call(number: int, held: list[torch.Tensor], given: Any) -> Any:
    """What a graph of Dynamo runs; AOTAutograd traces through it."""
    module = with_id(number)
    args, kwargs = _without_nothing(given)
    call = Call.of(args, kwargs)
    if not any(map(_is_fake, (*held, *call.inputs))):  # by the backend "eager"
        return _with_nothing(runner_of(module)(module, args, kwargs))
    return _with_nothing(_trace(_found(module, held, call), held, call))


def _found(module: nn.Module, held: list[torch.Tensor], call: Call) -> Description:
    """The description of a call: made when Dynamo traces it, found when AOTAutograd does.

    Raises:
        CaptureError: if there is none.
    """
    known = described(module, held, call)
    if known is not None and any(map(_is_functional, (*held, *call.inputs))):
        known.by_inductor |= _is_inductor_at_work()
        return known
    try:
        return describe(module, held, call)
    except CaptureError as error:
        warnings.warn(
            f"{type(module).__name__} breaks the graph of torch.compile: {error}",
            FallbackWarning,
            stacklevel=stack_level_of_user(),
        )
        raise


def _is_inductor_at_work() -> bool:
    virtualized = sys.modules.get("torch._inductor.virtualized")
    return virtualized is not None and isinstance(virtualized.V.fake_mode, FakeTensorMode)


def _is_fake(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, FakeTensor) or _is_functional(tensor)


def _is_functional(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, FunctionalTensor)


def _trace(about: Description, held: list[torch.Tensor], call: Call) -> Any:
    """Puts the operation into the graph; returns what forward returns."""
    tensors, count = [*held, *call.inputs], len(about.returns)
    made: dict[int, torch.Tensor] = {}
    unique = {id(r): r for r in about.tape.results}
    for key, result in unique.items():  # see `runtime` for why views of primals are first
        if isinstance(result.origin, str):
            made[key] = result.taken_from(tensors[about.taken[result.origin]], ())
    outputs = _Traced.apply(about, *tensors)
    for i, contents in zip(about.written, outputs[count:], strict=True):
        with torch.no_grad():
            tensors[i].copy_(contents)
    for key, result in unique.items():
        if isinstance(result.origin, int):
            made[key] = result.taken_from(outputs[result.origin], ())
    return tree.unflatten(about.tape.spec, [made[id(r)] for r in about.tape.results])[0]


# -- what Dynamo has no place for


class _Nothing:
    """In place of None, which a function that is not traced may neither take nor return."""


pytree.register_pytree_node(_Nothing, lambda _: ([], None), lambda *_: _Nothing())


def _with_nothing(values: Any) -> Any:
    return pytree.tree_map(lambda v: _Nothing() if v is None else v, values)


def _without_nothing(values: Any) -> Any:
    return pytree.tree_map(_or_none, values, is_leaf=_is_nothing)


def _is_nothing(value: Any) -> bool:
    return isinstance(value, _Nothing)


def _or_none(value: Any) -> Any:
    return None if isinstance(value, _Nothing) else value


class _Traced(torch.autograd.Function):
    """What AOTAutograd traces: two operations, each of which knows the other by its ticket."""

    @staticmethod
    def forward(ctx: Any, about: Description, *tensors: torch.Tensor) -> Any:
        *results, ticket = opaque.forward(list(tensors), about.number)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(ticket)
        ctx.about = about
        kinds = zip(results, about.returns, strict=False)
        plain = [t for t, look in kinds if not look.requires_grad]
        ctx.mark_non_differentiable(*plain, *results[len(about.returns) :])
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *given: torch.Tensor | None) -> Any:
        (ticket,), about = ctx.saved_tensors, ctx.about
        cotangents = {i: c for i, c in enumerate(given) if c is not None}
        wanted = about.gradients([*cotangents])
        found = opaque.backward(ticket, [*cotangents.values()], about.number, [*cotangents], wanted)
        grads = dict(zip(wanted, found, strict=True))
        return (None, *(grads.get(i) for i in range(len(about.takes))))
