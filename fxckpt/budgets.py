"""A budget as what decides: from a joint graph to the values that it saves, as a policy does."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from fxckpt.errors import BudgetError, PolicyError
from fxckpt.joint import Joint
from fxckpt.lean import Lean, lean
from fxckpt.levels import samples
from fxckpt.memory import Memory
from fxckpt.places import ROOT
from fxckpt.planner import Planner, are_here, costs_of
from fxckpt.plans import Plan, fingerprint
from fxckpt.quantities import parse_bytes
from fxckpt.schedule import Choice

_PLANS_KEPT = 32  # for reports


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
        return plan.choice(planner.graph_of(plan))

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
        graphs = {choice.joint.lean if choice.joint else 0 for choice in choices} | {Lean.CHEAP}
        memories = {what: Memory(lean(joint, what), workspaces=here) for what in graphs}
        cheap = memories[Lean.CHEAP]
        everything = Choice(frozenset(cheap.values), joint=cheap.joint)
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
