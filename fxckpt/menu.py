"""Decisions on one block, of which a plan for a whole step chooses: more kept, or more run again.

What counts in a step is what a block keeps while the others run, and what it needs on top of that
while it runs itself. A plan for the block alone knows nothing of the others. So plans are made for
a step in which something else needs memory between its forward and its backward: nothing, half as
much as the block itself, or so much that what is kept decides.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from fxckpt.errors import BudgetError
from fxckpt.joint import Joint
from fxckpt.memory import Memory
from fxckpt.planner import Planner, are_here, costs_of
from fxckpt.programs import Program
from fxckpt.replay import Needs
from fxckpt.schedule import Choice
from fxckpt.tape import BackwardKey

_LINES = ((64.0, 4), (0.5, 2), (0.0, 2))  # what others need, of the block's peak; budgets


@dataclasses.dataclass(frozen=True, eq=False)
class Entry:
    """A decision on the block.

    Attributes:
        given: The joint graph of the block.
        choice: What is saved.
        needs: Bytes.
        seconds: Of what runs again.
        programs: What is compiled for it; one for all blocks that look the same.
    """

    given: Joint
    choice: Choice
    needs: Needs
    seconds: float
    programs: dict[BackwardKey, Program] = dataclasses.field(default_factory=dict)

    def __call__(self, joint: Joint) -> Choice:
        """What is saved.

        Raises:
            BudgetError: if this is the graph of another backward.
        """
        if joint is not self.given:
            raise BudgetError("a plan is for the backward that was measured")
        return self.choice


class Menu:
    """The decisions on one block that no other one is better than in every respect.

    Attributes:
        joint: The graph of the block.
        entries: The decisions, the fastest first.
        eager: What it needs as it is.
        seconds: What forward and backward take if nothing runs again.

    Args:
        joint: The graph.
        profile: See `Planner`.
        seconds: For planning, about.
    """

    def __init__(self, joint: Joint, *, profile: bool, seconds: float) -> None:
        self.joint = joint
        here = are_here(costs_of(joint), joint)
        eager = Memory(joint, workspaces=here, eager=True)
        self.eager = eager.needs(eager.values)
        self.seconds = 0.0
        each = seconds / sum(count for _, count in _LINES)
        found: list[Entry] = []
        for share, count in _LINES:
            between = int(share * max(self.eager))
            planner = Planner(joint, profile=profile, seconds=each, between=between)
            self.seconds = planner.step_seconds
            memories: dict[int, Memory] = {}
            for choice, again in planner.choices(count):
                graph = choice.joint or joint
                if graph.lean not in memories:
                    memories[graph.lean] = Memory(graph, workspaces=here)
                found.append(Entry(joint, choice, memories[graph.lean].needs(choice), again))
        self.entries = [*_front(found)]


def _front(entries: list[Entry]) -> Iterator[Entry]:
    """Those that none of the others is at least as good as in every respect."""
    kept: list[Entry] = []
    for entry in sorted(entries, key=lambda e: (e.seconds, e.needs)):
        if not any(all(a <= b for a, b in zip(k.needs, entry.needs, strict=True)) for k in kept):
            kept.append(entry)
            yield entry
