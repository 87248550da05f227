"""A budget of bytes in, what to save out: the fastest plan that is found to fit.

The candidates are those of `search` and the simple strategies (all policies that have a name), so a
plan is never worse than these. Each is judged by its exact replay (see `memory`), and no plan is
given out whose replay needs more than the budget.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch.fx import Node

from fxckpt import ops, policies
from fxckpt.cost import DEVICES, Costs, Device, measured
from fxckpt.errors import BudgetError, PolicyError
from fxckpt.joint import Joint
from fxckpt.lean import lean
from fxckpt.memory import Memory
from fxckpt.places import ROOT
from fxckpt.replay import Replay
from fxckpt.schedule import Choice
from fxckpt.search import Found, Search

_UNITS = {"": 1, "K": 1, "M": 2, "G": 3, "T": 4}
_SECONDS_OF_REPLAY = 5e-6  # for each node of a graph, about
_SHARE = 0.3  # of the seconds for planning that replays for one budget may take


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to save, and what that comes to.

    Attributes:
        budget: Bytes that were given.
        peak: Bytes that live at most, by the replay, above what was there when forward was called.
        eager_peak: Likewise if all is saved.
        seconds: What runs again takes, by the cost model.
        step_seconds: What forward and backward take without that.
        bound: Seconds that every plan within the budget takes at least.
        saved: The values that are saved, and those that are let go.
        replay: The bytes at every moment.
    """

    budget: int
    peak: int
    eager_peak: int
    seconds: float
    step_seconds: float
    bound: float
    saved: Choice = dataclasses.field(repr=False)
    replay: Replay = dataclasses.field(repr=False)

    @property
    def overhead(self) -> float:
        """What runs again, relative to the step."""
        return self.seconds / self.step_seconds if self.step_seconds else 0.0

    @property
    def gap(self) -> float:
        """How far from the bound the plan is, relative to the bound; 0 is optimal."""
        if self.seconds <= self.bound:
            return 0.0
        return self.seconds / self.bound - 1 if self.bound else float("inf")


class Planner:
    """Makes plans for one joint graph; what it has found serves for all budgets.

    Args:
        joint: The graph.
        device: Where it runs: a `Device`, a name in `DEVICES`, or None to measure the device that
            the graph is on.
        seconds: What planning for one budget may take, about. It is translated into a number of
            steps, so that equal graphs get equal plans.

    Attributes:
        joint: The graph that plans are made for, see `lean`.
        memory: Of that graph.
        seconds: What each forward operation takes.
        eager_peak: Bytes that live at most in the step of the model as it is.
    """

    def __init__(
        self, joint: Joint, *, device: Device | str | None = None, seconds: float = 10.0
    ) -> None:
        costs = Costs(_device(device, joint))
        here = costs.device.name == str(_device_of(joint))
        self._given, self._costs = joint, costs
        self._eager = Memory(joint, workspaces=here, eager=True)
        self.eager_peak = self._eager.replay(self._eager.values).peak
        self.joint = joint = lean(joint)
        self.memory = Memory(joint, workspaces=here)
        self.seconds = {n: costs.seconds(n) for n in joint.forward_nodes()}
        backward = sum(map(costs.seconds, joint.backward_nodes()))
        self._step_seconds = sum(self.seconds.values()) + backward
        one = _SECONDS_OF_REPLAY * max(len(joint.graph.nodes), 200)
        self._search = Search(self.memory, self.seconds, max(int(_SHARE * seconds / one), 50))
        self._everything = self._search.consider(self.memory.values)
        self._search.consider(())
        for decide in policies.NAMES.values():
            try:
                self._search.consider(decide(joint))
            except PolicyError:
                continue  # it has no layers of this kind

    def strategy(self, decide: Callable[[Joint], Collection[Node]]) -> tuple[int, float]:
        """What a strategy comes to by itself, with none of what plans do besides.

        Args:
            decide: From the graph as it was given to what is saved.

        Returns:
            Bytes at the peak, and seconds of what runs again.
        """
        replay = self._eager.replay(decide(self._given))
        return replay.peak, math.fsum(self._costs.seconds(n) for n in replay.again)

    def plan(self, budget: int) -> Plan:
        """The fastest plan within a budget of bytes that is found.

        Raises:
            BudgetError: if none is found.
        """
        if self.memory.fixed.peak <= budget < self._everything.peak:
            self._search.look(budget)
        found = self._search.best(budget)
        if found is None:
            raise self._error(budget)
        return self._plan(budget, found)

    def least(self) -> Plan:
        """The plan that needs least of those that are found."""
        found = self._search.least
        return self._plan(found.peak, found)

    def frontier(self, points: int = 12) -> list[Plan]:
        """Plans for budgets from the least to the peak of eager, slowest first."""
        low, high = self.least().peak, self.eager_peak
        budgets = [low + (high - low) * i // max(points - 1, 1) for i in range(points)]
        for budget in budgets[:-1]:
            self._search.look(budget)
        return [self._plan(b, f) for b in budgets if (f := self._search.best(b)) is not None]

    def _plan(self, budget: int, found: Found) -> Plan:
        choice = self._search.choice(found.decision)
        # A plan is at most as good as the bound; where it is better by rounding, it is the bound.
        bound = min(self._search.bound(budget) or 0.0, found.seconds)
        return Plan(
            budget,
            found.peak,
            self.eager_peak,
            found.seconds,
            self._step_seconds,
            bound,
            choice,
            self.memory.replay(choice),
        )

    def _error(self, budget: int) -> BudgetError:
        least = self._search.least
        largest = self.memory.replay(self._search.choice(least.decision)).at_peak()[:5]
        values = ", ".join(
            f"{node.name} ({node.meta.get('path') or 'the root'}, {readable(size)})"
            for node, size in largest
        )
        return BudgetError(
            f"no plan fits a budget of {readable(budget)} ({budget} bytes). The least that was "
            f"found is {readable(least.peak)} ({least.peak} bytes; the model as it is needs "
            f"{readable(self.eager_peak)}). There, these values fill memory: {values}. Give at "
            "least that much, or make the batch smaller"
        )


class WithinBudget:
    """Decides what to save by a budget, as a policy does: from a joint graph to the values.

    Parts of a model that cannot be captured as a whole have no budget of their own: of them, as
    little as possible is saved.

    Args:
        budget: See `fxckpt.rewrite`.
        seconds: For planning.

    Raises:
        BudgetError: if the budget is none. When called, if no plan fits.
    """

    def __init__(self, budget: Any, seconds: float) -> None:
        self._bytes_of, self._seconds = parse_budget(budget), seconds

    def __call__(self, joint: Joint) -> Choice:
        """The values to save."""
        if joint.position != ROOT:
            return Choice(frozenset())
        planner = Planner(joint, seconds=self._seconds)
        saved = planner.plan(self._bytes_of(planner.eager_peak)).saved
        return dataclasses.replace(saved, joint=planner.joint)


def parse_budget(budget: Any) -> Callable[[int], int]:
    """From the peak of the model as it is to the bytes that a budget means.

    Args:
        budget: Bytes, `"8GiB"` or `"500 MB"`, or a float: a fraction of the peak.

    Raises:
        BudgetError: if it is none of these.

    Example:
        >>> parse_budget("1.5 KiB")(0), parse_budget("2MB")(0), parse_budget(0.5)(100)
        (1536, 2000000, 50)
    """
    if isinstance(budget, float) and 0 < budget <= 1:
        fraction = budget
        return lambda peak: int(fraction * peak)
    size = budget if isinstance(budget, int) and not isinstance(budget, bool) else None
    if isinstance(budget, str):
        found = re.fullmatch(r"\s*([0-9.]+)\s*([kKMGT]?)(i?)B?\s*", budget)
        if found and found[1].count(".") <= 1 and found[1] != ".":
            unit = _UNITS[found[2].upper()] if found[2] else 0
            size = int(float(found[1]) * (1024 if found[3] else 1000) ** unit)
    if size is None or size <= 0:
        raise BudgetError(
            f"budget={budget!r}: expected a positive number of bytes (int), a string such as "
            "'8GiB' or '500MB', or a fraction of the step's peak (float, above 0, at most 1)"
        )
    fixed = size
    return lambda peak: fixed


def readable(size: int) -> str:
    """Bytes with a unit.

    Example:
        >>> readable(1536), readable(3 * 2**30)
        ('1.5 KiB', '3 GiB')
    """
    amount, unit = float(size), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if amount < 1024:
            break
        amount, unit = amount / 1024, larger
    return f"{amount:.4g} {unit}"


def _device(device: Device | str | None, joint: Joint) -> Device:
    if isinstance(device, Device):
        return device
    if device is None:
        return measured(_device_of(joint))
    if device not in DEVICES:
        names = ", ".join(DEVICES)
        raise BudgetError(f"device={device!r} is not known: the names are {names}")
    return DEVICES[device]


def _device_of(joint: Joint) -> torch.device:
    nodes = [n for n in joint.forward_nodes() if ops.node_device(n).type != "meta"]
    return ops.node_device(nodes[-1])
