"""Checkpoints within checkpoints: exact, with the memory of the nest."""

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import chain
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import grad, hessian, vmap

import fxckpt
from bench.measure import peak_and_saved
from fxckpt import checkpoint, saved_values

Function = Callable[[Tensor], Tensor]
WIDTH = 8


def wide(seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(16, WIDTH, requires_grad=True)


WEIGHT = wide(1)[:WIDTH].detach().requires_grad_()
STEPS: dict[str, Function] = {
    "wave": lambda x: x.sin().exp().tanh(),
    "product": lambda x: (x @ WEIGHT).tanh(),
    "norm": lambda x: torch.layer_norm(x, (WIDTH,)) * x,
    "dropout": lambda x: torch.dropout(x, 0.3, True) * 2,
    "in place": lambda x: x.clone().mul_(2).add_(x).sin(),
}


def halved(steps: list[Function], ck: Callable[[Function], Function]) -> Function:
    """The steps one after the other, with a checkpoint around each half, and so on."""
    if len(steps) == 1:
        return steps[0]
    middle = len(steps) // 2
    first, second = ck(halved(steps[:middle], ck)), ck(halved(steps[middle:], ck))
    return lambda x: second(first(x))


def step(f: Function, x: Tensor) -> list[Tensor]:
    torch.manual_seed(2)
    out = f(x)
    return [out, *torch.autograd.grad(out.square().sum(), [x, WEIGHT], allow_unused=True)]


def assert_same(plain: Function, lean: Function) -> None:
    for _ in range(3):
        x = wide()
        pairs = zip(step(plain, x), step(lean, x), strict=True)
        assert all(a is b or torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("count", [8, 16, 32])
def test_memory_of_a_chain_grows_with_the_logarithm(count: int) -> None:
    """A value for each half around; each operation runs as often as there are halves around it."""
    plain = halved([STEPS["wave"]] * count, lambda f: f)
    lean = checkpoint(halved([STEPS["wave"]] * count, checkpoint), strict=True)
    x = torch.ones(10_000, requires_grad=True)
    for _ in range(3):
        expected, found = (torch.autograd.grad(f(x).sum(), x)[0] for f in (plain, lean))
        assert torch.equal(expected, found)
    run = SimpleNamespace(run=lambda _: torch.autograd.grad(lean(x).sum(), x))
    halves = count.bit_length() - 1
    assert peak_and_saved(run, "cpu")[0] <= (halves + 2.1) * x.nbytes
    _, backward = fxckpt.graphs(lean.__fxckpt__)
    again = len(re.findall(r"= aten_tanh_\w+\(", backward.code))
    assert again <= count * (halves + 1)


TREES = st.recursive(
    st.sampled_from([*STEPS]),
    lambda inner: st.tuples(
        st.sampled_from(["nothing", "dots", "everything", "plain"]),
        st.lists(inner, min_size=1, max_size=3),
    ),
    max_leaves=7,
)


def build(tree: Any, ck: Callable[[Function, str], Function]) -> Function:
    if isinstance(tree, str):
        return STEPS[tree]
    policy, inner = tree
    functions = [build(each, ck) for each in inner]

    def run(x: Tensor) -> Tensor:
        for f in functions:
            x = f(x)
        return x

    return run if policy == "plain" else ck(run, policy)


@given(TREES)
def test_random_nests_are_exact(tree: Any) -> None:
    plain = build(tree, lambda f, _: f)
    lean = checkpoint(build(tree, lambda f, p: checkpoint(f, policy=p)), strict=True)
    assert_same(plain, lean)


def test_what_an_inner_one_recomputes_is_not_saved() -> None:
    inner = checkpoint(lambda x: x.sin().exp().tanh(), policy="nothing")
    kept = saved_values(checkpoint(lambda x: inner(x).cos().exp(), policy="everything"), wide())
    outputs = [value.origin for value in kept if "output of" in value.origin]
    assert [re.search(r"aten\.(\w+)", origin)[1] for origin in outputs] == ["tanh", "exp"]


def test_what_an_inner_one_saves_the_outer_one_may_recompute() -> None:
    inner = checkpoint(lambda x: (x @ WEIGHT).sin(), policy="dots")
    for policy, count in (("nothing", 0), ("dots", 1)):
        kept = saved_values(checkpoint(lambda x: inner(x).exp(), policy=policy), wide())
        assert sum("output of aten.mm" in value.origin for value in kept) == count


def test_modules_within_modules() -> None:
    inner = fxckpt.rewrite(chain(4, WIDTH), "nothing")
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), inner, nn.Linear(WIDTH, WIDTH), nn.Tanh())
    plain = nn.Sequential(model[0], fxckpt.restore_(fxckpt.rewrite(inner, "dots")), *model[2:])
    lean = fxckpt.rewrite(model, "everything", strict=True)
    for _ in range(3):
        x = wide()
        found = [torch.autograd.grad(m(x).sum(), [x, *plain.parameters()]) for m in (plain, lean)]
        assert all(map(torch.equal, *found))
    kept = saved_values(lean, wide())
    inside = [v for v in kept if re.search(r"output of .* in 1\.", v.origin)]
    assert len(inside) <= 1  # what the inner one returns


@pytest.mark.parametrize("transform", [grad, lambda f: vmap(grad(f)), hessian])
def test_under_transforms(transform: Any) -> None:
    names = ["wave", "norm", "wave", "in place"]

    def total(ck: Callable[[Function], Function]) -> Function:
        f = ck(halved([STEPS[name] for name in names], ck))
        return lambda x: f(x).sum()

    x = wide().detach()[:2].double()
    expected, found = transform(total(lambda f: f))(x), transform(total(checkpoint))(x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_a_policy_is_asked_once_however_many_calls_it_decides_for() -> None:
    asked: list[str] = []

    def policy(value: fxckpt.Value) -> bool:
        asked.append(value.name)
        return False

    def counted(count: int) -> int:
        inner = checkpoint(STEPS["wave"], policy=policy)

        def chained(x: Tensor) -> Tensor:
            for _ in range(count):
                x = inner(x)
            return x

        asked.clear()
        step(checkpoint(chained, strict=True), wide())
        return max(map(asked.count, asked))

    assert counted(2) == counted(16)
