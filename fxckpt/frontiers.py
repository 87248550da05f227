"""`Frontier`: the curve of memory and time of a model, beside what usual strategies come to."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any, overload

from fxckpt import plotting
from fxckpt.plans import Plan
from fxckpt.plotting import Spot


@dataclasses.dataclass(frozen=True)
class Frontier(Sequence[Plan]):
    """Plans by growing budget.

    Attributes:
        plans: These.
        peers: What usual strategies come to, by name: bytes at the peak, and what runs again
            relative to the step.
        beside: For each of these, the plan in its memory, if it needs less than the step as it is
            and there is one.
    """

    plans: tuple[Plan, ...]
    peers: Mapping[str, Spot]
    beside: Mapping[str, Plan]

    @overload
    def __getitem__(self, index: int) -> Plan: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Plan, ...]: ...

    def __getitem__(self, index: int | slice) -> Plan | tuple[Plan, ...]:
        """The plan at a place."""
        return self.plans[index]

    def __len__(self) -> int:
        """How many there are."""
        return len(self.plans)

    def to_dict(self) -> dict[str, Any]:
        """What can be drawn, as numbers, strings, lists and dictionaries."""
        return {
            "eager_peak": self[-1].eager_peak,
            "step_seconds": self[-1].step_seconds,
            "device": self[-1].device,
            "points": [
                {"budget": p.budget, "peak": p.peak, "overhead": p.overhead, "bound": p.bound}
                for p in self
            ],
            "peers": {name: spot._asdict() for name, spot in self.peers.items()},
            "beside": {name: plan.overhead for name, plan in self.beside.items()},
        }

    def plot(self, path: str | os.PathLike[str], chosen: Plan | None = None) -> None:
        """Draws the curve, the strategies and a plan that was chosen to a file.

        Args:
            path: Of the picture: ".png", ".svg" or what matplotlib writes.
            chosen: A plan to show on the curve.

        Raises:
            FxckptError: if matplotlib is not installed.
        """
        plotting.plot_frontier(
            [Spot(plan.peak, plan.overhead) for plan in (*self, *self.beside.values())],
            self.peers,
            path,
            eager_peak=self[-1].eager_peak,
            device=self[-1].device,
            chosen=None if chosen is None else Spot(chosen.peak, chosen.overhead),
        )
