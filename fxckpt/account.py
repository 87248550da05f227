"""What a training step comes to in memory and time, as plain data: what reports and pictures show.

All bytes but those of `parameters` are what comes on top of the memory in use when forward is
called, as in budgets. Seconds are those of the cost model (see `cost`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

# What live bytes are (see `replay.KINDS`), as they lie on each other in pictures, with colours that
# the colour-blind can tell apart: Okabe and Ito, "Color Universal Design", 2008.
COLOURS = {
    "parameters": "#999999",
    "gradients": "#009E73",
    "outputs": "#CC79A7",
    "saved": "#0072B2",
    "recomputed": "#E69F00",
    "temporary": "#56B4E9",
    "outside": "#F0E442",  # of what was captured, if that are blocks
}
BEFORE, LIMIT = "#000000", "#D55E00"  # the step as it is, and the budget
KINDS = tuple(COLOURS)[1:]

# Of the step as it is, when activations are not what fills memory; and of a plan's own peak.
_FEW_ACTIVATIONS, _MOSTLY_ONE_OPERATION = 0.3, 0.6


class Row(NamedTuple):
    """A value that forward computes.

    Attributes:
        name: Its name in the printed graphs.
        action: "saved", "recomputed", "output" (held by the caller), or "freed": backward does not
            read it.
        bytes: Of its storage; of what is saved, what that adds to the bytes that are saved.
        shape: Its shape.
        dtype: Its element type, such as "float32".
        path: The module that computes it; empty for the root.
        op: The operation, such as "aten.mm".
        source: The user's source line, "model.py:31"; empty if there is none.
        seconds: What its operation takes; of what is recomputed, all the times that it runs again.
            Of several results of one operation, the first has them.
        times: How often its operation runs again.
        reason: Why that is done with it.
    """

    name: str
    action: str
    bytes: int
    shape: tuple[int, ...]
    dtype: str
    path: str
    op: str
    source: str
    seconds: float
    times: int
    reason: str


class Moment(NamedTuple):
    """One operation that runs.

    Attributes:
        name: Its name in the printed graphs.
        path: The module that runs it.
        op: The operation.
        source: The user's source line.
        phase: "forward", "recompute" or "backward".
        seconds: When it starts.
        live: Bytes that exist while it runs.
        kinds: What these are: bytes of each of `KINDS`.
    """

    name: str
    path: str
    op: str
    source: str
    phase: str
    seconds: float
    live: int
    kinds: tuple[int, ...]


class Holding(NamedTuple):
    """What lives at the peak: a value, the module that computes it, its kind and its bytes."""

    name: str
    path: str
    kind: str
    bytes: int


class Input(NamedTuple):
    """A tensor among the arguments of the call."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Account:
    """What a step comes to.

    Attributes:
        title: What is trained: the name of its class, or of the function.
        how: What decided: 'policy="dots"', "budget 8 GiB", "as it is".
        inputs: The tensors among the arguments.
        device: The device whose speed is assumed.
        placed: The device that the tensors are on.
        parameters: Bytes of parameters and buffers, which are there before the step.
        budget: Bytes that the step may hold; None without a budget.
        saved: Bytes that forward hands to backward.
        eager_saved: Likewise of the step as it is.
        seconds: What runs again takes.
        step_seconds: What forward and backward take without that.
        bound: Seconds that every plan within the budget takes at least; None without a budget.
        measured: Bytes at the peak of a step that was run for that; None if none was.
        allocated: The most that was allocated on the CUDA device so far; None on others.
        captures: How often the model was captured so far, if one capture is to serve many sizes
            (`rewrite(dynamic=True)`); else None.
        before: The operations of the step as it is. Empty if the model runs in parts; of blocks
            within a budget, forward and backward of each, and what runs between them.
        after: Those of the step that is explained.
        at_peak: What lives at the peak, the largest first.
        rows: A row a value, in the order of forward.
        warnings: What one should know.
        units: What is captured at once, and why.
    """

    title: str
    how: str
    inputs: tuple[Input, ...]
    device: str
    placed: str
    parameters: int
    budget: int | None
    saved: int
    eager_saved: int
    seconds: float
    step_seconds: float
    bound: float | None
    measured: int | None
    allocated: int | None
    captures: int | None
    before: tuple[Moment, ...] = dataclasses.field(repr=False)
    after: tuple[Moment, ...] = dataclasses.field(repr=False)
    at_peak: tuple[Holding, ...] = dataclasses.field(repr=False)
    rows: tuple[Row, ...] = dataclasses.field(repr=False)
    warnings: tuple[str, ...]
    units: str = ""

    @property
    def peak(self) -> int | None:
        """Bytes that live at most; None if the model runs in parts."""
        return max((m.live for m in self.after), default=None)

    @property
    def eager_peak(self) -> int | None:
        """Likewise of the step as it is."""
        return max((m.live for m in self.before), default=None)

    @property
    def overhead(self) -> float:
        """What runs again, relative to the step."""
        return self.seconds / self.step_seconds if self.step_seconds else 0.0

    @property
    def gap(self) -> float | None:
        """How far from the bound the plan is, relative to the bound; None without a budget."""
        if self.bound is None:
            return None
        if self.seconds <= self.bound:
            return 0.0
        return self.seconds / self.bound - 1 if self.bound else float("inf")

    @property
    def rewritten(self) -> bool:
        """Whether this is another step than the one as it is."""
        return self.how != AS_IT_IS

    @property
    def kinds(self) -> list[str]:
        """Those of `KINDS` that matter here."""
        there = any(m.kinds[-1] for m in (*self.before, *self.after))
        return [kind for kind in KINDS if kind != "outside" or there]

    @property
    def shown_rows(self) -> list[Row]:
        """The rows of what backward reads."""
        return [row for row in self.rows if row.action in ("saved", "recomputed")]

    def split(self, *, eager: bool = False) -> dict[str, int]:
        """What the bytes at the peak are: those of each of `KINDS`."""
        moment = highest(self.before if eager else self.after)
        return dict(zip(KINDS, moment.kinds, strict=True)) if moment else {}

    def to_dict(self) -> dict[str, Any]:
        """All of it as numbers, strings, lists and dictionaries, for `json`."""
        plain = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("before", "after", "at_peak", "rows", "inputs", "warnings")
        }
        derived = {
            "peak": self.peak,
            "eager_peak": self.eager_peak,
            "overhead": self.overhead,
            "gap": self.gap if self.gap != float("inf") else None,
            "split": self.split(),
            "eager_split": self.split(eager=True),
        }
        return {
            **plain,
            **derived,
            "inputs": _records(self.inputs),
            "warnings": [*self.warnings],
            "at_peak": _records(self.at_peak),
            "rows": _records(self.rows),
            "before": _columns(self.before),
            "after": _columns(self.after),
        }


AS_IT_IS = "as it is"


def highest(moments: Sequence[Moment]) -> Moment | None:
    """The first of the moments at which most lives."""
    return max(moments, key=lambda m: m.live, default=None)


def warnings_about(split: Mapping[str, int], eager_split: Mapping[str, int], how: str) -> list[str]:
    """What to tell about the peaks of a step and of the step as it is."""
    found = []
    eager, peak = sum(eager_split.values()), sum(split.values())
    activations = eager_split["saved"] + eager_split["recomputed"]
    if eager and activations < _FEW_ACTIVATIONS * eager:
        rest = {k: v for k, v in eager_split.items() if k not in ("saved", "recomputed")}
        largest = max(rest, key=rest.__getitem__)
        found.append(
            f"activations are not what fills memory: of the peak of the step as it is, they are "
            f"{activations / eager:.0%}, {_NAMES[largest]} {rest[largest] / eager:.0%}. "
            "Recomputation cannot lower that"
        )
    elif how != AS_IT_IS and peak and split["temporary"] > _MOSTLY_ONE_OPERATION * peak:
        found.append(
            f"what single operations need while they run is {split['temporary'] / peak:.0%} of the "
            "peak. Recomputing more will not lower it; smaller batches, or losses over parts of "
            "the batch, do"
        )
    if how != AS_IT_IS and eager and peak >= eager:
        found.append(
            "the peak is not lower than that of the step as it is: what is recomputed is there at "
            "the peak again, or was not there"
        )
    return found


_NAMES = {
    "gradients": "gradients",
    "outputs": "outputs and their gradients",
    "temporary": "what single operations need while they run",
}


def _records(entries: Sequence[Any]) -> list[dict[str, Any]]:
    return [
        {k: [*v] if isinstance(v, tuple) else v for k, v in entry._asdict().items()}
        for entry in entries
    ]


def _columns(moments: Sequence[Moment]) -> dict[str, list[Any]]:
    """The moments by attribute; in place of `kinds`, each of `KINDS`."""
    fields = Moment._fields[:-1]
    columns: dict[str, list[Any]] = {f: [getattr(m, f) for m in moments] for f in fields}
    return {**columns, **{kind: [m.kinds[i] for m in moments] for i, kind in enumerate(KINDS)}}
