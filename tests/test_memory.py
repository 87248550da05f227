"""Replays of decisions agree, byte for byte, with what the emitted graphs hold while they run.

The reference runs the graphs on real tensors, one node after the other, and adds up the storages of
all variables that the generated code would still have. It shares no code with `fxckpt.memory`.
"""

import dataclasses
import gc
import itertools
import timeit
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from operator import getitem
from typing import Any

import pytest
import torch
from helpers import (
    MODELS,
    Function,
    build_step,
    captures,
    decided,
    joint_of,
    random_choice,
    tensors_in,
    train,
)
from hypothesis import example, given
from hypothesis import strategies as st
from test_random_models import instructions, make_program
from test_random_models import run as run_program
from torch import Tensor, nn
from torch.autograd.profiler import profile
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg
from torch.nn import functional as F

import fxckpt
from bench.models import build
from fxckpt import delivery, kernels, ledger, memory, ops, programs, workspace
from fxckpt.policies import resolve

aten = torch.ops.aten
STATE = torch.get_rng_state().nbytes
REDRAWS = (ops.with_rng_state, ops.inplace_with_rng_state)


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
                states = 2 * STATE * (node.target in REDRAWS)  # to be put back, and left
                live.append(states + sum(s for key, s in alive.items() if key not in there))
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
        self._primals: list[Tensor] = []
        self._there: set[int] = set()
        self._outputs: list[Tensor] = []

    def run(
        self, program: programs.Program, key: Any, graph: Any, values: list[Any], sizes: Any
    ) -> Any:
        program.tried.add((key, sizes))
        with programs._as_recorded():
            if key is None:
                return self._run_forward(program, graph, values)
            held = [*self._outputs, *values[-len(program.joint.cotangents) :]]
            self.graph = graph
            results, self.backward = interpret(graph.graph, values, self._there, held)
            return results

    def _run_forward(self, program: programs.Program, graph: Any, values: list[Any]) -> Any:
        self._primals = list(values)  # which would free their addresses for others if they died
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
    watch, original = Watch(), programs.Program.run
    programs.Program.run = lambda self, *args: watch.run(self, *args)
    try:
        yield watch
    finally:
        programs.Program.run = original


def assert_agrees(watch: Watch, model: nn.Module, decide: Any) -> None:
    """The latest run of a model held what a replay says."""
    joint = joint_of(model)
    replay = memory.replay(joint, decide(joint))
    found = {
        "forward": [m.live for m in replay.moments if m.phase == "forward"],
        "backward": [m.live for m in replay.moments if m.phase != "forward"],
    }
    assert found["forward"] == watch.forward
    if watch.graph is captures(model)[-1].program.split.backward:  # not one for other cotangents
        assert found["backward"] == watch.backward
        assert replay.peak == max(watch.forward + watch.backward)


@pytest.fixture(autouse=True, scope="module")
def without_workspaces() -> Iterator[None]:
    """The reference does not look into kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ledger, "workspace", lambda node: 0)
        patch.setattr(memory, "delivery", lambda joint: 0)
        yield


@pytest.mark.parametrize(
    ("name", "policy"), [*itertools.product(MODELS, ("everything", "nothing", "dots", "block"))]
)
def test_models(name: str, policy: str) -> None:
    case = build(name, tiny=True)
    model = fxckpt.rewrite(case.model, policy, strict=True)
    with watched() as watch:
        train(model, build_step(case), steps=2)
        assert_agrees(watch, model, resolve(policy))


@pytest.mark.parametrize("share", [0, 2])
@pytest.mark.parametrize("name", MODELS)
def test_random_decisions(name: str, share: int) -> None:
    case = build(name, tiny=True)
    decide = random_choice(3, share)
    model = decided(case.model, decide)
    with watched() as watch:
        train(model, build_step(case), steps=2)
        assert_agrees(watch, model, decide)


@given(
    code=instructions,
    kind=st.sampled_from(["plain", "leaf", "transposed"]),
    seed=st.integers(0, 9),
    share=st.integers(0, 4),
)
@example(code=[("loss", 0, 0, 0)], kind="leaf", seed=0, share=0)  # larger than it looks
@example(code=[("fill_new", 0, 1, 0), ("batch_norm", 2, 0, 2)], kind="plain", seed=0, share=0)
@example(code=[("rrelu", 0, 0, 0), ("leaky_relu", 0, 0, 0)], kind="plain", seed=0, share=0)
@example(code=[("conv", 0, 0, 1), ("dropout_in_place", 0, 0, 0)], kind="leaf", seed=0, share=0)
def test_random_programs(code: list[Any], kind: str, seed: int, share: int) -> None:
    decide = random_choice(seed, share)
    model = decided(make_program(code, 4), decide)
    with watched() as watch:
        try:
            run_program(model, kind, 3, 4)
        except (RuntimeError, fxckpt.CaptureError):
            return  # eager raises too: see `test_random_models`
    if watch.forward:  # else there was nothing to save, and the model ran as it is
        assert_agrees(watch, model, decide)


# --- against the allocator ------------------------------------------------------------------------

REAL: dict[str, dict[str, Any]] = {
    "gpt2": {"layers": 2, "width": 128, "vocab": 1024},
    "vit": {"layers": 2},
    "resnet": {"layers": 10},
    "unet": {"layers": 2, "width": 16, "image": 48},
}


@pytest.fixture
def with_workspaces(monkeypatch: pytest.MonkeyPatch) -> None:
    """The allocator sees what kernels take."""
    monkeypatch.setattr(ledger, "workspace", workspace.workspace)
    monkeypatch.setattr(memory, "delivery", delivery.delivery)


def allocation_peak(case: Any, batch: Any) -> int:
    """The most that the allocator has handed out at any moment of one step."""
    return most_allocated(lambda: case.loss(case.model(**batch)).backward())


def most_allocated(work: Callable[[], Any]) -> int:
    """The most that the allocator has handed out at any moment."""
    with profile(profile_memory=True) as profiler:
        kept = work()
    del kept
    events = sorted(profiler.kineto_results.events(), key=lambda event: event.start_ns())
    return max(itertools.accumulate(e.nbytes() for e in events if e.name() == "[memory]"))


@pytest.mark.parametrize("policy", ["everything", "nothing", "dots"])
@pytest.mark.parametrize("name", REAL)
def test_real_allocations(name: str, policy: str, with_workspaces: None) -> None:
    case = build(name, **REAL[name])
    case = dataclasses.replace(case, model=fxckpt.rewrite(case.model, policy, strict=True))
    train(case.model, build_step(case), steps=2)
    case.model.zero_grad()
    gc.collect()
    peak = allocation_peak(case, case.batch(0))
    joint = joint_of(case.model)
    replay = memory.Memory(joint, outputs_held=False).replay(resolve(policy)(joint))
    assert replay.peak == pytest.approx(peak, rel=0.01)


class Gated(nn.Module):
    """Takes most memory where a product is differentiated by both of its factors."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 256), nn.Linear(64, 256)

    def forward(self, x: Tensor) -> Tensor:
        return (self.a(x).sin() * self.b(x).exp())[:, :8].sum()


def peaks_of_eager(model: nn.Module, x: Tensor) -> tuple[int, int, Any]:
    """The peak of eager as a replay has it, and as it is; and the moment."""
    new = fxckpt.rewrite(model, "everything", strict=True, example_inputs=(x,))
    eager = memory.Memory(joint_of(new), outputs_held=False, eager=True)
    replay = eager.replay(eager.values)
    most = max(replay.moments, key=lambda moment: moment.live)
    return replay.peak, most_allocated(lambda: model(x).backward()), most


def test_functions_hold_what_they_work_on_until_they_are_done(with_workspaces: None) -> None:
    planned, measured, most = peaks_of_eager(Gated(), torch.linspace(-1, 1, 64 * 64).view(64, 64))
    assert planned == pytest.approx(measured, rel=0.001)
    assert (most.node.target, most.phase) == (aten.mul.Tensor, "backward")


class Selecting(nn.Module):
    """Takes most memory where gradients of the same size are added up."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 64)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.linear(x)
        return sum((rows[i].sin() for i in range(4)), rows[5]).sum()


class Viewing(nn.Module):
    """Takes most memory where a gradient is added to a view, which is not done in place."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 256)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return (y * 2).sum() + (y.view(-1) * 3).sum()


class Multiplying(Viewing):
    """Would take most memory where a gradient is added up if factors of a product were there."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return (y * self.linear(x * 2)).sum() + y.t().sin().sum()


@pytest.mark.parametrize("cls", [Selecting, Viewing, Multiplying])
def test_eager_adds_gradients_up_in_place_unless_they_are_views(
    cls: type[nn.Module], with_workspaces: None
) -> None:
    planned, measured, _ = peaks_of_eager(cls(), torch.linspace(-1, 1, 400).view(100, 4))
    assert planned == pytest.approx(measured, rel=0.001)


OPERANDS = torch.ones(64, 8), torch.ones(8, 36)
LARGER_THAN_IT_LOOKS: dict[str, Callable[[Tensor], Tensor]] = {
    "binary cross-entropy": lambda y: F.binary_cross_entropy(y.sigmoid(), y.detach().sigmoid()),
    "mean squared error": lambda y: F.mse_loss(y, y.detach() * 2),
    "smooth": lambda y: F.smooth_l1_loss(y, y.detach() * 2),
    "soft margin": lambda y: F.soft_margin_loss(y, y.detach().sign()),
    "patches": lambda y: F.fold(y[None], 13, 8).sin().sum(),  # that overlap
    "patches, spread": lambda y: F.fold(y[None], 16, 1, stride=3).sin().sum(),
}


@pytest.mark.parametrize("name", LARGER_THAN_IT_LOOKS)
def test_results_that_are_larger_than_they_look(name: str) -> None:
    function = LARGER_THAN_IT_LOOKS[name]
    joint = joint_graph(lambda m, x, w: function(x @ m.weight @ w), *OPERANDS)
    larger = [n for n in joint.forward_nodes() if workspace.oversized(n) is not None]
    assert len(larger) == 1
    real = kernels.call_of(larger[0])()
    assert real.untyped_storage().nbytes() == ledger.allocated_for_result(larger[0], real)


class Drawing(nn.Module):
    """Takes most memory where dropout runs again."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.linear(x).sin()).square().sum()


def test_states_of_the_generator_while_it_draws_again(with_workspaces: None) -> None:
    model = fxckpt.rewrite(Drawing(), "nothing", strict=True)
    x = torch.linspace(-1, 1, 64 * 64).view(64, 64)
    for _ in range(2):
        model(x).backward()
    model.zero_grad()
    peak = most_allocated(lambda: model(x).backward())
    joint = joint_of(model)
    replay = memory.Memory(joint, outputs_held=False).replay(())
    assert replay.peak == pytest.approx(peak, rel=0.002)
    most = max(replay.moments, key=lambda moment: moment.live)
    assert ops.node_is_random(most.node)
    assert most.phase == "recompute"


# Batch, channels in and out, size, kernel, stride, whether transposed, dtype.
CONVOLUTIONS = [
    (16, 32, 96, 24, 1, 1, False, torch.float32),  # of pixels: a batch of 16 makes a difference
    (4, 32, 96, 24, 1, 1, False, torch.float32),
    (4, 32, 96, 48, 1, 2, False, torch.float32),
    (4, 32, 96, 24, 3, 1, False, torch.float32),
    (4, 96, 32, 24, 3, 2, False, torch.float32),
    (1, 32, 96, 16, 3, 1, False, torch.float32),  # so little that it becomes a matrix product
    (4, 48, 32, 24, 2, 2, True, torch.float32),
    (4, 32, 96, 24, 3, 1, False, torch.float64),
    (4, 48, 32, 24, 2, 2, True, torch.float64),
]
MASKS = [None, (True, True, False), (False, True, False), (True, False, False)]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_workspaces_of_convolutions(case: Any, mask: Any) -> None:
    """Forward, and backward by the input and by the weight, where the input may be imitated."""
    count, ins, outs, size, kernel, stride, transposed, dtype = case
    x = torch.ones(count, ins, size, size, dtype=dtype)
    weight = torch.ones((ins, outs) if transposed else (outs, ins), dtype=dtype)
    weight = weight[..., None, None].expand(-1, -1, kernel, kernel).contiguous()
    padding = 0 if transposed else kernel // 2
    options = ([stride] * 2, [padding] * 2, [1] * 2, transposed, [0] * 2, 1)
    op, args = aten.convolution.default, (x, weight, None, *options)
    if mask is not None:
        blank = torch.empty_strided(x.shape, [0] * 4, dtype=dtype)
        gradient = torch.ones_like(op(*args))
        op = aten.convolution_backward.default
        args = (gradient, x if mask[1] else blank, weight, [outs], *options, list(mask))
    graph = make_fx(lambda *tensors: op(*tensors, *args[len(tensors) :]), tracing_mode="fake")(
        *args[: 2 if mask is None else 3]
    )
    node = next(n for n in graph.graph.nodes if n.target is op)
    made = sum(t.nbytes for t in tensors_in([node.meta["val"]]))
    op(*args)
    assert kernels.workspace(node) is None  # it is not of a model
    assert made + workspace.workspace(node) == pytest.approx(
        most_allocated(lambda: op(*args)), rel=0.05
    )


KERNELS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "layer norm of transposed": lambda m, x: F.layer_norm((x @ m.weight).mT, x.shape[-2:-1]),
    "softmax of transposed": lambda m, x: (x @ m.weight).mT.softmax(-1),
    "roll": lambda m, x: (x @ m.weight).roll((1, 2), (1, 2)),
    "upsample": lambda m, x: F.interpolate((x @ m.weight)[:, None, ::2], scale_factor=2.0),
    "narrow convolution": lambda m, x: F.conv1d(
        (x @ m.weight).view(-1, 1, 64), m.weight[:3, None, :5]
    ),
    "attention": lambda m, x: F.scaled_dot_product_attention(x[None] @ m.weight, x[None], x[None]),
    "max pool": lambda m, x: F.max_pool2d((x @ m.weight)[:, None].mT, 3),
    "half precision": lambda m, x: (x.bfloat16() @ m.weight.bfloat16()).exp() @ x.bfloat16().mT,
    "expanded": lambda m, x: (x @ m.weight).sum().expand(64, 64) * m.weight,
    "losses": lambda m, x: F.binary_cross_entropy_with_logits(x @ m.weight, x.sigmoid()),
    "prefix sums": lambda m, x: (x @ m.weight).mT.cumsum(1).logsumexp(0),
    "sorted": lambda m, x: (x @ m.weight).mT.sort(1).values,
    "in place": lambda m, x: (x @ m.weight).index_put_((torch.tensor([1, 1, 0]),), x[:3], True),
}


@pytest.mark.parametrize("name", KERNELS)
def test_what_kernels_take_is_measured(name: str, with_workspaces: None) -> None:
    """The peak is that of the allocator, whatever the kernel and the layout."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return KERNELS[name](m, x).float().square().mean()

    torch.manual_seed(0)
    model, x = Function(forward, 64), torch.randn(16, 64, 64)
    new = fxckpt.rewrite(model, "everything", strict=True)
    for _ in range(2):
        new(x).backward()
    new.zero_grad()
    peak = most_allocated(lambda: new(x).backward())
    joint = joint_of(new)
    planned = memory.Memory(joint, outputs_held=False).replay(resolve("everything")(joint)).peak
    assert planned == pytest.approx(peak, rel=0.002)


def test_what_kernels_take_is_not_measured_while_the_program_profiles() -> None:
    """Nor is that remembered."""
    joint = joint_graph(lambda m, x: (x @ m.weight).mT.softmax(-1), torch.ones(3, 7, 8))
    node = next(n for n in joint.forward_nodes() if "softmax" in n.name)
    with profile():
        assert kernels.workspace(node) is None
    assert kernels.workspace(node) == 3 * 7 * 8 * 4


@pytest.mark.parametrize("layers", [1, 2])
def test_recurrent_layers_keep_bytes_for_themselves(layers: int, with_workspaces: None) -> None:
    """How many is known to the kernel alone, and backward cannot run on any others."""
    model, x = nn.LSTM(16, 16, layers, batch_first=True), torch.randn(4, 50, 16)
    first = fxckpt.plan(model, x, budget=1.0)
    new = fxckpt.rewrite(model, budget=1.0, strict=True)
    measured = []
    for each in (new, new, model):
        each.zero_grad()
        measured.append(most_allocated(lambda each=each: each(x)[0].sum().backward()))
    report = fxckpt.explain(new)
    assert [report.peak, report.eager_peak] == pytest.approx(measured[1:], rel=0.01)
    assert fxckpt.plan(model, x, budget=1.0, profile=True).eager_peak == first.eager_peak


class Parameters(nn.Module):
    """Two parameters that are larger than what is computed with them."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.ones(256, 128)), nn.Parameter(torch.ones(256, 128))
        self.function = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x).sum()


DELIVERED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "as they are": lambda m, x: (x @ m.a).tanh() + x @ m.b,
    "transposed": lambda m, x: m.a.t().exp() @ x.t() + (x @ m.b).t(),
    "to two parameters": lambda m, x: (x @ (m.a + m.b)).exp(),
    "expanded": lambda m, x: (x @ m.a).exp().sum() + m.b.sum(),
    "in parts": lambda m, x: x @ m.a + (x @ torch.cat([m.b[:128], m.b[128:] * 2])).exp(),
    "to be added up": lambda m, x: (x @ m.a).tanh() + x @ m.b + x @ (m.a + 1),
    "to be added up, views": lambda m, x: F.linear(F.linear(x, m.a.t()).tanh(), m.a),
    "to be added up, of one product": lambda m, x: (x[:1] @ torch.cat([m.a, m.a], 1)).exp(),
    "to be added up, shared": lambda m, x: (
        x[:1] @ m.a + x[:1] @ (m.a + m.b.view(128, 256).view(256, 128))
    ),
    "of one product": lambda m, x: (x @ torch.cat([m.a, m.b], 1)).exp(),
}


@pytest.mark.parametrize("name", DELIVERED)
def test_copies_of_gradients(name: str, with_workspaces: None) -> None:
    """Autograd keeps a gradient, or a copy if its layout or owner is another one."""
    model, x = Parameters(DELIVERED[name]), torch.ones(4, 256)
    new = fxckpt.rewrite(model, budget=1.0, strict=True)
    measured = []
    for each in (new, new, model):
        each.zero_grad()
        measured.append(most_allocated(lambda each=each: each(x).backward()))
    report = fxckpt.explain(new)
    assert [report.peak, report.eager_peak] == pytest.approx(measured[1:], rel=0.01)


def test_sums_of_gradients_are_made_one_after_the_other() -> None:
    def tied(m: Any, x: Tensor) -> Tensor:
        pairs = (F.linear(F.linear(x, weight.t()).tanh(), weight) for weight in (m.a, m.b))
        return sum(pairs, x)

    model, x = Parameters(tied), torch.ones(4, 256)
    joint = joint_of(fxckpt.rewrite(model, "nothing", strict=True, example_inputs=(x,)))
    assert [len(joint.grads[name]) for name in "ab"] == [2, 2]
    assert delivery.delivery(joint) == model.a.nbytes  # each new one makes room for the next


# --- what a planner reads -------------------------------------------------------------------------


def joint_graph(function: Any, *args: Tensor) -> Any:
    """The joint graph of a function of (module, *args)."""
    model = Function(function, 8)
    return joint_of(fxckpt.rewrite(model, "nothing", strict=True, example_inputs=args))


def named(nodes: Iterable[Node]) -> list[str]:
    return [node.name for node in nodes]


def test_recomputing_takes_roots_and_no_primals() -> None:
    def forward(m: Function, x: Tensor) -> Tensor:
        y = (x @ m.weight).exp()
        return (y.t() @ F.layer_norm(y, (8,)) + x.t() @ y).sin()

    known = memory.Memory(joint_graph(forward, torch.randn(8, 8)))
    inputs = {node.name: named(read) for node, read in known.inputs_of.items()}
    assert inputs["exp"] == ["mm"]
    assert inputs["mm"] == []
    assert inputs["native_layer_norm"] == ["exp"]
    assert inputs["mm_1"] == ["exp", "getitem"]
    assert inputs["mm_2"] == ["exp"]
    assert named(known.values) == "mm exp getitem getitem_1 getitem_2 mm_1 mm_2 add sin".split()
    needed = {node.name: named(read) for node, read in known.needed_by.items()}
    assert needed["cos"] == ["add"]
    assert needed["native_layer_norm_backward"] == ["exp", "getitem_1", "getitem_2"]


def test_outputs_cost_nothing_to_save() -> None:
    joint = joint_graph(lambda m, x: (x @ m.weight).exp(), torch.randn(8, 8))
    held, dropped = memory.Memory(joint), memory.Memory(joint, outputs_held=False)
    assert [held.cost[n] for n in held.values] == [256, 0]
    assert [dropped.cost[n] for n in dropped.values] == [256, 256]


def test_operations_with_several_results_run_again_as_one() -> None:
    joint = joint_graph(lambda m, x: F.layer_norm(x @ m.weight, (8,)).sin(), torch.randn(8, 8))
    replay = memory.replay(joint, ())
    assert {n.name for n in replay.recomputed} == {"mm", "native_layer_norm"}
    assert [m.phase for m in replay.moments].count("recompute") == 2


def test_peak_names_what_is_alive() -> None:
    joint = joint_graph(lambda m, x: (x @ m.weight).exp().sin(), torch.randn(8, 8))
    replay = memory.replay(joint, {value.node for value in joint.values()})
    alive = replay.at_peak()
    assert sum(size for _, size in alive) == replay.peak
    assert "exp" in named(node for node, _ in alive)
    assert replay.saved == 256  # what sin and exp are differentiated by: the same value


def test_fixed_bytes_are_a_lower_bound() -> None:
    case = build("gpt2", tiny=True)
    model = fxckpt.rewrite(case.model, "nothing", strict=True, example_inputs=case.batch(0))
    joint = joint_of(model)
    known = memory.Memory(joint)
    for policy in ("everything", "nothing", "dots"):
        replay = known.replay(resolve(policy)(joint))
        live = {(m.node, m.phase): m.live for m in replay.moments if m.phase != "recompute"}
        assert all(m.live <= live[m.node, m.phase] for m in known.fixed.moments)
    assert [m.node for m in known.fixed.moments if m.phase == "backward"] == [*known.needed_by]


def test_cuda_rounds_up() -> None:
    assert ledger.rounded(1, torch.device("cuda")) == 512
    assert ledger.rounded(1024, torch.device("cuda")) == 1024
    assert ledger.rounded(1, torch.device("cpu")) == 1


def test_replay_is_fast() -> None:
    case = build("gpt2", layers=12, width=16, heads=2, batch=1, seq=8, vocab=32)
    model = fxckpt.rewrite(case.model, "nothing", strict=True, example_inputs=case.batch(0))
    known = memory.Memory(joint_of(model))
    saved = known.values[::2]
    assert min(timeit.repeat(lambda: known.replay(saved), number=1, repeat=5)) < 0.1
