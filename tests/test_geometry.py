"""What is recorded has the shapes and strides of the real kernels, or is captured anew."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    Function,
    LiveBytes,
    assert_same,
    assert_same_training,
    captures,
    sgd,
    total,
    train,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fxckpt
from fxckpt import first_run, shapes
from fxckpt.shapes import Geometry

aten = torch.ops.aten
POLICIES = ("nothing", "dots", "everything")


@pytest.fixture(autouse=True)
def learned(monkeypatch: pytest.MonkeyPatch) -> dict[Any, Any]:
    """What first runs learn in a test, forgotten after it."""
    found: dict[Any, Any] = {}
    monkeypatch.setattr(shapes, "LEARNED", found)
    return found


# --- models whose fake kernels are wrong ----------------------------------------------------------


def turned(module: nn.Module, x: Tensor) -> Tensor:
    return F.linear(x, module.weight).transpose(1, 2)


def softplus(module: nn.Module, x: Tensor) -> Tensor:
    return F.softplus(F.linear(x, module.weight[:3])).transpose(1, 2).contiguous().sin()


def elu(module: nn.Module, x: Tensor) -> Tensor:
    return F.elu(turned(module, x)) + 1


def multilabel_margin(module: nn.Module, x: Tensor) -> Tensor:
    scores, labels = F.linear(x, module.weight)[0, 0], torch.tensor([3, 0, -1, 1])
    return F.multilabel_margin_loss(scores, labels, reduction="none")


def viewed(module: nn.Module, x: Tensor) -> Tensor:
    """`view` fits the real strides alone."""
    return torch.logaddexp(turned(module, x), x.mT[:1]).mT.view(-1).exp()


def losses(module: nn.Module, x: Tensor) -> Tensor:
    y, target = turned(module, x), x.mT.contiguous()
    parts = [f(y, target) for f in (F.mse_loss, F.smooth_l1_loss, F.huber_loss)]
    return sum(parts) + F.hardswish(y).add(F.logsigmoid(y)).div(2, rounding_mode="floor").sum()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("forward", [softplus, elu, multilabel_margin, viewed, losses])
def test_is_captured_exactly(forward: Callable[..., Tensor], policy: str) -> None:
    def batch(_: int) -> Tensor:
        return torch.randn(2, 5, 4)

    for loss in (total, lambda result: result.square().mean(), lambda result: result.sum()):
        assert_same_training(lambda: Function(forward), batch, loss, policy)


# --- trials: every element-wise operation, every layout -------------------------------------------

SIZES = ((3, 7, 2, 9), (6, 6, 1, 6))


def layouts(size: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors that can be broadcast to one size, each laid out in another way."""

    def full(*size: int) -> Tensor:
        return torch.full(size, 0.5 if dtype.is_floating_point else 1, dtype=dtype)

    a, b, c, d = size
    return {
        "contiguous": full(a, b, c, d),
        "transposed": full(d, c, b, a).permute(3, 2, 1, 0),
        "permuted": full(c, a, d, b).permute(1, 3, 0, 2),
        "channels last": full(a, c, d, b).permute(0, 3, 1, 2),
        "expanded": full(c, d).expand(size),
        "expanded at the end": full(b, a, 1, 1).transpose(0, 1).expand(size),
        "sliced": full(a, b, c, 2 * d)[..., :d],
        "transposed and sliced": full(a, 2 * b, d, c).mT[:, :b],
        "row": full(d),
        "column": full(b, 1, 1),
        "turned column": full(1, b, a).permute(2, 1, 0)[..., None],
        "number": full(),
    }


def element_wise() -> Iterator[Any]:
    """All operations that may be tried, but for a few with arguments of their own."""
    for name in sorted(dir(aten)):
        if name.startswith("special_") or "_norm" in name:
            continue
        packet = getattr(aten, name)
        if isinstance(packet, torch._ops.OpOverloadPacket):
            for overload in packet.overloads():
                func = getattr(packet, overload)
                if shapes._can_be_tried(func) and str(func._schema.returns[0].type) == "Tensor":
                    yield func


def arguments(func: Any, tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    """Arguments of an operation: these tensors, and simple values for the rest."""
    simple = {"float": 0.5, "number": 0.5, "int": 1, "bool": True, "str": "none", "NoneType": None}
    left, found = list(tensors), []
    for a in func._schema.arguments:
        kind = str(a.type).removeprefix("Optional[").removesuffix("]")
        if a.kwarg_only:
            break
        if str(a.type) == "Tensor":
            tensor = left.pop(0)
            found.append(tensor.bool() if a.name in ("condition", "mask") else tensor)
        elif a.name == "input_dtype":
            found.append(tensors[0].dtype)
        elif a.default_value is not None or (str(a.type).startswith("Optional") and kind != "bool"):
            found.append(a.default_value)
        else:
            found.append(simple[kind])
    return tuple(found)


def operands(func: Any) -> int:
    return sum(str(a.type) == "Tensor" and not a.kwarg_only for a in func._schema.arguments)


def choices(func: Any, size: tuple[int, ...], dtype: torch.dtype) -> Iterator[tuple[Tensor, ...]]:
    """Operands in all combinations of layouts, or a random sample of these."""
    known = list(layouts(size, dtype).values())
    if torch.Tag.pointwise not in func.tags:
        known = [t for t in known if t.size() == size]
    every = list(itertools.product(known, repeat=operands(func)))
    yield from random.sample(every, min(len(every), 16))


def differs(func: Any, args: tuple[Any, ...], real: Any) -> str | None:
    """How the recorded geometry of a call differs from that of its real results."""
    before = torch.get_rng_state()
    with FakeTensorMode():
        fakes = [Geometry.of(a).empty() if isinstance(a, Tensor) else a for a in args]
        fake = shapes.corrected(func, fakes, {}, func(*fakes))
    assert torch.equal(before, torch.get_rng_state())
    for r, f in zip(*((x if isinstance(x, tuple) else (x,)) for x in (real, fake)), strict=True):
        if isinstance(r, Tensor) and not shapes.alike(Geometry.of(f), r):
            shown = [(tuple(a.size()), a.stride()) for a in args if isinstance(a, Tensor)]
            return f"{func} of {shown}: {Geometry.of(r)}, but {Geometry.of(f)} was recorded"
    return None


def result_of(func: Any, args: tuple[Any, ...]) -> Any:
    """The real result; None if the kernel refuses these arguments."""
    try:
        return func(*args)
    except (RuntimeError, NotImplementedError):
        return None


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("count", "least"), [(1, 110), (2, 70), (3, 10)])
def test_element_wise_operations(count: int, least: int, size: tuple[int, ...]) -> None:
    tested, problems = 0, []
    for func in element_wise():
        for dtype in (torch.float32, torch.int64):
            if operands(func) != count:
                break
            calls = [arguments(func, c) for c in choices(func, size, dtype)]
            results = [(args, result_of(func, args)) for args in calls]
            results = [(args, result) for args, result in results if result is not None]
            problems += [differs(func, *each) for each in results]
            if results:
                tested += 1
                break
    found = [p for p in problems if p is not None]
    assert not found, f"{len(found)}: {found[:3]}"
    assert tested >= least


def norms(x: Tensor, y: Tensor) -> dict[Any, tuple[Any, ...]]:
    """Normalisation layers and their backwards, which are tried too."""
    c, d = x.size(1), x.size(-1)
    weight, mean, rows = torch.ones(c), torch.zeros(c), torch.ones(*x.shape[:-1], 1)
    plain, mask = (weight, None, None, None), [True, True, True]
    return {
        aten.native_batch_norm.default: (x, *plain, True, 0.1, 1e-5),
        aten.native_batch_norm_backward.default: (y, x, *plain[:3], mean, mean, True, 1e-5, mask),
        aten.native_layer_norm.default: (x, [d], torch.ones(d), None, 1e-5),
        aten.native_layer_norm_backward.default: (
            y,
            x,
            [d],
            rows,
            rows,
            *2 * (torch.ones(d),),
            mask,
        ),
        aten._weight_norm_interface.default: (x, torch.ones(x.size(0), 1, 1, 1)),
    }


@pytest.mark.parametrize("size", SIZES)
def test_normalisation(size: tuple[int, ...]) -> None:
    full = [t for t in layouts(size, torch.float32).values() if t.size() == size]
    for x, y in itertools.product(full, repeat=2):
        for func, args in norms(x, y).items():
            assert not (problem := differs(func, args, func(*args))), problem


def test_a_trial_is_made_once_and_only_for_strided_operands(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried = []

    def count(*args: Any) -> list[Any]:
        tried.append(args[0])
        return []

    monkeypatch.setattr(shapes, "_try", count)
    monkeypatch.setattr(shapes, "_TRIALS", {})
    x = torch.randn(4, 4)
    assert_same_training(lambda: nn.Sequential(nn.Linear(4, 4), nn.GELU()), lambda _: x, total)
    assert not tried
    for _ in range(2):
        assert_same_training(lambda: Function(lambda m, x: x.sin() * m.weight.T), lambda _: x)
        assert 0 < len(tried) < 6
        assert len(set(map(str, tried))) == len(tried)


# --- first runs -----------------------------------------------------------------------------------


class Delicate(nn.Module):
    """Changes buffers, draws random numbers: a first forward that does not fit must not show."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.drop = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.3)
        self.down = nn.Linear(6, 2)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.drop(self.norm(self.up(x)))
        self.calls.add_(1)
        return self.drop(self.down(F.gelu(hidden) * self.calls.clone()))


def rows(number: int = 0) -> Tensor:
    return torch.randn(5, 4)


def turn(monkeypatch: pytest.MonkeyPatch, *functions: Any) -> None:
    """Makes fake kernels wrong: they return the (first) result laid out the other way round."""

    def wrong(func: Any) -> Callable[..., Any]:
        def fake(*args: Any, **kwargs: Any) -> Any:
            out = func(*args, **kwargs)
            first = out if isinstance(out, Tensor) else out[0]
            turned = aten.empty_strided.default(
                first.size(), first.mT.contiguous().mT.stride(), dtype=first.dtype
            )
            return turned if isinstance(out, Tensor) else (turned, *out[1:])

        return fake

    for func in functions:
        monkeypatch.setitem(shapes.OWN, func, wrong(func))


WRONG = {
    "forward": (aten.gelu.default,),
    "backward": (aten.gelu_backward.default,),
    "one of several results": (aten.native_batch_norm.default,),
    "several in a row": (aten.native_batch_norm.default, aten.gelu.default, aten.addmm.default),
    "both": (
        aten.gelu.default,
        aten.gelu_backward.default,
        aten.native_batch_norm_backward.default,
    ),
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_learns_what_a_fake_kernel_gets_wrong(
    wrong: tuple[Any, ...], policy: str, monkeypatch: pytest.MonkeyPatch, learned: dict[Any, Any]
) -> None:
    turn(monkeypatch, *wrong)
    model = assert_same_training(Delicate, rows, policy=policy, steps=4)
    assert {func for func, *_ in learned} == {*wrong}
    (captured,) = captures(model)
    assert captured.standing.misfit is None
    assert len(captured.program.tried) == 2


def test_what_was_learned_is_known_at_the_next_capture(
    monkeypatch: pytest.MonkeyPatch, learned: dict[Any, Any]
) -> None:
    turn(monkeypatch, *WRONG["both"])
    assert_same_training(Delicate, rows)
    known = dict(learned)
    monkeypatch.setattr(shapes, "learn", None)  # nothing more is
    assert_same_training(Delicate, rows)
    assert learned == known


def test_several_forwards_before_the_first_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    turn(monkeypatch, aten.gelu_backward.default)

    def step(model: nn.Module, number: int) -> Any:
        results = [model(torch.randn(5, 4)) for _ in range(3)]
        loss = total(results)
        loss.backward(retain_graph=True)
        return [], results, loss

    records = []
    for rewritten in (False, True):
        torch.manual_seed(0)
        model = Delicate()
        model = fxckpt.rewrite(model, "nothing", strict=True) if rewritten else model
        records.append(train(model, step, optimizer=sgd))
    assert_same(*records)


def test_a_result_that_is_never_as_foreseen_runs_eagerly() -> None:
    whims = itertools.count()

    @torch.library.custom_op("fxckpt_tests::whimsical", mutates_args=())
    def whimsical(x: Tensor) -> Tensor:
        """Lays its result out in another way each time, always with a gap."""
        return F.pad(x, (0, next(whims) + 1)).exp()[:, : x.size(1)]

    whimsical.register_fake(torch.empty_like)
    whimsical.register_autograd(
        lambda ctx, grad: grad * ctx.saved_tensors[0],
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(output),
    )
    forward = Function(lambda module, x: whimsical(x @ module.weight))
    x = torch.randn(5, 4)
    with pytest.raises(fxckpt.CaptureError, match=r"whimsical.* than it says"):
        fxckpt.rewrite(forward, "nothing", strict=True)(x)
    model = fxckpt.rewrite(forward, "nothing")
    with pytest.warns(fxckpt.FallbackWarning, match="than it says"):
        result = model(x)
    assert torch.equal(result, (x @ forward.weight).exp())
    before = next(whims)
    model(x).sum().backward()
    assert next(whims) == before + 2  # it ran once


def test_an_error_of_the_model_is_raised_as_it_is() -> None:
    def batch(_: int) -> Tensor:
        return torch.tensor([1, 2])

    model = fxckpt.rewrite(nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 2)), "nothing")
    with pytest.raises(IndexError):
        model(torch.tensor([1, 7]))
    assert model(batch(0)).shape == (2, 2)
    assert captures(model)[0].standing.misfit is None


def test_nothing_is_learned_from_fake_tensors(
    monkeypatch: pytest.MonkeyPatch, learned: dict[Any, Any]
) -> None:
    turn(monkeypatch, *WRONG["both"])
    with FakeTensorMode():
        model = fxckpt.rewrite(Delicate(), "nothing", strict=True)
        total(model(rows())).backward()
    assert not learned


@pytest.mark.parametrize("policy", POLICIES)
def test_a_first_run_keeps_no_value_longer(policy: str) -> None:
    model, x = Delicate(), rows()
    model = fxckpt.rewrite(model, policy, strict=True, example_inputs=(x,))
    graph, captured = fxckpt.graphs(model)[0], captures(model)[0]
    traces = []
    for run in (graph.forward, lambda values: first_run.run(graph, values, ())):
        primals = [captured.lookup(name, [x]) for name in captured.program.split.primals]
        torch.manual_seed(0)
        with torch.no_grad(), LiveBytes() as memory:
            results = run([p.detach().clone() for p in primals])
        traces.append((memory.trace, [r.sum() for r in results if r.is_floating_point()]))
        del results
    assert traces[0] == traces[1]
    assert len(traces[0][0]) > 10
