"""What policies and selectors save, that they are exact, and what they say if they mean nothing."""

import copy
import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import Node

import fxckpt
from bench import models
from fxckpt import RECOMPUTE, SAVE, PolicyError, Value, policies
from fxckpt.capture import capture
from fxckpt.joint import Joint, is_value, producer, root, storage_bytes
from fxckpt.policies import NAMES, resolve
from fxckpt.regions import Structure
from fxckpt.segments import read_by_backward, segment_inputs
from fxckpt.split import split

aten = torch.ops.aten


def joint_of(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Joint:
    """The joint graph of a module or function."""
    module = fn if isinstance(fn, nn.Module) else None
    forward = type(fn).forward.__get__(fn) if module is not None else fn
    tape = capture(forward, args, kwargs, module=module)
    return tape.joint(tape.expected_backward())


def joint_of_model(name: str, **sizes: float) -> Joint:
    case = models.build(name, tiny=True, **sizes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, while fakes of _grouped_mm are computed
        return joint_of(case.model, **case.batch(0))


@pytest.fixture(scope="module")
def gpt2() -> Joint:
    return joint_of_model("gpt2")


def residuals(joint: Joint, **options: Any) -> list[Node]:
    """The values that backward really gets under a policy.

    Without random ones: those that are smaller than the state of the generator are always kept.
    """
    kept = set(split(joint, resolve(**options)(joint)).residuals)
    values = (n for n in joint.graph.nodes if n.name in kept and is_value(n))
    return [n for n in values if not Value(n).random]


def total(nodes: list[Node]) -> int:
    return sum(storage_bytes(n.meta["val"]) for n in nodes)


def recomputed_paths(joint: Joint, **options: Any) -> set[str]:
    """The modules in which values are computed that a policy does not save."""
    dropped = {v.node for v in joint.values()} - resolve(**options)(joint)
    return {n.meta["path"] for n in dropped}


def named(value: Any) -> str:
    """A name for a parameter that is the same in all processes: sets have no order."""
    if isinstance(value, set):
        return ",".join(sorted(value))
    return value.__name__ if callable(value) and hasattr(value, "__name__") else str(value)


# --- functions ----------------------------------------------------------------------------------


def small(x: Tensor, w: Tensor) -> Tensor:
    return ((x @ w).sin() @ w).cos().sum()


@pytest.fixture(scope="module")
def chain() -> Joint:
    return joint_of(small, torch.randn(3, 4), torch.randn(4, 4, requires_grad=True))


def saved(joint: Joint, policy: Any = None, **options: Any) -> set[str]:
    return {n.name for n in resolve(policy, **options)(joint)}


ALL = {"mm", "sin", "mm_1", "cos", "sum_1"}


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (lambda v: SAVE, ALL),
        (lambda v: RECOMPUTE, set()),
        (lambda v: v.name == "sin", {"sin"}),
        (lambda v: SAVE if v.op is aten.mm.default else RECOMPUTE, {"mm", "mm_1"}),
        (policies.everything_saveable, ALL),
        (policies.nothing_saveable, set()),
        (policies.dots_saveable, {"mm", "mm_1"}),
        (policies.save_only_these_names("y"), set()),
        (policies.save_anything_except_these_names("y"), ALL),
        (policies.save_any_names_but_these("y"), set()),
        (
            policies.save_from_both_policies(policies.dots_saveable, lambda v: v.name == "cos"),
            {"mm", "mm_1", "cos"},
        ),
    ],
)
def test_functions(policy: policies.Policy, expected: set[str], chain: Joint) -> None:
    assert saved(chain, policy) == expected


def test_policies_by_tag(chain: Joint) -> None:
    sin, cos = (next(v.node for v in chain.values() if v.name == name) for name in ("sin", "cos"))
    sin.meta["tags"], cos.meta["tags"] = ("a", "b"), ("c",)
    try:
        assert saved(chain, policies.save_only_these_names("b", "z")) == {"sin"}
        assert saved(chain, policies.save_anything_except_these_names("b")) == ALL - {"sin"}
        assert saved(chain, policies.save_any_names_but_these("c")) == {"sin"}
        assert saved(chain, policies.save_any_names_but_these("a", "b")) == {"cos"}
    finally:
        del sin.meta["tags"], cos.meta["tags"]


def test_dots_without_batch() -> None:
    def scores(x: Tensor, w: Tensor) -> Tensor:
        y = (x.flatten(0, 1) @ w).view_as(x).sin()
        return (y @ y.mT).sum()

    joint = joint_of(scores, torch.randn(2, 3, 4), torch.randn(4, 4, requires_grad=True))
    assert saved(joint, policies.dots_with_no_batch_dims_saveable) == {"mm"}
    assert saved(joint, "dots") == {"mm", "bmm"}


# --- names --------------------------------------------------------------------------------------


def test_dots_are_what_is_multiplied(gpt2: Joint) -> None:
    products = {aten.mm.default, aten.addmm.default, aten.bmm.default}
    assert {Value(n).op for n in resolve("dots")(gpt2)} == products
    expected = {v.node for v in gpt2.values() if v.op in products}
    assert resolve("dots")(gpt2) == expected


@pytest.mark.parametrize(
    ("name", "inside", "outside"),
    [
        ("attention", "attn", ("mlp", "ln_1", "ln_2")),
        ("mlp", "mlp", ("attn", "ln_1", "ln_2")),
    ],
)
def test_inside_is_recomputed_and_all_else_saved(
    name: str, inside: str, outside: tuple[str, ...], gpt2: Joint
) -> None:
    paths = recomputed_paths(gpt2, policy=name)
    assert paths
    assert all(path.split(".")[:4:3] == ["transformer", inside] for path in paths)
    kept = {n.meta["path"] for n in residuals(gpt2, policy=name)}
    for part in outside:
        assert any(path.startswith(f"transformer.h.1.{part}") for path in kept)


def test_norm_results_are_recomputed(gpt2: Joint) -> None:
    """Unlike those of other layers: they are as cheap as what is inside."""
    everything, kept = (residuals(gpt2, policy=p) for p in ("everything", "norm"))
    assert set(everything) - set(kept) == {n for n in everything if "ln_" in n.meta["path"]}
    assert set(kept) < set(everything)


def test_norms_in_a_row_are_recomputed_one_by_one() -> None:
    joint = joint_of(nn.Sequential(*(nn.LayerNorm(4) for _ in range(3))), torch.randn(2, 4))
    kept = [n.meta["path"] for n in residuals(joint, policy="norm")]
    assert kept == ["0", "1"]  # what enters the second and the third


@pytest.mark.parametrize("name", ["gpt2", "bert", "llama", "mixtral", "vit"])
def test_each_block_keeps_one_hidden_state(name: str) -> None:
    """As `torch.utils.checkpoint` per block does: its input."""
    sizes = {} if name == "vit" else {"dropout": 0.0}  # no random states among the residuals
    few, many = (joint_of_model(name, layers=n, **sizes) for n in (2, 5))
    hidden = 2 * 8 * 16 * 4 if name != "vit" else 2 * 5 * 16 * 4  # batch, tokens, width, float32
    more = total(residuals(many, policy="block")) - total(residuals(few, policy="block"))
    assert more == 3 * hidden
    assert len(residuals(many, policy="block")) - len(residuals(few, policy="block")) == 3


def test_blocks_recompute_all_that_is_inside(gpt2: Joint) -> None:
    kept = [n.meta["path"] for n in residuals(gpt2, policy="block")]
    blocks = [path for path in kept if path.startswith("transformer.h")]
    assert blocks == ["transformer.h.0", "transformer.h.1"]


class Cached(nn.Module):
    """Blocks of which the first computes something for all, as T5's position bias."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 32), nn.Linear(32, 8)

        def forward(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
            bias = self.a.weight.sum(0).exp() if bias is None else bias
            return x + self.b(torch.tanh(self.a(x))) * bias, bias

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Cached.Block() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        bias = None
        for block in self.blocks:
            x, bias = block(x, bias)
        return x.sum()


def test_what_a_block_computes_for_others_is_saved() -> None:
    kept = {n.name for n in residuals(joint_of(Cached(), torch.randn(2, 8)), policy="block")}
    assert "exp" in kept
    assert not any(name.startswith("tanh") for name in kept)


@pytest.mark.parametrize("name", ["attention", "mlp", "norm", "block"])
def test_nothing_of_the_kind_is_an_error(name: str) -> None:
    joint = joint_of(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), torch.randn(2, 4))
    with pytest.raises(PolicyError, match=f'policy="{name}" finds no .*recompute='):
        resolve(name)(joint)


def test_no_blocks_points_to_sqrt(chain: Joint) -> None:
    with pytest.raises(PolicyError, match='policy="sqrt" needs no modules'):
        resolve("block")(chain)


# --- sqrt ---------------------------------------------------------------------------------------

LAYER_BYTES = 8 * 4 * 4


@pytest.fixture(scope="module")
def deep() -> dict[int, Joint]:
    """Chains of equal layers."""
    x = torch.randn(8, 4)
    layers = {n: [(nn.Linear(4, 4), nn.Tanh()) for _ in range(n)] for n in (16, 64, 256)}
    return {n: joint_of(nn.Sequential(*itertools.chain(*ls)), x) for n, ls in layers.items()}


@pytest.mark.parametrize("n", [16, 64, 256])
def test_sqrt_bound(n: int, deep: dict[int, Joint]) -> None:
    """About sqrt(n) residuals, about sqrt(n) layers apart."""
    kept = residuals(deep[n], policy="sqrt")
    assert math.sqrt(n) / 2 <= len(kept) <= 2 * math.sqrt(n)
    assert total(kept) == len(kept) * LAYER_BYTES
    layers = sorted(int(node.meta["path"]) // 2 for node in kept)
    gaps = [b - a for a, b in itertools.pairwise([-1, *layers, n - 1])]
    assert max(gaps) <= 2 * math.sqrt(n)


def test_sqrt_with_shortcuts_across_all_layers() -> None:
    """What all segments read is kept once, and does not deter from cutting."""

    def forward(x: Tensor, w: Tensor) -> Tensor:
        shared = (x @ w).sin()
        y = shared
        for _ in range(64):
            y = torch.tanh(y @ w) * shared
        return y.sum()

    joint = joint_of(forward, torch.randn(8, 4), torch.randn(4, 4, requires_grad=True))
    kept = residuals(joint, policy="sqrt")
    assert len(kept) <= 24
    assert "sin" in {n.name for n in kept}


@st.composite
def programs(draw: st.DrawFn) -> Callable[[Tensor, Tensor], Tensor]:
    """A few operations, each on earlier results, which may be narrower or wider."""
    count = draw(st.integers(1, 7))
    steps = [
        (
            draw(st.sampled_from(["sin", "mul", "cat", "slice", "linear", "max"])),
            draw(st.integers(0, i)),
            draw(st.integers(0, i)),
        )
        for i in range(count)
    ]

    def program(x: Tensor, w: Tensor) -> Tensor:
        results = [x @ w]
        for kind, i, j in steps:
            a, b = results[i], results[j]
            results.append(
                {
                    "sin": lambda a=a: a.sin(),
                    "mul": lambda a=a, b=b: a[:, :2] * b[:, :2],
                    "cat": lambda a=a, b=b: torch.cat([a, b], 1),
                    "slice": lambda a=a: a[:, 1:].exp(),
                    "linear": lambda a=a: a[:, :1] @ w[:1],
                    "max": lambda a=a: a.max(1, keepdim=True)[0],
                }[kind]()
            )
        return results[-1].sum()

    return program


@given(programs())
def test_sqrt_is_the_best_of_all_cuts(program: Callable[[Tensor, Tensor], Tensor]) -> None:
    joint = joint_of(program, torch.randn(2, 4), torch.randn(4, 4, requires_grad=True))
    cost = _Cuts(joint)
    positions = range(1, len(cost.nodes))
    few = (cuts for k in range(3) for cuts in itertools.combinations(positions, k))
    assert cost.of_kept(segment_inputs(Structure(joint))) <= min(map(cost, few))


class _Cuts:
    """The memory that cuts cost, counted naively: what crosses them, and the largest segment."""

    def __init__(self, joint: Joint) -> None:
        self.nodes = list(joint.forward_nodes())
        positions = {n: i for i, n in enumerate(self.nodes)}
        self.at = {n: positions[producer(n)] for n in self.nodes}
        self.read = read_by_backward(joint)
        self.values = [n for n in self.nodes if is_value(n)]
        self.last = dict.fromkeys(self.values, -1)
        for node in self.nodes:
            for read in node.all_input_nodes:
                if root(read) in self.last and read is not node.meta.get("alias"):
                    self.last[root(read)] = max(self.last[root(read)], self.at[node])

    def __call__(self, cuts: tuple[int, ...]) -> int:
        kept = {v for v in self.values if any(self.at[v] < c <= self.last[v] for c in cuts)}
        edges = [0, *cuts, len(self.nodes)]
        segments = [
            [v for v in self.read - kept if a <= self.at[v] < b]
            for a, b in itertools.pairwise(edges)
        ]
        return total(list(kept)) + max(map(total, segments))

    def of_kept(self, kept: set[Node]) -> int:
        """The least that cuts cost at which exactly `kept` crosses."""
        cuts = [
            c
            for c in range(1, len(self.nodes))
            if {v for v in self.values if self.at[v] < c <= self.last[v]} <= kept
        ]
        return self(tuple(cuts))


# --- selectors ----------------------------------------------------------------------------------


def test_modules_by_path(gpt2: Joint) -> None:
    every = {"transformer.h.0.attn", "transformer.h.1.attn"}
    for pattern in ("transformer.h.*.attn", "h.*.attn", "attn", "tr*former.h.?.attn"):
        paths = recomputed_paths(gpt2, recompute=pattern)
        assert {".".join(p.split(".")[:4]) for p in paths} == every
        assert "transformer.h.0.attn.c_attn" in paths  # what is below a module belongs to it
    assert recomputed_paths(gpt2, recompute="h.1.attn.c_attn") == {"transformer.h.1.attn.c_attn"}
    in_layers = recomputed_paths(gpt2, recompute="transformer.h")  # a list, which is never called
    assert in_layers == recomputed_paths(gpt2, recompute="transformer.h.*")


def test_stars_do_not_cross_dots(gpt2: Joint) -> None:
    with pytest.raises(PolicyError):
        resolve(recompute="transformer.*.attn")(gpt2)


@pytest.mark.parametrize(
    ("selector", "paths"),
    [
        (nn.LayerNorm, {"transformer.h.0.ln_1", "transformer.h.0.ln_2", "transformer.h.1.ln_1"}),
        (nn.modules.dropout._DropoutNd, {"transformer.drop", "transformer.h.1.mlp.dropout"}),
        (aten.addmm, {"transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj"}),
        (aten.addmm.default, {"transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj"}),
        ("addmm", {"transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj"}),
        ("aten.addmm", {"transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj"}),
        ("aten.addmm.default", {"transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj"}),
        ("aten::tanh", {"transformer.h.0.mlp.act", "transformer.h.1.mlp.act"}),
        ("bernoulli_", {"transformer.drop", "transformer.h.0.attn"}),
        (lambda v: v.random, {"transformer.drop", "transformer.h.0.attn"}),
        (["ln_f", [aten.tanh]], {"transformer.ln_f", "transformer.h.1.mlp.act"}),
    ],
    ids=named,
)
def test_kinds_of_selectors(selector: Any, paths: set[str], gpt2: Joint) -> None:
    found = recomputed_paths(gpt2, recompute=selector)
    assert paths <= found
    assert "lm_head" not in found
    # save= with the same selector saves the rest of a model that recomputes all else.
    kept = {n.meta["path"] for n in resolve(save=selector)(gpt2)}
    assert paths <= kept
    assert "lm_head" not in kept


def test_what_one_selected_module_hands_to_another_is_saved(gpt2: Joint) -> None:
    dropped = {v.node for v in gpt2.values()} - resolve(recompute="transformer.h.*")(gpt2)
    names = {n.meta["path"] for n in residuals(gpt2, recompute="transformer.h.*")}
    assert "transformer.h.0" in names  # enters h.1
    assert "transformer.h.1" not in names  # enters the last norm only
    assert any(n.meta["path"] == "transformer.h.1" for n in dropped)


def test_a_single_operation_is_recomputed_as_asked() -> None:
    joint = joint_of(nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 2)), torch.randn(3, 4))
    assert [n.name for n in residuals(joint, recompute=nn.GELU)] == ["addmm"]
    assert [n.name for n in residuals(joint, recompute="0")] == ["gelu"]
    assert [n.name for n in residuals(joint, recompute=["0", nn.GELU])] == ["addmm"]


def test_which_selector_wins(chain: Joint) -> None:
    assert saved(chain, save="mm", recompute=["mm", "sin"]) == ALL - {"sin"}
    assert saved(chain, save="sin") == {"sin"}
    assert saved(chain, recompute="sin") == ALL - {"sin"}
    assert saved(chain, "dots", save="sin", recompute=lambda v: v.name == "mm") == {"sin", "mm_1"}
    assert saved(chain, "nothing", save="cos") == {"cos"}
    assert saved(chain, "everything", recompute="cos") == ALL - {"cos"}


# --- mistakes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("atention", "unknown policy 'atention'.*'dots'.*did you mean 'attention'"),
        ("xyz", "unknown policy 'xyz': the names are 'everything', 'nothing', 'dots'"),
        (None, "nothing says what to recompute: give a policy.*budget.*recompute="),
        (3, "policy=3 is no policy.*recompute="),
        (nn.Linear, "Linear.*is no policy.*recompute="),
    ],
)
def test_no_policy(policy: Any, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        resolve(policy)


def test_unknown_names_have_no_far_fetched_suggestion() -> None:
    with pytest.raises(PolicyError) as caught:
        resolve("xyz")
    assert "did you mean" not in str(caught.value)
    assert all(repr(name) in str(caught.value) for name in NAMES)


@pytest.mark.parametrize("answer", [None, 1, "save", "SAVE"])
def test_answers_that_are_no_decision(answer: Any, chain: Joint) -> None:
    def odd(value: Value) -> Any:
        return answer

    with pytest.raises(PolicyError, match=f"odd returned {answer!r} for <Value mm: aten.mm"):
        resolve(odd)(chain)


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        (3, "recompute=3 selects nothing: give a module path"),
        (int, "recompute=int is a class, but not one of modules"),
        (torch.nn.functional.gelu, r"such as torch.ops.aten.gelu"),
        ([None, 2.5], "selects nothing"),
    ],
)
def test_no_selector(selector: Any, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        resolve(recompute=selector)


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        ("transformer.h.*.atn", "Did you mean 'transformer.h.[*].attn'"),
        ("h.0.mpl", "Did you mean .*'transformer.h.[*].mlp'"),
        ("adddmm", "'adddmm' matches nothing that the model computes. Did you mean 'aten.addmm'"),
        ("zzz", "There are 'transformer', 'transformer.wte', .* and [0-9]+ more"),
        (nn.Conv2d, "recompute=Conv2d matches nothing.*Did you mean 'Conv1D'"),
        (aten.addbmm, "recompute=torch.ops.aten.addbmm matches.*Did you mean 'aten.addmm'"),
        (nn.Identity, "There are 'Conv1D', 'Dropout', 'Embedding'"),
        (lambda v: False, "matches nothing.*false for all [0-9]+ values"),
        (lambda v: "yes", "returned 'yes' for <Value .*expected True or False"),
    ],
)
def test_a_selector_that_matches_nothing(selector: Any, message: str, gpt2: Joint) -> None:
    with pytest.raises(PolicyError, match=message):
        resolve(recompute=selector)(gpt2)
    with pytest.raises(PolicyError, match=message.replace("recompute", "save")):
        resolve("everything", save=selector)(gpt2)


def test_one_of_several_selectors_that_matches_nothing(gpt2: Joint) -> None:
    with pytest.raises(PolicyError, match="'nowhere' matches nothing"):
        resolve(recompute=["attn", "nowhere"])(gpt2)


def test_a_module_that_computes_no_value_matches_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Flatten(0), nn.Tanh())
    with pytest.raises(PolicyError, match="matches nothing"):
        resolve(recompute=nn.Flatten)(joint_of(model, torch.randn(2, 4)))


def test_mistakes_surface_at_the_first_call() -> None:
    model = fxckpt.rewrite(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), recompute="nowhere")
    with pytest.raises(PolicyError, match="'nowhere' matches nothing"):
        model(torch.randn(2, 4))


# --- exactness ----------------------------------------------------------------------------------


def step(model: nn.Module, case: models.Case) -> list[Tensor]:
    """Loss, gradients and buffers of one training step."""
    torch.manual_seed(3)
    model.zero_grad()
    loss = case.loss(model(**case.batch(1)))
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return [loss.detach(), *(g.clone() for g in grads), *(b.clone() for b in model.buffers())]


@pytest.mark.parametrize(
    "options",
    [
        *({"policy": name} for name in NAMES),
        {"recompute": ["attn", nn.LayerNorm]},
        {"recompute": "transformer.h.*", "save": "h.*.attn.c_attn"},
        {"save": aten.addmm},
        {"policy": lambda v: v.bytes < 1000},
    ],
    ids=lambda options: " ".join(f"{key}={named(value)}" for key, value in options.items()),
)
def test_exact(options: dict[str, Any]) -> None:
    case = models.build("gpt2", tiny=True)
    expected = step(copy.deepcopy(case.model), case)
    rewritten = fxckpt.rewrite(copy.deepcopy(case.model), strict=True, **options)
    got = step(rewritten, case)
    assert len(got) == len(expected) > 20
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("policy", ["norm", "block", "sqrt", "dots"])
def test_exact_with_batch_norm(policy: str) -> None:
    case = models.build("resnet", tiny=True)
    expected = step(copy.deepcopy(case.model), case)
    got = step(fxckpt.rewrite(copy.deepcopy(case.model), policy, strict=True), case)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
