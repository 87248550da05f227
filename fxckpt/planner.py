"""A budget of bytes in, what to save out: the fastest plan that is found to fit.

The candidates are those of `search` and the simple strategies (all policies that have a name), so a
plan is never worse than these. Each is judged by its exact replay (see `memory`), and no plan is
given out whose replay needs more than the budget.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch.fx import Node

from fxckpt import ops, policies
from fxckpt.cost import Costs, profiled
from fxckpt.errors import BudgetError, PolicyError
from fxckpt.joint import Joint
from fxckpt.lean import lean
from fxckpt.levels import samples
from fxckpt.memory import Memory
from fxckpt.places import ROOT
from fxckpt.plans import Holding, Plan, Step, fingerprint
from fxckpt.quantities import parse_bytes, readable
from fxckpt.rates import DEVICES, Device, measured
from fxckpt.schedule import Choice
from fxckpt.search import Found, Search
from fxckpt.usual import STRATEGIES, Usual, usual

AnyDevice = Device | torch.device | str | None
_SECONDS_OF_REPLAY = 2e-6  # for each node of a graph, about
_SECONDS_OF_EXACT = 0.75  # for each exact solution, about
_PLANS_KEPT = 32  # for reports
_PARTS = 32  # see `Search.front`
_LITTLE = 1e-3  # of the peak, that a leaner graph may need more
_SHARE, _SHARE_OF_EXACT = 0.05, 0.2  # of the seconds for planning: replays, exact solutions


class Planner:
    """Makes plans for one joint graph; what it has found serves for all budgets.

    Args:
        joint: The graph.
        device: Where it runs: a `Device`, a name in `DEVICES`, a device to measure ("cuda"), or
            None to measure the device that the graph is on.
        profile: Whether to time each distinct operation there instead.
        seconds: What planning for one budget may take, about. It is translated into a number of
            steps, so that equal graphs get equal plans.
        between: See `Memory`.

    Attributes:
        joint: The graph that plans are made for: the one that was given, as a rule made lean.
        memory: Of that graph.
        seconds: What each forward operation takes.
        eager_peak: Bytes that live at most in the step of the model as it is.
        step_seconds: What forward and backward take if nothing runs again.
    """

    def __init__(
        self,
        joint: Joint,
        *,
        device: AnyDevice = None,
        profile: bool = False,
        seconds: float = 10.0,
        between: int = 0,
    ) -> None:
        costs = costs_of(joint, device, profile)
        here = are_here(costs, joint)
        self._given, self._costs = joint, costs
        self._eager = Memory(joint, workspaces=here, eager=True)
        self.eager_peak = self._eager.replay(self._eager.values).peak
        self.memory = self._leaner(here, between)
        self.joint = joint = self.memory.joint
        self.seconds = {n: costs.seconds(n) for n in joint.forward_nodes()}
        backward = sum(map(costs.seconds, joint.backward_nodes()))
        self.step_seconds = sum(self.seconds.values()) + backward
        one = _SECONDS_OF_REPLAY * max(len(joint.graph.nodes), 200)
        replays, exact = (
            max(int(_SHARE * seconds / one), 50),
            int(_SHARE_OF_EXACT * seconds / _SECONDS_OF_EXACT),
        )
        self._search = Search(self.memory, self.seconds, replays, exact)
        self._everything = self._search.consider(self.memory.values)
        self._search.consider(())
        for decide in policies.NAMES.values():
            try:
                self._search.consider(decide(joint))
            except PolicyError:
                continue  # it has no layers of this kind

    def _leaner(self, here: bool, between: int) -> Memory:
        """The memory of the graph made lean, as far as it does not need more for that.

        Two calls for a convolution may take more workspace than one. And where gradients are larger
        than activations, computing them first may cost more than it frees.
        """

        def of(joint: Joint) -> Memory:
            return Memory(joint, workspaces=here, between=between)

        graphs = [lean(self._given, degree) for degree in (1, 2)]
        memory = of(graphs[0])
        peak = memory.replay(memory.values).peak
        if len(graphs[1].graph.nodes) > len(graphs[0].graph.nodes):
            leanest = of(graphs[1])
            most = leanest.replay(leanest.values).peak
            if max(most - peak, leanest.fixed.peak - memory.fixed.peak) <= _LITTLE * peak:
                memory, peak = leanest, most
        if peak <= self.eager_peak:
            return memory
        plain = of(self._given)
        least, most = (plain.replay(saved).peak for saved in ((), plain.values))
        return plain if most < peak and least <= memory.replay(()).peak else memory

    def strategy(self, decide: Callable[[Joint], Collection[Node]]) -> tuple[int, float]:
        """What a policy comes to by itself, with none of what plans do besides.

        Args:
            decide: From the graph as it was given to what is saved.

        Returns:
            Bytes at the peak, and seconds of what runs again.
        """
        replay = self._eager.replay(decide(self._given))
        return replay.peak, math.fsum(self._costs.seconds(n) for n in replay.again)

    def usual(self) -> dict[str, Usual]:
        """What usual strategies come to as torch runs them, see `usual`."""
        found = {}
        for name in STRATEGIES:
            try:
                found[name] = usual(name, self._eager, self._given, self._costs.seconds)
            except PolicyError:
                continue  # it has no layers of this kind
        return found

    def peers(self) -> dict[str, tuple[int, float]]:
        """What these come to: bytes at the peak, and what runs again, of the step."""
        step = self.step_seconds
        return {n: (u.peak, u.seconds / step if step else 0.0) for n, u in self.usual().items()}

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

    def fits(self, budget: int) -> bool:
        """Whether a budget of bytes is enough for the plan that needs least."""
        found = self._search.best(budget)
        return found is not None or self._search.least.peak <= budget

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

    def choices(self, points: int) -> Iterator[tuple[Choice, float]]:
        """Decisions from the one that needs least to saving all, and what runs again, in seconds.

        Args:
            points: For how many budgets to look.
        """
        low, high = self._search.least.peak, self._everything.peak
        for i in range(points):
            self._search.look(low + (high - low) * i // points)
        for found in self._search.front(_PARTS):
            yield self._search.choice(found.decision), found.seconds

    def _plan(self, budget: int, found: Found) -> Plan:
        choice = self._search.choice(found.decision)
        replay = self.memory.replay(choice)
        # A plan is at most as good as the bound; where it is better by rounding, it is the bound.
        bound = min(self._search.bound(budget) or 0.0, found.seconds)
        forward = [*self.joint.forward_nodes()]
        return Plan(
            budget,
            found.peak,
            self.eager_peak,
            found.seconds,
            self.step_seconds,
            bound,
            self._costs.device.name,
            fingerprint(self._given),
            self.joint.lean,
            _names(forward, choice.saved),
            _names(forward, choice.transient),
            _names(forward, choice.fleeting),
            _names(forward, replay.recomputed),
            tuple(Step(m.node.name, _path(m.node), m.phase, m.live) for m in replay.moments),
            tuple(Holding(n.name, _path(n), size) for n, size in replay.at_peak()),
        )

    def _error(self, budget: int) -> BudgetError:
        least = self._search.least
        largest = self.memory.replay(self._search.choice(least.decision)).at_peak()[:5]
        values = ", ".join(
            f"{node.name} ({_path(node) or 'the root'}, {readable(size)})" for node, size in largest
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
    little as possible is saved. Under `vmap`, the budget is that of all samples together.

    Args:
        budget: See `fxckpt.rewrite`.
        seconds: For planning.
        profile: See `Planner`.

    Raises:
        BudgetError: if the budget is none. When called, if no plan fits.
    """

    def __init__(self, budget: Any, seconds: float, *, profile: bool = False) -> None:
        self.bytes_of, self.seconds, self.profile = parse_budget(budget), seconds, profile
        self._plans: OrderedDict[str, Plan] = OrderedDict()  # the latest, by graph

    def __call__(self, joint: Joint) -> Choice:
        """The values to save."""
        if joint.position != ROOT:
            return Choice(frozenset())
        planner, count = Planner(joint, profile=self.profile, seconds=self.seconds), samples()
        plan = planner.plan(self.bytes_of(count * planner.eager_peak) // count)
        self._plans[plan.graph] = plan
        if len(self._plans) > _PLANS_KEPT:
            self._plans.popitem(last=False)
        return plan.choice(planner.joint)

    def adapted(self, joint: Joint, choices: Sequence[Choice]) -> Choice:
        """What to save in a call of other sizes than those that some choices were made for.

        The fastest of these choices that fits the budget in this graph, or all values, if these
        fit; else what is planned anew.

        Args:
            joint: The graph, with the shapes of the call.
            choices: Decisions for the same operations.
        """
        costs = costs_of(joint)
        here = are_here(costs, joint)
        eager = Memory(joint, workspaces=here, eager=True)
        budget = self.bytes_of(eager.replay(eager.values).peak)
        degrees = {choice.joint.lean if choice.joint else 0 for choice in choices} | {1}
        memories = {d: Memory(lean(joint, d), workspaces=here) for d in degrees}
        everything = Choice(frozenset(memories[1].values), joint=memories[1].joint)
        fitting: list[tuple[float, int, Choice]] = []
        for i, choice in enumerate((*choices, everything)):
            memory = memories[choice.joint.lean if choice.joint else 0]
            replay = memory.replay(choice.of_graph(memory.joint))
            if replay.peak <= budget:
                fitting.append((math.fsum(map(costs.seconds, replay.again)), i, choice))
        return min(fitting)[2] if fitting else self(joint)

    def plan_of(self, joint: Joint) -> Plan | None:
        """The plan that was made for a graph, if it was one of the latest."""
        return self._plans.get(fingerprint(joint))


class AsPlanned:
    """Decides as a plan says; other graphs than its own get plans for the same budget.

    Args:
        plan: The plan.
        others: What decides on graphs that come after that of the plan, such as that of a last
            batch that is smaller.

    Raises:
        PolicyError: when called, if the plan was made for another graph than the first.
    """

    def __init__(self, plan: Plan, others: WithinBudget) -> None:
        self._plan, self._others, self._fits = plan, others, False

    def __call__(self, joint: Joint) -> Choice:
        """The values to save."""
        if self._plan.is_for(joint):
            self._fits = True
            return self._plan.choice(lean(joint, self._plan.lean))
        if not self._fits:
            raise PolicyError(
                "rewrite(..., plan=...): the plan was made for another graph: for another model, "
                "other shapes or dtypes of the arguments, another kind of device, another version "
                "of torch. Make one for this call with fxckpt.plan"
            )
        return self._others(joint)

    def adapted(self, joint: Joint, choices: Sequence[Choice]) -> Choice:
        """What to save in a call of other sizes, see `WithinBudget`."""
        if self._plan.is_for(joint):
            return self(joint)
        return self._others.adapted(joint, choices)

    def plan_of(self, joint: Joint) -> Plan | None:
        """The plan for a graph, see `WithinBudget`."""
        return self._plan if self._plan.is_for(joint) else self._others.plan_of(joint)


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
    size = parse_bytes(budget)
    if size is None:
        raise BudgetError(
            f"budget={budget!r}: expected a positive number of bytes (int), a string such as "
            "'8GiB' or '500MB', or a fraction of the step's peak (float, above 0, at most 1)"
        )
    fixed = size
    return lambda peak: fixed


def _path(node: Node) -> str:
    return str(node.meta.get("path") or "")


def costs_of(joint: Joint, device: AnyDevice = None, profile: bool = False) -> Costs:
    """The seconds of operations.

    Raises:
        BudgetError: if the device is not known, or not here although it has to be.
    """
    if device is None:
        device = device_of(joint)
    if isinstance(device, str):
        device = DEVICES.get(device) or _parsed(device)
    if isinstance(device, Device):
        if profile:
            raise BudgetError(
                f"device={device.name!r}, profile=True: operations are timed on a device that is "
                "here. Leave out one of the two"
            )
        return Costs(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BudgetError(
            f"device='{device}': no CUDA device is here to be measured. Say which one to plan for, "
            f"device= one of {', '.join(DEVICES)}"
        )
    return profiled(joint, device) if profile else Costs(measured(device))


def are_here(costs: Costs, joint: Joint) -> bool:
    """Whether costs are those of the device that a graph is on: then workspaces are known."""
    return costs.device.name == str(device_of(joint))


def _parsed(name: str) -> torch.device:
    try:
        return torch.device(name)
    except RuntimeError:
        names = ", ".join(DEVICES)
        raise BudgetError(f"device={name!r} is not known: the names are {names}") from None


def device_of(joint: Joint) -> torch.device:
    """The device that a graph is on."""
    # Not that of views: those that have several results may say nothing of them.
    own = (n for n in joint.forward_nodes() if n.meta.get("alias") is None)
    devices = [device for n in own if (device := ops.node_device(n)).type != "meta"]
    return devices[-1]


def _names(nodes: Collection[Node], some: Collection[Node]) -> tuple[str, ...]:
    return tuple(n.name for n in nodes if n in some)
