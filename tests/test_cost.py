"""Seconds of operations: the roofline model, devices, and timings."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Function, joint_of
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, Node
from torch.nn import functional as F

import fxckpt
from bench.models import build
from fxckpt import cost, ops, rates
from fxckpt.cost import Costs, bytes_moved, profiled
from fxckpt.joint import Joint
from fxckpt.kernels import signature
from fxckpt.rates import DEVICES, Device, measured
from fxckpt.symbols import Size

aten = torch.ops.aten
CPU = torch.device("cpu")
# One second for each operation, or each ten bytes.
SLOW = Device("slow", {torch.float32: 1.0, torch.bfloat16: 2.0}, 10.0, 0.25)


def joint_graph(function: Any, *args: Tensor) -> Joint:
    """The joint graph of a function of (module, *args)."""
    model = Function(function)
    return joint_of(fxckpt.rewrite(model, "nothing", strict=True, example_inputs=args))


def operations(joint: Joint) -> dict[str, Node]:
    return {n.name: n for n in (*joint.forward_nodes(), *joint.backward_nodes())}


def node_of(op: Any, *vals: Tensor) -> Node:
    """A node that runs an operation on fake tensors."""
    graph = Graph()
    inputs = [graph.placeholder(f"x{i}") for i in range(len(vals))]
    for node, val in zip(inputs, vals, strict=True):
        node.meta["val"] = val
    node = graph.call_function(op, tuple(inputs))
    node.meta["val"] = op(*vals)
    return node


# --- the model ------------------------------------------------------------------------------------


def test_products_count_operations_and_the_rest_bytes() -> None:
    nodes = operations(joint_graph(lambda m, x: (x @ m.weight).sin(), torch.randn(2, 4)))
    costs = Costs(SLOW)
    assert costs.flops(nodes["mm"]) == 2 * 2 * 4 * 4
    assert costs.seconds(nodes["mm"]) == 64 + 0.25
    assert costs.flops(nodes["sin"]) == 0
    assert bytes_moved(nodes["sin"]) == 2 * 2 * 4 * 4
    assert costs.seconds(nodes["sin"]) == 6.4 + 0.25


def test_half_precision_is_faster() -> None:
    costs = Costs(SLOW)
    seconds = [
        costs.seconds(node_of(aten.mm.default, *[torch.ones(64, 64, dtype=dtype)] * 2))
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert seconds == pytest.approx([2 * 64**3 + 0.25, 64**3 + 0.25])


def test_views_and_blanks_are_free() -> None:
    def forward(m: Function, x: Tensor) -> Tensor:
        y = F.dropout(x @ m.weight, 0.3)
        return y.t().contiguous()

    costs, nodes = Costs(SLOW), operations(joint_graph(forward, torch.randn(2, 4)))
    free = {name for name, node in nodes.items() if not costs.seconds(node)}
    assert {"t", "empty_strided"} <= free
    assert "mm" not in free
    assert "bernoulli_" not in free


def test_products_convolutions_and_attention_have_operations_in_both_directions() -> None:
    def forward(m: Function, x: Tensor, q: Tensor, image: Tensor) -> Tensor:
        kernel = m.weight.view(2, 2, 2, 2)
        a = F.scaled_dot_product_attention(q * m.weight[0, 0], q, q)
        return (x @ m.weight).sum() + a.sum() + F.conv2d(image, kernel).sum()

    images = torch.randn(1, 2, 4, 4, requires_grad=True)
    joint = joint_graph(forward, torch.randn(3, 4), torch.randn(1, 1, 8, 8), images)
    counted = {name for name, node in operations(joint).items() if Costs(SLOW).flops(node)}
    assert counted == {
        "mm",
        "mm_1",
        "convolution",
        "convolution_backward",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention_for_cpu_backward",
    }


@pytest.mark.parametrize("name", DEVICES)
def test_known_devices(name: str) -> None:
    with FakeTensorMode():
        big = torch.empty(4096, 4096, device="cuda", dtype=torch.float16)
        product, sine = node_of(aten.mm.default, big, big), node_of(aten.sin.default, big)
    costs = Costs(DEVICES[name])
    assert costs.seconds(product) > costs.seconds(sine) > costs.device.launch
    assert costs.seconds(product) == pytest.approx(
        2 * 4096**3 / DEVICES[name].rate(torch.float16) + DEVICES[name].launch
    )


# --- measuring ------------------------------------------------------------------------------------


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty folder for rates, in a process that has measured nothing."""
    monkeypatch.setenv("FXCKPT_CACHE_DIR", str(tmp_path / "rates"))
    measured.cache_clear()
    yield tmp_path / "rates"
    measured.cache_clear()


def never(*_: object) -> float:
    raise AssertionError("measured again")


def test_this_device_is_measured_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = measured(CPU)
    assert measured(CPU) is device
    assert 1e9 < device.rate(torch.float32) < 1e14
    assert 1e8 < device.bandwidth < 1e13
    assert 1e-8 < device.launch < 1e-3
    measured.cache_clear()  # as in another process
    monkeypatch.setattr(rates, "seconds_of", never)
    assert measured(CPU) == device
    assert [path.name for path in folder.iterdir()] == ["rates.json"]


def test_rates_of_other_threads_are_others(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured(CPU)
    measured.cache_clear()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1000)
    monkeypatch.setattr(rates, "seconds_of", lambda *_: 1.0)
    assert measured(CPU).launch == 0.01
    assert len(json.loads((folder / "rates.json").read_text())) == 2


@pytest.mark.parametrize("damage", ["{", "[]", '{"x": 1}'])
def test_a_damaged_file_is_measured_anew(
    folder: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    folder.mkdir()
    (folder / "rates.json").write_text(damage)
    monkeypatch.setattr(rates, "seconds_of", lambda *_: 1.0)
    assert measured(CPU).launch == 0.01
    measured.cache_clear()
    monkeypatch.setattr(rates, "seconds_of", never)
    assert measured(CPU).launch == 0.01


def test_rates_that_cannot_be_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.write_text("a file where the folder would be")
    monkeypatch.setattr(rates, "seconds_of", lambda *_: 1.0)
    assert measured(CPU).launch == 0.01


def test_signatures_tell_work_apart() -> None:
    def forward(m: Function, x: Tensor) -> Tensor:
        return ((x @ m.weight) @ m.weight).sin().sin().sum(0).sin()

    nodes = operations(joint_graph(forward, torch.randn(2, 4)))
    assert signature(nodes["mm"]) == signature(nodes["mm_1"])
    assert signature(nodes["sin"]) == signature(nodes["sin_1"])
    assert signature(nodes["sin"]) != signature(nodes["sin_2"])
    assert signature(nodes["sin"]) != signature(nodes["cos"])


def test_signatures_tell_sizes_apart_that_one_expression_stands_for() -> None:
    def resampled(size: int) -> Node:
        graph = Graph()
        x = graph.placeholder("x")
        x.meta["val"] = torch.ones(1, 1, 4)
        return graph.call_function(aten.upsample_nearest1d.default, (x, [Size(size, "s0")]))

    assert signature(resampled(4)) == signature(resampled(4)) != signature(resampled(8))


def test_profile_times_every_operation_of_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    case = build("gpt2", tiny=True)
    model = fxckpt.rewrite(case.model, "nothing", strict=True, example_inputs=case.batch(0))
    state = torch.get_rng_state()
    joint = joint_of(model)
    costs = profiled(joint, CPU)
    assert torch.equal(state, torch.get_rng_state())
    nodes = [n for n in operations(joint).values() if costs.seconds(n)]
    missing = {n.name for n in nodes if signature(n) not in costs._known}
    assert missing == set()


def test_profile_leaves_to_the_model_what_does_not_run() -> None:
    joint = joint_graph(lambda m, x: torch.linalg.cholesky(x @ m.weight * 0), torch.eye(4))
    cholesky = operations(joint)["linalg_cholesky_ex"]
    assert profiled(joint, CPU).seconds(cholesky) > 0


def test_profile_runs_mutations_themselves() -> None:
    joint = joint_graph(lambda m, x: (x @ m.weight).mul_(2).sin(), torch.randn(4, 4))
    mutation = next(n for n in operations(joint).values() if n.target is ops.inplace)
    assert cost._timed(mutation, CPU) is not None
