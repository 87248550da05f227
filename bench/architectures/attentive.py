"""Attention of every kind: torch's modules with their options, and what others made of it."""

import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.architectures.case import Architecture
from bench.architectures.tables import (
    Composed,
    architectures_of,
    batches,
    below,
    fixed,
    normal,
    weight,
)

_WIDTH = 8


class SelfAttention(nn.Module):
    """`nn.MultiheadAttention` of a sequence to itself, and a linear layer."""

    def __init__(self, *, weights: bool = True, average: bool = True, **options: object) -> None:
        super().__init__()
        self.weights, self.average = weights, average
        self.attention = nn.MultiheadAttention(_WIDTH, 2, dropout=0.1, **options)
        self.out = nn.Linear(_WIDTH, 3)

    def forward(self, x: Tensor, **masks: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns the output and, if asked for, the weights."""
        x, weights = self.attention(
            x, x, x, need_weights=self.weights, average_attn_weights=self.average, **masks
        )
        return self.out(x), weights


class Heads(nn.Module):
    """Projections to queries, keys and values, a function of them, and a projection back."""

    def __init__(
        self, attend: object, shared: int = 1, **members: nn.Module | nn.Parameter
    ) -> None:
        super().__init__()
        self.attend, self.heads = attend, 4
        self.qkv = nn.ModuleList(nn.Linear(_WIDTH, _WIDTH // s) for s in (1, shared, shared))
        self.out = nn.Linear(_WIDTH, _WIDTH)
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, x: Tensor) -> Tensor:
        """Attends within each head of two channels."""
        q, k, v = (p(x).unflatten(-1, (-1, _WIDTH // self.heads)).transpose(1, 2) for p in self.qkv)
        return self.out(self.attend(self, q, k, v).transpose(1, 2).flatten(2))


def _spelled_out(m: nn.Module, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | float = 0) -> Tensor:
    scores = q @ k.mT / math.sqrt(q.shape[-1]) + bias
    return F.dropout(scores.softmax(-1), 0.1, m.training) @ v


def _fused(m: nn.Module, q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, **options)


def _relative(m: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A learnt bias for each distance (Raffel et al. 2019)."""
    steps = torch.arange(q.shape[2])
    distances = (steps[:, None] - steps).clamp(-3, 3) + 3
    return _spelled_out(m, q, k, v, m.distance(distances).permute(2, 0, 1))


def _linear_bias(m: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A slope by head (Press et al. 2021)."""
    slopes = 2.0 ** -torch.arange(1, 1 + q.shape[1])[:, None, None]
    steps = torch.arange(q.shape[2])
    return _spelled_out(m, q, k, v, slopes * -(steps[:, None] - steps).abs())


def _rotary(m: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Positions as rotations of complex numbers (Su et al. 2021)."""
    angles = torch.outer(torch.arange(q.shape[2]), torch.tensor([1.0]))
    turns = torch.polar(torch.ones_like(angles), angles)
    q, k = (
        torch.view_as_real(torch.view_as_complex(t.unflatten(-1, (-1, 2))) * turns).flatten(-2)
        for t in (q, k)
    )
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _linear(m: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention without softmax (Katharopoulos et al. 2020)."""
    q, k = F.elu(q) + 1, F.elu(k) + 1
    memory = torch.einsum("bhnd,bhne->bhnde", k, v).cumsum(2)
    scale = torch.einsum("bhnd,bhnd->bhn", q, k.cumsum(2))[..., None]
    return torch.einsum("bhnd,bhnde->bhne", q, memory) / scale


def _random_features(m: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Positive random features drawn anew at each step (Choromanski et al. 2020)."""
    draw = torch.randn(q.shape[-1], 6)
    q, k = ((t @ draw - t.square().sum(-1, keepdim=True) / 2).exp() for t in (q, k))
    return q @ (k.mT @ v) / (q @ k.sum(2)[..., None])


def _low_rank(m: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Keys and values mixed down to three positions (Wang et al. 2020)."""
    return _spelled_out(m, q, m.mix @ k, m.mix @ v)


def _windows(m: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Only neighbours, by unfolding (Beltagy et al. 2020)."""
    k, v = (F.pad(t, (0, 0, 1, 1)).unfold(2, 3, 1) for t in (k, v))
    return torch.einsum("bhnw,bhndw->bhnd", torch.einsum("bhnd,bhndw->bhnw", q, k).softmax(-1), v)


def _talking(m: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Heads exchange scores and weights (Shazeer et al. 2020)."""
    scores = torch.einsum("bhij,hg->bgij", q @ k.mT, m.before)
    return torch.einsum("bhij,hg->bgij", scores.softmax(-1), m.after) @ v


def _sparse_max(m: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Sparsemax (Martins and Astudillo 2016): sort, cumulative sum, threshold."""
    scores = q @ k.mT
    ranked = scores.sort(-1, descending=True).values
    sums, ranks = ranked.cumsum(-1) - 1, torch.arange(1, 1 + scores.shape[-1])
    support = (ranked * ranks > sums).sum(-1, keepdim=True)
    return (scores - sums.gather(-1, support - 1) / support).clamp(min=0) @ v


def _top_k(m: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    best = scores.topk(3, -1)
    return torch.full_like(scores, -math.inf).scatter(-1, best.indices, best.values).softmax(-1) @ v


class SlotAttention(nn.Module):
    """Slots compete for inputs, three times over (Locatello et al. 2020)."""

    def __init__(self, width: int = _WIDTH) -> None:
        super().__init__()
        self.mean, self.spread = weight(1, 1, width), weight(1, 1, width)
        self.norm, self.slot_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.kv = nn.Linear(width, width, bias=False), nn.Linear(width, 2 * width)
        self.cell = nn.GRUCell(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Starts from random slots."""
        k, v = self.kv(self.norm(x)).chunk(2, -1)
        slots = self.mean + self.spread.exp() * torch.randn(x.shape[0], 3, x.shape[2])
        for _ in range(3):
            attention = (k @ self.q(self.slot_norm(slots)).mT).softmax(-1) + 1e-6
            updates = (attention / attention.sum(1, keepdim=True)).mT @ v
            slots = self.cell(updates.flatten(0, 1), slots.flatten(0, 1)).view_as(slots)
        return slots


class Perceiver(nn.Module):
    """Latents read the input through one shared layer, repeatedly (Jaegle et al. 2021)."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = weight(3, _WIDTH)
        self.read = nn.MultiheadAttention(_WIDTH, 2, kdim=5, vdim=5, batch_first=True)
        self.think = nn.TransformerEncoderLayer(_WIDTH, 2, 16, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """The latents after two readings."""
        latents = self.latents.expand(x.shape[0], -1, -1)
        for _ in range(2):
            latents = self.think(latents + self.read(latents, x, x)[0])
        return latents


def _encoder(mask_check: bool = True, **options: object) -> nn.Module:
    layer = nn.TransformerEncoderLayer(_WIDTH, 2, 16, batch_first=True, **options)
    norm = nn.LayerNorm(_WIDTH)
    return nn.TransformerEncoder(layer, 2, norm, enable_nested_tensor=False, mask_check=mask_check)


def _decoder() -> nn.Module:
    return nn.TransformerDecoder(nn.TransformerDecoderLayer(_WIDTH, 2, 16, norm_first=True), 2)


def _causal(length: int) -> Tensor:
    return nn.Transformer.generate_square_subsequent_mask(length)


_X = batches(normal(2, 6, _WIDTH, grad=True))
_PADDING = fixed(torch.tensor([[False] * 6, [False] * 4 + [True] * 2]))
_PADDED = normal(2, 6, _WIDTH)
_SPELLED = {
    "relative positions": lambda: Heads(_relative, distance=nn.Embedding(7, 4)),
    "talking heads": lambda: Heads(_talking, before=weight(4, 4), after=weight(4, 4)),
    "low rank": lambda: Heads(_low_rank, mix=weight(3, 6)),
    "linear biases": partial(Heads, _linear_bias),
    "rotary positions": partial(Heads, _rotary),
    "linear": partial(Heads, _linear),
    "random features": partial(Heads, _random_features),
    "local windows": partial(Heads, _windows),
    "sparsemax": partial(Heads, _sparse_max),
    "top k": partial(Heads, _top_k),
    "fused causal": partial(Heads, partial(_fused, is_causal=True)),
    "fused dropout": partial(Heads, partial(_fused, dropout_p=0.2)),
    "fused masked": partial(Heads, partial(_fused, attn_mask=torch.ones(6, 6).tril().bool())),
    "grouped queries": partial(Heads, partial(_fused, enable_gqa=True), 2),
    "multi-query": partial(Heads, _spelled_out, 4),
}


def all_of() -> list[Architecture]:
    """The attentive networks of the zoo."""
    return architectures_of(
        "attention",
        ("multihead attention", SelfAttention, _X),
        ("multihead without weights", lambda: SelfAttention(weights=False), _X),
        ("multihead unaveraged", lambda: SelfAttention(average=False, bias=False), _X),
        ("multihead padded", lambda: SelfAttention(batch_first=True), batches(
            _PADDED, key_padding_mask=_PADDING
        )),
        ("multihead causal", lambda: SelfAttention(batch_first=True, weights=False), batches(
            _PADDED, attn_mask=fixed(_causal(6)), is_causal=fixed(True)
        )),
        ("multihead with extra keys", partial(
            SelfAttention, add_bias_kv=True, add_zero_attn=True
        ), _X),
        ("perceiver", Perceiver, batches(normal(2, 7, 5))),
        ("slot attention", SlotAttention, _X),
        ("transformer", lambda: nn.Transformer(_WIDTH, 2, 1, 2, 16, batch_first=True), batches(
            normal(2, 5, _WIDTH), normal(2, 6, _WIDTH), tgt_mask=fixed(_causal(6))
        )),
        ("transformer encoder", _encoder, _X),
        ("transformer encoder pre-norm", lambda: _encoder(norm_first=True, activation="gelu"), _X),
        ("transformer encoder padded", _encoder, batches(_PADDED, src_key_padding_mask=_PADDING)),
        ("transformer encoder causal", lambda: _encoder(mask_check=False, bias=False), batches(
            _PADDED, mask=fixed(_causal(6)), is_causal=fixed(True)
        )),
        ("transformer decoder", _decoder, batches(
            normal(6, 2, _WIDTH), normal(5, 2, _WIDTH), tgt_mask=fixed(_causal(6)),
            memory_key_padding_mask=fixed(torch.tensor([[False] * 5, [False] * 3 + [True] * 2])),
        )),
        ("transformer language model", lambda: Composed(
            lambda m, x: m.out(m.body(m.embedding(x), _causal(6), is_causal=True)),
            embedding=nn.Embedding(11, _WIDTH), body=_encoder(), out=nn.Linear(_WIDTH, 11),
        ), batches(below(11, 2, 6))),
        *((f"attention {name}", make, _X) for name, make in _SPELLED.items()),
    )  # fmt: skip
