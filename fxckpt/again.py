"""Gradients by the model's own forward, run again.

NOTE [The generic route]

Two cases cannot run the backward graph: it cannot be differentiated again (`create_graph`), and a
pattern of gradients may need a value whose random state was not kept. Then the model's own forward
runs again on the same primals, in the same modes, random states and buffers, and autograd does the
rest: exactly eager, custom functions and errors included.
"""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch

from fxckpt import ops, tree
from fxckpt.arguments import Arguments
from fxckpt.errors import FxckptError
from fxckpt.modes import AutocastState, autocast_as
from fxckpt.programs import Program, Programs
from fxckpt.state import Slot, substituted
from fxckpt.symbols import Sizes
from fxckpt.tape import base_of
from fxckpt.transforms import Transformed


class State(Protocol):
    """The state of a module, by number.

    Attributes:
        latest: When it was last looked at, which is when a call began.
    """

    latest: int | None

    def state(self) -> int | None:
        """Now."""


@dataclasses.dataclass(frozen=True, slots=True)
class Original:
    """What was captured.

    Attributes:
        function: The callable.
        spec: Structure of its (args, kwargs).
        autocast: The state of autocast in which it was captured.
        module: The module whose tensors it reads, if any.
        state: Of the module; another one means that a rerun would differ.
    """

    function: Callable[..., Any]
    spec: tree.Spec
    autocast: AutocastState
    module: weakref.ref[torch.nn.Module] | None  # which keeps this
    state: State


@dataclasses.dataclass(slots=True)
class Forward:
    """What one forward keeps for its backward, besides the saved tensors."""

    programs: Programs
    program: Program
    original: Original
    module: torch.nn.Module | None
    inputs: Sequence[torch.Tensor]
    sizes: Sizes
    slots: Sequence[Slot]
    primals: Sequence[torch.Tensor]
    versions: list[int]
    state: Any
    random_states: dict[torch.device, torch.Tensor]
    before: dict[int, torch.Tensor]

    def run_again(self, cotangents: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """Gradients for all that autograd was given, by the generic route (see the note).

        Args:
            cotangents: A gradient, or None, for each output of the graph.
        """
        self._require_unchanged()
        stand_ins = self._stand_ins()
        wanted = [stand_ins[id(p)] for p in self.primals if p.requires_grad]
        inputs = [stand_ins.get(id(t), t) for t in self.inputs]
        with self._as_called(stand_ins), torch.enable_grad():
            if self.programs.decomposes:
                primals = [stand_ins[id(p)] for p in self.primals]
                outputs: Any = Transformed.apply(self.programs.pure, *primals)
            else:
                outputs = self._outputs_again(Arguments(self.original.spec, inputs))
        pairs = [(outputs[i], c) for i, c in enumerate(cotangents) if c is not None]
        grads = torch.autograd.grad(
            [t for t, _ in pairs],
            wanted,
            [c for _, c in pairs],
            create_graph=torch.is_grad_enabled(),
            allow_unused=True,
        )
        found = {id(t): g for t, g in zip(wanted, grads, strict=True)}
        extra = [None] * len(self.program.split.extra)
        return [*(found.get(id(stand_ins[id(p)])) for p in self.primals), *extra]

    def undo(self) -> None:
        """Puts back what forward changed: random states, and the contents of primals."""
        for device, random_state in self.random_states.items():
            ops.generator(device).set_state(random_state)
        with torch.no_grad():
            for i, contents in self.before.items():
                self.primals[i].copy_(contents)

    def _outputs_again(self, arguments: Arguments) -> dict[int | str, torch.Tensor]:
        """Outputs of the graph, by origin, of what the callable leaves behind.

        That is in its result, in modules and in its arguments.
        """
        result = self.original.function(*arguments.args, **arguments.kwargs)
        tape = self.programs.tape
        values = [container[key] for container, key in tape.assigned]
        contents = arguments.contents(tape.changes.numbers)
        tensors = tree.flatten((result, values, contents), known=arguments.known)[0]
        made = zip(tape.results, tensors, strict=True)
        return {r.origin: base_of(t) for r, t in made if t.requires_grad}

    def _stand_ins(self) -> dict[int, torch.Tensor]:
        """What the model is run on again, for each primal of the call (by `id`).

        An alias where a gradient is wanted, so that hooks of the primal do not run twice; a copy,
        with the contents of before, where forward changes the primal.
        """
        written = set(self.program.split.written)
        names = zip(self.program.split.primals, self.primals, strict=True)
        stand_ins: dict[int, torch.Tensor] = {}
        with torch.enable_grad():
            for i, (name, p) in enumerate(names):
                if name in written:
                    stand_ins[id(p)] = self.before.get(i, p).clone()
                else:
                    stand_ins[id(p)] = p.view_as(p) if p.requires_grad else p
        for (container, key), p in zip(self.slots, self.primals, strict=True):
            if container is not None:  # other tensors may be there now (`functional_call`)
                stand_ins[id(container[key])] = stand_ins[id(p)]
        return stand_ins

    @contextlib.contextmanager
    def _as_called(self, stand_ins: dict[int, torch.Tensor]) -> Iterator[None]:
        """The modes, random states and buffers as they were when forward was called."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(autocast_as(self.original.autocast))
            for device, random_state in self.random_states.items():
                stack.enter_context(ops.rng_state_as(random_state, device))
            if self.module is not None:
                stack.enter_context(substituted(self.module, stand_ins))
            yield

    def _require_unchanged(self) -> None:
        written = set(self.program.split.written)
        names = zip(self.program.split.primals, self.primals, self.versions, strict=True)
        changed = [n for n, p, v in names if n not in written and p._version != v]
        if changed:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an "
                f"inplace operation: {changed[0]} was changed between forward and backward"
            )
        if self.original.state.state() != self.state:
            raise FxckptError(
                "the module was changed (training mode, hyperparameters, parameters) between "
                "forward and a backward that has to run forward again (create_graph=True). "
                "Change it after backward"
            )
