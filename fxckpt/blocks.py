"""Blocks as units: each repeated block of a model is captured by itself, the rest runs eagerly.

NOTE [Blocks as units]

A unit delivers its gradients when its backward is done. If that is the whole model, all of them
come at the end; if it is a block, those of the last block come first, as in eager: what overlaps
communication, shards gradients, or steps an optimizer in backward depends on that. Parameters are
read at the call of the block, so they may be gathered just before it.

While the model runs, the blocks run by units of their own; before and afterwards they are as they
were, since the original of a rewritten model shares them. Blocks that look the same share one
capture (see `kin`).
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
from torch import nn

from fxckpt import levels
from fxckpt.arguments import Call
from fxckpt.budgeting import Budgeting
from fxckpt.budgets import WithinBudget
from fxckpt.capture import is_capturing
from fxckpt.captures import Captures, Options
from fxckpt.errors import BudgetError, CaptureError, FallbackWarning, FxckptError, PolicyError
from fxckpt.installation import exchange, installed, original_class, original_forward
from fxckpt.kin import Kin
from fxckpt.parts import CastOnce, Parts, has_forward, is_composed
from fxckpt.places import Position, stack_level_of_user
from fxckpt.runtime import Captured
from fxckpt.selectors import is_below, listed
from fxckpt.unit import Unit, is_traced, run_traced, run_within

Units = str | Iterable[str] | None


class Blocks:
    """Runs a module whose blocks are units.

    Args:
        module: The module; only a weak reference is kept.
        options: What `rewrite` was called with.
        units: "blocks", or module paths (see `fxckpt.selectors`).

        why: Why they are, if nobody asked for it.

    Raises:
        PolicyError: if there are no such blocks.
    """

    passing = False  # on the module until it is restored
    failure = None  # that of the whole: there is none

    def __init__(
        self, module: nn.Module, options: Options, units: Units, why: str = "as asked"
    ) -> None:
        self.options, self._units, self._reason = options, units, why
        self._owner = weakref.ref(module)
        self.latest: Captured | None = None
        self.told: set[str] = set()  # what was warned of, for any block
        decide = options.decide
        self.budgeting = (
            Budgeting(decide, options.cache_size) if isinstance(decide, WithinBudget) else None
        )
        self.parts = self._found(module)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs the module's forward, its blocks by their units if gradients may be wanted."""
        if not (module.training and torch.is_grad_enabled()):
            return original_forward(module)(*args, **kwargs)
        if torch.compiler.is_compiling():
            return run_traced(module, args, kwargs)
        if self._structure != _structure(self._containers):
            self.parts = self._found(module)

        forward, budgeting = self._forward_of(module), self.budgeting
        if budgeting is None or budgeting.is_running or is_traced(module) or levels.is_active():
            return forward(*args, **kwargs)
        with budgeting.planned(module, forward, args, kwargs):
            return forward(*args, **kwargs)

    def plan(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Plans for a call, if there is a budget.

        Raises:
            BudgetError: if that is refused; nothing has happened then.
        """
        if self.budgeting is not None:
            self.budgeting.plan(module, self._forward_of(module), args, kwargs)

    def _forward_of(self, module: nn.Module) -> Callable[..., Any]:
        """The forward of the module, in which blocks run by their units."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            with self.parts.in_place():
                return original_forward(module)(*args, **kwargs)

        return forward

    @property
    def called(self) -> bool:
        """Whether the module was ever called in training."""
        return self.parts.runs > 0

    def prepare(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuses to capture without a step: what blocks are called with is known in one only."""
        raise FxckptError(
            'rewrite(..., example_inputs=..., units="blocks"): blocks are captured at their first '
            "call. Leave out example_inputs="
        )

    def found(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Refuses likewise."""
        raise FxckptError(
            "the units of this model are its blocks, and what these are called with is known in a "
            'step only. Rewrite a block, or the model with units="model"'
        )

    def require(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raises the `CaptureError` for which the latest run was eager, no block captured."""
        units = [unit for _, unit in self.parts.runners()]
        if not any(unit.latest for unit in units):
            failures = (unit.failure for unit in units if unit.failure is not None)
            raise next(failures, None) or CaptureError(
                "no block was called, or nothing in one has a gradient",
                hint='Name those that run, units=["encoder.*"], or take units="model".',
            )

    def captured(self) -> list[tuple[str, Captured]]:
        """What ran in the latest step, and where, see `Unit.captured`."""
        runners = [(path, unit.latest) for path, unit in self.parts.runners()]
        return [(path, latest) for path, latest in runners if latest is not None]

    def histories(self) -> list[Captures]:
        """What was captured of each block."""
        return [each for _, unit in self.parts.runners() for each in unit.histories()]

    def for_module(self, module: nn.Module) -> Blocks:
        """This runner, or a new one with the same options if `module` is a copy of its owner."""
        return self if self._owner() is module else self.for_copy(module)

    def for_copy(self, module: nn.Module) -> Blocks:
        """A new runner with the same options."""
        return Blocks(module, self.options, self._units, self._reason)

    @property
    def why(self) -> str:
        """What is captured at once, and why."""
        return f"{len(self.parts.runners())} blocks, {self._reason}"

    def __deepcopy__(self, _: Any) -> Blocks:
        return self  # until `for_module` sees that its module is a copy

    def _found(self, module: nn.Module) -> Parts:
        """The blocks there are now."""
        found = find(module, self._units)
        self._containers = _containers(module, [position.path for _, position in found])
        self._structure = _structure(self._containers)
        kins: dict[Hashable, Kin] = {}

        def unit(m: nn.Module, position: Position) -> Block:
            stack = position.path.rpartition(".")[0]
            kin = kins.setdefault(stack, Kin(self.options.cache_size))
            return Block(m, position, self, None if self.options.by_index else kin)

        return Parts(module, found, unit)


class Undecided:
    """Decides at the first call whether the model is one unit, or its blocks are.

    Blocks are units if there are many that look alike, so that capturing one of them is much
    quicker, or if other processes wait for gradients. Then what lies outside of them is saved. A
    budget holds for the whole step in any case; where it cannot be planned over blocks, the model
    is one unit.

    Args:
        options: What `rewrite` was called with.
        whole: Whether the policy is one for the whole model.
    """

    passing = False  # on the module until it is restored
    latest = failure = None
    why = ""
    called = False  # in training; then it is decided

    def __init__(self, options: Options, whole: bool) -> None:
        self.options, self._whole = options, whole

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs the forward by what is decided, if gradients may be wanted."""
        if not (module.training and torch.is_grad_enabled()):
            return original_forward(module)(*args, **kwargs)
        if torch.compiler.is_compiling():
            return run_traced(module, args, kwargs)
        if is_capturing():  # something around it; that does not change it
            return run_within(self.options, module, args, kwargs)
        if is_traced(module):
            return original_forward(module)(*args, **kwargs)
        return self._decided(module, args, kwargs)(module, args, kwargs)

    def prepare(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Captures the model as one."""
        self._as_one(module).prepare(module, args, kwargs)

    def found(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What is captured of the model as one for a call."""
        return self._as_one(module).found(module, args, kwargs)

    def _as_one(self, module: nn.Module, why: str = "") -> Unit:
        unit = Unit(module, self.options)
        unit.why += why
        exchange(module, unit)
        return unit

    def require(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """See `Unit.require`."""
        self._decided(module, args, kwargs).require(module, args, kwargs)

    def captured(self) -> list[tuple[str, Captured]]:
        """Nothing yet."""
        return []

    def for_module(self, _: nn.Module) -> Undecided:
        """This runner: nothing in it belongs to one module."""
        return self

    def for_copy(self, _: nn.Module) -> Undecided:
        """Likewise."""
        return self

    def __deepcopy__(self, _: Any) -> Undecided:
        return self

    def _decided(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Unit | Blocks:
        has_budget = isinstance(self.options.decide, WithinBudget)
        # Under `vmap`, a budget is that of all samples, which is known of a graph alone.
        whole = self._whole or (has_budget and levels.is_active())
        why, refused = "" if whole else _why_blocks(module), ""
        if why:
            try:
                runner = Blocks(module, self.options, "blocks", why)
                runner.plan(module, args, kwargs)
                exchange(module, runner)
                return runner
            except PolicyError:
                pass  # they are rewritten already
            except BudgetError as error:
                reason = str(error).partition(". ")[0]
                refused = f", as its budget over blocks is refused: {reason}"
        return self._as_one(module, refused)


_OFTEN = 32


def _why_blocks(module: nn.Module) -> str:
    """Why blocks are the better units; nothing if they are not."""
    if _is_distributed(module):
        return "as other processes wait for gradients"
    return f"as at least {_OFTEN} are alike" if _repeats_often(module) else ""


def _repeats_often(module: nn.Module) -> bool:
    with contextlib.suppress(PolicyError):
        return max(position.copies for _, position in find(module, "blocks")) >= _OFTEN
    return False


def _is_distributed(module: nn.Module) -> bool:
    if any(type(p).__name__ == "DTensor" for p in module.parameters()):
        return True
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return there and torch.distributed.get_world_size() > 1


class Block(Unit):
    """The unit of one block.

    Args:
        module: The block; only a weak reference is kept.
        position: Where it stands in the whole.
        whole: What runs the whole; likewise.
        kin: What was captured of other blocks.
    """

    passing = True  # on the block while the whole runs

    def __init__(
        self, module: nn.Module, position: Position, whole: Blocks, kin: Kin | None
    ) -> None:
        super().__init__(module, whole.options, position, kin)
        self._whole, self._path = weakref.ref(whole), position.path
        self._cast = CastOnce(position.path, waits=False)
        self._told = whole.told

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs the forward of the block: the captured one where that is possible."""
        whole = self._whole()
        if whole is None or not whole.parts.active() or self._owner() is not module:
            return original_forward(module)(*args, **kwargs)
        known = self._cast.is_called_again
        if self._cast.may_be(whole.parts):
            if self._cast.is_called_again and not known and whole.parts.runs == 1:
                self._tell_of_rounding()
            return original_forward(module)(*args, **kwargs)
        result = super().__call__(module, args, kwargs)
        whole.latest = self.latest or whole.latest
        return result

    def _run(self, found: Captured, call: Call) -> Any:
        """Runs what was captured, or what a budget makes of it."""
        whole = self._whole()
        if whole is None or whole.budgeting is None:
            return super()._run(found, call)
        self.latest, result = whole.budgeting.run(self._path, found, call)
        return result

    def for_module(self, _: nn.Module) -> Block:
        """This unit, which runs the original forward of other modules."""
        return self

    def for_copy(self, _: nn.Module) -> Any:
        """None: blocks are rewritten only while the whole runs."""

    def _tell_of_rounding(self) -> None:
        warnings.warn(
            f"{self._path} is called several times in one step under autocast, where eager casts "
            "its weights once and sums their gradients in the lower precision. From now on it runs "
            "eagerly; in this step, sums of its gradients may be rounded differently",
            FallbackWarning,
            stacklevel=stack_level_of_user(),
        )


def find(root: nn.Module, units: Units) -> list[tuple[nn.Module, Position]]:
    """The blocks of a model, none of which lies in another one.

    Args:
        root: The model.
        units: Module paths, see `fxckpt.selectors`; "blocks" finds the modules of one class in one
            list (`nn.ModuleList`, `nn.Sequential`, `nn.ModuleDict`) of which two have parameters of
            the same shapes.

    Raises:
        PolicyError: if there are none.
    """
    may_be = is_composed if units == "blocks" else has_forward
    modules = {p: m for p, m in root.named_modules() if p and may_be(m)}
    rewritten = [p for p, m in modules.items() if _is_rewritten(m)]
    if units == "blocks":
        paths = _repeated(modules)
    else:
        paths = _matching(modules, [units] if isinstance(units, str) else [*(units or ())])
    taken: list[str] = []
    for path in paths:
        if not any(path == t or path.startswith(f"{t}.") for t in (*taken, *rewritten)):
            taken.append(path)
    if not taken:
        raise PolicyError(f"units={units!r} names what is rewritten already. Restore it first")
    copies = Counter(_stack(p, modules[p]) for p in taken)
    return [(modules[p], Position(p, copies[_stack(p, modules[p])])) for p in taken]


def _repeated(modules: dict[str, nn.Module]) -> list[str]:
    stacks: dict[Hashable, list[str]] = {}
    for path, m in modules.items():
        if path.rpartition(".")[2].isdigit():
            stacks.setdefault(_stack(path, m), []).append(path)
    alike = {s for s, paths in stacks.items() if _has_twins([modules[p] for p in paths])}
    if not alike:
        raise PolicyError(
            'units="blocks" finds no repeated blocks: no list of modules holds two of one class '
            'whose parameters have the same shapes. Name some by path, units=["encoder.*"], or '
            'take the model as one, units="model"'
        )
    return [p for p, m in modules.items() if _stack(p, m) in alike and p in stacks[_stack(p, m)]]


def _stack(path: str, m: nn.Module) -> tuple[str, type]:
    return path.rpartition(".")[0], original_class(type(m))


def _has_twins(modules: list[nn.Module]) -> bool:
    shapes = Counter(tuple(p.shape for p in m.parameters()) for m in modules)
    return any(n > 1 for s, n in shapes.items() if s)


def _matching(modules: dict[str, nn.Module], patterns: list[str]) -> list[str]:
    found = {pattern: [p for p in modules if is_below(p, pattern)] for pattern in patterns}
    for pattern, paths in found.items():
        if not paths:
            known = listed(dict.fromkeys(modules))
            raise PolicyError(f"units={pattern!r} matches no module. There are {known}")
    matched = {p for paths in found.values() for p in paths}
    return [p for p in modules if p in matched]


def _is_rewritten(m: nn.Module) -> bool:
    runner = installed(m)
    return runner is not None and not runner.passing


def _containers(root: nn.Module, paths: list[str]) -> list[dict[str, nn.Module | None]]:
    """The dictionaries of submodules on the ways to some modules."""
    above = {"", *(p[:i] for p in paths for i, c in enumerate(p) if c == ".")}
    return [root.get_submodule(path)._modules for path in sorted(above)]


def _structure(containers: Iterable[dict[str, nn.Module | None]]) -> list[int]:
    return [id(m) for members in containers for m in (members, *members.values())]
