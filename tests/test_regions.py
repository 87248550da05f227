"""Attention, feed-forward layers, norms and blocks are found however they are written."""

import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import models
from fxckpt.attention import attentions
from fxckpt.capture import capture
from fxckpt.feedforward import mlps
from fxckpt.joint import Joint, is_value
from fxckpt.regions import Region, Structure, is_product, norms
from fxckpt.segments import _Costs, blocks, read_by_backward
from fxckpt.split import split

WIDTH, HEADS = 8, 2
FINDERS = {"attention": attentions, "mlp": mlps, "norm": norms, "block": blocks}


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


def found(kind: str, joint: Joint) -> list[Region]:
    return FINDERS[kind](Structure(joint))


def names(kind: str, joint: Joint) -> set[str]:
    """Names of the regions, with `*` for numbers."""
    return {re.sub(r"\.\d+", ".*", region.name) for region in found(kind, joint)}


def inputs() -> Tensor:
    return torch.randn(2, 5, WIDTH)


# --- models of the zoo --------------------------------------------------------------------------

EXPECTED = {
    "gpt2": {
        "attention": {"transformer.h.*.attn"},
        "mlp": {"transformer.h.*.mlp"},
        "norm": {"transformer.h.*.ln_1", "transformer.h.*.ln_2", "transformer.ln_f"},
        "block": {"transformer.h.*"},
    },
    "bert": {
        "attention": {"bert.encoder.layer.*.attention"},
        "mlp": {"bert.encoder.layer.*: mlp"},
        "block": {"bert.encoder.layer.*"},
    },
    "llama": {
        "attention": {"model.layers.*.self_attn"},
        "mlp": {"model.layers.*.mlp"},
        "norm": {
            "model.layers.*.input_layernorm",
            "model.layers.*.post_attention_layernorm",
            "model.norm",
        },
        "block": {"model.layers.*"},
    },
    "t5": {
        "attention": {
            "encoder.block.*.layer.*",
            "decoder.block.*.layer.*",
        },
        "mlp": {"encoder.block.*.layer.*", "decoder.block.*.layer.*"},
        "block": {"encoder.block.*", "decoder.block.*"},
    },
    "mixtral": {
        "attention": {"model.layers.*.self_attn"},
        "mlp": {"model.layers.*.mlp"},
        "block": {"model.layers.*"},
    },
    "vit": {
        "attention": {"vit.layers.*.attention"},
        "mlp": {"vit.layers.*.mlp"},
        "block": {"vit.layers.*"},
    },
    "resnet": {"attention": set(), "mlp": set(), "block": {"blocks.*"}},
    "unet": {"attention": set(), "mlp": set(), "block": {"down.*", "up.*"}},
    "mlp": {"attention": set(), "mlp": {"blocks.*"}, "block": {"blocks.*"}},
}


@pytest.mark.parametrize("name", EXPECTED)
def test_models_of_the_zoo(name: str) -> None:
    joint = joint_of_model(name)
    assert {kind: names(kind, joint) for kind in EXPECTED[name]} == EXPECTED[name]


@pytest.mark.parametrize("name", ["gpt2", "bert", "llama", "t5"])
def test_models_under_autocast(name: str) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        joint = joint_of_model(name)
    assert any(n.meta["val"].dtype is torch.bfloat16 for n in joint.forward_nodes() if is_value(n))
    assert {kind: names(kind, joint) for kind in EXPECTED[name]} == EXPECTED[name]


def test_each_layer_is_one_region() -> None:
    joint = joint_of_model("t5", layers=3)
    assert [r.name for r in found("attention", joint)] == [
        *(f"encoder.block.{i}.layer.0" for i in range(3)),
        *(f"decoder.block.{i}.layer.{j}" for i in range(3) for j in range(2)),
    ]
    expected = [f"{side}.block.{i}" for side in ("encoder", "decoder") for i in range(3)]
    assert [r.name for r in found("block", joint)] == expected


def test_bert_feed_forward_is_a_pair_of_modules() -> None:
    joint = joint_of_model("bert", layers=1)
    (region,) = found("mlp", joint)
    paths = {n.meta["path"] for n in region.nodes}
    layer = "bert.encoder.layer.0"
    assert {f"{layer}.intermediate.dense", f"{layer}.output.dropout"} <= paths
    assert not any("attention" in path for path in paths)


def test_mixture_of_experts_includes_the_router() -> None:
    (region,) = found("mlp", joint_of_model("mixtral", layers=1))
    paths = {n.meta["path"] for n in region.nodes}
    assert {"model.layers.0.mlp.gate", "model.layers.0.mlp.experts"} <= paths


# --- attention written by hand ------------------------------------------------------------------


class Core(nn.Module):
    """How a test writes attention: from queries, keys and values to their weighted sum."""

    def __init__(self, style: str) -> None:
        super().__init__()
        self.style = style
        self.drop = nn.Dropout(0.1)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.style == "sdpa":
            return F.scaled_dot_product_attention(q, k, v)
        if self.style == "sdpa dropout":
            return F.scaled_dot_product_attention(q, k, v, dropout_p=0.1, is_causal=True)
        if self.style == "einsum":
            scores = torch.einsum("bhid,bhjd->bhij", q, k).softmax(-1)
            return torch.einsum("bhij,bhjd->bhid", scores, v)
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        if self.style == "masked":
            mask = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).triu(1)
            scores = scores.masked_fill(mask, -torch.inf)
        if self.style == "capped":
            scores = 5 * torch.tanh(scores / 5)
        if self.style == "upcast":
            return self.drop(scores.double().softmax(-1)).to(v.dtype) @ v
        if self.style == "sink":
            sink = torch.zeros(*scores.shape[:-1], 1)
            return torch.cat([scores, sink], -1).softmax(-1)[..., :-1] @ v
        return self.drop(scores.softmax(-1)) @ v


STYLES = ("sdpa", "sdpa dropout", "einsum", "plain", "masked", "capped", "upcast", "sink")


class Mixing(nn.Module):
    """Attention as a module. Its name tells nothing."""

    def __init__(self, style: str) -> None:
        super().__init__()
        self.core = Core(style)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(x).unflatten(-1, (3, HEADS, -1)).transpose(1, 3)
        y = self.core(heads[:, :, 0], heads[:, :, 1], heads[:, :, 2])
        return self.proj(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A transformer layer, attention and feed-forward part in modules."""

    def __init__(self, style: str = "plain") -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.mix = Mixing(style)
        self.feed = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(self.ln1(x))
        return x + self.feed(self.ln2(x))


class InlineBlock(nn.Module):
    """The same computation, written out in one forward."""

    def __init__(self, style: str = "plain") -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.style, self.drop = style, nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.ln1(x)).unflatten(-1, (3, HEADS, -1)).transpose(1, 3)
        y = Core.forward(self, heads[:, :, 0], heads[:, :, 1], heads[:, :, 2])
        x = x + self.proj(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.ln2(x))))


class Stack(nn.Module):
    """Layers one after the other, several times if they are shared, and a head."""

    def __init__(self, *layers: nn.Module, times: int = 1) -> None:
        super().__init__()
        self.layers, self.times = nn.ModuleList(layers), times
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            for layer in self.layers:
                x = layer(x)
        return self.head(x)


@pytest.mark.parametrize("style", STYLES)
def test_attention_in_a_module(style: str) -> None:
    joint = joint_of(Stack(Block(style), Block(style)), inputs())
    assert [r.name for r in found("attention", joint)] == ["layers.0.mix", "layers.1.mix"]
    assert [r.name for r in found("mlp", joint)] == ["layers.0.feed", "layers.1.feed"]


@pytest.mark.parametrize("style", STYLES)
def test_inline_is_the_same_as_in_modules(style: str) -> None:
    modular = joint_of(Stack(Block(style), Block(style)), inputs())
    inline = joint_of(Stack(InlineBlock(style), InlineBlock(style)), inputs())
    for kind in ("attention", "mlp"):
        assert operations(found(kind, inline)) == operations(found(kind, modular))


def operations(regions: list[Region]) -> list[list[str]]:
    """The values of each region by the operation that computes them, but for constant masks."""
    constant = {"ones", "zeros", "triu", "tril", "scalar_tensor", "where"}
    return [
        sorted({re.sub(r"_\d+$", "", n.name) for n in r.nodes if is_value(n)} - constant)
        for r in regions
    ]


def test_inline_regions_are_named_after_the_call_that_they_lie_in() -> None:
    joint = joint_of(Stack(InlineBlock()), inputs())
    assert names("attention", joint) == {"layers.*: attention"}
    assert names("mlp", joint) == {"layers.*: mlp"}


@pytest.mark.parametrize("first", [True, False])
def test_transformer_encoder_layer(first: bool) -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 16, norm_first=first, batch_first=True)
    joint = joint_of(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), inputs())
    assert names("attention", joint) == {"layers.*.self_attn"}
    assert names("mlp", joint) == {"layers.*: mlp"}
    assert names("norm", joint) == {"layers.*.norm1", "layers.*.norm2"}
    assert names("block", joint) == {"layers.*"}


@pytest.mark.parametrize("weights", [True, False])
def test_multihead_attention(weights: bool) -> None:
    x = inputs()
    joint = joint_of(nn.MultiheadAttention(WIDTH, HEADS), x, x, x, need_weights=weights)
    assert names("attention", joint) == {"(root)"}


class Single(nn.Module):
    """One head, no batch: the products are plain `mm`."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.softmax(self.q(x) @ self.k(x).T, -1) @ self.v(x)


def test_attention_without_batch() -> None:
    joint = joint_of(Stack(Single(), Single()), torch.randn(5, WIDTH))
    assert names("attention", joint) == {"layers.*"}


def test_attention_of_a_function_of_queries_keys_and_values() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q @ k.mT).softmax(-1) @ v).sin()

    heads = [torch.randn(2, 5, 4, requires_grad=True) for _ in range(3)]
    (region,) = found("attention", joint_of(attend, *heads))
    assert {n.name for n in region.nodes} >= {"bmm", "_softmax", "bmm_1"}
    assert "sin" not in {n.name for n in region.nodes}


class LinearAttention(nn.Module):
    """Attention without softmax (Katharopoulos et al. 2020): found by name only."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k = F.elu(self.q(x)) + 1, F.elu(self.k(x)) + 1
        return self.o(q @ (k.mT @ self.v(x)))


def test_attention_by_name() -> None:
    joint = joint_of(Stack(LinearAttention(), LinearAttention()), inputs())
    assert names("attention", joint) == {"layers.*"}
    assert names("mlp", joint) == set()
    assert names("attention", joint_of(LinearAttention(), inputs())) == {"(root)"}


class SoftmaxGate(nn.Module):
    """Softmax between two weights: routing, not attention."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.value = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.value(self.gate(x).softmax(-1))


@pytest.mark.parametrize("mixed", [False, True])
def test_softmax_between_weights_is_not_attention(mixed: bool) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        joint = joint_of(Stack(SoftmaxGate(), SoftmaxGate()), inputs())
    assert names("attention", joint) == set()


class Dispatch(nn.Module):
    """Softmax between a weight and a product of activations: tokens dealt out to slots."""

    def __init__(self) -> None:
        super().__init__()
        self.slots, self.out = nn.Linear(WIDTH, 3, bias=False), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.slots(x).softmax(-1)
        return weights @ self.out(weights.mT @ x)


def test_softmax_of_a_product_with_a_weight_is_not_attention() -> None:
    assert names("attention", joint_of(Stack(Dispatch(), Dispatch()), inputs())) == set()


class FeedForwardThenAttention(nn.Module):
    """Everything inline, the feed-forward part first: it must not count as a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(F.relu(self.up(x)))
        return self.o((self.q(x) @ self.k(x).mT).softmax(-1) @ self.v(x))


def test_feed_forward_before_attention_stays_outside() -> None:
    joint = joint_of(Stack(FeedForwardThenAttention(), FeedForwardThenAttention()), inputs())
    regions = found("attention", joint)
    paths = {n.meta["path"] for r in regions for n in r.nodes}
    assert {"layers.0.q", "layers.1.o"} <= paths
    assert not paths & {"layers.0.up", "layers.0.down", "layers.1.up", "layers.1.down", "head"}
    assert names("mlp", joint) == {"layers.*: mlp"}


class NoOutputProjection(FeedForwardThenAttention):
    """The next product after attention is that of the feed-forward part."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + (self.q(x) @ self.k(x).mT).softmax(-1) @ self.v(x)
        return self.down(F.relu(self.up(x)))


def test_the_output_projection_stands_before_the_residual_sum() -> None:
    regions = found("attention", joint_of(Stack(NoOutputProjection()), inputs()))
    paths = {n.meta["path"] for r in regions for n in r.nodes}
    assert paths == {"layers.0", "layers.0.q", "layers.0.k", "layers.0.v"}


# --- feed-forward layers written by hand --------------------------------------------------------


class Gated(nn.Module):
    """A gated layer (Shazeer 2020) inline, with what a test puts between its products."""

    def __init__(self, style: str) -> None:
        super().__init__()
        self.style, self.norm = style, nn.LayerNorm(WIDTH)
        self.gate, self.up = nn.Linear(WIDTH, 16), nn.Linear(WIDTH, 16)
        self.both, self.down = nn.Linear(WIDTH, 32), nn.Linear(16, WIDTH)
        self.mixed = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(self.mixed(x) + x)
        if self.style == "fused":
            gate, up = self.both(z).chunk(2, -1)
        else:
            gate, up = self.gate(z), self.up(z)
        if self.style == "written out":
            y = 0.5 * gate * (1 + torch.tanh(0.8 * (gate + 0.04 * gate**3))) * up
        elif self.style == "dropout":
            y = F.dropout(F.gelu(gate), 0.1) * up
        elif self.style == "relu2":
            y = F.relu(gate).square()
        elif self.style == "in place":
            y = F.relu_(gate)
        else:
            y = F.silu(gate) * up
        return x + self.down(y)


@pytest.mark.parametrize("style", ["plain", "fused", "written out", "dropout", "relu2", "in place"])
def test_feed_forward_inline(style: str) -> None:
    joint = joint_of(Stack(Gated(style), Gated(style)), inputs())
    regions = found("mlp", joint)
    assert [r.name for r in regions] == ["layers.0: mlp", "layers.1: mlp"]
    first = {"both"} if style == "fused" else {"gate"}
    first |= {"up"} if style in ("plain", "written out", "dropout") else set()
    paths = {n.meta["path"] for n in regions[0].nodes} - {"layers.0"}
    assert paths == {f"layers.0.{name}" for name in first | {"down"}}


class Recurrent(nn.Module):
    """Product, nonlinearity, product of the same weight."""

    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = x[:, 0]
        for _ in range(3):
            h = torch.tanh(self.step(h))
        return h


class StateSpace(nn.Module):
    """A gate around something that is no feed-forward layer (Gu and Dao 2023, in small)."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.decay = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        y, gate = self.into(x).chunk(2, -1)
        y = (y * self.decay(y)).cumsum(1)
        return self.out(y * F.silu(gate))


class Convolution(StateSpace):
    """The same around a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(5, 5, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y, gate = self.into(x).chunk(2, -1)
        return self.out(self.conv(y) * F.silu(gate))


@pytest.mark.parametrize(
    "module",
    [
        Recurrent(),
        Stack(StateSpace(), StateSpace()),
        Stack(Convolution(), Convolution()),
        nn.Sequential(nn.Linear(WIDTH, 16), nn.ReLU(), nn.Linear(16, 3)),
        nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()) for _ in range(6))),
    ],
    ids=["recurrent", "state space", "convolution", "classifier", "deep"],
)
def test_not_a_feed_forward_layer(module: nn.Module) -> None:
    assert found("mlp", joint_of(module, inputs())) == []


class PostActivation(nn.Module):
    """A nonlinearity after the residual connection: it does not join two layers to one."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.down(F.relu(self.up(x))))


def test_layers_that_end_in_a_nonlinearity() -> None:
    joint = joint_of(Stack(PostActivation(), PostActivation()), inputs())
    assert [r.name for r in found("mlp", joint)] == ["layers.0", "layers.1"]


class Experts(nn.Module):
    """A home-made dense mixture, with nothing in its name."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 3)
        self.choices = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 16), nn.ReLU(), nn.Linear(16, WIDTH)) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        weights = self.router(x).softmax(-1)
        return sum(weights[..., i : i + 1] * f(x) for i, f in enumerate(self.choices))


class Mixture(Experts):
    pass


def test_mixture_by_name_or_by_expert() -> None:
    named = joint_of(Stack(Experts(), Experts()), inputs())
    assert names("mlp", named) == {"layers.*"}
    unnamed = joint_of(Stack(Mixture(), Mixture()), inputs())
    assert names("mlp", unnamed) == {"layers.*.choices.*"}
    assert len(found("mlp", unnamed)) == 6


class BlockOfMoE(Block):
    """A whole transformer layer that is called like its feed-forward part."""


def test_what_contains_attention_is_no_feed_forward_layer() -> None:
    joint = joint_of(Stack(BlockOfMoE(), BlockOfMoE()), inputs())
    assert names("mlp", joint) == {"layers.*.feed"}


# --- norms --------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class PreNorm(nn.Module):
    """Has `Norm` in its name and more than a norm in it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner = RMSNorm(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(self.inner(self.norm(x)), (WIDTH,))


def test_norms_by_class_and_by_operation() -> None:
    regions = found("norm", joint_of(Stack(PreNorm()), inputs()))
    assert [r.name for r in regions] == ["layers.0.norm", "layers.0: native_layer_norm"]
    assert len([n for n in regions[1].nodes if is_value(n)]) == 3  # the result, mean, 1 / deviation


# --- blocks -------------------------------------------------------------------------------------


def test_calls_of_a_shared_block_are_blocks() -> None:
    joint = joint_of(Stack(Block(), times=3), inputs())
    assert [r.name for r in found("block", joint)] == [
        "layers.0",
        "layers.0 (call 2)",
        "layers.0 (call 3)",
    ]
    assert [r.name for r in found("attention", joint)][1] == "layers.0.mix (call 2)"
    sizes = {len(r.nodes) for r in found("block", joint)}
    assert len(sizes) == 1


class Wide(Block):
    pass


def test_several_classes_of_blocks() -> None:
    joint = joint_of(nn.Sequential(Stack(Block(), Block(), Wide(), Wide()), nn.Tanh()), inputs())
    assert [r.name for r in found("block", joint)] == [f"0.layers.{i}" for i in range(4)]


@pytest.mark.parametrize("frozen", [False, True])
def test_estimate_is_what_is_kept_and_the_largest_block(frozen: bool) -> None:
    model = Stack(Block("masked"), Block("masked"), Block("masked")).eval()
    for layer in model.layers:
        layer.requires_grad_(not frozen)
    structure = Structure(joint_of(model, inputs().requires_grad_()))
    layers = [call for call in structure.scopes if call.cls is Block]
    inside = [structure.inside(structure.scopes[call].keys()) for call in layers]
    kept = {v.node for v in structure.joint.values()}.difference(*inside)
    residuals = set(split(structure.joint, kept).residuals)
    size = {v.name: v.bytes for v in structure.joint.values()}
    read = read_by_backward(structure.joint)
    largest = max(sum(size[n.name] for n in nodes & read) for nodes in inside)
    expected = sum(size[name] for name in residuals) + largest
    assert _Costs(structure).estimate(layers) == expected


def test_blocks_that_are_attributes() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.entry, self.exit = Block(), Block()

        def forward(self, x: Tensor) -> Tensor:
            return self.exit(self.entry(x).relu())

    assert [r.name for r in found("block", joint_of(Named(), inputs()))] == ["entry", "exit"]


@pytest.mark.parametrize(
    "module",
    [
        nn.Linear(WIDTH, 3),
        nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(4))),
        Stack(Block()),
        nn.Sequential(*(nn.GELU() for _ in range(4)), nn.Linear(WIDTH, 3)),
    ],
    ids=["one layer", "nothing to gain", "one block", "no products"],
)
def test_no_blocks(module: nn.Module) -> None:
    assert names("block", joint_of(module, inputs())) == set()


# --- regions and calls --------------------------------------------------------------------------


def test_results_are_what_others_read() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.a(x).tanh()
            return self.b(y).exp(), y.T.cos()

    structure = Structure(joint_of(Shared(), torch.randn(2, WIDTH)))
    by_name = {n.name: n for n in structure.chains}
    tanh, cos = by_name["tanh"], by_name["cos"]
    assert structure.results({by_name["addmm"], tanh}) == {tanh}
    assert structure.inside({by_name["addmm"], tanh}) == {by_name["addmm"]}
    everything = set(structure.chains)
    assert structure.inside(everything) == {by_name["addmm"], tanh, by_name["addmm_1"]}
    assert structure.results({tanh, by_name["addmm_1"], by_name["t_1"], by_name["exp"]}) >= {tanh}
    assert cos in structure.results(everything)  # it is returned
    view = next(n for n in cos.all_input_nodes if n.meta.get("alias") is tanh)
    assert tanh not in structure.results(everything - {view})  # a view alone reads nothing


def test_chains_of_calls_of_shared_modules() -> None:
    inner = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
    twice = nn.Sequential(inner, inner, Stack(nn.Sequential(nn.Tanh()), inner, times=2))
    chains = Structure(joint_of(twice, inputs())).chains
    tanhs = [[c.name for c in chain] for n, chain in chains.items() if n.name.startswith("tanh")]
    assert tanhs == [
        ["(root)", "0", "0.1"],
        ["(root)", "0 (call 2)", "0.1 (call 2)"],
        ["(root)", "2", "2.layers.0", "2.layers.0.0"],
        ["(root)", "2", "0 (call 3)", "0.1 (call 3)"],
        ["(root)", "2", "2.layers.0 (call 2)", "2.layers.0.0 (call 2)"],
        ["(root)", "2", "0 (call 4)", "0.1 (call 4)"],
    ]


def test_chains_through_lists_that_are_not_called() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seq = nn.Sequential(Stack(nn.Sequential(nn.Tanh())))

        def forward(self, x: Tensor) -> Tensor:
            return self.seq(x)

    chains = Structure(joint_of(Wrapped(), inputs())).chains
    (chain,) = (chain for node, chain in chains.items() if node.name == "tanh")
    paths = ["", "seq", "seq.0", "seq.0.layers.0", "seq.0.layers.0.0"]
    assert [call.path for call in chain] == paths
    assert [call.cls for call in chain] == [Wrapped, nn.Sequential, Stack, nn.Sequential, nn.Tanh]


def test_chains_in_a_bare_function() -> None:
    model = nn.Sequential(nn.Tanh(), nn.Linear(WIDTH, 3))
    joint = joint_of(lambda x: model(x).sin(), inputs())
    ends = [[c.name for c in chain] for n, chain in Structure(joint).chains.items() if is_value(n)]
    assert ends == [
        ["(root)", "Sequential", "Sequential.Tanh"],
        ["(root)", "Sequential", "Sequential.Linear"],
        ["(root)"],
    ]


def test_regions_of_a_kind_do_not_overlap_and_contain_products() -> None:
    for name in ("gpt2", "t5"):
        structure = Structure(joint_of_model(name))
        for find in (attentions, mlps, blocks):
            regions = find(structure)
            assert sum(len(r.nodes) for r in regions) == len(
                set().union(*(r.nodes for r in regions))
            )
            assert all(any(map(is_product, r.nodes)) for r in regions)
