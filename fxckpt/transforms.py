"""Runs what was captured under the transforms of `torch.func`.

NOTE [Under transforms]

Tensors are wrapped then, once for each transform around the call: what a module or a function sees
is a sample of a batch, or a value that is differentiated at several levels. Capture knows nothing
of this: it sees fakes of the shapes that the program sees, outside of all transforms. The graph is
run as one `autograd.Function` with `setup_context`, which each transform interprets in its way:

    grad, vjp       forward runs one level further out and returns residuals as further outputs;
                    backward runs the backward graph, recomputation included, one level further out
    vmap            both graphs run on batches, as any function of tensors would
    jvp             forward runs once more on dual numbers, since it keeps nothing

Residuals are differentiable outputs: an outer `grad` differentiates the backward graph, and what
comes back for a residual is passed on by differentiating forward as it is. So that all this works,
these graphs are made of pure operations: nothing is written in place, and random values are saved
instead of drawn again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad

from fxckpt.derivatives import given, pulled, pushed
from fxckpt.pure import Pure


class Transformed(torch.autograd.Function):
    """Runs forward; see the note."""

    @staticmethod
    def forward(program: Pure, *primals: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Outputs and residuals."""
        return tuple(_fresh(program.forward(*primals), primals))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keeps primals and residuals."""
        program, *primals = inputs
        flags = zip(output, program.differentiable, strict=True)
        ctx.mark_non_differentiable(*(t for t, differentiable in flags if not differentiable))
        _keep(ctx, program, [*primals, *output[program.outputs :]])

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor | None) -> tuple[Any, ...]:
        """Gradients by the backward graph; generically if a cotangent of a residual comes."""
        program, saved = ctx.program, _alive(ctx.saved_tensors)
        which, directions = given(_alive(cotangents))
        count = len(program.moving)
        if which != program.wanted:
            moving = [*program.moving, *(False for _ in saved[count:])]
            with _hint(program):
                return (None, *pulled(program.again, saved, moving, which, directions)[:count])
        grads = iter(Pullback.apply(program, *saved, *directions))
        return (None, *(next(grads) if has else None for has in program.has_grad))

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """Tangents of outputs and residuals: forward runs again on dual numbers."""
        program, values = ctx.program, ctx.saved_tensors
        tangents += (None,) * (len(values) - len(tangents))
        with _hint(program):
            return pushed(program.again, values, tangents, program.differentiable)

    @staticmethod
    def vmap(info: Any, dims: Any, program: Pure, *primals: torch.Tensor) -> Any:
        """Forward of batches."""
        results = Transformed.apply(program.batched(dims[1:], info.randomness), *primals)
        return results, (0,) * len(results)


class Pullback(torch.autograd.Function):
    """Runs backward: of what it computes on the way, nothing is kept.

    `torch.func.grad` always records backward, for the case that it is differentiated in turn. As a
    function of its own it is one step of that record, which keeps its arguments alone.
    """

    @staticmethod
    def forward(program: Pure, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The gradients that there are."""
        return tuple(_fresh(program.backward(*values), values))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keeps the arguments."""
        program, *values = inputs
        _keep(ctx, program, values)

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor | None) -> tuple[Any, ...]:
        """By differentiating the backward graph."""
        program, values = ctx.program, _alive(ctx.saved_tensors)
        moving = [*program.moving, *program.differentiable[program.outputs :]]
        moving += [True] * (len(values) - len(moving))
        with _hint(program):
            return (None, *pulled(program.rule, values, moving, *given(_alive(cotangents))))

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """Likewise."""
        program, results = ctx.program, [True] * sum(ctx.program.has_grad)
        with _hint(program):
            return pushed(program.rule, ctx.saved_tensors, tangents, results)

    @staticmethod
    def vmap(info: Any, dims: Any, program: Pure, *values: torch.Tensor) -> Any:
        """Backward of batches."""
        results = Pullback.apply(program.batched_backward(dims[1:], info.randomness), *values)
        return results, (0,) * len(results)


@contextlib.contextmanager
def _hint(program: Pure) -> Iterator[None]:
    """Torch's error stays what it is, with a note (from Python 3.11)."""
    try:
        yield
    except RuntimeError as error:
        if program.lacks_rules and not program.decomposed and hasattr(error, "add_note"):
            error.add_note(_HINT)
        raise


_HINT = (
    "fxckpt: with `decompose=True`, `checkpoint` and `rewrite` differentiate torch's decomposition "
    "of an operation where torch has no rule for the operation itself"
)


def _keep(ctx: Any, program: Pure, values: Sequence[torch.Tensor]) -> None:
    """Keeps tensors for `backward` and for `jvp`, which get None where no derivative comes."""
    ctx.program = program
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*values)
    ctx.save_for_forward(*values)


def _fresh(
    results: Sequence[torch.Tensor], arguments: Sequence[torch.Tensor]
) -> Iterator[torch.Tensor]:
    """The results, none of which is an argument or another result.

    In forward mode, each has memory for all its elements: autograd lays tangents out like it.
    """
    seen = {id(a) for a in arguments}
    for result in results:
        if forward_ad._current_level >= 0 and _is_without_memory(result):
            yield result.clone(memory_format=torch.contiguous_format)
        else:
            yield result.view_as(result) if id(result) in seen else result
        seen.add(id(result))


def _is_without_memory(tensor: torch.Tensor) -> bool:
    geometry = zip(tensor.size(), tensor.stride(), strict=True)
    return tensor._is_zerotensor() or any(n > 1 and s == 0 for n, s in geometry)


def _alive(tensors: Sequence[Any]) -> list[Any]:
    """Tensors without the wrappers of transforms that have ended, as in what `vjp` returns."""
    return [t if t is None else torch._C._functorch.unwrap_if_dead(t) for t in tensors]
