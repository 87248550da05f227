"""Budgets with blocks as units: they hold for the whole step, and every bit is that of eager."""

import copy
import gc
import random
import re
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import distributed
import numpy as np
import pytest
import test_blocks
import torch
import torch.distributed as dist
from helpers import assert_same_training, captures
from test_memory import most_allocated
from torch import Tensor, nn
from torch.autograd.profiler import profile
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_module
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import fxckpt
from fxckpt import BudgetError, FallbackWarning
from fxckpt.blocks import Blocks
from fxckpt.budgeting import StepPlan
from fxckpt.installation import runner_of
from fxckpt.unit import Unit

WIDTH, ROWS = 16, 2048
TINY = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 0}


class Layer(test_blocks.Layer):
    """Activations are worth keeping."""

    def __init__(self, width: int = WIDTH, *, scale: float = 1.0) -> None:
        super().__init__(width, scale=scale)


class Net(test_blocks.Net):
    """Returns a loss."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers, width=WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).square().sum()


class Twice(Net):
    """Calls each layer twice."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(layer(x) * 0.5)
        return super().forward(x)


class Squashing(nn.Module):
    """A layer whose backward reads its output."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.down(torch.tanh(self.up(x))))


class Doubling(Net):
    """Lets go of what layers return."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x) * 2.0
        return self.head(x).sum()


def net() -> Net:
    return Net(*(Layer() for _ in range(5)))


def gpt2() -> nn.Module:
    config = GPT2Config(n_layer=4, n_embd=32, n_head=2, n_positions=64, use_cache=False, **TINY)
    return GPT2LMHeadModel(config).train()


def llama() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    config = LlamaConfig(num_hidden_layers=4, use_cache=False, **sizes, **TINY)
    return LlamaForCausalLM(config).train()


def batch(number: int = 0) -> Tensor:
    return torch.randn(ROWS, WIDTH)


def tokens(number: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(0, 64, (4, 64))
    return {"input_ids": ids, "labels": ids}


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[..., Any]]] = {
    "net": (net, batch),
    "twice": (lambda: Twice(Layer(), Layer()), batch),
    "unlike": (lambda: Net(Layer(), Squashing(), Layer(), Squashing()), batch),
    "doubling": (lambda: Doubling(*(Squashing() for _ in range(4))), batch),
    "gpt2": (gpt2, tokens),
    "llama": (llama, tokens),
}


def of_result(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result.loss


def result_of(model: nn.Module, inputs: Any) -> Any:
    return model(**inputs) if isinstance(inputs, dict) else model(inputs)


def loss_of(model: nn.Module, inputs: Any) -> Tensor:
    return of_result(result_of(model, inputs))


def plan_of(model: nn.Module) -> StepPlan:
    runner = runner_of(model)
    assert isinstance(runner, Blocks)
    assert runner.budgeting is not None
    assert runner.budgeting.latest is not None
    return runner.budgeting.latest


def rewritten(model: nn.Module, budget: Any, units: Any = "blocks") -> nn.Module:
    return fxckpt.rewrite(model, budget=budget, units=units, planning_seconds=0.5, strict=True)


def measured(model: nn.Module, inputs: Any, steps: int = 2) -> int:
    """Bytes at the peak of a step, after some others."""
    for _ in range(steps):
        loss_of(model, inputs).backward()
        model.zero_grad()
    gc.collect()

    def step() -> None:
        result = result_of(model, inputs)  # which is held, as plans assume
        of_result(result).backward()

    try:
        return most_allocated(step)
    finally:
        model.zero_grad()


@pytest.mark.parametrize("name", MODELS)
def test_bits_are_those_of_eager_and_the_step_is_planned_to_the_byte(name: str) -> None:
    make, data = MODELS[name]
    model, inputs = make(), data()
    eager = measured(model, inputs)

    def rewrite(model: nn.Module, _: Any) -> nn.Module:
        return rewritten(model, 0.75)

    ours = assert_same_training(make, data, of_result, rewrite=rewrite)
    plan, peak = plan_of(ours), measured(ours, inputs)
    assert plan.eager_peak == pytest.approx(eager, rel=0.01)
    assert plan.budget == int(0.75 * plan.eager_peak)
    assert peak <= plan.peak <= plan.budget
    assert peak == pytest.approx(plan.peak, rel=0.003)
    assert plan.seconds >= plan.bound > 0


@pytest.mark.parametrize("share", [1.0, 0.9, 0.6])
def test_budgets(share: float) -> None:
    model, inputs = net(), batch()
    ours = rewritten(model, share)
    peak, plan = measured(ours, inputs), plan_of(ours)
    assert peak <= plan.budget == int(share * plan.eager_peak)
    assert peak == pytest.approx(plan.peak, rel=0.003)
    assert (plan.seconds == 0) == (share == 1.0)


def test_the_least_that_an_error_tells_is_feasible() -> None:
    def fitted(budget: Any) -> nn.Module:
        ours = rewritten(model, budget)
        loss_of(ours, inputs).backward()
        return ours

    model, inputs = net(), batch()
    state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with pytest.raises(BudgetError, match="no plan fits") as error:
        fitted("100 KiB")
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state[1])
    assert all(map(torch.equal, model.state_dict().values(), state[0].values()))
    message = str(error.value)
    least = int(message.split("is ")[1].split("(")[1].split()[0])
    assert "what lies outside of the blocks" in message
    assert plan_of(fitted(least)).peak <= least
    with pytest.raises(BudgetError, match=f"{least} bytes"):
        fitted(least - 1)


def test_blocks_that_look_the_same_share_what_is_compiled_for_each_decision() -> None:
    model = rewritten(net(), 0.7)
    loss_of(model, batch()).backward()
    plan = plan_of(model)
    assert len({id(c._programs) for c in captures(model)}) == 1  # one capture
    chosen = {id(spot.entry): spot.entry for spot in plan.spots.values()}
    assert 1 < len(chosen) < len(plan.spots)
    assert all(len(entry.programs) == 1 for entry in chosen.values())


def test_a_block_that_is_called_twice_may_run_in_two_ways() -> None:
    model = rewritten(Twice(Layer(), Layer()), 0.7)
    loss_of(model, batch()).backward()
    spots = plan_of(model).spots
    assert {number for _, number in spots} == {0, 1, 2}
    assert len(spots) == 6


def test_other_calls_are_planned_anew_and_evaluation_is_as_ever() -> None:
    model, eager = net(), net()
    eager.load_state_dict(model.state_dict())
    ours = rewritten(model, 0.7)
    loss_of(ours, batch()).backward()
    first = plan_of(ours)
    loss_of(ours, torch.randn(ROWS // 2, WIDTH)).backward()
    assert plan_of(ours).peak < first.peak
    loss_of(ours, batch()).backward()
    assert plan_of(ours) is first
    with torch.no_grad():
        assert torch.equal(ours.eval()(torch.ones(4, WIDTH)), model(torch.ones(4, WIDTH)))
    assert plan_of(ours) is first
    other = copy.deepcopy(ours.train())
    loss_of(other, batch()).backward()
    assert plan_of(other) is not first
    assert type(fxckpt.restore_(ours)) is Net


class Noticing(Net):
    """Does all kinds of things to its surroundings."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.count, self.seen, self.register = 0, [], nn.Buffer(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.seen.append(x.shape)
        self.register += 1
        x = x * random.random() + np.random.rand()
        x += torch.rand_like(x)
        return super().forward(x)


def test_measuring_leaves_everything_as_it_was() -> None:
    """Attributes, lists, buffers, arguments, generators, gradients, hooks of parameters."""
    steps: list[str] = []

    def trained(model: nn.Module) -> list[Any]:
        for generator in (random.seed, np.random.seed, torch.manual_seed):
            generator(3)
        x = torch.linspace(-1, 1, ROWS * WIDTH).view(ROWS, WIDTH)
        handle = model.stem.weight.register_post_accumulate_grad_hook(
            lambda p: steps.append("stepped")
        )
        loss = model(x)
        loss.backward()
        loss = model(x)  # accumulates
        loss.backward()
        handle.remove()
        tensors = [x, loss, *(p.grad for p in model.parameters()), *model.buffers()]
        found = [t.detach().clone() for t in tensors], model.count, [*model.seen]
        return [*found, random.random(), np.random.rand(), torch.rand(1)]

    model = Noticing(Layer(), Layer())
    copied = copy.deepcopy(model)
    expected, eager_steps = trained(model), len(steps)
    steps.clear()
    got = trained(rewritten(copied, 0.8))
    assert len(steps) == eager_steps
    assert all(map(torch.equal, expected[0], got[0]))
    assert expected[1:] == got[1:]


def test_a_step_that_does_something_else_is_told_of_and_exact() -> None:
    class Dropping(Net):
        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers[: 1 if x.sum() > 0 else 3]:
                x = layer(x)
            return self.head(x).sum()

    def step(model: nn.Module, x: Tensor) -> list[Tensor]:
        torch.manual_seed(0)
        loss = model(x)
        return [loss, *torch.autograd.grad(loss, [*model.layers.parameters()], allow_unused=True)]

    model = Dropping(Layer(), Layer(), Layer())
    ours, x = rewritten(copy.deepcopy(model), 0.9), torch.ones(ROWS, WIDTH)
    loss_of(ours, x).backward()
    with pytest.warns(FallbackWarning, match=r"layers.1 is called in another way"):
        got = step(ours, -x)
    model.load_state_dict(ours.state_dict())
    loss_of(ours, -x).backward()  # measured anew
    assert len(plan_of(ours).spots) == 3
    del got


def test_a_block_that_cannot_be_captured_counts_as_what_lies_outside() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Layer()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) if float(x.detach().sum()) > 0 else -self.inner(x)

    model = Net(Layer(), Odd(), Layer(), Odd(), Layer())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        ours = fxckpt.rewrite(model, budget=0.8, units="blocks", planning_seconds=0.5)
        peak = measured(ours, batch())
    assert len(plan_of(ours).spots) == 3
    assert peak <= plan_of(ours).budget


def test_what_cannot_be_measured_is_an_error() -> None:
    class Other(Tensor):
        """A tensor of another class."""

    model = rewritten(net(), 0.5)
    with pytest.raises(BudgetError, match="plain tensors"):
        model(batch().as_subclass(Other))
    with profile(), pytest.raises(BudgetError, match="profiler"):
        model(batch())
    loss_of(model, batch()).backward()
    with profile():
        loss_of(model, batch()).backward()  # is not measured again
    found = fxckpt.plan(nn.Sequential(*(Layer() for _ in range(3))), batch(), budget=1.0)
    with pytest.raises(BudgetError, match="measured for each size"):
        fxckpt.rewrite(net(), budget=0.5, units="blocks", dynamic=True)
    with pytest.raises(fxckpt.PolicyError, match="a plan is for the model as one unit"):
        fxckpt.rewrite(net(), plan=found, units="blocks")


def test_nothing_is_sent_to_processes_that_do_not_measure() -> None:
    distributed.alone(refused_among_others)


def refused_among_others() -> None:
    class Sending(Net):
        def forward(self, x: Tensor) -> Tensor:
            dist.all_reduce(x.detach().sum())
            sent.append("forward")
            return super().forward(x)

    sent: list[str] = []
    model = rewritten(Sending(*(Layer() for _ in range(3))), 0.5)
    with pytest.raises(BudgetError, match="communicate"):
        model(batch())
    assert not sent
    model = net()
    distribute_module(model, init_device_mesh("cpu", (1,)))
    with pytest.raises(BudgetError, match="one of class DTensor"):
        rewritten(model, 0.5)(batch())


def test_nothing_to_choose() -> None:
    class Skipping(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.stem(x)).sum()

    model = rewritten(Skipping(Layer(), Layer()), 1.0)
    loss_of(model, batch()).backward()
    assert plan_of(model).peak == plan_of(model).eager_peak
    with pytest.raises(BudgetError, match="outside of the blocks"):
        loss_of(rewritten(Skipping(Layer(), Layer()), "1 KiB"), batch())


def test_reports_tell_of_the_step(tmp_path: Any) -> None:
    model = rewritten(net(), 0.7)
    loss_of(model, batch()).backward()
    plan, report = plan_of(model), fxckpt.explain(model)
    assert (report.peak, report.eager_peak) == (plan.peak, plan.eager_peak)
    assert (report.budget, report.bound, report.seconds) == (plan.budget, plan.bound, plan.seconds)
    assert report.units == "5 blocks, as asked"
    assert all(sum(m.kinds) == m.live for m in (*report.before, *report.after))
    assert sum(holding.bytes for holding in report.at_peak) == plan.peak
    assert {row.path.split(".")[1] for row in report.rows} == set("01234")
    again = sum(row.seconds for row in report.rows if row.action == "recomputed")
    assert again == pytest.approx(plan.seconds)
    text = str(report) + report.to_markdown() + report._repr_html_()
    assert "outside" in text
    report.to_html(tmp_path / "page.html")


# --- the default ----------------------------------------------------------------------------------


def small() -> Tensor:
    return torch.randn(64, WIDTH)


@pytest.mark.parametrize(("count", "why"), [(31, "the model"), (32, "32 blocks, as at least 32")])
def test_many_layers_are_units_under_a_budget(count: int, why: str) -> None:
    class Plain(Net):
        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return self.head(x).square().sum()

    def rewrite(model: nn.Module, _: Any) -> nn.Module:
        return rewritten(model, 0.6, units=None)

    model = assert_same_training(
        lambda: Plain(*(Layer() for _ in range(count))), lambda _: small(), rewrite=rewrite
    )
    report = fxckpt.explain(model)
    assert report.units.startswith(why)
    assert report.peak <= report.budget < report.eager_peak


@pytest.mark.parametrize(
    ("around", "reason"),
    [(profile, "the step is measured by torch's profiler"), (nullcontext, "no plan fits")],
    ids=["cannot be measured", "does not fit"],
)
def test_a_budget_that_blocks_refuse_is_one_of_the_whole(
    around: Callable[[], AbstractContextManager[Any]], reason: str
) -> None:
    """What lies outside of the blocks fills most of the memory: as one unit, it is less."""

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 512)
            self.layers = nn.ModuleList(
                nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(32)
            )

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for layer in self.layers:
                x = layer(x)
            return torch.log_softmax(self.head(x).sin().exp().tanh(), 1).sum()

    torch.manual_seed(0)
    model, x = Wide(), torch.randn(256, WIDTH)
    least = least_of(lambda: rewritten(model, "1 KiB", units="model")(x).backward())
    ours = rewritten(model, least, units=None)
    results = []
    with around():
        for m in (model, ours):
            results.append([loss := m(x), *torch.autograd.grad(loss, [*m.parameters()])])
    assert all(map(torch.equal, *results))
    units = fxckpt.explain(ours).units
    assert units.startswith("the model as a whole, as its budget over blocks is refused")
    assert reason in units
    with pytest.raises(BudgetError, match="no plan fits"):
        rewritten(model, "1 KiB", units=None)(x)


def least_of(step: Callable[[], Any]) -> int:
    """The bytes that an error says are needed at least."""
    with pytest.raises(BudgetError) as caught:
        step()
    found = re.search(r"least that was found is [^(]*\((\d+) bytes", str(caught.value))
    assert found is not None
    return int(found[1])


def test_a_transform_before_anything_is_known_makes_the_model_one_unit() -> None:
    model = rewritten(
        nn.Sequential(*(nn.Sequential(nn.Linear(4, 4)) for _ in range(32))), 1.0, None
    )

    def loss(x: Tensor) -> Tensor:
        return model(x).sum()

    torch.func.vmap(torch.func.grad(loss))(torch.ones(2, 3, 4))
    assert isinstance(runner_of(model), Unit)
