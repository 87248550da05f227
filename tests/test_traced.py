"""A rewritten module inside of `torch.compile`: one operation that keeps what was decided."""

import copy
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import kept_bytes
from test_compile import WIDTH, Net, steps
from torch import Tensor, nn

import fxckpt
from fxckpt import FallbackWarning, opaque

CASES = (
    ("eager", False, {"budget": 0.8}),
    ("aot_eager", False, {"budget": 0.8}),
    ("aot_eager", True, {"policy": "dots"}),
    ("aot_eager", True, {"policy": "nothing", "units": "blocks"}),
)


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Outer(nn.Module):
    """Something around what is rewritten, with buffers that both change."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner = nn.Linear(WIDTH, WIDTH), Net()

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        y, found = self.inner(self.first(x).relu())
        return y + 1, {"loss": found["loss"] + y.sum()}


def rewritten(model: nn.Module, *, whole: bool, **options: Any) -> nn.Module:
    if whole:
        return fxckpt.rewrite(model, **options)
    fxckpt.rewrite_(model.inner, **options)
    return model


@pytest.mark.parametrize(("backend", "whole", "options"), CASES)
def test_without_a_compiler_behind_it_is_exact(backend: str, whole: bool, options: Any) -> None:
    eager = Outer()
    lean = rewritten(copy.deepcopy(eager), whole=whole, **options)
    compiled = torch.compile(lean, backend=backend, fullgraph=True)
    for expected, got in zip(steps(eager, eager), steps(lean, compiled), strict=True):
        assert all(map(torch.equal, expected, got))


@pytest.mark.slow
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "inner"])
@pytest.mark.filterwarnings("ignore")  # Inductor's
def test_inductor_compiles_what_is_around_and_both_halves(whole: bool) -> None:
    """It writes into memory that it believes free; random draws stay those of eager."""
    eager = Outer()
    lean = rewritten(copy.deepcopy(eager), whole=whole, policy="dots")
    compiled = torch.compile(lean, fullgraph=True)
    for expected, got in zip(steps(eager, eager), steps(lean, compiled), strict=True):
        assert torch.equal(expected[-1], got[-1])
        for a, b in zip(expected, got, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)
    unit = lean if whole else lean.inner
    assert fxckpt.module.runner_of(unit).latest.program.compiled


@pytest.mark.parametrize("policy", ["nothing", "dots", "everything"])
def test_what_is_kept_is_what_was_decided(policy: str) -> None:
    model, x = Net(), torch.randn(64, WIDTH)
    lean = fxckpt.rewrite(model, policy)
    compiled = torch.compile(lean, backend="aot_eager", fullgraph=True)
    for forward in (lean, compiled):
        forward(x)[1]["loss"].backward()
    expected = kept_bytes(lambda: lean(x)[1]["loss"])
    ticket = 8
    assert kept_bytes(lambda: compiled(x)[1]["loss"]) == expected + ticket


def test_what_is_kept_dies_with_the_graph() -> None:
    """With or without a backward."""
    lean = fxckpt.rewrite(Net(), "dots")
    compiled = torch.compile(lean, backend="aot_eager", fullgraph=True)
    before = {*opaque._kept}
    loss = compiled(torch.randn(8, WIDTH))[1]["loss"]
    (ticket,) = {*opaque._kept} - before
    kept = opaque._kept[ticket]
    assert kept.outputs
    loss.backward()
    assert not kept.outputs
    del loss, kept
    compiled(torch.randn(8, WIDTH))
    gc.collect()
    assert {*opaque._kept} <= before


def test_backward_twice() -> None:
    lean = fxckpt.rewrite(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), "nothing")
    compiled = torch.compile(lean, backend="aot_eager", fullgraph=True)
    loss = compiled(torch.randn(2, 4)).sum()
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in lean.parameters()]
    loss.backward()
    assert all(torch.equal(p.grad, 2 * g) for p, g in zip(lean.parameters(), once, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_evaluation_shapes_and_changes_of_the_module() -> None:
    """What Dynamo guards, and what the unit notices when it runs: a rate of dropout.

    In evaluation mode, the original is compiled, which torch does up to rounding.
    """
    eager = Net()
    lean = fxckpt.rewrite(copy.deepcopy(eager), "dots")
    compiled = torch.compile(lean, backend="aot_eager", fullgraph=True)

    def runs(model: nn.Module, forward: Callable[..., Any]) -> list[list[Tensor]]:
        found = []
        for mode, size, rate in ((True, 8, 0.1), (True, 6, 0.1), (True, 6, 0.7), (False, 6, 0.7)):
            torch.manual_seed(size)
            model.train(mode)
            for layer in model.layers:
                layer[3].p = rate
            model.zero_grad()
            loss = forward(torch.randn(size, WIDTH))[1]["loss"]
            loss.backward()
            with torch.no_grad():
                y = forward(torch.randn(size, WIDTH))[0]
            found.append([loss, *(p.grad for p in model.parameters()), y])
        return found

    *training, evaluation = zip(runs(eager, eager), runs(lean, compiled), strict=True)
    for expected, got in training:
        assert all(map(torch.equal, expected[:-1], got[:-1]))
        torch.testing.assert_close(got[-1], expected[-1])  # without gradients, not ours
    for a, b in zip(*evaluation, strict=True):
        torch.testing.assert_close(b, a)


def test_arguments_and_results_of_all_kinds() -> None:
    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.unused = nn.Parameter(torch.randn(4)), nn.Parameter(torch.ones(1))
            self.frozen = nn.Parameter(torch.randn(4), requires_grad=False)

        def forward(self, x: Tensor, y: Tensor, *, scale: float, none: None, flag: str) -> Any:
            assert none is None
            assert flag == "a"
            z = (x * self.weight + y * self.frozen).sin() * scale
            return z, None, {"view": z[1:], "same": x, "count": 3, "part": self.weight.view(2, 2)}

    eager = Many()
    ours = copy.deepcopy(eager)
    lean = fxckpt.rewrite(ours, "nothing")
    compiled = torch.compile(lean, backend="aot_eager", fullgraph=True)
    found = []
    for model, forward in ((eager, eager), (ours, compiled)):
        x = torch.linspace(0, 1, 12).view(3, 4).requires_grad_()
        z, none, rest = forward(x, x, scale=2.0, none=None, flag="a")
        assert none is None
        assert rest["count"] == 3
        (z.sum() + rest["view"].square().sum() + rest["same"].sum() + rest["part"].sum()).backward()
        assert model.unused.grad is None
        assert model.frozen.grad is None
        found.append([z, rest["view"], rest["same"], x.grad, model.weight.grad])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_hooks_of_parameters_run_once() -> None:
    lean = fxckpt.rewrite(nn.Linear(4, 4), "nothing")
    compiled = torch.compile(lean, backend="aot_eager", fullgraph=True)
    calls: list[Tensor] = []
    lean.weight.register_hook(calls.append)
    compiled(torch.ones(2, 4)).sum().backward()
    assert len(calls) == 1


def test_a_parameter_that_the_graph_has_changed_before() -> None:
    class Decaying(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.inner[0].weight.mul_(0.5)
                self.inner[1].running_mean.add_(1.0)
            return self.inner(x) + self.inner[1].running_mean

    eager = Decaying()
    ours = copy.deepcopy(eager)
    fxckpt.rewrite_(ours.inner, "nothing")
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    for model, forward in ((eager, eager), (ours, compiled)):
        torch.manual_seed(0)
        forward(torch.randn(3, 4)).square().sum().backward()
        assert model.inner[0].weight.grad is not None
    for a, b in zip(eager.parameters(), ours.parameters(), strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a.grad, b.grad)
    assert torch.equal(eager.inner[1].running_mean, ours.inner[1].running_mean)


@pytest.mark.parametrize("around", [True, False], ids=["around", "inside"])
def test_autocast(around: bool) -> None:
    """Of the call, or within what is compiled."""
    eager = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8))
    ours = copy.deepcopy(eager)
    lean = fxckpt.rewrite(ours, "nothing")

    def step(model: nn.Module, forward: Callable[..., Any]) -> list[Tensor]:
        def inside(x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return model(x)

        torch.manual_seed(0)
        x = torch.randn(4, 8)
        if around:
            with torch.autocast("cpu", torch.bfloat16):
                y = forward(model)(x)
        else:
            y = forward(inside)(x)
        y.float().square().sum().backward()
        return [y, *(p.grad for p in model.parameters())]

    expected = step(eager, lambda model: model)
    got = step(lean, lambda f: torch.compile(f, backend="aot_eager", fullgraph=True))
    assert got[0].dtype == torch.bfloat16
    assert all(map(torch.equal, expected, got))


class Assigns(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.last = nn.Linear(4, 4), torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x).sin()
        self.last = y.sum()
        return y * 2


def test_what_cannot_be_one_operation_breaks_the_graph() -> None:
    """It runs as in eager, still checkpointed, and a warning says why; or it is an error."""
    eager = nn.Sequential(nn.Linear(4, 4), Assigns())
    ours = copy.deepcopy(eager)
    fxckpt.rewrite_(ours[1], "nothing")
    with pytest.warns(FallbackWarning, match="breaks the graph.*assigns"):
        y = torch.compile(ours, backend="aot_eager")(torch.ones(2, 4))
    y.sum().backward()
    eager(torch.ones(2, 4)).sum().backward()
    for a, b in zip(eager.parameters(), ours.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    assert torch.equal(ours[1].last, eager[1].last)
    assert fxckpt.graphs(ours[1])
    torch._dynamo.reset()
    with (
        pytest.raises(torch._dynamo.exc.Unsupported),
        pytest.warns(FallbackWarning, match="breaks the graph"),
    ):
        torch.compile(ours, backend="aot_eager", fullgraph=True)(torch.ones(2, 4))


def test_a_result_that_a_compiled_graph_has_no_place_for() -> None:
    class Cache:
        def __init__(self, keys: Tensor) -> None:
            self.keys = keys

    class Caches(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), Cache(x * 2)

    lean = fxckpt.rewrite(Caches(4, 4), "nothing")
    with pytest.warns(FallbackWarning, match="returns a Cache.*use_cache=False"):
        y, cache = torch.compile(lean, backend="aot_eager")(torch.ones(2, 4))
    assert torch.equal(y, nn.functional.linear(torch.ones(2, 4), lean.weight, lean.bias))
    assert torch.equal(cache.keys, torch.full((2, 4), 2.0))


def test_copies_and_modules_that_were_rewritten_anew() -> None:
    """What is compiled belongs to one module, and to one rewriting of it."""
    torch.manual_seed(0)
    lean = fxckpt.rewrite(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), "nothing")
    torch.compile(lean, backend="aot_eager", fullgraph=True)(torch.ones(2, 4)).sum().backward()
    twin = copy.deepcopy(lean)
    with torch.no_grad():
        twin[0].weight.add_(1)
    twin.zero_grad()
    torch.compile(twin, backend="aot_eager", fullgraph=True)(torch.ones(2, 4)).sum().backward()
    assert not torch.equal(twin[0].weight.grad, lean[0].weight.grad)
    plain = copy.deepcopy(fxckpt.restore_(twin))
    plain.zero_grad()
    plain(torch.ones(2, 4)).sum().backward()
    assert torch.equal(twin[0].weight.grad, plain[0].weight.grad)


def test_a_model_of_transformers() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=32, n_positions=16)
    eager = GPT2LMHeadModel(config).train()
    ours = copy.deepcopy(eager)
    lean = fxckpt.rewrite(ours, "dots")
    compiled = torch.compile(lean, backend="aot_eager", fullgraph=True)
    for forward in (eager, compiled):
        torch.manual_seed(0)
        ids = torch.randint(32, (2, 8))
        result = forward(input_ids=ids, labels=ids, use_cache=False)
        assert type(result).__name__ == "CausalLMOutputWithCrossAttentions"
        result.loss.backward()
    for (name, a), b in zip(eager.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


def test_a_function_that_is_checkpointed() -> None:
    weight = torch.randn(4, requires_grad=True)
    f = fxckpt.checkpoint(lambda x, w: (x * w).sin().sin())
    compiled = torch.compile(lambda x, w: f(x + 1, w) * 2, backend="aot_eager", fullgraph=True)
    found = []
    for forward in (lambda x, w: (((x + 1) * w).sin().sin()) * 2, compiled):
        y = forward(torch.ones(4), weight)
        found.append(torch.autograd.grad(y.sum(), weight)[0])
    assert torch.equal(*found)


def test_results_own_their_memory() -> None:
    """As in eager, also where one takes the place of a copy: here of what dropout divides."""
    lean = fxckpt.rewrite(Net(), "dots")
    for _ in range(2):
        y = lean(torch.randn(8, WIDTH))[0]
        assert y._base is None
        y.sum().backward()


def test_exported_programs_have_the_original_forward() -> None:
    lean = fxckpt.rewrite(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), "nothing")
    program = torch.export.export(lean, (torch.ones(2, 4),))
    assert "fxckpt" not in program.graph_module.code
