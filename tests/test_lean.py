"""Backward rewritten for less memory at a time: the same bits, by kernels and in training."""

import copy
import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import (
    MODELS,
    Function,
    adamw,
    assert_same,
    build_step,
    content,
    decided,
    joint_of,
    random_choice,
    total,
    train,
)
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.nn import functional as F

import fxckpt
from bench.models import build
from fxckpt import slices
from fxckpt.joint import Joint
from fxckpt.lean import Lean, can_be_imitated, lean
from fxckpt.memory import Memory
from fxckpt.planner import Planner
from fxckpt.schedule import Choice

aten = torch.ops.aten
MIB = 2**20


def blank_like(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, [0] * x.dim(), dtype=x.dtype)


# --- kernels --------------------------------------------------------------------------------------


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[Any, ...]:
    """Arguments of `convolution_backward` without the mask."""
    sizes = draw(st.sampled_from([(9,), (8, 8), (14, 14), (9, 5), (5, 5, 4)]))
    dims, groups = len(sizes), draw(st.sampled_from([1, 1, 2, 4]))
    ins, outs = (groups * draw(st.sampled_from([1, 2, 8, 16])) for _ in range(2))
    kernel, stride, dilation = (draw(st.sampled_from(n)) for n in ([1, 2, 3, 5], [1, 1, 2], [1, 2]))
    transposed = draw(st.booleans())
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    first, second = (ins, outs) if transposed else (outs, ins)
    torch.manual_seed(draw(st.integers(0, 9)))
    x = torch.randn(draw(st.sampled_from([1, 4])), ins, *sizes).to(dtype)
    weight = torch.randn(first, second // groups, *[kernel] * dims).to(dtype)
    options = ([stride] * dims, [kernel // 2] * dims, [dilation] * dims, transposed)
    options += ([stride - 1] * dims if transposed else [0] * dims, groups)
    try:
        y = aten.convolution(x, weight, None, *options)
    except RuntimeError:
        assume(False)
    gradient = torch.randn(y.shape).to(dtype)
    if dims == 2 and draw(st.booleans()):
        gradient = gradient.to(memory_format=torch.channels_last)
    if dims == 2 and draw(st.booleans()):
        weight = weight.to(memory_format=torch.channels_last)
    return gradient, x, weight, [outs], *options


@given(convolutions(), st.booleans())
def test_two_calls_for_a_convolution_give_the_same_bits(args: tuple[Any, ...], bias: bool) -> None:
    gradient, x, *rest = args
    both = aten.convolution_backward(*args, [True, True, bias])
    by_weight = aten.convolution_backward(*args, [False, True, bias])
    by_input = aten.convolution_backward(gradient, blank_like(x), *rest, [True, False, False])
    assert content(both[0]) == content(by_input[0])
    assert content(both[1]) == content(by_weight[1])
    assert not bias or content(both[2]) == content(by_weight[2])


def test_channels_last_cannot_be_imitated() -> None:
    """Kernels lay out the gradient of an input as the input."""
    x = torch.randn(2, 3, 4, 4)
    assert can_be_imitated(x)
    assert not can_be_imitated(x.to(memory_format=torch.channels_last))
    assert not can_be_imitated(x.transpose(2, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [(2, 2, 0), (3, 2, 1), (3, 1, 1), 3], ids=str)
@given(*[st.booleans()] * 3, st.integers(0, 99))
def test_thresholds_before_or_after_pooling_give_the_same_bits(
    window: Any, dtype: torch.dtype, last: bool, last_too: bool, relu: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    special = torch.tensor([-0.0, torch.inf, -torch.inf, torch.nan])
    x = torch.randn(2, 3, 11, 13)
    x = x.where(torch.rand(x.shape) > 0.1, special[seed % 4]).to(dtype)
    layouts = torch.contiguous_format, torch.channels_last
    layout, other = layouts[last], layouts[last_too]
    y = F.threshold(x.to(memory_format=layout), limit := 0.0 if relu else 0.5, 0.0)
    if isinstance(window, int):
        forward, backward, args = aten.adaptive_max_pool2d, aten.adaptive_max_pool2d_backward, ()
        pooled, indices = forward(y, [window, window])
    else:
        forward = aten.max_pool2d_with_indices
        backward = aten.max_pool2d_with_indices_backward
        args = (*([each] * 2 for each in window), [1, 1], False)
        pooled, indices = forward(y, *args)
    gradient = torch.randn(pooled.shape)
    gradient = gradient.where(torch.rand(pooled.shape) > 0.1, special[seed // 4 % 3])
    gradient = gradient.to(dtype).to(memory_format=other)
    after = aten.threshold_backward(backward(gradient, y, *args, indices), y, limit)
    masked = aten.threshold_backward(gradient, pooled, limit)
    before = backward(masked, y, *args, indices)
    assert content(before) == content(after)


LIMITS = [(0.0, 6.0), (-1.0, 1.0), (-0.1, 0.3), (1e-30, 1.0), (2.0, 2.0)]
SIDED: dict[str, Callable[..., Tensor]] = {"hardtanh": F.hardtanh, "leaky_relu": F.leaky_relu}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@given(st.sampled_from(sorted(SIDED)), st.sampled_from(LIMITS), st.booleans())
def test_sides_of_limits_are_told_by_results(
    inplace: bool, dtype: torch.dtype, name: str, limits: tuple[float, float], alone: bool
) -> None:
    """Unless rounding could take a result to the other side, or backward would read one more."""
    options = limits if name == "hardtanh" else limits[:1]
    assume(not inplace or name == "hardtanh" or limits[0] >= 0)  # torch refuses the others

    def forward(m: Function, x: Tensor) -> Tensor:
        y = SIDED[name](x * m.weight.view(-1), *options, inplace=inplace)
        return y + 1 if alone else y * y

    special = torch.tensor([*limits, 0.0, torch.inf, torch.nan, torch.finfo(dtype).tiny]).to(dtype)
    beside = [torch.nextafter(special, torch.full_like(special, far)) for far in (-1e4, 1e4)]
    x = torch.cat([special, -special, *beside, torch.linspace(-9, 9, 9).to(dtype)])
    ours = decided(Function(forward, width=1).to(dtype), leanly(everything))
    plain = Function(forward, width=1).to(dtype)
    gradients = []
    for model in (plain, ours):
        nn.init.ones_(model.weight)
        given_ = x.clone().requires_grad_()
        total(model(given_)).backward()
        gradients.append((content(model.weight.grad), content(given_.grad)))
    assert gradients[0] == gradients[1]
    [node] = [n for n in joint_of(ours).backward_nodes() if name in str(n.target)]
    read: Any = node.args[1]
    exact = all(torch.tensor(each, dtype=dtype).item() == each for each in limits)
    apart = limits[0] < limits[1] and exact if name == "hardtanh" else limits[0] >= 0
    copied = inplace and name == "hardtanh"  # by eager, which keeps the copy
    assert (name in read.name) == ((apart and (copied or not alone)) or (inplace and not copied))
    assert not apart or "clone" not in {n.name for n in joint_of(ours).forward_nodes()}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("name", SIDED)
def test_sides_are_told_by_the_result_of_the_same_limits(name: str, first: bool) -> None:
    """Another operation of the same operand may have others."""
    limits = [(0.0, 6.0), (-1.0, 1.0)] if name == "hardtanh" else [(0.5,), (-0.5,)]

    def forward(m: Function, x: Tensor) -> Tensor:
        h = x * m.weight.view(-1)
        one, other = (SIDED[name](h, *each) for each in (limits if first else limits[::-1]))
        return one * one + 3 * other * other

    ours, plain = (
        decided(Function(forward, width=1), leanly(everything)),
        Function(forward, width=1),
    )
    gradients = []
    for model in (plain, ours):
        nn.init.ones_(model.weight)
        x = torch.linspace(-9, 9, 64).requires_grad_()
        total(model(x)).backward()
        gradients.append((content(model.weight.grad), content(x.grad)))
    assert gradients[0] == gradients[1]


POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "max_pool": lambda x: F.max_pool2d(x, 2),
    "avg_pool": lambda x: F.avg_pool2d(x, 3, 2, 1),
    "adaptive_avg_pool": lambda x: F.adaptive_avg_pool2d(x, 3),
    "adaptive_max_pool": lambda x: F.adaptive_max_pool2d(x, 3),
    "reflection_pad": lambda x: F.pad(x, (1, 2, 0, 1), "reflect"),
    "replication_pad": lambda x: F.pad(x, (1, 2, 0, 1), "replicate"),
    "nll_loss": lambda x: F.nll_loss(x.flatten(2).mean(2), torch.tensor([1, 0])),
    "nll_loss2d": lambda x: F.nll_loss(x, torch.ones(2, 8, 9, dtype=torch.long)),
}


@pytest.mark.parametrize("name", POOLS)
def test_what_is_read_for_its_shape_is_not_kept(name: str) -> None:
    """Gradients are the same bits, and backward reads no value but masks and indices."""

    def forward(m: Function, x: Tensor) -> Tensor:
        return POOLS[name](x.mul(m.weight[0, 0]))

    x = torch.linspace(-1, 1, 2 * 3 * 8 * 9).view(2, 3, 8, 9)
    plain, ours = Function(forward), decided(Function(forward), leanly(everything))
    ours.load_state_dict(plain.state_dict())
    for model in (plain, ours):
        total(model(x)).backward()
    assert content(plain.weight.grad) == content(ours.weight.grad)
    read = {n for node in joint_of(ours).backward_nodes() for n in node.all_input_nodes}
    assert "mul" not in {n.name for n in read}


# --- graphs ---------------------------------------------------------------------------------------


def everything(joint: Joint) -> set[Node]:
    return {value.node for value in joint.values()}


def leanly(decide: Callable[[Joint], Any]) -> Callable[[Joint], Choice]:
    """A decision on the lean graph."""

    def decide_on(joint: Joint) -> Choice:
        better = lean(joint, ~Lean(0))
        better.verify()
        choice = Choice.of(decide(better))
        return dataclasses.replace(choice, joint=better)

    return decide_on


@pytest.mark.parametrize("name", MODELS)
def test_training_is_exact(name: str) -> None:
    case, twin = build(name, tiny=True), build(name, tiny=True)
    for each, decide in itertools.product((twin,), (everything, random_choice(2, 1))):
        eager = train(build(name, tiny=True).model, build_step(case), optimizer=adamw)
        model = decided(build(name, tiny=True).model, leanly(decide))
        assert_same(eager, train(model, build_step(each), optimizer=adamw))


def masks_of(joint: Joint) -> list[list[bool]]:
    """Of the convolutions of backward: whether they give gradients of input, weight and bias."""
    target = aten.convolution_backward.default
    return [n.args[-1] for n in joint.backward_nodes() if n.target is target]


def test_gradients_come_first() -> None:
    """The input of a layer dies before the gradient for it is made."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)).requires_grad_()
    new = fxckpt.rewrite(model, "nothing", example_inputs=(torch.ones(512, 8),))
    joint = joint_of(new)

    def products(joint: Joint) -> list[str]:
        nodes = [n for n in joint.backward_nodes() if n.target is aten.mm.default]
        return ["x".join(map(str, n.meta["val"].shape)) for n in nodes]

    assert products(joint) == ["512x8", "8x8", "8x8"]
    assert products(lean(joint)) == ["8x8", "512x8", "8x8"]


def test_convolution_is_differentiated_without_its_input() -> None:
    """Of 1 MiB each: the input, and the gradients of output and input, of which two are there."""
    stem, conv = (nn.Conv2d(16, 16, 3, padding=1, bias=False) for _ in range(2))
    x = torch.ones(1, 16, 128, 128)
    new = fxckpt.rewrite(nn.Sequential(stem, conv), "everything", example_inputs=(x,))
    joint = joint_of(new)
    better = lean(joint)
    masks = [
        n.args[-1] for n in better.backward_nodes() if n.target is aten.convolution_backward.default
    ]
    assert masks == [[False, True, False], [True, False, False], [False, True, False]]
    eager, ours = (Memory(each, workspaces=False, outputs_held=False) for each in (joint, better))
    weights = stem.weight.nbytes * 2
    assert eager.replay(eager.values).backward_peak <= 3 * MIB + weights
    assert ours.replay(ours.values).backward_peak <= 2 * MIB + weights + 8


def rectified() -> tuple[nn.Module, Tensor]:
    """ReLUs are differentiated by their results, which convolutions read: one large, one small."""
    model = nn.Sequential(
        *(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.MaxPool2d(4)),
        *(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)),
    )
    return model, torch.randn(2, 3, 48, 48)


def test_convolution_whose_input_is_read_later_is_left_alone_if_it_is_small() -> None:
    model, x = rectified()
    new = fxckpt.rewrite(model, "everything", example_inputs=(x,))
    pooled_or_large = [[False, True, True], [True, False, False]]
    masks = masks_of(lean(joint_of(new), ~Lean(0)))
    assert masks == [[True] * 3, *pooled_or_large, *pooled_or_large, [False, True, True]]


@pytest.mark.parametrize("name", ["resnet", "unet"])
def test_calls_that_take_more_workspace_are_not_made(name: str) -> None:
    """On the CPU; what is read for its shape is copied there."""
    case = build(name, tiny=True)
    joint = joint_of(fxckpt.rewrite(case.model, "everything", example_inputs=case.batch(0)))
    one, two = (Memory(lean(joint, what), workspaces=True) for what in (1, 3))
    most = min(max(m.fixed.peak, m.replay(m.values).peak) for m in (one, two))
    assert len(masks_of(one.joint)) < len(masks_of(two.joint))
    chosen = Planner(joint).memory
    assert max(chosen.fixed.peak, chosen.replay(chosen.values).peak) <= 1.001 * most


def test_large_input_of_a_convolution_is_let_go_between_its_readers() -> None:
    """It meets neither both gradients, nor what is made of it."""
    model, x = rectified()
    found, *_, most = fxckpt.frontier(model, x, device="v100")
    assert not most.fleeting
    large = 2 * 4 * 46 * 46 * 4
    assert found.fleeting
    assert found.peak < 3 * large
    rewritten = fxckpt.rewrite(copy.deepcopy(model), plan=found, strict=True)
    for each in (model, rewritten):
        each(x).square().sum().backward()
    grads = [[content(p.grad) for p in each.parameters()] for each in (model, rewritten)]
    assert grads[0] == grads[1]


class Pooled(nn.Module):
    """A convolution, ReLU and max-pooling; what ReLU gives may be read once more."""

    def __init__(self, *, twice: bool) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)
        self.twice = twice

    def forward(self, x: Tensor) -> Tensor:
        """Of images."""
        y = self.stem(x).relu()
        z = self.head(F.max_pool2d(y, 3, 2, 1)).mean()
        return z + (y * y).mean() if self.twice else z


@pytest.mark.parametrize("twice", [False, True])
def test_what_is_pooled_is_masked_before(twice: bool) -> None:
    """Unless somebody else reads it, backward does without what ReLU gave."""
    torch.manual_seed(0)
    plain, x = Pooled(twice=twice), torch.randn(2, 3, 16, 16)
    ours = decided(Pooled(twice=twice), leanly(everything))
    ours.load_state_dict(plain.state_dict())
    for model in (plain, ours):
        model(x).backward()
    for mine, theirs in zip(ours.parameters(), plain.parameters(), strict=True):
        assert content(mine.grad) == content(theirs.grad)
    read = {n.name for node in lean(joint_of(ours)).backward_nodes() for n in node.all_input_nodes}
    assert ("relu" in read) == twice


class Skips(nn.Module):
    """A convolution, some below it, and their results side by side."""

    def __init__(self, depth: int, skipped: int, deeper: int, *, kept: str = "") -> None:
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, skipped, 3), nn.Conv2d(skipped, deeper, 3, padding=1)
        layers = (nn.Conv2d(deeper, deeper, 3, padding=1) for _ in range(depth))
        self.below, self.head = nn.Sequential(*layers), nn.Conv2d(skipped + deeper, 4, 3)
        self.kept = kept
        self.register_buffer("scale", torch.full((1,), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        """Of images."""
        skip = self.stem(x)
        deep = self.below(self.down(skip))
        kept = {"scaled": skip * self.scale, "twice": skip + skip}.get(self.kept, skip)
        both = torch.cat([kept, deep], 1)
        return self.head(both).square().mean()


SKIPS = {"half": Skips(9, 8, 8), "a quarter": Skips(9, 4, 12)}
NO_SKIPS = {
    "most": Skips(9, 14, 2),
    "read soon": Skips(0, 8, 8),
    "scaled": Skips(9, 8, 8, kept="scaled"),
    "added to itself": Skips(9, 8, 8, kept="twice"),
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", [*SKIPS, *NO_SKIPS])
def test_part_of_a_gradient_that_waits_is_copied(name: str, layout: torch.memory_format) -> None:
    """If it is a small part, waits long, and is only added to something."""
    plain = {**SKIPS, **NO_SKIPS}[name].to(memory_format=layout)
    ours, x = copy.deepcopy(plain), torch.randn(2, 3, 12, 12).to(memory_format=layout)
    ours = decided(ours, leanly(everything))
    for model in (plain, ours):
        model.zero_grad()
        model(x).backward()
    for mine, theirs in zip(ours.parameters(), plain.parameters(), strict=True):
        assert content(mine.grad) == content(theirs.grad)
    copies = [n for n in joint_of(ours).backward_nodes() if n.target is aten.clone.default]
    assert len(copies) == (name in SKIPS)


@pytest.mark.parametrize(
    ("rows", "other", "taken"),
    [
        (4, torch.ones(4, 3), True),
        (1, torch.ones(2, 3), False),
        (4, torch.ones(4, 3, dtype=torch.float64), False),
    ],
    ids=["alike", "larger", "another dtype"],
)
def test_copies_are_made_for_sums_that_look_like_them(
    rows: int, other: Tensor, taken: bool
) -> None:
    graph, whole = Graph(), torch.ones(rows, 9)
    nodes = [graph.placeholder(name) for name in ("whole", "other")]
    view = graph.call_function(aten.slice.Tensor, (nodes[0], 1, 0, 3))
    made = graph.call_function(aten.add.Tensor, (view, nodes[1]))
    values = whole, other, whole[:, :3], whole[:, :3] + other
    for node, val in zip((*nodes, view, made), values, strict=True):
        node.meta["val"] = val
    assert slices._is_added(view) == taken


def test_copies_are_made_where_they_pay() -> None:
    """Not where all is kept, since they take time; for the least memory they are."""
    model, x = Skips(6, 8, 8), torch.randn(4, 3, 64, 64)
    joint = joint_of(fxckpt.rewrite(model, "nothing", example_inputs=(x,)))
    planner = Planner(joint, device="v100")
    ordinary, copying = planner._searches
    copied = copying.memory
    assert copied.joint.lean & Lean.SLICES
    assert ordinary.consider(ordinary.memory.values).seconds == 0
    assert copying.consider(copied.values).seconds > 0
    most, least = planner.plan(planner.eager_peak), planner.least()
    assert [bool(plan.lean & Lean.SLICES) for plan in (least, most)] == [True, False]
    rewritten = fxckpt.rewrite(copy.deepcopy(model), plan=least, strict=True)
    for each in (model, rewritten):
        each(x).backward()
    grads = [[content(p.grad) for p in each.parameters()] for each in (model, rewritten)]
    assert grads[0] == grads[1]
