"""A budget for a step whose units are blocks: each call of a block runs as is planned for the step.

For a call of a new kind, the step is measured (see `timeline`), each distinct block gets a menu of
decisions (see `menu`), and each call of a block takes the one that the plan for the whole step says
(see `composition`). Calls that the measured step did not have keep nothing but what comes in.
"""

from __future__ import annotations

import dataclasses
import threading
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from fxckpt import signature
from fxckpt.arguments import Call
from fxckpt.budgets import WithinBudget
from fxckpt.composition import OUTSIDE, Composition, Option
from fxckpt.errors import BudgetError, CaptureError, FallbackWarning
from fxckpt.first_run import Misfit
from fxckpt.memory import Memory
from fxckpt.menu import Entry, Menu
from fxckpt.places import stack_level_of_user
from fxckpt.planner import are_here, costs_of
from fxckpt.quantities import readable
from fxckpt.replay import Needs
from fxckpt.runtime import Captured
from fxckpt.timeline import Called, Observer, Own, Timeline, timeline

_SURPRISES = 3  # steps that do something else than the measured one, until none is measured anew


@dataclasses.dataclass(eq=False)
class Spot:
    """What is planned for one call of a block."""

    called: Called
    menu: Menu
    entry: Entry
    bound: tuple[Captured, Captured] | None = None  # what was found for the call, and what runs

    def runs(self, found: Captured) -> Captured:
        """What runs in place of what was found for the call."""
        if self.bound is None or self.bound[0] is not found:
            self.bound = found, found.deciding(self.entry, self.entry.programs)
        return self.bound[1]


@dataclasses.dataclass(eq=False)
class StepPlan:
    """A plan for a step.

    Attributes:
        budget: Bytes that were given.
        peak: Bytes that live at most, above what was there when forward was called.
        eager_peak: Likewise if blocks run as they are.
        seconds: What runs again takes.
        bound: What it takes at least within the budget, with these menus.
        spots: By path of the block and number of its call.
        composition: The step.
        eager: The step as it is.
        chosen: The entry of each call.
    """

    budget: int
    peak: int
    eager_peak: int
    seconds: float
    bound: float
    spots: dict[tuple[str, int], Spot]
    composition: Composition
    eager: Composition
    chosen: tuple[int, ...]


class Following:
    """Runs the calls of blocks in one step as planned.

    Args:
        plan: The plan.
    """

    def __init__(self, plan: StepPlan) -> None:
        self.unknown: list[str] = []  # blocks whose calls are not in the plan
        self._plan, self._counts = plan, Counter[str]()

    def find(self, path: str, found: Captured) -> Captured:
        """What runs for the next call of a block, in place of what was found."""
        spot = self._plan.spots.get((path, self._counts[path]))
        self._counts[path] += 1
        if spot is None or spot.called.captured.tape is not found.tape:
            self.unknown.append(path)
            return found
        return spot.runs(found)

    def take_back(self, path: str) -> None:
        """The latest call of a block was none."""
        self._counts[path] -= 1


class Budgeting:
    """The plans for the steps of one model.

    Attributes:
        latest: What was followed last.

    Args:
        decide: The budget.
        most: How many plans are kept.
    """

    def __init__(self, decide: WithinBudget, most: int) -> None:
        self.latest: StepPlan | None = None
        self._decide, self._most = decide, most
        self._plans: OrderedDict[Hashable, StepPlan] = OrderedDict()
        self._thread = threading.local()
        self._surprises = 0

    @property
    def is_running(self) -> bool:
        """Whether this thread runs a step."""
        return self._current is not None

    def run(self, path: str, found: Captured, call: Call) -> tuple[Captured, Any]:
        """Runs a call of a block.

        Args:
            path: Of the block.
            found: What was captured for the call.
            call: The call.

        Returns:
            What ran, and the result.

        Raises:
            Misfit: see `Captured`.
        """
        current = self._current
        if isinstance(current, Observer):
            return found, current.run(path, found, call)
        if current is None:
            return found, found(call)
        runs = current.find(path, found)
        try:
            return runs, runs(call)
        except Misfit:
            current.take_back(path)
            raise

    @contextmanager
    def planned(
        self,
        module: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Iterator[None]:
        """While active, blocks run as is planned for this call.

        Args:
            module: The model.
            forward: Runs its forward.
            args: Of the call.
            kwargs: Likewise.

        Raises:
            BudgetError: if no plan fits, or the step cannot be measured; nothing has run then.
        """
        key = self.plan(module, forward, args, kwargs)
        self.latest = plan = self._plans[key]
        following = Following(plan)
        with self._as_current(following):
            yield
        if following.unknown:
            self._note_surprise(key, following.unknown[0])

    def plan(
        self,
        module: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Hashable:
        """Plans for a call, if there is no plan for it yet.

        Returns:
            What finds it again.

        Raises:
            BudgetError: see `planned`.
        """
        key = _key(module, args, kwargs)
        if key not in self._plans:
            self._plans[key] = self._plan(module, forward, args, kwargs)
            if len(self._plans) > self._most:
                self._plans.popitem(last=False)
        self._plans.move_to_end(key)
        return key

    def _note_surprise(self, key: Hashable, path: str) -> None:
        self._surprises += 1
        if self._surprises <= _SURPRISES:
            del self._plans[key]  # it is measured anew
        if self._surprises == 1:
            warnings.warn(
                f"{path} is called in another way than in the step that was measured. It keeps "
                "only what comes in, but the budget is not promised for this step. Such steps are "
                f"measured anew {_SURPRISES} times",
                FallbackWarning,
                stacklevel=stack_level_of_user(),
            )

    @property
    def _current(self) -> Observer | Following | None:
        return getattr(self._thread, "current", None)

    @contextmanager
    def _as_current(self, current: Observer | Following) -> Iterator[None]:
        self._thread.current = current
        try:
            yield
        finally:
            self._thread.current = None

    # -- planning

    def _plan(
        self, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any
    ) -> StepPlan:
        def run(observer: Observer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            with self._as_current(observer):
                return forward(*args, **kwargs)

        found = timeline(module, run, args, kwargs)
        menus = self._menus(found.calls)
        composition = Composition(found.moments, [*_options(found, menus)])
        eager = Composition(found.moments, [[_option(menu.eager, 0.0)] for menu in menus])
        eager_peak = eager.peak([0] * len(menus))
        budget = self._decide.bytes_of(eager_peak)
        best = composition.fastest(budget)
        if best is None:
            raise _error(budget, eager_peak, found, composition)
        entries = [menu.entries[i] for menu, i in zip(menus, best.chosen, strict=True)]
        spots = map(Spot, found.calls, menus, entries)
        return StepPlan(
            budget,
            composition.peak(best.chosen),
            eager_peak,
            composition.seconds(best.chosen),
            best.bound,
            {(spot.called.path, spot.called.number): spot for spot in spots},
            composition,
            eager,
            best.chosen,
        )

    def _menus(self, calls: Sequence[Called]) -> list[Menu]:
        """The menu of each call; one for all that have the same graph."""
        joints = {id(joint): joint for call in calls for joint in (call.captured.given,)}
        each = self._decide.seconds / max(len(joints), 1)
        menus = {
            key: Menu(joint, profile=self._decide.profile, seconds=each)
            for key, joint in joints.items()
        }
        return [menus[id(call.captured.given)] for call in calls]


def _key(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hashable:
    """What a step depends on: arguments, modes, and which parameters get gradients."""
    try:
        call = Call.of(args, kwargs)
    except CaptureError as error:
        raise BudgetError(f"the step cannot be measured: {error}") from error
    state = tuple(
        (m.training, tuple(None if p is None else p.requires_grad for p in m._parameters.values()))
        for m in module.modules()
    )
    return signature.of_modes(), signature.of_arguments(call.spec, call.inputs), state


# --- what calls of blocks come to -----------------------------------------------------------------


def _options(found: Timeline, menus: Sequence[Menu]) -> Iterator[list[Option]]:
    """What each call needs with each entry of its menu.

    What the call that was measured needed besides what its replay tells (buffers of kernels), it
    needs with every entry.
    """
    for call, own, menu in zip(found.calls, found.own, menus, strict=True):
        nothing = _needs_of(call.captured)
        known = Own(nothing.kept, nothing.forward, nothing.backward)
        lacks = Own(*(max(a - b, 0) for a, b in zip(own, known, strict=True)))
        yield [_option(e.needs, e.seconds, lacks) for e in menu.entries]


def _option(needs: Needs, seconds: float, lacks: Own = Own(0, 0, 0)) -> Option:  # noqa: B008
    return Option(
        needs.kept + lacks.kept,
        needs.outputs_kept,
        needs.forward + lacks.forward,
        needs.backward + lacks.kept + lacks.backward,
        needs.backward_alone + lacks.kept + lacks.backward,
        seconds,
    )


def _needs_of(captured: Captured) -> Needs:
    """What replays tell of what runs."""
    joint, choice = captured.program.joint, captured.program.choice
    here = are_here(costs_of(joint), joint)
    return Memory(joint, workspaces=here).needs(choice)


# --- what to say ----------------------------------------------------------------------------------


def _error(budget: int, eager_peak: int, found: Timeline, composition: Composition) -> BudgetError:
    """That no plan fits, with the least that does, and what is there at its peak."""
    least = composition.least()
    live = composition.live(least)
    peak = max(live)
    moment = composition.moments[live.index(peak)]
    kept = sum(composition.menus[c][least[c]].kept for c in moment.waiting)
    parts = [(moment.outside, f"what lies outside of the blocks{_at(moment.operation)}")]
    parts.append((kept, f"what {len(moment.waiting)} blocks keep"))
    if moment.phase != OUTSIDE:
        path = found.calls[moment.call].path
        own = peak - moment.outside - kept
        parts.append((own, f"what {path} needs while {moment.phase} runs"))
    shown = ", ".join(f"{name} ({readable(size)})" for size, name in sorted(parts, reverse=True))
    return BudgetError(
        f"no plan fits a budget of {readable(budget)} ({budget} bytes). The least that was found "
        f"is {readable(peak)} ({peak} bytes; the model as it is needs {readable(eager_peak)}). "
        f"There, these fill memory: {shown}. Give at least that much, or make the batch smaller"
    )


def _at(operation: str) -> str:
    return f", at {operation}," if operation else ""
