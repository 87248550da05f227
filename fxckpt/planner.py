"""A budget of bytes in, what to save out: the fastest plan that is found to fit.

The candidates are those of `search` and the simple strategies (all policies that have a name), so a
plan is never worse than these. Each is judged by its exact replay (see `memory`), and no plan is
given out whose replay needs more than the budget.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator

import torch
from torch.fx import Node

from fxckpt import ops, policies
from fxckpt.cost import Costs, profiled
from fxckpt.errors import BudgetError, PolicyError
from fxckpt.joint import Joint
from fxckpt.lean import Lean, lean
from fxckpt.memory import Memory
from fxckpt.plans import Holding, Plan, Step, fingerprint
from fxckpt.pool import Found
from fxckpt.quantities import readable
from fxckpt.rates import DEVICES, Device, measured
from fxckpt.schedule import Choice
from fxckpt.search import Search
from fxckpt.slices import what_waits
from fxckpt.usual import STRATEGIES, Usual, usual

AnyDevice = Device | torch.device | str | None
_SECONDS_OF_REPLAY = 2e-6  # for each node of a graph, about
_ENTRIES = 9_000  # for each second, of matrices that whole numbers are looked for in
_PARTS = 32  # see `Search.front`
_LITTLE = 1e-3  # of the peak, that a leaner graph may need more
_BEHIND = 1.1  # times what is best: how far a graph may be behind another one
_SHARE = 0.075  # of the seconds for planning: replays of one way to look


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
        memory: Of the graph that plans are made for: the one that was given, as a rule made lean.
            Where that can help, there is a second one, see `slices`.
        seconds: What each forward operation of the first takes.
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
        self._given, self._costs, self._here, self._between = joint, costs, here, between
        self._eager = Memory(joint, workspaces=here, eager=True)
        self.eager_peak = self._eager.replay(self._eager.values).peak
        self.memory = self._leaner()
        self.seconds = self._forward(self.memory.joint)
        self._backward_seconds = self._backward(self.memory.joint)
        self.step_seconds = sum(self.seconds.values()) + self._backward_seconds
        memories = [*self._memories()]
        self._searches = [self._searched(memory, seconds / len(memories)) for memory in memories]

    def _memories(self) -> Iterator[Memory]:
        """Those of the graphs that plans are made for: of the ordinary one first."""
        yield self.memory
        joint = self.memory.joint
        if joint.lean and next(what_waits(joint), None) is not None:
            yield self._memory(lean(self._given, joint.lean | Lean.SLICES))

    def _memory(self, joint: Joint) -> Memory:
        return Memory(joint, workspaces=self._here, between=self._between)

    def _forward(self, joint: Joint) -> dict[Node, float]:
        return {n: self._costs.seconds(n) for n in joint.forward_nodes()}

    def _backward(self, joint: Joint) -> float:
        return sum(map(self._costs.seconds, joint.backward_nodes()))

    def _searched(self, memory: Memory, seconds: float) -> Search:
        """A search in one of the graphs that knows the simple strategies."""
        joint, ordinary = memory.joint, self.memory.joint
        one = _SECONDS_OF_REPLAY * max(len(joint.graph.nodes), 50)
        search = Search(
            memory,
            self.seconds if joint is ordinary else self._forward(joint),
            replays=max(int(_SHARE * seconds / one), 50),
            entries=int(_ENTRIES * seconds),
            more=self._backward(joint) - self._backward_seconds if joint is not ordinary else 0.0,
        )
        search.consider(memory.values)
        search.consider(())
        for decide in policies.NAMES.values():
            try:
                search.consider(decide(joint))
            except PolicyError:
                continue  # it has no layers of this kind
        return search

    def _leaner(self) -> Memory:
        """The memory of the graph made lean, as far as it does not need more for that.

        Two calls for a convolution may take more workspace than one. And where gradients are larger
        than activations, computing them first may cost more than it frees.
        """
        graphs = [lean(self._given, what) for what in (Lean.CHEAP, Lean.CHEAP | Lean.TWO_CALLS)]
        memory = self._memory(graphs[0])
        peak = memory.replay(memory.values).peak
        if len(graphs[1].graph.nodes) > len(graphs[0].graph.nodes):
            leanest = self._memory(graphs[1])
            most = leanest.replay(leanest.values).peak
            if max(most - peak, leanest.fixed.peak - memory.fixed.peak) <= _LITTLE * peak:
                memory, peak = leanest, most
        if peak <= self.eager_peak:
            return memory
        plain = self._memory(self._given)
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
        self._look(budget)
        if self._best(budget) is None:
            self._least()  # which may be what fits
        found = self._best(budget)
        if found is None:
            raise self._error(budget)
        return self._plan(budget, *found)

    def graph_of(self, plan: Plan) -> Joint:
        """The graph that a plan of this planner is for: one that was made lean, see `lean`."""
        return next(s.memory.joint for s in self._searches if s.memory.joint.lean == plan.lean)

    def fits(self, budget: int) -> bool:
        """Whether a budget of bytes is enough for the plan that needs least."""
        return self._best(budget) is not None or any(
            search.least.peak <= budget for search in self._searches
        )

    def least(self) -> Plan:
        """The plan that needs least of those that are found."""
        search, found = self._least()
        return self._plan(found.peak, search, found)

    def frontier(self, points: int = 12) -> list[Plan]:
        """Plans for budgets from the least to the peak of eager, slowest first."""
        low, high = self._least()[1].peak, self.eager_peak
        budgets = [low + (high - low) * i // max(points - 1, 1) for i in range(points)]
        for budget in budgets:
            self._look(budget)
        return [self._plan(b, *found) for b in budgets if (found := self._best(b)) is not None]

    def choices(self, points: int) -> Iterator[tuple[Choice, float]]:
        """Decisions from the one that needs least to saving all, and what runs again, in seconds.

        Args:
            points: For how many budgets to look.
        """
        low, high = self._least()[1].peak, self.memory.replay(self.memory.values).peak
        for i in range(points):
            self._look(low + (high - low) * i // points)
        for search in self._searches:
            for found in search.pool.front(_PARTS):
                yield self._choice(search, found), found.seconds

    def _look(self, budget: int) -> None:
        """Looks for plans in each graph, as long as what is found there is not far behind."""
        looks = {search: search.look(budget) for search in self._searches}
        while looks:
            looks = {s: look for s, look in looks.items() if next(look, s) is not s}
            best = self._best(budget)
            if best is not None and not best[0].is_poor(budget):
                most = _BEHIND * best[1].seconds
                looks = {s: look for s, look in looks.items() if not s.is_behind(most, budget)}

    def _best(self, budget: int) -> tuple[Search, Found] | None:
        found = [
            (search, f) for search in self._searches if (f := search.pool.best(budget)) is not None
        ]
        return min(found, key=lambda each: (each[1].seconds, each[1].peak), default=None)

    def _least(self) -> tuple[Search, Found]:
        found = [(search, search.least) for search in self._searches]
        return min(found, key=lambda each: (each[1].peak, each[1].seconds))

    def _choice(self, search: Search, found: Found) -> Choice:
        choice = search.pool.choice(found.decision)
        return dataclasses.replace(choice, joint=search.memory.joint)

    def _plan(self, budget: int, search: Search, found: Found) -> Plan:
        choice = self._choice(search, found)
        replay = search.memory.replay(choice)
        bounds = [b for each in self._searches if (b := each.bound(budget)) is not None]
        # A plan is at most as good as the bound; where it is better by rounding, it is the bound.
        bound = min(*bounds, found.seconds) if bounds else 0.0
        forward = [*search.memory.joint.forward_nodes()]
        return Plan(
            budget,
            found.peak,
            self.eager_peak,
            found.seconds,
            self.step_seconds,
            bound,
            self._costs.device.name,
            fingerprint(self._given),
            search.memory.joint.lean,
            _names(forward, choice.saved),
            _names(forward, choice.transient),
            _names(forward, choice.fleeting),
            _names(forward, replay.recomputed),
            tuple(Step(m.node.name, _path(m.node), m.phase, m.live) for m in replay.moments),
            tuple(Holding(n.name, _path(n), size) for n, size in replay.at_peak()),
        )

    def _error(self, budget: int) -> BudgetError:
        search, least = self._least()
        largest = search.memory.replay(self._choice(search, least)).at_peak()[:5]
        values = ", ".join(
            f"{node.name} ({_path(node) or 'the root'}, {readable(size)})" for node, size in largest
        )
        return BudgetError(
            f"no plan fits a budget of {readable(budget)} ({budget} bytes). The least that was "
            f"found is {readable(least.peak)} ({least.peak} bytes; the model as it is needs "
            f"{readable(self.eager_peak)}). There, these values fill memory: {values}. Give at "
            "least that much, or make the batch smaller"
        )


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
    # Not that of views: those that have several results may say nothing of them. Checks have none.
    made = (n for n in joint.forward_nodes() if n.meta["val"] is not None)
    own = (n for n in made if n.meta.get("alias") is None)
    devices = [device for n in own if (device := ops.node_device(n)).type != "meta"]
    return devices[-1]


def _names(nodes: Collection[Node], some: Collection[Node]) -> tuple[str, ...]:
    return tuple(n.name for n in nodes if n in some)
