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
import dataclasses
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch._functorch import pyfunctorch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, Node

from fxckpt import ops
from fxckpt.codegen import graph_module
from fxckpt.errors import CaptureError
from fxckpt.invisible import fake_mode, outside_of_modes
from fxckpt.joint import Joint, is_value, producer, root
from fxckpt.schedule import Choice, Scheduler, recomputation

_functorch = torch._C._functorch


def is_active() -> bool:
    """Whether a call is transformed by `torch.func`."""
    return _functorch.peek_interpreter_stack() is not None


def are_known() -> bool:
    """Whether all transforms around the call are such that the graph can run under them.

    Of two `jvp`, the inner one would not see the outer one's tangents of what it reads: an
    `autograd.Function` computes its tangents once.
    """
    kinds = [level.key().name for level in _functorch.get_interpreter_stack() or ()]
    return {*kinds} <= {"Grad", "Vmap", "Jvp"} and kinds.count("Jvp") < 2


def outside_of_transforms() -> contextlib.AbstractContextManager[Any]:
    """Nothing is transformed while this is active."""
    return pyfunctorch.temporarily_clear_interpreter_stack()


def is_wrapped(tensor: torch.Tensor) -> bool:
    """Whether a tensor is that of a transform."""
    return _functorch.is_functorch_wrapped_tensor(tensor)


def is_differentiated(tensor: torch.Tensor) -> bool:
    """Whether a gradient of a tensor is wanted at any level."""
    while not tensor.requires_grad:
        if not is_wrapped(tensor):
            return False
        tensor = _functorch.get_unwrapped(tensor)
    return True


_MOST_TWINS = 10_000


class Twins:
    """Fakes that stand for wrapped tensors, with the shapes that the program sees.

    The same place gets the same twin in the next call, so that nothing looks new then.
    """

    def __init__(self) -> None:
        self._mode = fake_mode()
        self._kept: dict[Hashable, torch.Tensor] = {}

    def of(self, tensors: Iterable[tuple[Hashable, torch.Tensor]]) -> dict[int, torch.Tensor]:
        """The twins, by `id`, of those tensors that are wrapped.

        Args:
            tensors: Pairs of a place and the tensor that is there.
        """
        if len(self._kept) > _MOST_TWINS:
            self._kept.clear()
        found: dict[int, torch.Tensor] = {}
        for place, tensor in tensors:
            if is_wrapped(tensor) and id(tensor) not in found:
                found[id(tensor)] = self._twin(place, tensor)
        return found

    def _twin(self, place: Hashable, tensor: torch.Tensor) -> torch.Tensor:
        wanted, size, stride = is_differentiated(tensor), tensor.size(), tensor.stride()
        key = (place, wanted, size, stride, tensor.dtype, tensor.device)
        if key not in self._kept:
            options: Any = {"dtype": tensor.dtype, "device": tensor.device}
            with outside_of_transforms(), self._mode:
                self._kept[key] = torch.empty_strided(size, stride, **options, requires_grad=wanted)
        return self._kept[key]


@dataclasses.dataclass(slots=True)
class Pure:
    """The two halves of a joint graph as functions of tensors.

    Attributes:
        forward: Primals to outputs and residuals.
        backward: Primals, residuals and cotangents to a gradient, or None, for each primal.
        outputs: How many of the results of forward are outputs.
        moving: For each primal, whether it is differentiated.
        differentiable: For each result of forward, whether it has a gradient.
        wanted: Which outputs get a cotangent.
        has_grad: For each primal, whether backward computes a gradient.
    """

    forward: Callable[..., tuple[torch.Tensor, ...]]
    backward: Callable[..., tuple[torch.Tensor | None, ...]]
    outputs: int
    moving: list[bool]
    differentiable: list[bool]
    wanted: list[int]
    has_grad: list[bool]

    def gradients(self, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The gradients that backward computes."""
        return tuple(g for g in self.backward(*values) if g is not None)

    def batched(self, dims: Sequence[int | None], randomness: str) -> Pure:
        """The same for batches of primals.

        Args:
            dims: For each primal, the dimension of the batch; None for one that all share.
            randomness: See `torch.func.vmap`.

        Returns:
            Results have the batch in front, gradients where the primals have it.
        """

        def backward(*values: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
            given = [*dims, *(0 for _ in values[len(dims) :])]
            found = iter(_vmapped(self.gradients, given, randomness)(*values))
            return tuple(
                _unbatched(next(found), dim) if has else None
                for has, dim in zip(self.has_grad, dims, strict=True)
            )

        forward = _vmapped(self.forward, dims, randomness)
        return dataclasses.replace(self, forward=forward, backward=backward)

    def batched_backward(self, dims: Sequence[int | None], randomness: str) -> Pure:
        """Likewise for batches of what backward takes; gradients have the batch in front."""

        def backward(*values: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
            found = iter(_vmapped(self.gradients, dims, randomness)(*values))
            return tuple(next(found) if has else None for has in self.has_grad)

        return dataclasses.replace(self, backward=backward)


def _vmapped(run: Callable[..., Any], dims: Sequence[int | None], randomness: str) -> Any:
    return torch.func.vmap(run, tuple(dims), randomness=randomness)


def _unbatched(grad: torch.Tensor, dim: int | None) -> torch.Tensor:
    """The gradient of a primal that has its batch at `dim`, or is shared by all samples."""
    return grad.sum(0) if dim is None else grad.movedim(0, dim)


def pure(joint: Joint, choice: Choice, moving: Collection[str], cotangents: Sequence[bool]) -> Pure:
    """Splits a joint graph into pure functions.

    Args:
        joint: The graph.
        choice: What backward may keep; random values are kept in any case.
        moving: The names of the primals that are differentiated.
        cotangents: For each output, whether it has a cotangent in the joint graph.

    Raises:
        CaptureError: if forward changes its arguments.
    """
    if joint.writes:
        raise CaptureError(
            f"forward changes {next(iter(joint.writes))} under a torch.func transform"
        )
    strided = (n for n in joint.forward_nodes() if n.target in _STRIDED)
    if any(root(n.all_input_nodes[0]).op == "placeholder" for n in strided):
        raise CaptureError("as_strided of an argument is taken under a torch.func transform")
    random = {n for n in joint.forward_nodes() if ops.node_is_random(n)}
    drawn = {n for n in joint.forward_nodes() if is_value(n) and producer(n) in random}
    scheduler = Scheduler(joint)
    schedule = scheduler.schedule(dataclasses.replace(choice, saved=choice.saved | drawn))
    residuals = [r for r in schedule.residuals if isinstance(r, Node)]
    assert len(residuals) == len(schedule.residuals), "nothing is drawn again or copied"
    primals = [*joint.primals.values()]
    forward, backward = _Emitter(), _Emitter()
    forward.inputs(primals)
    for step in schedule.forward:
        forward.run(step)
    forward.output([*joint.outputs, *residuals])
    backward.inputs([*primals, *residuals, *joint.cotangents])
    for step in schedule.backward:
        backward.run(step)
    grads = [joint.grads.get(name, ()) for name in joint.primals]
    backward.output([backward.sum(each) for each in grads])
    run, flags = forward.function("Forward"), [name in moving for name in joint.primals]
    return Pure(
        run,
        backward.function("Backward"),
        len(joint.outputs),
        flags,
        [result.requires_grad for result in _on_fakes(run, primals, flags)],
        [i for i, wanted in enumerate(cotangents) if wanted],
        [bool(each) for each in grads],
    )


def _on_fakes(
    run: Callable[..., Any], primals: Sequence[Node], moving: Sequence[bool]
) -> Sequence[torch.Tensor]:
    """The results of forward for fakes, some of which want a gradient."""
    with outside_of_transforms(), outside_of_modes(), FakeTensorMode(), torch.enable_grad():
        fakes = []
        for node, wanted in zip(primals, moving, strict=True):
            val = node.meta["val"]
            options: Any = {"dtype": val.dtype, "device": val.device, "requires_grad": wanted}
            fakes.append(torch.empty_strided(val.size(), val.stride(), **options))
        try:
            results: Sequence[torch.Tensor] = run(*fakes)
        except RuntimeError as error:  # shapes that depend on values, which capture had read
            raise CaptureError(f"forward cannot run on fakes again ({error})") from error
    return results


aten = torch.ops.aten

# What these read depends on the memory of a tensor, which is another one for a batch.
_STRIDED = (aten.as_strided.default, aten.as_strided_scatter.default)

# A batch may have other strides than its samples are captured with; results are the same.
_ON_ANY_STRIDES: dict[Any, Any] = {
    aten.view.default: aten.reshape.default,
    aten._unsafe_view.default: aten.reshape.default,
    aten._reshape_alias.default: ops.reshaped,
}


class _Emitter:
    """Writes one half."""

    def __init__(self) -> None:
        self._graph = Graph()
        self._copies: dict[Node, Node] = {}

    def inputs(self, nodes: Sequence[Node]) -> None:
        for node in nodes:
            self._copies[node] = self._graph.placeholder(node.name)

    def run(self, step: Any) -> None:
        assert isinstance(step, Node)
        target, args, kwargs = recomputation(step)
        args, kwargs = torch.fx.node.map_arg((args, kwargs), self._copies.__getitem__)
        if target is ops.inplace:
            op, plan, *rest = args
            target, args = ops.purely, (op, [(key, view, True) for key, view, _ in plan], *rest)
        if (like := step.meta.get("like")) in self._copies:
            target, args = ops.made_like, (target, self._copies[like], *args)
        target = _ON_ANY_STRIDES.get(target, target)
        self._copies[step] = self._graph.call_function(target, tuple(args), dict(kwargs))
        self._copies[step].meta["region"] = step.meta.get("path", "")

    def sum(self, nodes: Sequence[Node]) -> Node | None:
        if not nodes:
            return None
        total, *rest = (self._copies[n] for n in nodes)
        for each in rest:
            total = self._graph.call_function(torch.ops.aten.add.Tensor, (total, each))
        return total

    def output(self, nodes: Sequence[Node | None]) -> None:
        copies = [None if n is None else self._copies.get(n, n) for n in nodes]
        self._graph.output(tuple(copies))

    def function(self, name: str) -> Callable[..., Any]:
        self._graph.eliminate_dead_code()
        module = graph_module(self._graph, name)
        return lambda *args: module.forward([*args])


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
        ctx.program, ctx.count = program, len(primals)
        ctx.set_materialize_grads(False)
        flags = zip(output, program.differentiable, strict=True)
        ctx.mark_non_differentiable(*(t for t, differentiable in flags if not differentiable))
        ctx.save_for_backward(*primals, *output[program.outputs :])
        ctx.save_for_forward(*primals)

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor | None) -> tuple[Any, ...]:
        """Gradients by the backward graph; generically if a cotangent of a residual comes."""
        program, saved = ctx.program, _alive(ctx.saved_tensors)
        given, wanted = _given(_alive(cotangents))
        if given != program.wanted:
            primals = saved[: ctx.count]
            return (None, *_pulled(program.forward, primals, program.moving, given, wanted))
        grads = iter(Pullback.apply(program, *saved, *wanted))
        return (None, *(next(grads) if has else None for has in program.has_grad))

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """Tangents of outputs and residuals: forward runs again on dual numbers."""
        return _pushed(ctx.program.forward, ctx.saved_tensors, tangents, ctx.program.differentiable)

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
        return tuple(_fresh(program.gradients(*values), values))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keeps the arguments."""
        program, *values = inputs
        ctx.program = program
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*values)
        ctx.save_for_forward(*values)

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor | None) -> tuple[Any, ...]:
        """By differentiating the backward graph as it is."""
        program, values = ctx.program, _alive(ctx.saved_tensors)
        moving = [*program.moving, *program.differentiable[program.outputs :]]
        moving += [True] * (len(values) - len(moving))
        given = _given(_alive(cotangents))
        return (None, *_pulled(program.gradients, values, moving, *given))

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """Likewise."""
        count = sum(ctx.program.has_grad)
        return _pushed(ctx.program.gradients, ctx.saved_tensors, tangents, [True] * count)

    @staticmethod
    def vmap(info: Any, dims: Any, program: Pure, *values: torch.Tensor) -> Any:
        """Backward of batches."""
        results = Pullback.apply(program.batched_backward(dims[1:], info.randomness), *values)
        return results, (0,) * len(results)


def _fresh(
    results: Sequence[torch.Tensor], arguments: Sequence[torch.Tensor]
) -> Iterator[torch.Tensor]:
    """The results, none of which is an argument or another result."""
    seen = {id(a) for a in arguments}
    for result in results:
        yield result.view_as(result) if id(result) in seen else result
        seen.add(id(result))


def _alive(tensors: Sequence[Any]) -> list[Any]:
    """Tensors without the wrappers of transforms that have ended, as in what `vjp` returns."""
    return [t if t is None else _functorch.unwrap_if_dead(t) for t in tensors]


def _given(
    cotangents: Sequence[torch.Tensor | None],
) -> tuple[list[int], list[torch.Tensor]]:
    """Which there are, and these."""
    pairs = [(i, c) for i, c in enumerate(cotangents) if c is not None]
    return [i for i, _ in pairs], [c for _, c in pairs]


def _pulled(
    run: Callable[..., Sequence[torch.Tensor]],
    values: Sequence[torch.Tensor],
    moving: Sequence[bool],
    given: Sequence[int],
    cotangents: Sequence[torch.Tensor],
) -> list[torch.Tensor | None]:
    """Gradients of some values, for cotangents of some results of a function."""
    moved = [i for i, moves in enumerate(moving) if moves]

    def some(*arguments: torch.Tensor) -> tuple[torch.Tensor, ...]:
        results = run(*_with(values, moved, arguments))
        return tuple(results[i] for i in given)

    pull: Any = torch.func.vjp(some, *(values[i] for i in moved))[1]
    grads: list[torch.Tensor | None] = [None] * len(values)
    for i, grad in zip(moved, pull(tuple(cotangents)), strict=True):
        grads[i] = grad
    return grads


def _pushed(
    run: Callable[..., Sequence[torch.Tensor]],
    values: Sequence[torch.Tensor],
    tangents: Sequence[torch.Tensor | None],
    differentiable: Sequence[bool],
) -> tuple[torch.Tensor | None, ...]:
    """Tangents of the results of a function."""
    moved, directions = _given(tangents)

    def some(*arguments: torch.Tensor) -> tuple[torch.Tensor, ...]:
        results = run(*_with(values, moved, arguments))
        return tuple(r for r, has in zip(results, differentiable, strict=True) if has)

    result: Any = torch.func.jvp(some, tuple(values[i] for i in moved), tuple(directions))
    found = iter(result[1])
    return tuple(next(found) if has else None for has in differentiable)


def _with(
    values: Sequence[torch.Tensor], places: Sequence[int], others: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """The values, with others in some places."""
    new = [*values]
    for place, other in zip(places, others, strict=True):
        new[place] = other
    return new
