"""Blocks as units: exact, captured once for all that look alike, gradients as early as in eager."""

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same_training, captures, kept_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.profiler import record_function
from torch.utils.checkpoint import checkpoint
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import fxckpt
from fxckpt import BudgetError, FallbackWarning, FxckptError, PolicyError
from fxckpt.blocks import find
from fxckpt.installation import runner_of

WIDTH = 8
TINY = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 0}
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, **TINY}


class Layer(nn.Module):
    """A feed-forward layer with dropout, statistics, and a number that Python reads."""

    def __init__(self, width: int = WIDTH, *, scale: float = 1.0) -> None:
        super().__init__()
        self.scale, self.norm, self.drop = scale, nn.BatchNorm1d(width), nn.Dropout(0.1)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.drop(self.down(F.gelu(self.up(self.norm(x)))))


class Net(nn.Module):
    """A stack of layers with Python around it that no graph can hold."""

    def __init__(self, *layers: nn.Module, width: int = WIDTH) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(width, width), nn.Linear(width, 3)
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
            x = x if float(x.detach().sum()) > 0 else -x
        return self.head(x)


def net(*scales: float) -> Net:
    return Net(*(Layer(scale=s) for s in scales or (1.0, 1.0, 1.0)))


def batch(number: int) -> Tensor:
    return torch.randn(6, WIDTH)


def tokens(number: int) -> dict[str, Tensor]:
    ids = torch.randint(0, 50, (2, 12))
    return {"input_ids": ids, "labels": ids}


def programs(model: nn.Module) -> int:
    """How many different things were compiled."""
    return len({id(c._programs) for c in captures(model)})


@pytest.mark.parametrize("policy", ["nothing", "dots", "mlp", "block", "everything"])
def test_exact_and_compiled_once(policy: str) -> None:
    model = assert_same_training(net, batch, policy=policy, units="blocks")
    assert programs(model) == 1


@pytest.mark.parametrize(
    "make",
    [
        lambda: GPT2LMHeadModel(
            GPT2Config(n_layer=3, n_embd=16, n_head=2, use_cache=False, **TINY)
        ),
        lambda: BertForMaskedLM(BertConfig(num_hidden_layers=3, **SIZES)),
        lambda: LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, use_cache=False, **SIZES)),
    ],
    ids=["gpt2", "bert", "llama"],
)
def test_transformers(make: Callable[[], nn.Module]) -> None:
    model = assert_same_training(
        lambda: make().train(), tokens, lambda out: out.loss, "attention", units="blocks"
    )
    assert programs(model) == 1


def test_layers_that_write_into_a_cache_have_captures_of_their_own() -> None:
    def make() -> nn.Module:
        return LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **SIZES)).train()

    model = assert_same_training(make, tokens, lambda out: out.loss, "dots", units="blocks")
    assert programs(model) == 2


@settings(max_examples=10, deadline=None)
@given(
    scales=st.lists(st.sampled_from([0.5, 1.0]), min_size=2, max_size=5),
    frozen=st.lists(st.booleans(), min_size=5, max_size=5),
    policy=st.sampled_from(["nothing", "dots", "norm"]),
)
def test_what_looks_the_same_shares_what_is_compiled(
    scales: list[float], frozen: list[bool], policy: str
) -> None:
    """Numbers and flags tell layers apart: exact in any case, and shared as far as possible."""

    def make() -> nn.Module:
        model = net(*scales)
        for layer, freeze in zip(model.layers, frozen, strict=False):
            layer.up.weight.requires_grad_(not freeze)
        return model

    model = assert_same_training(make, batch, policy=policy, units="blocks", steps=2)
    assert programs(model) == len({*zip(scales, frozen, strict=False)})


class Callback(nn.Module):
    """A layer whose Python reads things that may be its own or shared: a list, a function."""

    def __init__(self, factors: list[float], function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.factors, self.function = nn.Linear(WIDTH, WIDTH), factors, function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.linear(x)) * sum(self.factors)


def times(factor: float) -> Callable[[Tensor], Tensor]:
    return lambda x: (x * factor).tanh()


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (lambda: [Callback([1.0, 2.0], torch.tanh), Callback([1.0, 2.0], torch.tanh)], 1),
        (lambda: [Callback([1.0, 2.0], torch.tanh), Callback([1.0, 3.0], torch.tanh)], 2),
        (lambda: [Callback([1.0], torch.tanh), Callback([1.0], torch.sigmoid)], 2),
        (lambda: [Callback([1.0], times(2)), Callback([1.0], times(3))], 2),
    ],
    ids=["equal lists", "other lists", "other functions", "other variables"],
)
def test_objects_tell_layers_apart(layers: Callable[[], Any], expected: int) -> None:
    model = assert_same_training(lambda: Net(*layers()), batch, units="blocks")
    assert programs(model) == expected


def test_a_layer_that_is_called_several_times() -> None:
    class Loop(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(super().forward(x) @ torch.ones(3, WIDTH))

    assert_same_training(lambda: Loop(Layer(), Layer()), batch, units="blocks")


def test_tied_layers() -> None:
    def make() -> Net:
        model = net()
        model.layers[2].up.weight = model.layers[0].up.weight
        return model

    assert_same_training(make, batch, units="blocks")


def test_a_layer_that_is_changed_later() -> None:
    model = net()
    ours, eager = fxckpt.rewrite(model, "nothing", units="blocks"), copy.deepcopy(model)

    def same() -> None:
        torch.manual_seed(0)
        x, results = torch.randn(6, WIDTH), []
        for m in (ours, eager):
            torch.manual_seed(1)
            loss = m(x).square().sum()
            results.append([loss, *torch.autograd.grad(loss, [*m.parameters()])])
        assert all(map(torch.equal, *results))

    same()
    for m in (ours, eager):
        m.layers[1].scale = 3.0
    same()
    torch.manual_seed(5)
    new = Layer(scale=2.0)
    for m in (ours, eager):
        m.layers[1] = copy.deepcopy(new)
    same()
    assert programs(ours) == 2
    for m in (ours, eager):
        m.layers.append(copy.deepcopy(new))
    same()
    assert len(captures(ours)) >= 4


def test_a_hook_for_all_modules_that_comes_later() -> None:
    """No layer runs what was captured of another one before that."""

    def double(m: nn.Module, args: Any, result: Tensor) -> Tensor | None:
        return result * 2 if type(m) is nn.GELU else None

    def loss(m: nn.Module) -> Tensor:
        torch.manual_seed(0)
        return m(batch(0)).square().sum()

    model = blocks_of_gelu()
    ours = fxckpt.rewrite(model, "nothing", units="blocks")
    loss(ours).backward()
    handle = nn.modules.module.register_module_forward_hook(double)
    try:
        with pytest.warns(FallbackWarning, match="a hook is registered for all modules"):
            assert torch.equal(loss(ours), loss(model))
    finally:
        handle.remove()
    assert torch.equal(loss(ours), loss(model))


def blocks_of_gelu() -> nn.Module:
    layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(3)]
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Sequential(*layers))


def test_gradients_come_block_by_block() -> None:
    """As in eager: those of the last block are there before backward of the first one starts."""

    def order(model: nn.Module) -> list[str]:
        seen: list[str] = []
        for name, p in model.named_parameters():
            if name.endswith("weight"):
                p.register_post_accumulate_grad_hook(lambda _, name=name: seen.append(name[:8]))
        model(batch(0)).sum().backward()
        return list(dict.fromkeys(seen))

    assert order(fxckpt.rewrite(net(), "nothing", units="blocks")) == order(net())
    assert order(net()) == ["head.wei", "layers.2", "layers.1", "layers.0", "stem.wei"]


def test_less_is_kept() -> None:
    model = net()
    ours, x = fxckpt.rewrite(model, "nothing", units="blocks"), torch.randn(256, WIDTH)
    assert kept_bytes(lambda: ours(x)) < kept_bytes(lambda: model(x)) / 3


def test_the_original_and_copies() -> None:
    model = net()
    ours = fxckpt.rewrite(model, "nothing", units="blocks")
    ours(batch(0)).sum().backward()
    assert all(type(layer) is Layer for layer in model.layers)
    other = copy.deepcopy(ours)
    other(batch(0)).sum().backward()
    assert len(captures(other)) == len(captures(ours)) == 3
    assert type(pickle.loads(pickle.dumps(ours))) is Net
    assert type(fxckpt.restore_(ours)) is Net


def test_hooks_of_blocks_run_as_ever() -> None:
    def recorded(model: nn.Module) -> list[Any]:
        seen: list[Any] = []
        for layer in model.layers:
            layer.register_forward_pre_hook(lambda m, args: seen.append(args[0].sum()))
            layer.register_forward_hook(lambda m, args, out: out * 2)
            layer.register_full_backward_hook(lambda m, gi, go: seen.append(gi[0].sum()))
        torch.manual_seed(0)
        loss = model(batch(0)).sum()
        return [loss, *torch.autograd.grad(loss, [*model.parameters()]), *seen]

    model = net()
    expected = recorded(copy.deepcopy(model))
    ours = fxckpt.rewrite(model, "nothing", units="blocks")
    assert all(map(torch.equal, expected, recorded(ours)))
    assert programs(ours) == 1


def test_blocks_in_checkpoints_of_the_model() -> None:
    class Checkpointing(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for layer in self.layers:
                x = checkpoint(layer, x, use_reentrant=False)
            return self.head(x)

    def step(model: nn.Module) -> list[Tensor]:
        torch.manual_seed(0)
        loss = model(batch(0)).square().sum()
        return [loss, *torch.autograd.grad(loss, [*model.parameters()])]

    model = Checkpointing(Layer(), Layer())
    ours = fxckpt.rewrite(copy.deepcopy(model), "nothing", units="blocks")
    assert all(map(torch.equal, step(model), step(ours)))


@pytest.mark.parametrize("twice", [False, True])
def test_autocast(twice: bool) -> None:
    """Blocks save memory from the first step on; one that is called twice is told of, and exact."""

    class Twice(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for layer in self.layers:
                x = layer(layer(x)) if twice else layer(x)
            return self.head(x)

    def step(model: nn.Module) -> list[Tensor]:
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x).float().square().sum()
        return [loss, *torch.autograd.grad(loss, [*model.parameters()])]

    model, x = Twice(Layer(), Layer()), batch(0)
    eager, ours = copy.deepcopy(model), fxckpt.rewrite(model, "nothing", units="blocks")
    if twice:
        with pytest.warns(FallbackWarning, match="called several times in one step under autocast"):
            step(ours)
    else:
        assert all(map(torch.equal, step(eager), step(ours)))
        assert captures(ours)
    eager.load_state_dict(ours.state_dict())
    assert all(map(torch.equal, step(eager), step(ours)))


def test_a_block_that_cannot_be_captured_runs_by_its_parts() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Layer()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) if float(x.detach().sum()) > 0 else -self.inner(x)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = fxckpt.rewrite(Net(Odd(), Odd()), "nothing", units="blocks")
        for i in range(2):
            model(batch(i)).sum().backward()
    assert len([w for w in caught if issubclass(w.category, FallbackWarning)]) == 1
    block = runner_of(model).parts.runners()[0][1]
    assert any(part.latest is not None for _, part in block.parts.runners())


def test_a_failure_that_is_one_for_all_blocks_is_an_error_with_strict() -> None:
    class Odd(Layer):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * float(x.detach().sum())

    model = fxckpt.rewrite(Net(Odd(), Odd()), "nothing", units="blocks", strict=True)
    with pytest.raises(fxckpt.CaptureError):
        model(batch(0))


def test_verify_says_that_no_block_was_called() -> None:
    class Skipping(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.stem(x))

    model = fxckpt.rewrite(Skipping(Layer(), Layer()), "nothing", units="blocks")
    with pytest.raises(fxckpt.CaptureError, match="no block was called"):
        fxckpt.verify(model, batch(0))


def test_what_profilers_read_is_not_recorded() -> None:
    class Named(Layer):
        def forward(self, x: Tensor) -> Tensor:
            with record_function("a layer"):
                return super().forward(x)

    assert_same_training(lambda: Net(Named(), Named()), batch, units="blocks")
    assert_same_training(lambda: Named(), batch)


# --- which modules are blocks ---------------------------------------------------------------------


def paths(model: nn.Module, units: Any = "blocks") -> list[str]:
    return [position.path for _, position in find(model, units)]


def test_blocks_are_found() -> None:
    stages = nn.Sequential(
        nn.Sequential(Layer(4), Layer(8), Layer(8)), nn.Sequential(Layer(16), Layer(16))
    )
    assert paths(stages) == ["0.0", "0.1", "0.2", "1.0", "1.1"]
    nested = Net(nn.Sequential(Layer(), Layer()), nn.Sequential(Layer(), Layer()))
    assert paths(nested) == ["layers.0", "layers.1"]
    assert paths(nested, ["layers.1.*", "head"]) == ["head", "layers.1.0", "layers.1.1"]
    assert paths(nested, "layers.0") == ["layers.0"]
    assert paths(nested, "layers") == ["layers.0", "layers.1"]


def test_what_is_rewritten_already_is_no_block() -> None:
    model = net()
    fxckpt.rewrite_(model.layers[0], "nothing")
    assert paths(model) == ["layers.1", "layers.2"]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fxckpt.rewrite(Layer(), "nothing", units="blocks"), PolicyError, "no repeated"),
        (lambda: fxckpt.rewrite(net(), "dots", units=["leyers.*"]), PolicyError, "layers.0"),
        (lambda: fxckpt.rewrite(net(), budget="x", units="blocks"), BudgetError, "budget='x'"),
        (
            lambda: fxckpt.rewrite(net(), "dots", units="blocks", example_inputs=(batch(0),)),
            FxckptError,
            "at their first call",
        ),
    ],
)
def test_errors(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("policy", "shared"),
    [
        ({"policy": "dots"}, True),
        ({"recompute": "layers.*.up"}, True),
        ({"recompute": "layers.0"}, False),
        ({"recompute": nn.Linear}, True),
        ({"policy": lambda value: value.path.startswith("layers.0")}, False),
    ],
    ids=["dots", "path", "numbered path", "class", "function"],
)
def test_a_policy_may_tell_blocks_apart(policy: Any, shared: bool) -> None:
    def rewrite(model: nn.Module, _: Any) -> nn.Module:
        return fxckpt.rewrite(model, units="blocks", **policy)

    model = assert_same_training(net, batch, rewrite=rewrite)
    assert programs(model) == (1 if shared else 3)


# --- the default ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("layers", "units"), [(31, "Unit"), (32, "Blocks")])
def test_many_layers_are_units_by_default(layers: int, units: str) -> None:
    model = fxckpt.rewrite(nn.Sequential(*(Layer() for _ in range(layers))), "dots")
    assert type(runner_of(model)).__name__ == "Undecided"
    model(batch(0)).sum().backward()
    assert type(runner_of(model)).__name__ == units
    assert type(runner_of(copy.deepcopy(model))).__name__ == units


@pytest.mark.parametrize("options", [{"policy": "sqrt"}, {"budget": 1.0, "dynamic": True}])
def test_what_decides_for_the_whole_makes_it_one_unit(options: Any) -> None:
    model = fxckpt.rewrite(nn.Sequential(*(Layer() for _ in range(32))), **options)
    model(batch(0)).sum().backward()
    assert type(runner_of(model)).__name__ == "Unit"
