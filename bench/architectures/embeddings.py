"""Embeddings with all options of torch, and the recommenders and word models built from them."""

from dataclasses import replace
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
    uniform,
)


class Looked(nn.Module):
    """An embedding and a linear layer."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.embedding, self.out = nn.Embedding(11, 6, **options), nn.Linear(6, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        """Classifies each token."""
        return self.out(self.embedding(tokens))


class Bagged(nn.Module):
    """Bags of tokens of different sizes, each classified."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.bag, self.out = nn.EmbeddingBag(11, 6, **options), nn.Linear(6, 3)

    def forward(self, tokens: Tensor, *offsets: Tensor, **options: Tensor) -> Tensor:
        """Classifies each bag."""
        return self.out(self.bag(tokens, *offsets, **options))


class SkipGram(nn.Module):
    """Word vectors by negative sampling (Mikolov et al. 2013); samples from a unigram table."""

    def __init__(self, words: int = 20, width: int = 6) -> None:
        super().__init__()
        self.inner, self.outer = nn.Embedding(words, width), nn.Embedding(words, width)
        self.register_buffer("unigram", torch.arange(1.0, words + 1))

    def forward(self, centre: Tensor, context: Tensor) -> Tensor:
        """Returns the loss."""
        count = 5 * len(centre)
        negative = torch.multinomial(self.unigram, count, replacement=True).view(-1, 5)
        v = self.inner(centre)
        positive = (v * self.outer(context)).sum(1)
        others = torch.einsum("bd,bnd->bn", v, self.outer(negative))
        return -(F.logsigmoid(positive) + F.logsigmoid(-others).sum(1)).mean()


class DLRM(nn.Module):
    """Dense features, bags of categories and their dot products (Naumov et al. 2019)."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.bags = nn.ModuleList(nn.EmbeddingBag(n, width, mode="sum") for n in (7, 9, 5))
        self.bottom = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, width), nn.ReLU())
        self.top = nn.Sequential(nn.Linear(width + 6, 8), nn.ReLU(), nn.Linear(8, 1))

    def forward(self, dense: Tensor, categories: list[Tensor]) -> Tensor:
        """The probability of a click."""
        x = self.bottom(dense)
        vectors = torch.stack([x, *(b(c) for b, c in zip(self.bags, categories, strict=True))], 1)
        rows, columns = torch.tril_indices(4, 4, -1)
        products = torch.bmm(vectors, vectors.mT)[:, rows, columns]
        return self.top(torch.cat([x, products], 1)).sigmoid()


class DeepFM(nn.Module):
    """A factorization machine beside a network on shared embeddings (Guo et al. 2017)."""

    def __init__(self, fields: int = 3, values: int = 10, width: int = 4) -> None:
        super().__init__()
        self.first, self.second = nn.Embedding(values, 1), nn.Embedding(values, width)
        self.deep = nn.Sequential(
            nn.Linear(fields * width, 8),
            nn.BatchNorm1d(8),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Linear(8, 1),
        )

    def forward(self, ids: Tensor) -> Tensor:
        """A score for each sample."""
        x = self.second(ids)
        pairs = 0.5 * (x.sum(1).square() - x.square().sum(1)).sum(1, keepdim=True)
        return self.first(ids).sum(1) + pairs + self.deep(x.flatten(1))


class CrossNetwork(nn.Module):
    """Explicit feature crosses (Wang et al. 2017)."""

    def __init__(self, width: int = 6, layers: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, 1, bias=False) for _ in range(layers))
        self.shifts = nn.ParameterList(torch.zeros(width) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        """Crosses the input with each layer's."""
        crossed = x
        for layer, shift in zip(self.layers, self.shifts, strict=True):
            crossed = x * layer(crossed) + shift + crossed
        return crossed


class AdaptiveInput(nn.Module):
    """Narrow embeddings for rare words (Baevski and Auli 2018): boolean masks by cluster."""

    def __init__(self) -> None:
        super().__init__()
        self.edges = (0, 4, 12)
        self.tables = nn.ModuleList([nn.Embedding(4, 8), nn.Embedding(8, 2)])
        self.lifts = nn.ModuleList([nn.Linear(8, 6), nn.Linear(2, 6)])

    def forward(self, tokens: Tensor) -> Tensor:
        """Embeds each token."""
        out = torch.zeros(*tokens.shape, 6)
        for i, (table, lift) in enumerate(zip(self.tables, self.lifts, strict=True)):
            inside = (tokens >= self.edges[i]) & (tokens < self.edges[i + 1])
            out[inside] = lift(table(tokens[inside] - self.edges[i]))
        return out


def _hashed(m: nn.Module, ids: Tensor) -> Tensor:
    """Two hashes into one small table (Svenstrup et al. 2017)."""
    return m.table((ids * 31 + 7) % 13) * m.table((ids * 17 + 3) % 13)


def _sinusoidal(m: nn.Module, tokens: Tensor) -> Tensor:
    steps = torch.arange(tokens.shape[1])[:, None] / 100 ** (torch.arange(3) / 3)
    return m.out(m.embedding(tokens) + torch.cat([steps.sin(), steps.cos()], 1))


def _matched(m: nn.Module, users: Tensor, items: Tensor) -> Tensor:
    """Matrix factorisation with biases."""
    products = (m.users(users) * m.items(items)).sum(1)
    return (products + m.user_bias(users)[:, 0] + m.item_bias(items)[:, 0]).sigmoid()


def _translated(m: nn.Module, heads: Tensor, relations: Tensor, tails: Tensor) -> Tensor:
    """TransE: a relation is a step from head to tail."""
    h, t = F.normalize(m.entities(heads)), F.normalize(m.entities(tails))
    return F.relu(1 + (h + m.relations(relations) - t).norm(p=1, dim=1)).mean()


_TOKENS = batches(below(11, 2, 6))
_BAGS = batches(below(11, 9), fixed(torch.tensor([0, 3, 7])))
_IDS = below(10, 4)


def all_of() -> list[Architecture]:
    """The embedding models of the zoo."""
    table = nn.Embedding
    dense = architectures_of(
        "embedding",
        ("embedding padded", partial(Looked, padding_idx=0), _TOKENS),
        ("embedding of bounded norm", partial(Looked, max_norm=1.0), _TOKENS),
        ("embedding by frequency", partial(Looked, scale_grad_by_freq=True), _TOKENS),
        ("bag sum", partial(Bagged, mode="sum", include_last_offset=True), batches(
            below(11, 9), fixed(torch.tensor([0, 3, 9]))
        )),
        ("bag mean", partial(Bagged, mode="mean", padding_idx=0), _BAGS),
        ("bag max", partial(Bagged, mode="max"), _BAGS),
        ("bag rows", partial(Bagged, scale_grad_by_freq=True), _TOKENS),
        ("bag of bounded norm", partial(Bagged, max_norm=1.0), _BAGS),
        ("bag weighted", partial(Bagged, mode="sum"), batches(
            below(11, 9), fixed(torch.tensor([0, 3, 7])), per_sample_weights=uniform(9)
        )),
        ("skip-gram", SkipGram, batches(below(20, 4), below(20, 4))),
        ("dlrm", DLRM, batches(
            normal(2, 3), lambda g: [below(n, 2, 3)(g) for n in (7, 9, 5)]
        )),
        ("deep factorization machine", DeepFM, batches(below(10, 4, 3))),
        ("cross network", CrossNetwork, batches(normal(4, 6))),
        ("adaptive input", AdaptiveInput, batches(below(12, 2, 6))),
        ("hashed embedding", lambda: Composed(_hashed, table=table(13, 6)), batches(
            below(999, 2, 6)
        )),
        ("sinusoidal positions", lambda: Composed(
            _sinusoidal, embedding=table(11, 6), out=nn.Linear(6, 3)
        ), _TOKENS),
        ("matrix factorisation", lambda: Composed(
            _matched, users=table(10, 4), items=table(10, 4), user_bias=table(10, 1),
            item_bias=table(10, 1),
        ), batches(_IDS, _IDS)),
        ("transe", lambda: Composed(
            _translated, entities=table(10, 4), relations=table(3, 4)
        ), batches(_IDS, below(3, 4), _IDS)),
    )  # fmt: skip
    sparse = architectures_of(
        "embedding",
        ("embedding sparse", partial(Looked, sparse=True), _TOKENS),
        ("bag sparse", partial(Bagged, sparse=True), _BAGS),
    )
    # Adam has no rule for sparse gradients.
    return [*dense, *(replace(s, optimizer=partial(torch.optim.SGD, lr=0.1)) for s in sparse)]
