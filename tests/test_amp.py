"""Mixed precision: autocast around the model, in any combination, with gradient scaling."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    Attention,
    Stack,
    assert_same,
    captures,
    content,
    graph_texts,
    leaves,
    seed_all,
    sgd,
    total,
)
from torch import Tensor, nn

import fxckpt
from bench.models import build

DTYPES = [torch.bfloat16, torch.float16]
POLICIES = ("nothing", "dots", "everything")


def both(make: Callable[[], nn.Module], use: Callable[[nn.Module], Any], policy: str) -> nn.Module:
    """Asserts that eager and rewritten return the same bits; returns the rewritten module."""
    results = []
    for rewritten in (False, True):
        seed_all(0)
        model = make()
        if rewritten:
            model = fxckpt.rewrite(model, policy, strict=True)
        seed_all(1)
        found = leaves(use(model))
        results.append([(n, content(t) if isinstance(t, Tensor) else t) for n, t in found])
    assert_same(*results)
    return model


def grads(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in model.named_parameters()}


def x() -> Tensor:
    return torch.linspace(-1, 1, 80).view(2, 5, 8).sin()


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Dropout(0.3),
        nn.Flatten(),
        nn.Linear(72, 3),
    )


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_outside(dtype: torch.dtype, policy: str) -> None:
    def use(model: nn.Module) -> Any:
        optimizer = sgd(model.parameters())
        for _ in range(2):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype):
                out = model(x())
                loss = total(out)
            loss.backward()
            optimizer.step()
        return out, grads(model)

    model = both(Stack, use, policy)
    assert str(dtype) in "".join(graph_texts(model))


@pytest.mark.parametrize("policy", POLICIES)
def test_backward_inside(policy: str) -> None:
    """Backward under autocast: what it multiplies is cast as well."""

    def use(model: nn.Module) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            total(model(x())).backward()
        first = grads(model)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = total(model(x()))
        loss.backward()
        return first, grads(model)

    both(Stack, use, policy)


def test_backward_alone_inside() -> None:
    def use(model: nn.Module) -> Any:
        loss = total(model(x()))
        with torch.autocast("cpu", torch.bfloat16):
            loss.backward()
        return grads(model)

    both(Stack, use, "nothing")


@pytest.mark.parametrize("policy", POLICIES)
def test_on_and_off(policy: str) -> None:
    def use(model: nn.Module) -> Any:
        seen = []
        for enabled in (True, False, True, False):
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                out = model(x())
            total(out).backward()
            seen.append((out, grads(model)))
        return seen

    model = both(Stack, use, policy)
    assert len(captures(model)) == 2


def test_one_dtype_and_another() -> None:
    def use(model: nn.Module) -> Any:
        seen = []
        for dtype in (torch.bfloat16, torch.float16, torch.bfloat16):
            with torch.autocast("cpu", dtype):
                out = model(x())
            seen.append(out)
        total(seen).backward()
        return seen, grads(model)

    assert len(captures(both(Stack, use, "nothing"))) == 2


def test_inside_of_the_model() -> None:
    """Autocast switched on, and off again, within forward."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = Stack(), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                out = self.inner(x)
                with torch.autocast("cpu", enabled=False):
                    return self.head(out.float())

    def use(model: nn.Module) -> Any:
        total(model(x())).backward()
        return grads(model)

    both(Model, use, "nothing")


@pytest.mark.parametrize("policy", POLICIES)
def test_convolution_and_batch_norm(policy: str) -> None:
    def use(model: nn.Module) -> Any:
        images = torch.linspace(-1, 1, 96).view(2, 1, 6, 8).cos()
        images = F.pad(images, (0, -0))
        with torch.autocast("cpu", torch.bfloat16):
            out = model(images)
            loss = F.cross_entropy(out, torch.tensor([0, 2]))
        loss.backward()
        return out, grads(model), list(model.buffers())

    def make() -> nn.Module:
        model = convolutional()
        model[-1] = nn.Linear(4 * 4 * 6, 3)
        return model

    both(make, use, policy)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_scaler(dtype: torch.dtype, policy: str) -> None:
    """The loop of torch's documentation; one step overflows and is skipped."""

    def use(model: nn.Module) -> Any:
        optimizer = sgd(model.parameters())
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14, growth_interval=2)
        scales = []
        for number in range(4):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype):
                loss = total(model(x())) * (1e38 if number == 1 else 1)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        assert scales[1] < scales[0]
        return scales, list(model.parameters())

    both(Stack, use, policy)


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "resnet"])
def test_models(name: str) -> None:
    def use(model: nn.Module) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            loss = case.loss(model(**case.batch(0)))
        loss.backward()
        return loss, grads(model), list(model.buffers())

    case = build(name, tiny=True)
    both(lambda: build(name, tiny=True).model, use, "nothing")


def test_second_derivative() -> None:
    def use(model: nn.Module) -> Any:
        inputs = x().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(inputs).float().sum()
        (g,) = torch.autograd.grad(loss, inputs, create_graph=True)
        g.pow(2).sum().backward()
        return inputs.grad, grads(model)

    both(lambda: Attention(8), use, "nothing")


def test_cache_of_cast_weights_is_left_clean() -> None:
    """Autocast keeps cast weights until its outermost block ends; capture must not fill it."""
    model = fxckpt.rewrite(Stack(), "nothing", strict=True)
    with torch.autocast("cpu", torch.bfloat16):
        model(x())
        out = model.head(torch.ones(1, 8))
    assert type(out) is Tensor
    out.sum().backward()
    assert type(model.head.weight.grad) is Tensor


def test_weights_are_cast_once_for_two_calls() -> None:
    """Equal up to rounding in bfloat16: docs/limits.md documents it.

    Eager casts a weight once in a region, and adds up the gradients of the cast weight in bfloat16;
    the rewritten model casts it in each call, and adds up in float32.
    """

    def use(model: nn.Module) -> tuple[list[Tensor], dict[str, Tensor | None]]:
        with torch.autocast("cpu", torch.bfloat16):
            out = [model(x()), model(x() * 2)]
        total(out).backward()
        return out, grads(model)

    def make() -> nn.Module:
        seed_all(0)
        return nn.Sequential(nn.Linear(8, 8), nn.Tanh())

    eager, ours = use(make()), use(fxckpt.rewrite(make(), "nothing", strict=True))
    for expected, got in zip(eager[0], ours[0], strict=True):
        assert torch.equal(expected, got)
    # Rounding of the sum and of one term: at most one unit in the last place of the largest.
    scale = max(float(g.abs().max()) for g in eager[1].values())
    atol = scale * torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(ours[1], eager[1], rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES)
def test_model_in_low_precision(dtype: torch.dtype) -> None:
    def use(model: nn.Module) -> Any:
        total(model(x().to(dtype))).backward()
        return grads(model)

    for policy in POLICIES:
        both(lambda: Stack().to(dtype), use, policy)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_with_gradient_scaler(dtype: torch.dtype) -> None:
    results = []
    for rewritten in (False, True):
        seed_all(0)
        model = Stack().cuda()
        if rewritten:
            model = fxckpt.rewrite(model, "nothing", strict=True)
        optimizer, scaler = sgd(model.parameters()), torch.amp.GradScaler("cuda")
        torch.cuda.manual_seed(0)
        for _ in range(3):
            optimizer.zero_grad()
            with torch.autocast("cuda", dtype):
                loss = total(model(x().cuda()))
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        results.append([p.detach().cpu() for p in model.parameters()])
    for expected, got in zip(*results, strict=True):
        assert torch.equal(expected, got)
