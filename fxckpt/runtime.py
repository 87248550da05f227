"""Runs the two halves of a split graph as one `torch.autograd.Function`.

NOTE [What autograd sees]

    forward     gets the primals as they are at the call, returns the outputs of the graph. Views in
                the result of the model are taken outside, in grad mode, so that they are views to
                autograd as well, and results that are views of a primal never pass through here.
    saved       the primals that backward reads, and the residuals, by `save_for_backward`: version
                counters, saved-tensor hooks and "backward a second time" work as in eager.
    backward    takes the saved tensors out of the node first, if the graph is not retained, so that
                each residual dies at its last use while backward runs.

Which outputs get a gradient, with which strides, is known only in backward. If it is not what the
split was made for, another backward graph is derived for the same residuals, and the next forward
is made for what was seen. What neither can run takes the generic route (see `again`).
"""

from __future__ import annotations

import copy
import dataclasses
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from fxckpt import ops, spread, tree
from fxckpt.again import Forward, Original, State
from fxckpt.arguments import Call
from fxckpt.errors import CaptureError
from fxckpt.first_run import Misfit
from fxckpt.locks import LOCK
from fxckpt.modes import autocast_state
from fxckpt.programs import Decide, Program, Programs
from fxckpt.state import Slot
from fxckpt.symbols import Pattern, Sizes, pattern, sizes_of
from fxckpt.tape import BackwardKey, Tape
from fxckpt.transforms import Transformed


class Captured(Programs):
    """One captured callable for one signature: runs it, forward and backward.

    Args:
        tape: The captured forward.
        decide: Chooses the values to save, given a joint graph.
        original: The callable that was captured.
        input_spec: Structure of (args, kwargs).
        module: The module whose tensors the callable reads, if any.
        state: Of the module; another one means that a rerun would differ.
        compile: Whether to compile both graphs with Inductor.
        decompose: Whether to decompose what torch cannot differentiate twice; see `pure`.
    """

    def __init__(
        self,
        tape: Tape,
        decide: Decide,
        original: Callable[..., Any],
        input_spec: tree.Spec,
        module: torch.nn.Module | None,
        state: State,
        *,
        compile: bool = False,
        decompose: bool = False,
    ) -> None:
        super().__init__(tape, decide, compile=compile, decompose=decompose)
        kept = None if module is None else weakref.ref(module)
        self._original = Original(original, input_spec, autocast_state(), kept, state)
        self.confirmed = False  # whether forward was seen to do the same again
        self._needs_parts = bool(tape.changes.numbers) or tree.mentions_known(tape.spec)
        self._sources: Mapping[str, Slot] = {p.name: p.source for p in tape.primals}
        self._slots: dict[tuple[str, ...], list[Slot]] = {}  # by the names of primals
        self.latest = tape.symbols.sizes  # what the symbols were in the latest call
        random = [n for n in self.program.joint.forward_nodes() if ops.node_is_random(n)]
        self._random_devices = sorted({ops.node_device(n) for n in random}, key=str)

    def rebound(
        self,
        module: torch.nn.Module,
        original: Callable[..., Any],
        state: State,
        sources: Mapping[str, Slot],
    ) -> Captured:
        """The same for another module in the same state: what is compiled serves both.

        Args:
            module: The other module.
            original: Its forward.
            state: Its state.
            sources: Where the primals are at call time, by name.
        """
        new = copy.copy(self)
        new._original = dataclasses.replace(
            self._original, function=original, module=weakref.ref(module), state=state
        )
        new._sources, new._slots, new.confirmed = sources, {}, True  # with the first of them
        return new

    def lookup(self, name: str, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """The tensor that a primal is at this call."""
        container, key = self._sources[name]
        return inputs[key] if container is None else container[key]

    def guards_hold(self, call: Call) -> bool:
        """Whether the values that Python read during capture are the same for these arguments."""
        changes, inputs = self.tape.changes, call.inputs
        sizes = self.sizes_of(inputs)
        if sizes and not self.tape.symbols.hold(sizes):
            return False
        if changes.numbers and not changes.fit(call.parts()):
            return False
        guards = self.tape.guards
        return all(g.holds(lambda name: self.lookup(name, inputs), sizes) for g in guards)

    def sizes_of(self, inputs: Sequence[torch.Tensor]) -> Sizes:
        """What the symbols are in a call."""
        return sizes_of(inputs) if self.tape.symbols.count else ()

    def __call__(
        self, arguments: Call, on_node: Callable[[torch.autograd.graph.Node], None] | None = None
    ) -> Any:
        """Runs forward on the arguments; returns what the callable returns.

        Args:
            arguments: Of the call.
            on_node: Gets the node of autograd that will run backward.

        Raises:
            Misfit: see `first_run`; nothing has happened then.
        """
        inputs = arguments.inputs
        self.latest = sizes = self.sizes_of(inputs)
        program = self.program_for(sizes)
        tried = (None, sizes) in program.tried
        copied = program.fragile if tried else program.written
        slots, original = self._slots_of(program), self._original
        with LOCK:  # another thread may be capturing, with other tensors in their places
            primals = _tensors_at(slots, inputs)
        call = Forward(
            self,
            program,
            original,
            None if original.module is None else original.module(),
            inputs,
            sizes,
            slots,
            primals,
            [p._version for p in primals],
            original.state.latest or original.state.state(),  # anew if another thread captures
            {d: ops.read_rng_state(d) for d in self._random_devices},
            {i: primals[i].clone() for i in copied},
        )
        extra = [primals[i] for i in program.extra_positions]

        def run() -> tuple[torch.Tensor, ...]:
            outputs: tuple[torch.Tensor, ...] = _Function.apply(call, *primals, *extra)
            call.before = {i: call.before[i] for i in program.fragile}
            if on_node is not None:
                on_node(next(t.grad_fn for t in outputs if t.grad_fn is not None))
            return outputs

        try:
            result, values = self._results(arguments, run)
        except Misfit as misfit:
            self.standing.note(misfit)
            call.undo()
            raise
        for (container, key), value in zip(self.tape.assigned, values, strict=True):
            container[key] = value
        if self.tape.assigned:
            call.state = original.state.state()
        return result

    def run_transformed(self, arguments: Call) -> Any:
        """Like a call, under transforms of `torch.func`.

        Raises:
            CaptureError: see `pure`.
        """
        halves, primals = self.pure, _tensors_at(self._slots_of(self.program), arguments.inputs)
        result, _ = self._results(arguments, lambda: Transformed.apply(halves, *primals))
        return result

    def _slots_of(self, program: Program) -> list[Slot]:
        """Where the arguments of forward are."""
        names = tuple(program.split.primals)
        if names not in self._slots:
            self._slots[names] = [self._sources[name] for name in names]
        return self._slots[names]

    def _results(self, arguments: Call, run: Callable[[], Sequence[torch.Tensor]]) -> Any:
        """What the callable returns, and what it assigns, of the outputs of the graph."""
        inputs, sizes = arguments.inputs, self.sizes_of(arguments.inputs)
        unique = {id(r): r for r in self.tape.results}
        # Views of primals first: in the model, they mostly come before what is computed from them,
        # and autograd adds up gradients in the reverse order.
        made = {
            key: result.taken_from(self.lookup(result.origin, inputs), sizes)
            for key, result in unique.items()
            if isinstance(result.origin, str)
        }
        outputs = run()
        for key, result in unique.items():
            if isinstance(result.origin, int):
                made[key] = result.taken_from(outputs[result.origin], sizes)
        tensors = iter([made[id(r)] for r in self.tape.results])
        passed = arguments.parts() if self._needs_parts else ()
        result, values = tree.unflatten(self.tape.spec, tensors, passed)
        self.tape.changes.make(passed, tensors)
        return result, values


_FREED: Any = object()  # in place of a call whose backward is done


class _Function(torch.autograd.Function):
    """See the note on what autograd sees."""

    @staticmethod
    def forward(ctx: Any, call: Forward, *primals: torch.Tensor) -> tuple[torch.Tensor, ...]:
        program = call.program
        arguments = [spread.local(p) for p in primals[: len(program.split.primals)]]
        results = program.run(None, program.split.forward, arguments, call.sizes)
        outputs = call.programs.around_outputs(results[: len(program.joint.outputs)])
        ctx.set_materialize_grads(False)
        for residual, device in program.split.first_states.items():  # not to be kept twice
            call.random_states[device] = results[len(outputs) + residual]
        ctx.mark_non_differentiable(*call.programs.without_gradient(outputs))
        ctx.save_for_backward(
            *(primals[i] for i in program.saved_positions), *results[len(outputs) :]
        )
        ctx.call = call
        return outputs

    @staticmethod
    def backward(ctx: Any, *given: torch.Tensor | None) -> tuple[Any, ...]:
        cotangents = tuple(c if c is None else c.resolve_conj().resolve_neg() for c in given)
        del given
        # Raises as eager does if one was changed, or freed.
        saved = [spread.local(t) for t in ctx.saved_tensors]
        call: Forward = ctx.call
        if call is _FREED:
            raise RuntimeError(
                "Trying to backward through the graph a second time. Specify retain_graph=True if "
                "you need to backward through the graph a second time"
            )
        if torch.is_grad_enabled():
            return (None, *call.run_again(cotangents))
        try:
            key = _key(cotangents, dynamic=bool(call.sizes))
            graph, extra = call.programs.backward_for(call.program, key, call.sizes)
        except CaptureError:
            return (None, *call.run_again(cotangents))
        saved += [spread.local(call.primals[i]) for i in extra]
        saved += [spread.local(c) for c in cotangents if c is not None]
        ctx.maybe_clear_saved_tensors()
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            ctx.call = _FREED
        programs, program, sizes = call.programs, call.program, call.sizes
        if (key, sizes) not in program.tried:
            return (None, *_first_backward(call, key, graph, saved, cotangents))
        del cotangents, call
        gradients = program.run(key, graph, saved, sizes)
        return (None, *programs.around_gradients(program, key, gradients))


def _first_backward(
    call: Forward, key: BackwardKey, graph: GraphModule, values: list[Any], cotangents: Any
) -> Any:
    """Gradients by a backward graph that did not run yet; generically if it does not fit."""
    try:
        gradients = call.program.run(key, graph, values, call.sizes)
        return call.programs.around_gradients(call.program, key, gradients)
    except Misfit as misfit:
        call.programs.standing.note(misfit)
    return call.run_again(cotangents)


def _key(cotangents: Sequence[torch.Tensor | None], *, dynamic: bool) -> BackwardKey:
    def strides(c: torch.Tensor) -> Pattern:
        return pattern(c.shape, c.stride())[0] if dynamic else c.stride()

    return BackwardKey(
        tuple(
            None if c is None else (strides(spread.local(c)), c.dtype, spread.layout(c))
            for c in cotangents
        ),
        autocast_state(),
    )


def _tensors_at(slots: Sequence[Slot], inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Tensors where they are: (None, i) is the i-th input, else a container and the key in it."""
    return [inputs[key] if held is None else held[key] for held, key in slots]
