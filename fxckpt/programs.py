"""What is compiled of a tape: a split graph for each backward that was expected.

The pattern of gradients that backward gets (which outputs have one, with which strides) is part of
the graph. A `Program` is made for the pattern that is expected, holds further backward graphs for
its own residuals, and gives way to another one once another pattern was seen. If sizes are symbols
and a plan decides, there is a program for each decision.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node
from typing_extensions import Self

from fxckpt import first_run, spread
from fxckpt.errors import BudgetError, CaptureError
from fxckpt.first_run import Misfit
from fxckpt.inductor import Compiled
from fxckpt.joint import Joint
from fxckpt.lean import lean
from fxckpt.levels import outside_of_transforms
from fxckpt.locks import LOCK
from fxckpt.nests import with_nests
from fxckpt.pure import Pure, pure
from fxckpt.schedule import Choice, read_before_written
from fxckpt.split import Split, backward_from, kept_bytes, split
from fxckpt.symbols import Sizes
from fxckpt.tape import BackwardKey, Tape

Decide = Callable[[Joint], Collection[Node]]

_MOST_TRIED = 1 << 14


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
class Standing:
    """Whether what was captured may run; one for all modules that run it.

    `misfit` is set if a first run showed that it must not run again, `withdrawn` if forward was
    seen to do something else when it is called again.
    """

    misfit: Misfit | None = None
    withdrawn: bool = False

    @property
    def is_good(self) -> bool:
        """Whether it may run."""
        return self.misfit is None and not self.withdrawn

    def note(self, misfit: Misfit) -> None:
        """Remembers that a first run did not fit, without what its traceback holds."""
        self.misfit = Misfit(misfit.op, misfit.learned)


class Programs:
    """The programs of one captured callable.

    Args:
        tape: The captured forward.
        decide: Chooses the values to save, given a joint graph.
        compile: Whether to compile both graphs with Inductor.
        decompose: Whether to decompose what torch cannot differentiate twice; see `pure`.
    """

    def __init__(self, tape: Tape, decide: Decide, *, compile: bool, decompose: bool) -> None:
        self.tape = tape
        self.standing = Standing()
        self._decide, self._compiles, self._decompose = decide, compile, decompose
        self._programs: dict[BackwardKey, Program] = {}
        self._fitting: dict[tuple[BackwardKey, Sizes], Program] = {}  # of plans with symbols
        self._expected = tape.expected_backward()
        self._differentiable = [t.requires_grad for t in tape.outputs]
        self._layouts = [spread.layout(t) for t in tape.outputs]

    def without_gradient(self, outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Those of the outputs of the graph that get no gradient."""
        flags = zip(outputs, self._differentiable, strict=True)
        return [t for t, differentiable in flags if not differentiable]

    def around_outputs(self, outputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """What forward returns, of the outputs of the graph, see `spread`."""
        layouts = zip(outputs, self._layouts, strict=True)
        return tuple(t if layout is None else layout.around(t) for t, layout in layouts)

    def around_gradients(
        self, program: Program, key: BackwardKey, gradients: Sequence[torch.Tensor | None]
    ) -> Sequence[torch.Tensor | None]:
        """What backward returns, of the outputs of its graph."""
        layouts = self.tape.layouts(key)
        if not layouts:
            return gradients
        halves = program.split
        names = zip(gradients, (*halves.primals, *halves.extra), strict=True)
        return [g if g is None or n not in layouts else layouts[n].around(g) for g, n in names]

    def deciding(self, decide: Decide, programs: dict[BackwardKey, Program]) -> Self:
        """The same with another decision for the backward that is expected now.

        Args:
            decide: As for a new one; it may refuse any other backward by a `BudgetError`.
            programs: What is compiled for this decision, by whoever runs it.
        """
        new = copy.copy(self)
        new._decide, new._programs, new._fitting = decide, programs, {}
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
            made = program.choice.joint
            joint = given if made is None else lean(given, made.lean)
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

    @functools.cached_property
    def pure(self) -> Pure:
        """Both halves as pure functions, for the transforms of `torch.func`.

        Raises:
            CaptureError: if forward changes anything.
        """
        if self.tape.assigned:
            raise CaptureError("forward assigns to a module under a torch.func transform")
        seen = (*(p.stand_in for p in self.tape.primals), *self.tape.outputs)
        if any(map(spread.is_spread, seen)):
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

    @property
    def decomposes(self) -> bool:
        """Whether forward has operations that only their decompositions differentiate twice."""
        try:
            return self._decompose and self.pure.decomposed
        except CaptureError:
            return False

    def backward_for(
        self, program: Program, key: BackwardKey, sizes: Sizes
    ) -> tuple[GraphModule, list[int]]:
        """The backward graph for `key`, and which primals it needs besides the saved ones.

        Raises:
            CaptureError: if that needs a value that was not kept and cannot be recomputed.
        """
        with LOCK:
            if key not in program.backwards:
                joint = self.tape.joint(key)
                if sizes and not self.tape.symbols.hold(sizes):
                    raise CaptureError("this backward is another for other sizes")
                program.backwards[key] = backward_from(
                    joint, program.split, reuse=not self._compiles
                )
                self._expected = key
            return program.backwards[key]

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


@contextlib.contextmanager
def _as_recorded() -> Iterator[None]:
    """Runs a graph as it was recorded: below autograd and autocast, which are part of it.

    Grad mode is on because a few kernels look at it (`mkldnn_rnn_layer` prepares for backward).
    """
    with torch.enable_grad(), torch._C._AutoDispatchBelowAutograd(), torch._C._DisableAutocast():
        yield
