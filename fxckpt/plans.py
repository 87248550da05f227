"""A plan as plain data: what is saved, what that comes to, and for which graph it was made.

A plan names values and operations as the captured graph does, whose names are the same whenever the
same model is captured for the same call. The fingerprint of the graph says whether that is so: it
covers operations, arguments, shapes, strides, dtypes and kinds of device, and nothing that depends
on the process or the machine.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.fx import Node
from torch.fx.node import map_aggregate

from fxckpt import ops
from fxckpt.errors import PolicyError
from fxckpt.joint import Joint
from fxckpt.schedule import Choice
from fxckpt.symbols import plain

SCHEMA = 3


class Step(NamedTuple):
    """One operation that runs.

    Attributes:
        name: The operation, as in the graph.
        path: The module that runs it; empty for the root.
        phase: "forward", "recompute" or "backward".
        live: Bytes that exist while it runs.
    """

    name: str
    path: str
    phase: str
    live: int


class Holding(NamedTuple):
    """A value that exists at the peak: its name, the module that computes it, its bytes."""

    name: str
    path: str
    size: int


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
        device: The name of the device whose speed is assumed.
        graph: The fingerprint of the graph that the plan is for.
        lean: What was done to that graph for what runs, see `lean`.
        saved: The values that are saved, in forward order.
        transient: Those that are let go in between, see `schedule`.
        fleeting: Those of them that do not stay between their readers either.
        recomputed: The operations that run again, likewise.
        steps: What lives at every operation, in the order in which they run.
        at_peak: What lives at the peak, the largest first.
    """

    budget: int
    peak: int
    eager_peak: int
    seconds: float
    step_seconds: float
    bound: float
    device: str
    graph: str = dataclasses.field(repr=False)
    lean: int = dataclasses.field(repr=False)
    saved: tuple[str, ...] = dataclasses.field(repr=False)
    transient: tuple[str, ...] = dataclasses.field(repr=False)
    fleeting: tuple[str, ...] = dataclasses.field(repr=False)
    recomputed: tuple[str, ...] = dataclasses.field(repr=False)
    steps: tuple[Step, ...] = dataclasses.field(repr=False)
    at_peak: tuple[Holding, ...] = dataclasses.field(repr=False)

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

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the plan to a file, as JSON.

        Example:
            >>> import tempfile, torch, fxckpt
            >>> model = torch.nn.Sequential(*[torch.nn.Linear(64, 64), torch.nn.Tanh()] * 8)
            >>> found = fxckpt.plan(model, torch.ones(512, 64), budget=0.7, device="a100")
            >>> with tempfile.NamedTemporaryFile() as file:
            ...     found.save(file.name)
            ...     assert fxckpt.Plan.load(file.name) == found
        """
        content = {"schema": SCHEMA, "torch": torch.__version__, **dataclasses.asdict(self)}
        Path(path).write_text(json.dumps(content) + "\n")

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Plan:
        """Reads a plan that `save` wrote.

        Raises:
            PolicyError: if the file holds something else.
            OSError: if it cannot be read.
        """
        text = Path(path).read_text()
        try:
            content = json.loads(text)
        except ValueError:
            content = None
        if not isinstance(content, dict) or content.pop("schema", None) != SCHEMA:
            raise PolicyError(
                f"Plan.load({str(path)!r}): expected a plan of schema {SCHEMA} that Plan.save "
                "wrote, and this is none. Make it anew with fxckpt.plan"
            )
        content.pop("torch", None)
        try:
            return Plan(
                **{
                    **content,
                    "saved": tuple(content["saved"]),
                    "transient": tuple(content["transient"]),
                    "fleeting": tuple(content["fleeting"]),
                    "recomputed": tuple(content["recomputed"]),
                    "steps": tuple(Step(*each) for each in content["steps"]),
                    "at_peak": tuple(Holding(*each) for each in content["at_peak"]),
                }
            )
        except (KeyError, TypeError) as error:
            raise PolicyError(
                f"Plan.load({str(path)!r}): the plan is damaged ({error}). Make it anew with "
                "fxckpt.plan"
            ) from error

    def is_for(self, joint: Joint) -> bool:
        """Whether the plan was made for this graph."""
        return self.graph == fingerprint(joint)

    def choice(self, joint: Joint) -> Choice:
        """The decision on the graph that runs: see `lean`."""
        nodes = {n.name: n for n in joint.forward_nodes()}
        saved, transient, fleeting = (
            frozenset(map(nodes.__getitem__, names))
            for names in (self.saved, self.transient, self.fleeting)
        )
        return Choice(saved, transient, fleeting, joint)


def fingerprint(joint: Joint) -> str:
    """A digest of a graph, the same in every process and on every machine."""
    nodes = [
        (n.name, _target(n), map_aggregate((n.args, n.kwargs, n.meta.get("val")), _described))
        for n in joint.graph.nodes
        if n.op != "output"
    ]
    roles = (joint.cotangents, joint.outputs, [*joint.writes.items()], [*joint.grads.items()])
    return hashlib.sha256(repr((nodes, roles)).encode()).hexdigest()


def _target(node: Node) -> str:
    return str(node.target) if node.op == "placeholder" else str(ops.operation(node))


def _described(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.stride(), value.dtype, value.device.type
    return value.type if isinstance(value, torch.device) else plain(value)
