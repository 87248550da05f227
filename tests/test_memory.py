"""Replays of decisions agree, byte for byte, with what the emitted graphs hold while they run.

The reference runs the graphs on real tensors, one node after the other, and adds up the storages of
all variables that the generated code would still have. It shares no code with `fxckpt.memory`.
"""

import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from operator import getitem
from typing import Any

import pytest
import torch
from helpers import MODELS, build_step, captures, joint_of, tensors_in, train
from hypothesis import given
from hypothesis import strategies as st
from test_random_models import instructions, make_program, random_policy
from test_random_models import run as run_program
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.fx.node import map_arg

import fxckpt
from bench.models import build
from fxckpt import memory, ops, runtime
from fxckpt.policies import resolve

aten = torch.ops.aten
STATE = torch.get_rng_state().nbytes


# --- the reference --------------------------------------------------------------------------------


def storages(values: Iterable[Any]) -> dict[int, int]:
    """Address and size of every storage under `values`."""
    found = [t.untyped_storage() for t in tensors_in(list(values))]
    return {s._cdata: s.nbytes() for s in found}


def is_operation(node: Node) -> bool:
    """Whether a node is more than a view, and more than the copy that ends a forward graph."""
    views = (getitem, aten._unsafe_view.default)
    if node.target in views or node.meta.get("alias") is not None:
        return False
    return node.target is not aten.copy_.default or "phase" in node.meta


def interpret(graph: Graph, args: list[Any], there: set[int], held: list[Any]) -> tuple[Any, list]:
    """Results, and the bytes that live at each operation.

    Args:
        graph: What to run.
        args: Its arguments.
        there: Storages that do not count.
        held: Values that live all the time.
    """
    env = dict(zip((n for n in graph.nodes if n.op == "placeholder"), args, strict=True))
    args.clear()
    waiting = {n: set(n.users) for n in graph.nodes}
    live = []
    for node in graph.nodes:
        if node.op == "call_function":
            values = map_arg((node.args, node.kwargs), env.__getitem__)
            env[node] = node.target(*values[0], **values[1])
            if is_operation(node):
                alive = storages([*env.values(), *held])
                live.append(sum(size for key, size in alive.items() if key not in there))
            for read in (*node.all_input_nodes, node):
                waiting[read].discard(node)
                if not waiting[read]:
                    del env[read]
    return map_arg(graph.output_node().args[0], env.__getitem__), live


class Watch:
    """Runs the graphs of rewritten modules by `interpret`."""

    def __init__(self) -> None:
        self.forward: list[int] = []
        self.backward: list[int] = []
        self.graph: Any = None  # of the latest backward
        self._there: set[int] = set()
        self._outputs: list[Tensor] = []

    def run(self, program: runtime.Program, key: Any, graph: Any, values: list[Any]) -> Any:
        program.untried.discard(key)
        with runtime._as_recorded():
            if key is None:
                return self._run_forward(program, graph, values)
            held = [*self._outputs, *values[-len(program.joint.cotangents) :]]
            self.graph = graph
            results, self.backward = interpret(graph.graph, values, self._there, held)
            return results

    def _run_forward(self, program: runtime.Program, graph: Any, values: list[Any]) -> Any:
        self._there = set(storages(values))
        besides = sum(values[i].nbytes for i in program.fragile)
        joint = program.joint
        besides += STATE * any(ops.node_is_random(n) for n in joint.forward_nodes())
        results, live = interpret(graph.graph, values, self._there, [])
        self._outputs = list(results[: len(joint.outputs)])
        self.forward = [size + besides for size in live]
        return results


@contextmanager
def watched() -> Iterator[Watch]:
    """Graphs run inside are watched."""
    watch, original = Watch(), runtime.Program.run
    runtime.Program.run = lambda self, *args: watch.run(self, *args)
    try:
        yield watch
    finally:
        runtime.Program.run = original


def assert_agrees(watch: Watch, model: nn.Module, policy: Any) -> None:
    """The latest run of a model held what a replay says."""
    joint = joint_of(model)
    replay = memory.replay(joint, resolve(policy)(joint))
    found = {
        "forward": [m.live for m in replay.moments if m.phase == "forward"],
        "backward": [m.live for m in replay.moments if m.phase != "forward"],
    }
    assert found["forward"] == watch.forward
    if watch.graph is captures(model)[-1].program.split.backward:  # not one for other cotangents
        assert found["backward"] == watch.backward
        assert replay.peak == max(watch.forward + watch.backward)


@pytest.mark.parametrize(
    ("name", "policy"), [*itertools.product(MODELS, ("everything", "nothing", "dots", "block"))]
)
def test_models(name: str, policy: str) -> None:
    case = build(name, tiny=True)
    model = fxckpt.rewrite(case.model, policy, strict=True)
    with watched() as watch:
        train(model, build_step(case), steps=2)
        assert_agrees(watch, model, policy)


@pytest.mark.parametrize("name", MODELS)
def test_random_decisions(name: str) -> None:
    case = build(name, tiny=True)
    policy = random_policy(3, 2)
    model = fxckpt.rewrite(case.model, policy, strict=True)
    with watched() as watch:
        train(model, build_step(case), steps=2)
        assert_agrees(watch, model, policy)


@given(
    code=instructions,
    kind=st.sampled_from(["plain", "leaf", "transposed"]),
    seed=st.integers(0, 9),
    share=st.integers(0, 4),
)
def test_random_programs(code: list[Any], kind: str, seed: int, share: int) -> None:
    policy = random_policy(seed, share)
    model = fxckpt.rewrite(make_program(code, 4), policy, strict=True)
    with watched() as watch:
        try:
            run_program(model, kind, 3, 4)
        except (RuntimeError, fxckpt.CaptureError):
            return  # eager raises too: see `test_random_models`
        assert_agrees(watch, model, policy)
