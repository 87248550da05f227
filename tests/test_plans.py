"""Plans as data: written, read, used for the graph that they were made for; batches that fit."""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same_training, captures, chain, joint_of
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fxckpt
from bench.models import build
from fxckpt import BudgetError, Plan, PolicyError
from fxckpt.plans import fingerprint
from fxckpt.steps import devices, undone

DEVICE = "a100"


def planned(model: nn.Module, *args: Any, budget: Any = 0.7, **kwargs: Any) -> Plan:
    """With rates that do not depend on this machine."""
    return fxckpt.plan(model, *args, budget=budget, device=DEVICE, planning_seconds=1.0, **kwargs)


def two_inputs() -> tuple[nn.Module, Tensor, Tensor]:
    """A model, a batch, and one that is smaller."""
    return chain(12, 16), torch.ones(256, 16), torch.ones(100, 16)


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "unet", "t5"])
def test_a_plan_that_is_read_is_the_one_that_was_written(name: str, tmp_path: Path) -> None:
    case = build(name, tiny=True)
    plan = planned(case.model, budget=0.85, **case.batch(0))
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert plan.saved
    assert max(step.live for step in plan.steps) == plan.peak >= sum(h.size for h in plan.at_peak)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1, 2", "expected a plan of schema 3"),
        ("[]", "expected a plan of schema 3"),
        ('{"schema": 2}', "expected a plan of schema 3"),
        ('{"schema": 3, "saved": []}', "the plan is damaged"),
    ],
)
def test_file_that_is_no_plan(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(content)
    with pytest.raises(PolicyError, match=message):
        Plan.load(path)


def test_plan_with_an_unknown_entry(tmp_path: Path) -> None:
    model, x, _ = two_inputs()
    path = tmp_path / "plan.json"
    planned(model, x).save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), "mood": "good"}))
    with pytest.raises(PolicyError, match="the plan is damaged"):
        Plan.load(path)


@pytest.mark.slow
def test_the_fingerprint_is_the_same_in_another_process() -> None:
    """Where strings have other hashes, and objects other addresses."""
    code = (
        "from test_plans import planned, build\n"
        "case = build('gpt2', tiny=True)\n"
        "print(planned(case.model, budget=0.8, **case.batch(0)).graph)"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            check=True,
            capture_output=True,
            text=True,
            cwd=Path(__file__).parent,
            env={"PYTHONPATH": f"{Path(__file__).parents[1]}", "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }
    case = build("gpt2", tiny=True)
    assert found == {planned(case.model, budget=0.8, **case.batch(0)).graph + "\n"}


@pytest.mark.parametrize("what", ["shape", "dtype", "constant", "operation", "frozen"])
def test_the_fingerprint_tells_graphs_apart(what: str) -> None:
    def of(model: nn.Module, x: Tensor) -> str:
        rewritten = fxckpt.rewrite(model, "nothing", strict=True, example_inputs=(x,))
        return fingerprint(joint_of(rewritten))

    def model(activation: nn.Module) -> nn.Module:
        return nn.Sequential(nn.Linear(16, 16), activation, nn.Linear(16, 16))

    x = torch.ones(3, 16)
    before = of(model(nn.LeakyReLU(0.1)), x)
    assert before == of(model(nn.LeakyReLU(0.1)), x + 1)
    frozen = model(nn.LeakyReLU(0.1))
    frozen[0].requires_grad_(False)
    after = {
        "shape": lambda: of(model(nn.LeakyReLU(0.1)), torch.ones(4, 16)),
        "dtype": lambda: of(model(nn.LeakyReLU(0.1)).double(), x.double()),
        "constant": lambda: of(model(nn.LeakyReLU(0.2)), x),
        "operation": lambda: of(model(nn.ELU(0.1)), x),
        "frozen": lambda: of(frozen, x),
    }
    assert after[what]() != before


# --- use ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "unet"])
def test_training_as_planned_is_exact(name: str) -> None:
    case = build(name, tiny=True)
    plan = planned(case.model, budget=0.85, **case.batch(0))
    model = assert_same_training(
        lambda: build(name, tiny=True).model, case.batch, case.loss, None, plan=plan
    )
    (captured,) = captures(model)
    assert captured


def test_what_is_planned_is_what_is_recomputed() -> None:
    model, x, _ = two_inputs()
    plan = planned(model, x)
    assert plan.recomputed
    rewritten = fxckpt.rewrite(model, plan=plan, strict=True)
    rewritten(x)
    _, backward = fxckpt.graphs(rewritten)
    again = re.findall(r"= aten_tanh_(?:_?default|out)\(", backward.code)
    assert len(again) >= sum(name.startswith("tanh") for name in plan.recomputed) > 0


def test_a_plan_for_another_graph_is_refused() -> None:
    model, x, smaller = two_inputs()
    plan = planned(model, x)
    with pytest.raises(PolicyError, match="the plan was made for another graph"):
        fxckpt.rewrite(model, plan=plan)(smaller)
    with pytest.raises(PolicyError, match="the plan was made for another graph"):
        fxckpt.rewrite(chain(11, 16), plan=plan, example_inputs=(x,))


def test_a_smaller_batch_after_that_of_the_plan_keeps_the_budget() -> None:
    model, x, smaller = two_inputs()
    plan = planned(model, x, budget=0.65)
    rewritten = fxckpt.rewrite(model, plan=plan, strict=True)
    rewritten(x).sum().backward()
    rewritten(smaller).sum().backward()
    _, backward = fxckpt.graphs(rewritten)
    assert not re.search(r"= aten_tanh_(?:_?default|out)\(", backward.code)  # it fits as it is


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"budget": 0.5}, BudgetError, "a plan has its budget"),
        ({"policy": "dots"}, BudgetError, "leave out policy"),
        ({"save": "layer"}, BudgetError, "leave out policy"),
        ({"plan": "plan.json"}, PolicyError, "expected what fxckpt.plan or fxckpt.Plan.load"),
    ],
)
def test_plan_with_something_else(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    model, x, _ = two_inputs()
    with pytest.raises(error, match=message):
        fxckpt.rewrite(model, **{"plan": planned(model, x), **options})


# --- profiles -------------------------------------------------------------------------------------


def test_operations_can_be_timed() -> None:
    model, x, _ = two_inputs()
    plan = fxckpt.plan(model, x, budget=0.7, profile=True)
    assert 0 < plan.seconds < plan.step_seconds
    fxckpt.rewrite(model, budget=0.7, profile=True, strict=True)(x).sum().backward()


def test_a_device_that_is_not_here_cannot_be_timed() -> None:
    model, x, _ = two_inputs()
    with pytest.raises(BudgetError, match="Leave out one of the two"):
        fxckpt.plan(model, x, budget=0.7, device=DEVICE, profile=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("profile", [False, True])
def test_a_kind_of_device_that_is_not_here_cannot_be_measured(profile: bool) -> None:
    model, x, _ = two_inputs()
    with pytest.raises(BudgetError, match="no CUDA device is here to be measured"):
        fxckpt.plan(model, x, budget=0.7, device="cuda", profile=profile)


def test_a_device_that_is_here_is_measured() -> None:
    model, x, _ = two_inputs()
    assert fxckpt.plan(model, x, budget=0.7, device="cpu").device == "cpu"
    assert fxckpt.plan(model, x, budget=0.7, device=torch.device("cpu")).device == "cpu"


# --- the largest batch ----------------------------------------------------------------------------


@pytest.mark.parametrize("memory", ["20KiB", "100KiB", 300_000])
def test_largest_batch(memory: int | str) -> None:
    def make(size: int) -> tuple[Tensor]:
        return (torch.ones(size, 16),)

    model, *_ = two_inputs()
    fit = fxckpt.fit_batch(make, model, memory=memory, device=DEVICE, planning_seconds=1.0)
    assert fit.plan == planned(model, *make(fit.batch), budget=memory)
    with pytest.raises(BudgetError):
        planned(model, *make(fit.batch + 1), budget=memory)


@pytest.mark.slow
def test_largest_batch_of_a_model_on_fake_tensors() -> None:
    with FakeTensorMode():
        model, *_ = two_inputs()

    def make(size: int) -> dict[str, Tensor]:
        return {"input": torch.ones(size, 16)}

    fit = fxckpt.fit_batch(make, model, memory="100KiB", device=DEVICE, most=1000)
    assert 1 < fit.batch < 1000
    few = fxckpt.fit_batch(make, model, memory="100KiB", device=DEVICE, most=fit.batch - 1)
    assert few.batch == fit.batch - 1


def test_batches_that_cannot_be() -> None:
    model, *_ = two_inputs()
    with pytest.raises(BudgetError, match="The least that was found"):
        fxckpt.fit_batch(lambda n: (torch.ones(n, 16),), model, memory=100, device=DEVICE)
    with pytest.raises(BudgetError, match="expected bytes"):
        fxckpt.fit_batch(lambda n: (torch.ones(n, 16),), model, memory=0.5)
    with pytest.raises(fxckpt.FxckptError, match="to return a tuple of positional"):
        fxckpt.fit_batch(lambda n: torch.ones(n, 16), model, memory="1MiB", device=DEVICE)


CALLS: list[int] = []


class Prepares(nn.Module):
    """Registers a hook at its first call, as transformers does to collect hidden states."""

    def __init__(self) -> None:
        super().__init__()
        self.ready = False
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        if not self.ready:
            self.layers[0].register_forward_hook(lambda m, args, out: out.sin())
            self.ready = True
            CALLS.append(len(CALLS))
        return self.layers(x)


def test_what_prepares_itself_is_planned_and_left_as_it_is() -> None:
    model, x = Prepares(), torch.ones(4, 8, requires_grad=True)
    contents, before = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    plans = [fxckpt.plan(model, x, budget=0.97) for _ in range(2)]
    assert plans[0] == plans[1]
    assert any("sin" in step.name for step in plans[0].steps)
    report = fxckpt.explain(model, x, budget=0.97)
    assert report.eager_peak == plans[0].eager_peak
    assert (model.ready, len(model.layers[0]._forward_hooks), x.grad) == (False, 0, None)
    assert all(p.grad is None for p in model.parameters())
    assert not CALLS
    assert torch.equal(torch.get_rng_state(), before)
    assert all(map(torch.equal, contents.values(), model.state_dict().values()))
    lean = fxckpt.rewrite(model, plan=plans[0])
    for _ in range(3):
        lean(x).sum().backward()
    assert captures(lean)
    CALLS.clear()


def test_what_prepares_itself_is_planned_on_fake_tensors() -> None:
    with FakeTensorMode():
        model, x = Prepares(), torch.ones(4, 8)
    assert fxckpt.plan(model, x, budget=1.0, device="h200").eager_peak > 0
    assert not model.ready


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_generators_of_devices_that_are_not_there_are_left_alone() -> None:
    with FakeTensorMode():
        model = nn.Module()
        model.weight = nn.Parameter(torch.empty(2, device="cuda"))
    with undone(model):
        assert devices(model) == [torch.device("cpu")]
