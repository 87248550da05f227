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
is made for what was seen.

NOTE [The generic route]

Two cases cannot run the backward graph: it cannot be differentiated again (`create_graph`), and a
pattern of gradients may need a value whose random state was not kept. Then the model's own forward
runs again on the same primals, in the same modes, random states and buffers, and autograd does the
rest: exactly eager, custom functions and errors included.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from fxckpt import first_run, ops, spread, tree
from fxckpt.arguments import Arguments, Call
from fxckpt.errors import BudgetError, CaptureError, FxckptError
from fxckpt.first_run import Misfit
from fxckpt.inductor import Compiled
from fxckpt.joint import Joint
from fxckpt.lean import lean
from fxckpt.levels import outside_of_transforms
from fxckpt.locks import LOCK
from fxckpt.modes import AutocastState, autocast_as, autocast_state
from fxckpt.nests import with_nests
from fxckpt.pure import Pure, pure
from fxckpt.schedule import Choice, read_before_written
from fxckpt.split import Split, backward_from, kept_bytes, split
from fxckpt.state import Slot, substituted
from fxckpt.symbols import Pattern, Sizes, pattern, sizes_of
from fxckpt.tape import BackwardKey, Tape
from fxckpt.transforms import Transformed

Decide = Callable[[Joint], Collection[torch.fx.Node]]


@dataclasses.dataclass(slots=True, eq=False)
class Program:
    """One split of a captured callable, ready to run.

    `backwards` are further backward graphs for the same residuals. `tried` holds what ran: the keys
    of backward graphs, None for forward, each with the sizes of the call. `compiled` has what
    Inductor made of graphs, or is None if these run as they are.
    """

    joint: Joint
    choice: Choice
    split: Split
    saved_positions: list[int]
    extra_positions: list[int]  # primals that are passed to autograd once more
    fragile: list[int]  # changed primals whose contents before the change matter
    written: list[int]  # all changed primals
    backwards: dict[BackwardKey, tuple[GraphModule, list[int]]]
    tried: set[tuple[BackwardKey | None, Sizes]]
    compiled: dict[BackwardKey | None, Compiled] | None
    sizes: Sizes  # that it was decided for

    def run(
        self, key: BackwardKey | None, graph: GraphModule, values: list[Any], sizes: Sizes
    ) -> Any:
        """Runs one of the graphs, as it was recorded, on a list that it empties.

        Raises:
            Misfit: in the first run for these sizes, if its results are not what capture foresaw.
        """
        if (key, sizes) not in self.tried:
            with _as_recorded():
                results = first_run.run(graph, values, sizes)
            if len(self.tried) >= _MOST_TRIED:
                self.tried.clear()
            self.tried.add((key, sizes))
            return results
        run = graph.forward if self.compiled is None else self._compiled(key, graph)
        if sizes:
            values.append(sizes)
        with _as_recorded():
            return run(values)

    def _compiled(self, key: BackwardKey | None, graph: GraphModule) -> Compiled:
        assert self.compiled is not None, "asked for"
        with LOCK:
            if key not in self.compiled:
                self.compiled[key] = Compiled(graph)
            return self.compiled[key]


@dataclasses.dataclass(slots=True)
class _Call:
    """What one forward keeps for its backward, besides the saved tensors."""

    captured: Captured
    program: Program
    module: torch.nn.Module | None
    inputs: Sequence[torch.Tensor]
    sizes: Sizes
    primals: Sequence[torch.Tensor]
    versions: list[int]
    state: Any
    random_states: dict[torch.device, torch.Tensor]
    before: dict[int, torch.Tensor]


@dataclasses.dataclass(slots=True)
class Standing:
    """Whether what was captured may run; one for all modules that run it (see `Captured.rebound`).

    `misfit` is set if a first run showed that it must not run again, `withdrawn` if forward was
    seen to do something else when it is called again.
    """

    misfit: Misfit | None = None
    withdrawn: bool = False

    @property
    def is_good(self) -> bool:
        """Whether it may run."""
        return self.misfit is None and not self.withdrawn


class Captured:
    """One captured callable for one signature: runs it, forward and backward.

    Args:
        tape: The captured forward.
        decide: Chooses the values to save, given a joint graph.
        original: The callable that was captured.
        input_spec: Structure of (args, kwargs).
        module: The module whose tensors the callable reads, if any.
        state: Tells the state of the module; another answer means that a rerun would differ.
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
        state: Callable[[], Any],
        *,
        compile: bool = False,
        decompose: bool = False,
    ) -> None:
        self.tape, self.original, self.input_spec = tape, original, input_spec
        self.state = state
        self._module = None if module is None else weakref.ref(module)  # which keeps this
        self.confirmed = False  # whether forward was seen to do the same again
        self.standing = Standing()
        self.autocast: AutocastState = autocast_state()
        self._decide, self._compiles, self._decompose = decide, compile, decompose
        self._needs_parts = bool(tape.changes.numbers) or tree.mentions_known(tape.spec)
        self._sources: Mapping[str, Slot] = {p.name: p.source for p in tape.primals}
        self._programs: dict[BackwardKey, Program] = {}
        self._fitting: dict[tuple[BackwardKey, Sizes], Program] = {}  # of plans with symbols
        self._slots: dict[int, list[Slot]] = {}  # by id of the program
        self._expected = tape.expected_backward()
        self.latest = tape.symbols.sizes  # what the symbols were in the latest call
        self._differentiable = [t.requires_grad for t in tape.outputs]
        self._layouts = [spread.layout(t) for t in tape.outputs]
        random = [n for n in self.program.joint.forward_nodes() if ops.node_is_random(n)]
        self._random_devices = sorted({ops.node_device(n) for n in random}, key=str)

    def rebound(
        self,
        module: torch.nn.Module,
        original: Callable[..., Any],
        state: Callable[[], Any],
        sources: Mapping[str, Slot],
    ) -> Captured:
        """The same for another module in the same state: what is compiled serves both.

        Args:
            module: The other module.
            original: Its forward.
            state: Tells its state.
            sources: Where the primals are at call time, by name.
        """
        new = copy.copy(self)
        new.original, new.state, new._module = original, state, weakref.ref(module)
        new._sources, new._slots, new.confirmed = sources, {}, True  # with the first of them
        return new

    def deciding(self, decide: Decide, programs: dict[BackwardKey, Program]) -> Captured:
        """The same with another decision for the backward that is expected now.

        Args:
            decide: As for a new one; it may refuse any other backward by a `BudgetError`.
            programs: What is compiled for this decision, by whoever runs it.
        """
        new = copy.copy(self)
        new._decide, new._programs, new._slots, new._fitting = decide, programs, {}, {}
        for cached in ("saves_memory", "pure"):
            new.__dict__.pop(cached, None)
        return new

    @property
    def differentiable(self) -> bool:
        """Whether any result can get a gradient; if not, there is nothing to keep."""
        return any(self._differentiable)

    def seen(self, sizes: Sizes) -> tuple[Joint, Joint, Choice]:
        """The graph that is decided on, that which runs, and what is decided, for other sizes."""
        program = self.program_for(sizes)
        given = self.tape.joint(self._expected, sizes)
        joint = program.joint
        if program.sizes != sizes:
            joint = given if program.choice.joint is None else lean(given)
        return given, joint, program.choice.of_graph(joint)

    @functools.cached_property
    def saves_memory(self) -> bool:
        """Whether less is kept for backward than if all were saved."""
        joint, choice = self._chosen(self._expected)
        everything = {value.node for value in joint.values()}
        return kept_bytes(joint, choice) < kept_bytes(joint, everything)

    @property
    def program(self) -> Program:
        """The program for the backward that is expected next; one that fits the budget, if any."""
        with LOCK:
            if self._expected not in self._programs:
                try:
                    self._programs[self._expected] = self._compile(self._expected)
                except BudgetError:
                    if not self._programs:
                        raise
                    self._expected = next(iter(self._programs))  # its residuals serve, too
            return self._programs[self._expected]

    def program_for(self, sizes: Sizes) -> Program:
        """The program for a call with these sizes: what a plan decides depends on them."""
        adapted = getattr(self._decide, "adapted", None)
        if not sizes or adapted is None:
            return self.program
        with LOCK:
            program, key = self.program, self._expected
            self._fitting.setdefault((key, self.tape.symbols.sizes), program)
            if (key, sizes) not in self._fitting:
                if len(self._fitting) >= _MOST_TRIED:
                    self._fitting.clear()
                made = dict.fromkeys(p for (k, _), p in self._fitting.items() if k == key)
                joint = self.tape.joint(key, sizes)
                try:
                    choice = adapted(joint, [p.choice for p in made])
                except BudgetError:
                    others = [p for (_, s), p in self._fitting.items() if s == sizes]
                    if not others:
                        raise
                    return others[-1]  # of another pattern of gradients; its residuals serve, too
                known = next((p for p in made if p.choice is choice), None)
                self._fitting[key, sizes] = known or self._split(key, joint, choice)
            return self._fitting[key, sizes]

    @property
    def given(self) -> Joint:
        """The graph that is decided on; that of a plan is made of it."""
        return self.tape.joint(self._expected)

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
        with LOCK:  # another thread may be capturing, with other tensors in their places
            primals = self._primals(program, inputs)
        call = _Call(
            self,
            program,
            None if self._module is None else self._module(),
            inputs,
            sizes,
            primals,
            [p._version for p in primals],
            self.state(),
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
            self._undo(call, misfit)
            raise
        for (container, key), value in zip(self.tape.assigned, values, strict=True):
            container[key] = value
        if self.tape.assigned:
            call.state = self.state()
        return result

    @functools.cached_property
    def pure(self) -> Pure:
        """Both halves as pure functions, for the transforms of `torch.func`.

        Raises:
            CaptureError: if forward changes anything.
        """
        if self.tape.assigned:
            raise CaptureError("forward assigns to a module under a torch.func transform")
        if any(
            map(spread.is_spread, (*(p.stand_in for p in self.tape.primals), *self.tape.outputs))
        ):
            raise CaptureError("a DTensor is used under a torch.func transform")
        key = dataclasses.replace(self._expected, recorded=True)
        with outside_of_transforms(), torch.enable_grad():
            joint, choice = self.tape.joint(key), self._chosen(self._expected)[1]
            if choice.joint is None:
                choice = self._chosen(key)[1]
            else:  # that of a plan, whose values have the same names
                names = {node.name for node in choice}
                choice = Choice(frozenset(n for n in joint.forward_nodes() if n.name in names))
            moving = {p.name for p in self.tape.primals if p.requires_grad}
            cotangents = [c is not None for c in self._expected.cotangents]
            return pure(joint, choice, moving, cotangents, decompose=self._decompose)

    def run_transformed(self, arguments: Call) -> Any:
        """Like a call, under transforms of `torch.func`.

        Raises:
            CaptureError: see `pure`.
        """
        halves, primals = self.pure, self._primals(self.program, arguments.inputs)
        result, _ = self._results(arguments, lambda: Transformed.apply(halves, *primals))
        return result

    def _primals(self, program: Program, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The arguments of forward."""
        slots = self._slots_of(program)
        return [inputs[key] if held is None else held[key] for held, key in slots]

    def _slots_of(self, program: Program) -> list[Slot]:
        """Where they are: (None, i) for the i-th input, else a container and the key in it."""
        if id(program) not in self._slots:
            self._slots[id(program)] = [self._sources[name] for name in program.split.primals]
        return self._slots[id(program)]

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

    def _undo(self, call: _Call, misfit: Misfit) -> None:
        """Puts back what a forward that did not fit changed."""
        self.standing.misfit = Misfit(misfit.op, misfit.learned)
        for device, random_state in call.random_states.items():
            ops.generator(device).set_state(random_state)
        with torch.no_grad():
            for i, contents in call.before.items():
                call.primals[i].copy_(contents)

    # -- called by _Function

    def around_outputs(self, outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """What forward returns, of what the graph does."""
        layouts = zip(outputs, self._layouts, strict=True)
        return [t if layout is None else layout.around(t) for t, layout in layouts]

    def around_gradients(
        self, program: Program, key: BackwardKey, gradients: Sequence[torch.Tensor | None]
    ) -> Sequence[torch.Tensor | None]:
        """What backward returns, of what the graph does."""
        layouts = self.tape.layouts(key)
        if not layouts:
            return gradients
        halves = program.split
        names = zip(gradients, (*halves.primals, *halves.extra), strict=True)
        return [g if g is None or n not in layouts else layouts[n].around(g) for g, n in names]

    def mark_outputs(self, ctx: Any, outputs: Sequence[torch.Tensor]) -> None:
        """Tells autograd which outputs have no gradient."""
        flags = zip(outputs, self._differentiable, strict=True)
        ctx.mark_non_differentiable(*(t for t, differentiable in flags if not differentiable))

    def backward_for(self, call: _Call, key: BackwardKey) -> tuple[GraphModule, list[int]]:
        """The backward graph for `key`, and which of call.primals it needs besides the saved ones.

        Raises:
            CaptureError: if that needs a value that was not kept and cannot be recomputed.
        """
        program = call.program
        with LOCK:
            if key not in program.backwards:
                joint = self.tape.joint(key)
                if call.sizes and not self.tape.symbols.hold(call.sizes):
                    raise CaptureError("this backward is another for other sizes")
                program.backwards[key] = backward_from(
                    joint, program.split, reuse=not self._compiles
                )
                self._expected = key
            return program.backwards[key]

    def try_backward(
        self, call: _Call, key: BackwardKey, graph: GraphModule, values: list[Any], cotangents: Any
    ) -> Any:
        """Gradients by a backward graph that did not run yet; generically if it does not fit."""
        try:
            gradients = call.program.run(key, graph, values, call.sizes)
            return self.around_gradients(call.program, key, gradients)
        except Misfit as misfit:
            self.standing.misfit = Misfit(misfit.op, misfit.learned)
        return self.run_again(call, cotangents)

    def run_again(
        self, call: _Call, cotangents: Sequence[torch.Tensor | None]
    ) -> list[torch.Tensor | None]:
        """Gradients by the generic route (see the note)."""
        self._require_unchanged(call)
        stand_ins = self._stand_ins(call)
        wanted = [stand_ins[id(p)] for p in call.primals if p.requires_grad]
        inputs = [stand_ins.get(id(t), t) for t in call.inputs]
        with self._as_called(call, stand_ins), torch.enable_grad():
            if self._is_decomposed():
                primals = [stand_ins[id(p)] for p in call.primals]
                outputs: Any = Transformed.apply(self.pure, *primals)
            else:
                outputs = self._outputs_again(Arguments(self.input_spec, inputs))
        pairs = [(outputs[i], c) for i, c in enumerate(cotangents) if c is not None]
        grads = torch.autograd.grad(
            [t for t, _ in pairs],
            wanted,
            [c for _, c in pairs],
            create_graph=torch.is_grad_enabled(),
            allow_unused=True,
        )
        found = {id(t): g for t, g in zip(wanted, grads, strict=True)}
        extra = [None] * len(call.program.split.extra)
        return [*(found.get(id(stand_ins[id(p)])) for p in call.primals), *extra]

    def _is_decomposed(self) -> bool:
        """Whether forward has operations that only their decompositions differentiate twice."""
        try:
            return self._decompose and self.pure.decomposed
        except CaptureError:
            return False

    def _outputs_again(self, arguments: Arguments) -> dict[int | str, torch.Tensor]:
        """Outputs of the graph, by origin, of what the callable leaves behind.

        That is in its result, in modules and in its arguments.
        """
        result = self.original(*arguments.args, **arguments.kwargs)
        values = [container[key] for container, key in self.tape.assigned]
        contents = arguments.contents(self.tape.changes.numbers)
        tensors = tree.flatten((result, values, contents), known=arguments.known)[0]
        made = zip(self.tape.results, tensors, strict=True)
        return {r.origin: _base(t) for r, t in made if t.requires_grad}

    def _stand_ins(self, call: _Call) -> dict[int, torch.Tensor]:
        """What the model is run on again, for each primal of the call (by `id`).

        An alias where a gradient is wanted, so that hooks of the primal do not run twice; a copy,
        with the contents of before, where forward changes the primal.
        """
        written = set(call.program.split.written)
        names = zip(call.program.split.primals, call.primals, strict=True)
        stand_ins: dict[int, torch.Tensor] = {}
        with torch.enable_grad():
            for i, (name, p) in enumerate(names):
                if name in written:
                    stand_ins[id(p)] = call.before.get(i, p).clone()
                else:
                    stand_ins[id(p)] = p.view_as(p) if p.requires_grad else p
        for (container, key), p in zip(self._slots_of(call.program), call.primals, strict=True):
            if container is not None:  # other tensors may be there now (`functional_call`)
                stand_ins[id(container[key])] = stand_ins[id(p)]
        return stand_ins

    @contextlib.contextmanager
    def _as_called(self, call: _Call, stand_ins: dict[int, torch.Tensor]) -> Iterator[None]:
        """The modes, random states and buffers as they were when forward was called."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(autocast_as(self.autocast))
            for device, random_state in call.random_states.items():
                stack.enter_context(ops.rng_state_as(random_state, device))
            if call.module is not None:
                stack.enter_context(substituted(call.module, stand_ins))
            yield

    def _require_unchanged(self, call: _Call) -> None:
        written = set(call.program.split.written)
        names = zip(call.program.split.primals, call.primals, call.versions, strict=True)
        changed = [n for n, p, v in names if n not in written and p._version != v]
        if changed:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an "
                f"inplace operation: {changed[0]} was changed between forward and backward"
            )
        if self.state() != call.state:
            raise FxckptError(
                "the module was changed (training mode, hyperparameters, parameters) between "
                "forward and a backward that has to run forward again (create_graph=True). "
                "Change it after backward"
            )

    # -- compiling

    def _chosen(self, key: BackwardKey) -> tuple[Joint, Choice]:
        """What is decided, and the graph that it is decided for."""
        joint = self.tape.joint(key)
        choice = Choice.of(self._decide(joint))
        if choice.joint is not None:
            return choice.joint, choice
        return joint, with_nests(joint, choice)

    def _compile(self, key: BackwardKey) -> Program:
        return self._split(key, *self._chosen(key))

    def _split(self, key: BackwardKey, joint: Joint, choice: Choice) -> Program:
        joint = choice.joint or joint
        halves = split(joint, choice, reuse=not self._compiles)
        positions = {name: i for i, name in enumerate(halves.primals)}
        return Program(
            joint,
            choice,
            halves,
            [positions[name] for name in halves.saved_primals],
            [positions[name] for name in halves.extra],
            [positions[name] for name in read_before_written(joint)],
            [positions[name] for name in halves.written],
            {key: (halves.backward, [])},
            set(),
            {} if self._compiles else None,
            joint.sizes,
        )


_MOST_TRIED = 1 << 14
_FREED: Any = object()  # in place of a call whose backward is done


class _Function(torch.autograd.Function):
    """See the note on what autograd sees."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *primals: torch.Tensor) -> tuple[torch.Tensor, ...]:
        program = call.program
        arguments = [spread.local(p) for p in primals[: len(program.split.primals)]]
        results = program.run(None, program.split.forward, arguments, call.sizes)
        outputs = call.captured.around_outputs(results[: len(program.joint.outputs)])
        ctx.set_materialize_grads(False)
        for residual, device in program.split.first_states.items():  # not to be kept twice
            call.random_states[device] = results[len(outputs) + residual]
        call.captured.mark_outputs(ctx, outputs)
        ctx.save_for_backward(
            *(primals[i] for i in program.saved_positions), *results[len(outputs) :]
        )
        ctx.call = call
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *given: torch.Tensor | None) -> tuple[Any, ...]:
        cotangents = tuple(c if c is None else c.resolve_conj().resolve_neg() for c in given)
        del given
        # Raises as eager does if one was changed, or freed.
        saved = [spread.local(t) for t in ctx.saved_tensors]
        call: _Call = ctx.call
        if call is _FREED:
            raise RuntimeError(
                "Trying to backward through the graph a second time. Specify retain_graph=True if "
                "you need to backward through the graph a second time"
            )
        if torch.is_grad_enabled():
            return (None, *call.captured.run_again(call, cotangents))
        try:
            key = _key(cotangents, dynamic=bool(call.sizes))
            graph, extra = call.captured.backward_for(call, key)
        except CaptureError:
            return (None, *call.captured.run_again(call, cotangents))
        saved += [spread.local(call.primals[i]) for i in extra]
        saved += [spread.local(c) for c in cotangents if c is not None]
        ctx.maybe_clear_saved_tensors()
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            ctx.call = _FREED
        program, sizes, captured = call.program, call.sizes, call.captured
        if (key, sizes) not in program.tried:
            return (None, *call.captured.try_backward(call, key, graph, saved, cotangents))
        del cotangents, call
        gradients = program.run(key, graph, saved, sizes)
        return (None, *captured.around_gradients(program, key, gradients))


@contextlib.contextmanager
def _as_recorded() -> Iterator[None]:
    """Runs a graph as it was recorded: below autograd and autocast, which are part of it.

    Grad mode is on because a few kernels look at it (`mkldnn_rnn_layer` prepares for backward).
    """
    with torch.enable_grad(), torch._C._AutoDispatchBelowAutograd(), torch._C._DisableAutocast():
        yield


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


def _base(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor that the graph returns for a result: the one that owns the storage."""
    base = tensor._base
    return base if base is not None and base.requires_grad else tensor
