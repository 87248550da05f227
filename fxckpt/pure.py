"""The two halves of a joint graph as pure functions, which transforms of `torch.func` interpret.

Nothing is written in place, and random values are kept instead of drawn again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, Node

from fxckpt import decompositions, layouts, ops
from fxckpt.codegen import graph_module
from fxckpt.derivatives import pulled
from fxckpt.errors import CaptureError
from fxckpt.invisible import outside_of_modes
from fxckpt.joint import Joint, is_value, producer, root
from fxckpt.levels import outside_of_transforms
from fxckpt.schedule import Choice, Scheduler, recomputation

Run = Callable[..., tuple[torch.Tensor, ...]]
Dims = Sequence[int | None]


@dataclasses.dataclass(slots=True)
class Pure:
    """The two halves of a joint graph as functions of tensors.

    Attributes:
        forward: Primals to outputs and residuals.
        backward: Primals, residuals and cotangents to the gradients that there are.
        again: Primals and residuals to outputs and residuals, where nothing is drawn: forward as it
            is differentiated if backward cannot be used.
        rule: Like backward: what is differentiated instead of it.
        outputs: How many of the results of forward are outputs.
        moving: For each primal, whether it is differentiated.
        differentiable: For each result of forward, whether it has a gradient.
        wanted: Which outputs get a cotangent.
        has_grad: For each primal, whether backward computes a gradient.
        lacks_rules: Whether there are operations that torch cannot differentiate in all ways, but
            their decompositions.
        decomposed: Whether they are decomposed in `again` and `rule`; then residuals have no
            gradients.
    """

    forward: Run
    backward: Run
    again: Run
    rule: Run
    outputs: int
    moving: list[bool]
    differentiable: list[bool]
    wanted: list[int]
    has_grad: list[bool]
    lacks_rules: bool
    decomposed: bool

    def batched(self, dims: Dims, randomness: str) -> Pure:
        """The same for batches of primals.

        Args:
            dims: For each primal, the dimension of the batch; None for one that all share.
            randomness: See `torch.func.vmap`.

        Returns:
            Results have the batch in front, gradients where the primals have it.
        """
        with_grad = [dim for dim, has in zip(dims, self.has_grad, strict=True) if has]

        def over(run: Run) -> Run:
            def on_batches(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
                given = [*dims, *(0 for _ in values[len(dims) :])]
                return _vmapped(run, given, randomness)(*values)

            return on_batches

        def gradients(run: Run) -> Run:
            def on_batches(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
                return tuple(map(_unbatched, over(run)(*values), with_grad))

            return on_batches

        return dataclasses.replace(
            self,
            forward=over(self.forward),
            again=over(self.again),
            backward=gradients(self.backward),
            rule=gradients(self.rule),
        )

    def batched_backward(self, dims: Dims, randomness: str) -> Pure:
        """Likewise for batches of what backward takes; gradients have the batch in front."""
        return dataclasses.replace(
            self,
            backward=_vmapped(self.backward, dims, randomness),
            rule=_vmapped(self.rule, dims, randomness),
        )


def _vmapped(run: Run, dims: Dims, randomness: str) -> Run:
    return torch.func.vmap(run, tuple(dims), randomness=randomness)


def _unbatched(grad: torch.Tensor, dim: int | None) -> torch.Tensor:
    """The gradient of a primal that has its batch at `dim`, or is shared by all samples."""
    return grad.sum(0) if dim is None else grad.movedim(0, dim)


def pure(
    joint: Joint,
    choice: Choice,
    moving: Collection[str],
    cotangents: Sequence[bool],
    *,
    decompose: bool = False,
) -> Pure:
    """Splits a joint graph into pure functions.

    Args:
        joint: The graph; its backward was recorded so that it can be differentiated.
        choice: What backward may keep; random values are kept in any case.
        moving: The names of the primals that are differentiated.
        cotangents: For each output, whether it has a cotangent in the joint graph.
        decompose: Whether operations without rules of differentiation are decomposed when they are
            differentiated further than by the joint graph.

    Raises:
        CaptureError: if forward changes its arguments, or does what no pure function does.
    """
    _require_pure(joint)
    halves = _Halves(joint, choice)
    flags = [name in moving for name in joint.primals]
    grads = [joint.grads.get(name, ()) for name in joint.primals]
    forward, backward = halves.forward(), halves.backward(grads)
    again, rule = halves.again(), backward
    count = len(joint.outputs)
    differentiable = [r.requires_grad for r in _on_fakes(forward, halves.primals, flags)]
    halves.require_draws_alone(differentiable[count:])
    has_grad = [bool(each) for each in grads]
    wanted = [i for i, has in enumerate(cotangents) if has]
    lacks_rules = halves.lack_rules()
    if decompose and lacks_rules:
        again = halves.again(decompose=True)
        rule = _differentiated(again, flags, has_grad, wanted, len(halves.residuals))
        differentiable[count:] = [False] * len(halves.residuals)
    return Pure(
        forward,
        backward,
        again,
        rule,
        count,
        flags,
        differentiable,
        wanted,
        has_grad,
        lacks_rules,
        decompose and lacks_rules,
    )


aten = torch.ops.aten


def _require_pure(joint: Joint) -> None:
    if joint.writes:
        raise CaptureError(
            f"forward changes {next(iter(joint.writes))} under a torch.func transform"
        )
    strided = (n for n in joint.forward_nodes() if n.target in layouts.STRIDED)
    if any(root(n.all_input_nodes[0]).op == "placeholder" for n in strided):
        raise CaptureError("as_strided of an argument is taken under a torch.func transform")


def _on_fakes(run: Run, primals: Sequence[Node], moving: Sequence[bool]) -> Sequence[torch.Tensor]:
    """The results of forward for fakes, some of which want a gradient."""
    with outside_of_transforms(), outside_of_modes(), FakeTensorMode(), torch.enable_grad():
        fakes = []
        for node, wanted in zip(primals, moving, strict=True):
            val = node.meta["val"]
            options: Any = {"dtype": val.dtype, "device": val.device, "requires_grad": wanted}
            fakes.append(torch.empty_strided(val.size(), val.stride(), **options))
        try:
            return run(*fakes)
        except RuntimeError as error:  # shapes that depend on values, which capture had read
            raise CaptureError(f"forward cannot run on fakes again ({error})") from error


def _differentiated(
    again: Run,
    moving: Sequence[bool],
    has_grad: Sequence[bool],
    wanted: Sequence[int],
    residuals: int,
) -> Run:
    """Backward as what differentiates forward: primals, residuals and cotangents to gradients."""
    count = len(moving) + residuals
    flags = [*moving, *(False for _ in range(residuals))]

    def backward(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        grads = pulled(again, values[:count], flags, wanted, values[count:])
        found = zip(grads[: len(moving)], has_grad, strict=True)
        return tuple(grad for grad, has in found if has and grad is not None)

    return backward


class _Halves:
    """Writes the functions.

    Attributes:
        primals: Arguments of forward.
        residuals: What forward returns besides outputs: what backward reads, and what is drawn.
    """

    def __init__(self, joint: Joint, choice: Choice) -> None:
        nodes = [*joint.forward_nodes()]
        random = {n for n in nodes if ops.node_is_random(n)}
        drawn = {n for n in nodes if is_value(n) and producer(n) in random}
        saved = choice.saved | drawn
        self._joint = joint
        self._schedule = schedule = Scheduler(joint).schedule(
            dataclasses.replace(choice, saved=saved)
        )
        residuals = [r for r in schedule.residuals if isinstance(r, Node)]
        if len(residuals) < len(schedule.residuals):
            raise CaptureError("backward needs a random state under a torch.func transform")
        self._steps = [step for step in schedule.forward if isinstance(step, Node)]
        self._drawn = {n: producer(n) for n in self._steps if n in drawn}
        self.primals = [*joint.primals.values()]
        self.residuals = [*dict.fromkeys((*residuals, *self._drawn))]

    def forward(self) -> Run:
        """Primals to outputs and residuals."""
        emitter = _Emitter(self.primals)
        for step in self._steps:
            emitter.run(step)
        return emitter.function("Forward", [*self._joint.outputs, *self.residuals])

    def backward(self, grads: Sequence[Sequence[Node]]) -> Run:
        """Primals, residuals and cotangents to gradients."""
        emitter = _Emitter([*self.primals, *self.residuals, *self._joint.cotangents])
        for step in self._schedule.backward:
            assert isinstance(step, Node), "nothing is drawn again or copied"
            emitter.run(step)
        return emitter.function("Backward", [emitter.sum(each) for each in grads if each])

    def again(self, *, decompose: bool = False) -> Run:
        """Primals and residuals to outputs and residuals, with what was drawn.

        If operations are decomposed, the residuals are those that were given.
        """
        emitter = _Emitter([*self.primals, *self.residuals], decompose=decompose)
        given = [emitter.argument(node) for node in self.residuals]
        random = {*self._drawn.values()}
        for step in self._steps:
            if step in self._drawn and _masked_by(step) in self._drawn:
                emitter.mask(step)
            elif step not in self._drawn and step not in random:
                emitter.run(step)
        kept = given if decompose else self.residuals
        return emitter.function("Again", [*self._joint.outputs, *kept])

    def lack_rules(self) -> bool:
        """Whether there are operations in forward that are decomposed."""
        return any(map(decompositions.lacks_rules, self._steps))

    def require_draws_alone(self, differentiable: Sequence[bool]) -> None:
        """Refuses operations that draw, and compute with it, in one: they cannot be done again.

        Args:
            differentiable: For each residual, whether it has a gradient.
        """
        for node, has in zip(self.residuals, differentiable, strict=True):
            if has and node in self._drawn and _masked_by(node) not in self._drawn:
                raise CaptureError(
                    f"{ops.operation(self._drawn[node])} draws random numbers and computes with "
                    "them in one, under a torch.func transform"
                )


def _masked_by(node: Node) -> Node | None:
    """The mask of a dropout that draws and computes in one, for its first result."""
    op = producer(node)
    if op.target is not aten.native_dropout.default or node.args[1] != 0:
        return None
    return next((user for user in op.users if user.args[1] == 1), None)


class _Emitter:
    """Writes one function.

    Args:
        inputs: Its arguments.
        decompose: Whether to decompose what torch has no rules for.
    """

    def __init__(self, inputs: Sequence[Node], *, decompose: bool = False) -> None:
        self._graph, self._decompose = Graph(), decompose
        self._copies = {node: self._graph.placeholder(node.name) for node in inputs}

    def argument(self, node: Node) -> Node:
        """What a node is so far, to be returned."""
        return self._copies[node]

    def run(self, step: Node) -> None:
        """Adds an operation; one whose result was given is computed, too, for who reads it."""
        target, args, kwargs = recomputation(step)
        strides = layouts.captured_strides(target, args, kwargs)
        args, kwargs = torch.fx.node.map_arg((args, kwargs), self._copies.__getitem__)
        if self._decompose and decompositions.lacks_rules(step):
            target, args = decompositions.run, (ops.operation(step), *ops.op_arguments(step))
            args = torch.fx.node.map_arg(args, self._copies.__getitem__)
        elif target is ops.inplace:
            target, args = layouts.purely, (*args[:2], strides, *args[2:])
        elif any(strides):
            target, args = layouts.as_captured, (target, strides, *args)
        if (like := step.meta.get("like")) in self._copies:
            target, args = layouts.made_like, (target, self._copies[like], *args)
        self._add(step, layouts.ON_ANY_STRIDES.get(target, target), args, kwargs)

    def mask(self, result: Node) -> None:
        """Adds the result of a dropout, of its mask."""
        x: Any
        x, p, *_ = producer(result).args
        mask: Any = _masked_by(result)
        self._add(result, layouts.masked, (self._copies[x], self._copies[mask], p), {})

    def _add(self, step: Node, target: Any, args: Any, kwargs: Any) -> None:
        node = self._graph.call_function(target, tuple(args), dict(kwargs))
        node.meta["region"] = step.meta.get("path", "")
        self._copies[step] = node

    def sum(self, nodes: Sequence[Node]) -> Node:
        """The sum of some results, to be returned."""
        total, *rest = (self._copies[n] for n in nodes)
        for each in rest:
            total = self._graph.call_function(aten.add.Tensor, (total, each))
        return total

    def function(self, name: str, results: Sequence[Node]) -> Run:
        """The function that returns these results."""
        self._graph.output(tuple(self._copies.get(n, n) for n in results))
        self._graph.eliminate_dead_code()
        module = graph_module(self._graph, name)
        return lambda *args: module.forward([*args])
