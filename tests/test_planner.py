"""Plans: within the budget, near the bound, never worse than simple strategies, bit-identical."""

import functools
import itertools
import math
import re
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import (
    KINDS,
    MODELS,
    Function,
    LiveBytes,
    all_dispatched,
    assert_same_training,
    captures,
    chain,
    choice_of,
    joint_of,
    total,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import OptimizeResult
from scipy.sparse import csr_matrix
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig, LlamaModel

import fxckpt
from bench.models import build
from fxckpt import BudgetError, exact, highs, policies, problems, search
from fxckpt.budgets import parse_budget
from fxckpt.columns import Columns, Rows
from fxckpt.joint import Joint
from fxckpt.moment import Moment
from fxckpt.planner import Planner
from fxckpt.quantities import readable
from fxckpt.search import Search

ROWS, WIDTH = 64, 8

# --- against all decisions ------------------------------------------------------------------------

STEPS = {
    "sin": lambda m, values, i: values[i].sin(),
    "square": lambda m, values, i: values[i] * values[i],
    "add": lambda m, values, i: values[i] + values[-1],
    "mul": lambda m, values, i: values[i] * values[-1],
    "mm": lambda m, values, i: values[i] @ m.weight,
    "halves": lambda m, values, i: torch.cat(values[i].exp().chunk(2, 1), 0),
    "norm": lambda m, values, i: torch.layer_norm(values[i], values[i].shape[-1:]),
}


@st.composite
def joints(draw: st.DrawFn) -> Joint:
    """Of programs with up to six operations."""
    names = draw(st.lists(st.sampled_from([*STEPS]), min_size=2, max_size=5))
    reads = [draw(st.integers(-3, -1)) for _ in names]

    def forward(m: Function, x: Tensor) -> Tensor:
        values = [x, x @ m.weight]
        for name, i in zip(names, reads, strict=True):
            i = max(i, -len(values))
            if values[i].shape == values[-1].shape and values[i].shape[1] == WIDTH:
                values.append(STEPS[name](m, values, i))
                if name == "halves":
                    values[-1] = values[-1].view(ROWS, WIDTH)
        return values[-1].sum()

    model = Function(forward, WIDTH)
    x = torch.ones(ROWS, WIDTH)
    return joint_of(fxckpt.rewrite(model, "nothing", strict=True, example_inputs=(x,)))


@pytest.mark.parametrize("depths", [(12, 40), (0, 40), (0, 0), (0, 1)], ids=str)
@settings(max_examples=12)
@given(joints())
def test_no_decision_is_better_than_the_bound(depths: tuple[int, int], joint: Joint) -> None:
    """However far chains are followed, for the first bound and for the one that knows more."""
    near, far = (
        mock.patch.object(exact, n, d) for n, d in zip(("_NEAR", "_FAR"), depths, strict=True)
    )
    with near, far, mock.patch.object(problems, "_LARGE", 0.0):
        assert_bounds(joint)


def assert_bounds(joint: Joint) -> None:
    """All decisions on a small graph, for some budgets."""
    planner = Planner(joint, device="v100", seconds=1.0)
    assume(len(planner.memory.values) <= 6)
    decisions = all_decisions(planner)
    budgets = sorted({peak for peak, _ in decisions})
    for budget in budgets[:: max(len(budgets) // 6, 1)]:
        optimum = min(seconds for peak, seconds in decisions if peak <= budget)
        plan = planner.plan(budget)
        assert plan.peak <= budget
        known = planner._searches[0].bound(budget)  # before it is capped by the plan
        near, deep = bounds_of(planner, budget)
        assert near * (1 - 1e-6) <= deep
        whole = planner._searches[0]._bounds.sharpened(budget, 2 * optimum)
        proof = planner._searches[0]._bounds.sharpened(budget, optimum)
        for bound in (known or 0.0, near, deep, whole or 0.0, proof or 0.0):
            assert bound <= optimum * (1 + 1e-6) + 1e-12
        assert plan.bound <= optimum * (1 + 1e-6)
        assert plan.seconds <= optimum * (1 + plan.gap) * (1 + 1e-6)
    with pytest.raises(BudgetError):
        planner.plan(min(peak for peak, _ in decisions) - 1)


def all_decisions(planner: Planner) -> list[tuple[int, float]]:
    """The peak of each, and the seconds of what runs again."""
    values = planner.memory.values
    breakable = [values[i] for i in planner._searches[0]._problem.breakable()]
    decisions = []
    for chosen in itertools.product(*(KINDS if v in breakable else KINDS[:3] for v in values)):
        replay = planner.memory.replay(choice_of(dict(zip(values, chosen, strict=True))))
        decisions.append((replay.peak, sum(planner.seconds[n] for n in replay.again)))
    return decisions


def test_least_is_found_where_one_change_alone_takes_nothing_off() -> None:
    """Neither the solutions of the programs lead there, nor what takes most off their peaks."""

    def forward(m: Function, x: Tensor) -> Tensor:
        product, normal = x @ m.weight, torch.layer_norm(x, x.shape[-1:])
        return (product * normal).sin().sin().sum()

    model, x = Function(forward, WIDTH), torch.ones(ROWS, WIDTH)
    joint = joint_of(fxckpt.rewrite(model, "nothing", strict=True, example_inputs=(x,)))
    with mock.patch.object(problems, "_LARGE", 0.0):
        planner = Planner(joint, device="v100", seconds=1.0)
        assert planner.least().peak == min(peak for peak, _ in all_decisions(planner))


def test_bound_knows_that_results_take_the_place_of_what_is_let_go() -> None:
    """Where it is read, not for the last time, and made once more for later readers."""

    def forward(m: Function, x: Tensor) -> Tensor:
        v = (x * m.weight).exp()
        return (v * m.a).sin().sum() + (v * m.b).cos().sum()

    model, x = Function(forward, WIDTH), torch.ones(ROWS, WIDTH)
    model.weight, model.a, model.b = (nn.Parameter(torch.ones(ROWS, WIDTH)) for _ in range(3))
    joint = joint_of(fxckpt.rewrite(model, "nothing", strict=True, example_inputs=(x,)))
    with mock.patch.object(problems, "_LARGE", 0.0):
        planner = Planner(joint, device="v100")
    large = [v for v in planner.memory.values if v.name.startswith(("mul", "exp"))]
    replays = [
        planner.memory.replay(choice_of(dict(zip(large, kinds, strict=True))))
        for kinds in itertools.product(KINDS, repeat=len(large))
    ]
    decisions = [(r.peak, sum(planner.seconds[n] for n in r.again)) for r in replays]
    for budget in {peak for peak, _ in decisions}:
        bound = planner._searches[0].bound(budget)
        assert bound is not None
        assert bound <= min(s for peak, s in decisions if peak <= budget) * (1 + 1e-6)


def bounds_of(planner: Planner, budget: int) -> tuple[float, float]:
    """The bound of a budget where chains are short, and the one that follows longer chains."""
    problem = planner._searches[0]._problem
    with mock.patch.object(exact, "Moment", short):
        near = exact.Exact(problem).solve(budget)
    deep = exact.Exact(problem).solve(budget)
    assert near is not None
    assert deep is not None
    return near.seconds, deep.seconds


def short(columns: Columns, rows: Rows, moment: int, *_: int, **__: bool) -> Moment:
    """With short chains whether they are asked for or not."""
    return Moment(columns, rows, moment, exact._NEAR)


def test_longer_chains_raise_the_bound() -> None:
    with mock.patch.object(exact, "_NEAR", 1):
        planner = Planner(deep_chain(), device="v100")
        near, deep = bounds_of(planner, (planner.least().peak + planner.eager_peak) // 2)
    assert near < deep


def test_moments_that_bind_are_found_and_kept_for_other_budgets() -> None:
    planner = Planner(deep_chain(), device="v100")
    low, high = planner.memory.fixed.peak * 6 // 5, planner.eager_peak * 19 // 20
    program = exact.Exact(planner._searches[0]._problem)
    with mock.patch.object(exact, "_MOST_WORK", 0):  # one round
        at_first = program.solve(low)
    found, other = program.solve(low), program.solve(high)
    with mock.patch.object(exact, "_MOST_WORK", 0):
        again = program.solve(low)
    assert at_first is not None
    assert found is not None
    assert other is not None
    assert again is not None
    assert at_first.seconds < 0.9 * found.seconds
    assert again.seconds > 0.999 * found.seconds


class Residual(nn.Module):
    """Layers that add to what comes in, of which backward reads only what follows from it."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        pairs = ([nn.Linear(width, width, bias=False) for _ in "io"] for _ in range(layers))
        self.layers = nn.ModuleList(nn.ModuleList(pair) for pair in pairs)

    def forward(self, x: Tensor) -> Tensor:
        """Of rows."""
        for inner, outer in self.layers:
            x = x + outer(inner(x * 2.0).tanh())
        return ((x * 1.0).exp() * (x * 1.0).sin()).sum()


def test_long_chains_do_not_run_in_fractions() -> None:
    """A part of the residual stream cannot have been computed early, and be nowhere."""
    model, x = Residual(24, 16), torch.ones(256, 16)
    joint = joint_of(fxckpt.rewrite(model, "nothing", strict=True, example_inputs=(x,)))
    with mock.patch.object(exact, "_FAR", exact._NEAR):
        planner = Planner(joint, device="v100")
        least = planner.least().peak
        near, deep = bounds_of(planner, least + (planner.eager_peak - least) // 3)
    assert 1.005 * near < deep


def test_moments_with_a_price_follow_long_chains() -> None:
    """Even where a solution with short ones fits, as far as is known."""
    model, x = Residual(24, 16), torch.ones(256, 16)
    joint = joint_of(fxckpt.rewrite(model, "nothing", strict=True, example_inputs=(x,)))
    planner = Planner(joint, device="v100")
    problem, least = planner._searches[0]._problem, planner.least().peak
    budget = least + (planner.eager_peak - least) // 4
    with mock.patch.object(exact.Exact, "_binding", return_value=[]):
        near = exact.Exact(problem).solve(budget)
    deep = exact.Exact(problem).solve(budget)
    assert near is not None
    assert deep is not None
    assert 1.005 * near.seconds < deep.seconds


def test_moments_of_one_round_are_apart() -> None:
    program = exact.Exact(Planner(deep_chain(), device="v100")._searches[0]._problem)
    over = {(moment, -1): 100.0 - moment for moment in range(len(program.problem.backward))}
    with mock.patch.object(exact, "_PARTS", 16):
        assert program._refine(over, [])
    moments = sorted(moment for moment, _ in program._cuts)
    apart = len(program.problem.backward) / 16
    assert len(moments) == exact._MOST_CUTS
    assert min(np.diff(moments)) >= apart > 1


def test_no_whole_numbers_are_looked_for_in_large_programs() -> None:
    """That could take minutes."""
    planner = Planner(deep_chain(), device="v100")
    budget = (planner.least().peak + planner.eager_peak) // 2
    program = exact.Exact(planner._searches[0]._problem)
    assert program.solve(budget) is not None
    with (
        mock.patch.object(highs, "branched") as branched,
        mock.patch.object(exact, "_MOST_ENTRIES", 1_000),
    ):
        assert program.sharpened(budget, math.inf) is None
        assert not [*program.branched(budget)]  # no entries are left
    assert not branched.called


def test_whole_numbers_raise_the_bound() -> None:
    """A half of what has to be saved or not is no decision."""
    joint = deep_chain()
    planner = Planner(joint, device="v100")
    budget = planner.least().peak + (planner.eager_peak - planner.least().peak) // 40
    whole = planner.plan(budget)
    with mock.patch.object(exact.Exact, "sharpened", return_value=None):
        fractions = Planner(joint, device="v100").plan(budget)
    assert fractions.bound < whole.bound <= whole.seconds <= fractions.seconds


def test_whole_numbers_raise_the_bound_where_all_else_leaves_a_gap() -> None:
    joint = deep_chain()
    bounds = []
    with mock.patch.object(exact, "_FEW", -1), mock.patch.object(search, "_GOOD", 1.0):
        planner = Planner(joint, device="v100")
        budget = planner.least().peak + (planner.eager_peak - planner.least().peak) // 40
        bounds.append(planner.plan(budget).bound)
        with mock.patch.object(exact.Exact, "sharpened", return_value=None):
            bounds.append(Planner(joint, device="v100").plan(budget).bound)
    assert bounds[0] > bounds[1]


def test_whole_numbers_get_rows_for_the_moments_that_they_do_not_fit_at() -> None:
    """Fractions do not fit at other moments."""
    planner = Planner(deep_chain(), device="v100")
    search, least = planner._searches[0], planner.least().peak
    fewer = []
    for part in range(1, 20):
        budget = least + (planner.eager_peak - least) * part // 20
        program = search._exact
        program.left = 10**6
        assert program.solve(budget) is not None
        found = [search.pool.replay(search._rounded(s, 0.5)) for s in program.branched(budget)]
        if len(found) > 1:
            fewer.append(found[-1].peak <= found[0].peak)
    assert fewer
    assert all(fewer)


@functools.cache
def unet(layers: int) -> Planner:
    """Of skip connections, for which values run again many times."""
    case = build("unet", layers=layers, width=16, batch=4, image=64)
    model = fxckpt.rewrite(case.model, "nothing", strict=True, example_inputs=case.batch(0))
    return Planner(joint_of(model), device="v100")


def within(planner: Planner, tenths: int) -> int:
    """A budget between what is needed at least, and by eager."""
    least = planner.least().peak
    return least + (planner.eager_peak - least) * tenths // 10


@pytest.mark.parametrize(("layers", "tenths"), [(2, 1), (2, 2), (2, 3), (3, 2), (3, 3), (3, 4)])
def test_whole_solutions_come_to_what_they_say(layers: int, tenths: int) -> None:
    """In bytes and in seconds, also where values run again three times and more."""
    planner = unet(layers)
    found, budget = planner._searches[0], within(planner, tenths)
    program = found._exact
    program.left = 10**6
    assert program.solve(budget) is not None
    with mock.patch.object(program, "_over", wraps=program._over) as over:
        solutions = [*program.branched(budget)]
    assert solutions
    for solution, call in zip(solutions, over.call_args_list, strict=True):
        made = found.pool.replay(found._rounded(solution, 0.5))
        said = max(program._over(*call.args).values(), default=0.0)
        assert (made.peak <= budget) == (not said)
        assert max(made.peak - budget, 0) == pytest.approx(said, abs=0.01 * budget)
        assert made.seconds <= 1.04 * solution.seconds


@pytest.mark.parametrize("is_told", [True, False])
def test_runs_are_counted_where_a_replay_takes_longer(is_told: bool) -> None:
    """Than the solution of a large program said, which does not know how often they run."""
    planner = unet(2)
    told = math.inf if is_told else 0.0
    with mock.patch.object(search, "_TOLD", told), mock.patch.object(exact, "_SMALL", 0):
        found = Search(planner.memory, planner.seconds, replays=100, entries=10**6)
        with mock.patch.object(exact, "runs", wraps=exact.runs) as runs:
            assert found._look_exactly(found._exact, within(planner, 3), 10**6)
    assert runs.called != is_told


def test_what_lives_while_something_runs_again_raises_the_bound() -> None:
    planner = unet(2)
    budget = within(planner, 3)
    known, found = planner.plan(budget).seconds, planner._searches[0]
    assert found._exact.while_running()
    without = found._bounds.sharpened(budget, known)
    bound = found._bounds.sharpened(budget, known, found._exact.while_running())
    assert bound is not None
    assert without is not None
    assert 1.01 * without < bound <= known


def test_a_replay_of_much_that_runs_again_counts_as_several() -> None:
    """It takes as long; one that is known already does not."""
    search = Planner(deep_chain(), device="v100")._searches[0]
    nothing = search._moves.without_waiting(search.pool.saving(()))
    again, operations = len(search.pool.count(nothing).again), len(search.memory.inputs_of)
    assert again > 5 * operations
    search.pool.left = 100
    search.pool.replay(nothing)
    assert search.pool.left == 99 - again // operations
    search.pool.replay(nothing)
    assert search.pool.left == 98 - again // operations


def test_values_of_equal_layers_have_equal_roles() -> None:
    planner = Planner(deep_chain(), device="v100")
    roles = dict(zip(planner.memory.values, planner._searches[0]._problem.roles(), strict=True))
    products = [role for node, role in roles.items() if node.target is torch.ops.aten.addmm.default]
    tanhs = [role for node, role in roles.items() if node.target is torch.ops.aten.tanh.default]
    assert len({*products[4:-4]}) == len({*tanhs[4:-4]}) == 1
    assert {*products}.isdisjoint(tanhs)


def deep_chain() -> Joint:
    """Of twenty equal layers."""
    model, x = chain(20, 16), torch.ones(256, 16)
    return joint_of(fxckpt.rewrite(model, "nothing", strict=True, example_inputs=(x,)))


# --- against simple strategies --------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_never_worse_than_a_simple_strategy(name: str) -> None:
    case = build(name, tiny=True)
    model = fxckpt.rewrite(case.model, "nothing", strict=True, example_inputs=case.batch(0))
    joint = joint_of(model)
    planner = Planner(joint, device="v100", seconds=1.0)
    for decide in policies.NAMES.values():
        try:
            peak, seconds = planner.strategy(decide)
        except fxckpt.PolicyError:
            continue
        plan = planner.plan(peak)
        assert plan.peak <= peak
        assert plan.seconds <= seconds


def test_a_larger_budget_is_never_slower() -> None:
    model, x = chain(12, 16), torch.ones(256, 16)
    plans = fxckpt.frontier(model, x, points=9, device="v100")
    assert len(plans) == 9
    assert [p.seconds for p in plans] == sorted((p.seconds for p in plans), reverse=True)
    assert all(p.peak <= p.budget for p in plans)
    assert plans[-1].seconds == 0 < plans[0].seconds


def test_a_strategy_may_need_less_than_any_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where gradients fill the memory, and torch's own backward delivers them in another order."""
    monkeypatch.setattr(Planner, "peers", lambda _: {"little": (1, 0.3), "much": (100_000, 0.3)})
    found = fxckpt.frontier(chain(4, 16), torch.ones(256, 16), points=2, device="v100")
    assert {*found.peers} == {"little", "much"}
    assert {*found.beside} == {"much"}


def test_least_fits_where_nothing_else_was_found() -> None:
    planner = Planner(deep_chain(), device="v100")
    least = Planner(deep_chain(), device="v100").least().peak
    with mock.patch.object(Search, "look", return_value=iter(())):
        assert planner.plan(least).peak == least
        with pytest.raises(BudgetError):
            planner.plan(least - 1)


def test_plans_without_solutions() -> None:
    """If the solver of the programs gives up, what is found by changes counts, and no bound."""
    model, x = chain(12, 16), torch.ones(256, 16)
    with mock.patch.object(highs, "_SECONDS", 0.0):
        plan = fxckpt.plan(model, x, budget=0.8, device="v100")
    assert 0 == plan.bound < plan.seconds
    assert plan.peak <= plan.budget


@given(st.data())
def test_whole_numbers_are_found_near_the_optimum(data: st.DataObject) -> None:
    """Against all of them: what is found fits, and a proof is none for what is not so."""
    columns = data.draw(st.integers(1, 6))
    parts = st.sampled_from([0.02, 0.1, 0.3, 0.7, 1.0])
    costs = np.array(data.draw(st.lists(parts, min_size=columns, max_size=columns)))
    row = st.lists(parts, min_size=columns, max_size=columns)
    needs = -np.array(data.draw(st.lists(row, min_size=1, max_size=3)))
    most = needs.sum(1) * data.draw(st.floats(0.1, 0.9))
    every = np.array([*itertools.product((0.0, 1.0), repeat=columns)])
    fitting = every[(every @ needs.T <= most).all(1)]
    optimum = (fitting @ costs).min()
    limits = {"whole": np.ones(columns), "nodes": 100, "gap": 0.0}
    found = highs.near(costs, csr_matrix(needs), most, **limits)
    assert np.all(needs @ found.x.round() <= most + 1e-6)
    assert costs @ found.x >= optimum - 1e-6
    least = optimum * data.draw(st.floats(0.5, 2.0))
    proof = highs.near(costs, csr_matrix(needs), most, **limits, least=least, proven=True)
    if proof.status == highs.NOTHING_FITS:
        assert least <= optimum + 1e-6
    else:
        assert min(proof.mip_dual_bound, least) <= optimum + 1e-6


def test_what_is_not_solved_to_its_end_is_no_bound() -> None:
    unfinished = OptimizeResult(x=np.ones(1), fun=1.0, success=False)
    with mock.patch.object(highs, "linprog", return_value=unfinished):
        assert highs.relaxed([1.0], csr_matrix([[1.0]]), [1.0]).x is None


def test_plans_are_deterministic() -> None:
    model, x = chain(12, 16), torch.ones(256, 16)
    found = [fxckpt.plan(model, x, budget=0.8, device="v100") for _ in range(2)]
    names = [sorted(plan.saved) for plan in found]
    assert names[0] == names[1]


# --- measured -------------------------------------------------------------------------------------


def held(model: nn.Module, *args: Tensor, **kwargs: Tensor) -> int:
    """The peak of a step, in bytes."""
    for p in model.parameters():
        p.grad = None
    with all_dispatched(LiveBytes()) as memory:
        out = model(*args, **kwargs)
        total(out).backward()
    return memory.peak


@pytest.mark.parametrize("fraction", [0.9, 0.7, 0.65])
def test_measured_peak_is_within_the_budget(fraction: float) -> None:
    model, x = chain(12, 16), torch.ones(4096, 16)
    eager = held(model, x)
    budget = int(fraction * eager)
    new = fxckpt.rewrite(model, budget=budget)
    for _ in range(3):
        assert held(new, x) <= budget + x.nbytes  # `total` computes outside of the model
    plan = fxckpt.plan(model, x, budget=budget)
    assert plan.peak <= budget
    assert plan.eager_peak == pytest.approx(eager, rel=0.1)


@pytest.mark.parametrize(
    "name", ["gpt2", "bert", "resnet", "unet", pytest.param("t5", marks=pytest.mark.slow)]
)
def test_training_within_a_budget_is_exact(name: str) -> None:
    """Half way between the least and the most."""
    case = build(name, tiny=True)
    budget = fxckpt.frontier(case.model, points=3, planning_seconds=1.0, **case.batch(0))[1].budget
    model = assert_same_training(
        lambda: build(name, tiny=True).model,
        case.batch,
        case.loss,
        None,
        budget=budget,
        planning_seconds=1.0,
    )
    assert captures(model)


# --- budgets --------------------------------------------------------------------------------------


def test_all_of_the_memory_recomputes_nothing() -> None:
    model, x = chain(4, 8), torch.ones(32, 8)
    plan = fxckpt.plan(model, x, budget=1.0)
    assert plan.seconds == plan.overhead == plan.gap == 0
    assert not plan.recomputed


def test_infeasible_budget_says_what_is_feasible() -> None:
    model, x = chain(6, 16), torch.ones(512, 16)
    with pytest.raises(BudgetError, match="no plan fits a budget of 1000 bytes") as caught:
        fxckpt.plan(model, x, budget=1000)
    least = int(re.search(r"The least .*? \((\d+) bytes", str(caught.value))[1])
    assert fxckpt.plan(model, x, budget=least).peak <= least
    with pytest.raises(BudgetError):
        fxckpt.rewrite(model, budget=1000)(x)


def test_parts_of_a_model_that_falls_back_save_as_little_as_possible() -> None:
    last = Function(lambda m, x: x * x.detach().sum().item())
    new = fxckpt.rewrite(nn.Sequential(chain(6, 8), last), budget=0.5)
    x = torch.ones(512, 8)
    with pytest.warns(fxckpt.FallbackWarning, match="but for 1 of its parts"):
        total(new(x)).backward()


@pytest.mark.parametrize("bad", [0, -1, 0.0, 1.5, "8 apples", "", ".", "1.2.3MB", True, None, [1]])
def test_budget_that_is_none(bad: object) -> None:
    with pytest.raises(BudgetError, match=r"budget=.*expected a positive number of bytes"):
        parse_budget(bad)


def test_budgets() -> None:
    def size(budget: object) -> int:
        return parse_budget(budget)(1000)

    assert size("8GiB") == 8 * 2**30
    assert size("8 GB") == 8 * 10**9
    assert size("1.5kB") == 1500
    assert size("77") == 77
    assert size(77) == 77
    assert size(0.25) == 250
    assert size(1.0) == 1000
    assert readable(77) == "77 bytes"


def test_budget_and_policy_exclude_each_other() -> None:
    with pytest.raises(BudgetError, match="leave out policy"):
        fxckpt.rewrite(nn.Linear(2, 2), "dots", budget=0.5)
    with pytest.raises(BudgetError, match="is not known: the names are v100"):
        fxckpt.plan(nn.Linear(2, 2), torch.ones(1, 2), budget=0.5, device="v1000")


@pytest.mark.slow
def test_llama_of_seven_billion_parameters() -> None:
    config = LlamaConfig(num_hidden_layers=32, use_cache=False)
    with FakeTensorMode():
        model = LlamaModel(config)
        tokens = torch.zeros(4, 4096, dtype=torch.long)
        plan = fxckpt.plan(model.train(), tokens, budget=0.7, device="h200")
    assert plan.peak <= 0.7 * plan.eager_peak
    assert 0 < plan.overhead < 0.2


def test_views_with_several_results() -> None:
    """The cell splits a product into its gates."""
    model, x = nn.LSTMCell(4, 4), torch.ones(3, 4)
    assert fxckpt.plan(model, x, budget=1.0, device="v100").peak > 0


@pytest.mark.slow
def test_views_with_several_results_that_are_changed_in_place() -> None:
    """The cells of a recurrent layer compute each gate where it is."""

    def last(out: tuple[Tensor, Tensor]) -> Tensor:
        return out[0].square().sum()

    model = assert_same_training(
        lambda: nn.GRU(4, 4, bidirectional=True), lambda _: torch.randn(5, 3, 4), last, None,
        budget=0.8, planning_seconds=0.2, steps=2,
    )  # fmt: skip
    assert captures(model)
