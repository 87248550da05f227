"""Ways to put modules together: experts, sharing, custom gradients, many inputs and outputs."""

import itertools
from collections import namedtuple
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from bench.architectures.case import Architecture
from bench.architectures.tables import (
    Composed,
    Residual,
    architectures_of,
    batches,
    below,
    normal,
)


class Experts(nn.Module):
    """A mixture of experts: each token goes to the best two of them (Shazeer et al. 2017).

    Args:
        dispatch: "index" gathers each expert's tokens, "dense" runs all experts on everything,
            "capacity" gives each expert a few places, first come (Fedus et al. 2021).
    """

    def __init__(self, dispatch: str, width: int = 6, experts: int = 3) -> None:
        super().__init__()
        self.dispatch, self.router = dispatch, nn.Linear(width, experts)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 8), nn.GELU(), nn.Linear(8, width))
            for _ in range(experts)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the output and the loss that balances the experts."""
        scores = self.router(x).softmax(-1)
        gates, chosen = scores.topk(2, -1)
        load = F.one_hot(chosen, len(self.experts)).float().mean((0, 1))
        route = getattr(self, f"_{self.dispatch}")
        return route(x, gates, chosen), (load * scores.mean(0)).sum()

    def _dense(self, x: Tensor, gates: Tensor, chosen: Tensor) -> Tensor:
        weights = torch.zeros(len(x), len(self.experts)).scatter(1, chosen, gates)
        outputs = torch.stack([expert(x) for expert in self.experts], 1)
        return torch.einsum("te,ted->td", weights, outputs)

    def _index(self, x: Tensor, gates: Tensor, chosen: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            token, rank = torch.where(chosen == i)
            out.index_add_(0, token, expert(x[token]) * gates[token, rank, None])
        return out

    def _capacity(self, x: Tensor, gates: Tensor, chosen: Tensor, capacity: int = 3) -> Tensor:
        first = F.one_hot(chosen[:, 0], len(self.experts))
        place = (first.cumsum(0) - 1).gather(1, chosen[:, :1]).squeeze(1)
        kept = place < capacity
        table = torch.zeros(len(self.experts), capacity + 1, x.shape[1])
        slot = place.clamp(max=capacity)
        table = table.index_put((chosen[:, 0], slot), x)
        made = torch.stack([expert(rows) for expert, rows in zip(self.experts, table, strict=True)])
        return torch.where(kept[:, None], made[chosen[:, 0], slot] * gates[:, :1], x)


@dataclass
class Scores:
    """What `DeeplySupervised` returns."""

    final: Tensor
    inner: list[Tensor]
    extra: Tensor | None = None


Pair = namedtuple("Pair", ["mean", "spread"])


class DeeplySupervised(nn.Module):
    """A classifier after each layer (Lee et al. 2014), and a result of three kinds."""

    def __init__(self, kind: type) -> None:
        super().__init__()
        self.kind = kind
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.heads = nn.ModuleDict({f"head{i}": nn.Linear(6, 2) for i in range(3)})

    def forward(self, x: Tensor) -> object:
        """Returns scores as a dataclass, a dictionary or a named tuple."""
        scores = []
        for i, layer in enumerate(self.layers):
            x = layer(x).relu()
            scores.append(self.heads[f"head{i}"](x))
        if self.kind is dict:
            return {"final": scores[-1], "inner": {"first": scores[0]}, "extra": None, "layers": 3}
        if self.kind is Pair:
            return Pair(torch.stack(scores).mean(0), (scores[0], [scores[1].exp()]))
        return Scores(scores[-1], scores[:-1])


class MultiTask(nn.Module):
    """A task name chooses the head; unused heads get no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 6)
        self.tasks = nn.ModuleDict({"cats": nn.Linear(6, 2), "dogs": nn.Linear(6, 3)})

    def forward(self, x: Tensor, task: str = "cats") -> Tensor:
        """Runs one head."""
        return self.tasks[task](self.body(x).relu())


class Checkpointed(nn.Module):
    """Layers under `torch.utils.checkpoint`, in segments or one by one."""

    def __init__(self, *, segments: bool) -> None:
        super().__init__()
        self.segments = segments
        self.layers = nn.Sequential(*(nn.Linear(6, 6) for _ in range(4)))

    def forward(self, x: Tensor) -> Tensor:
        """Recomputes in backward."""
        if self.segments:
            return checkpoint_sequential(self.layers, 2, x, use_reentrant=False)
        for layer in self.layers:
            x = checkpoint(lambda x, layer=layer: layer(x).tanh(), x, use_reentrant=False)
        return x


class StochasticDepth(nn.Module):
    """Drops whole residual layers by Python's choice (Huang et al. 2016), or by each sample's."""

    def __init__(self, *, by_sample: bool) -> None:
        super().__init__()
        self.by_sample = by_sample
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """Skips about a third of the layers."""
        for layer in self.layers:
            if self.by_sample:
                x = x + layer(x).tanh() * (torch.rand(len(x), 1) < 2 / 3) * 1.5
            elif torch.rand(()) < 2 / 3:
                x = x + layer(x).tanh()
        return x


class Counter(nn.Module):
    """Buffers that forward changes: a count, a history written by index, a running mean."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("history", torch.zeros(4, 3))
        self.register_buffer("mean", None)

    def forward(self, x: Tensor) -> Tensor:
        """Subtracts what was before."""
        x = self.layer(x)
        now = x.detach().mean(0)
        self.mean = now if self.mean is None else 0.9 * self.mean + 0.1 * now
        self.history.index_copy_(0, (self.steps % 4)[None], now[None])
        self.steps += 1
        return x - self.history.mean(0) * self.steps.rsqrt()


class Remembering(nn.Module):
    """A step counter and a cache in plain Python, as old code has them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.calls, self.seen = nn.Linear(6, 3), 0, []

    def forward(self, x: Tensor) -> Tensor:
        """Counts."""
        self.calls += 1
        self.seen.append(x.shape)
        return self.layer(x) / self.calls


def _siamese(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    x, y = m.body(x), m.body(y)
    return m.bilinear(x, y).squeeze(1) + F.cosine_similarity(x, y) - m.distance(x, y)


def _recurrent_depth(m: nn.Module, x: Tensor) -> Tensor:
    for _ in range(6):  # one layer, six times
        x = x + m.layer(m.norm(x)).tanh()
    return x


def _highway(m: nn.Module, x: Tensor) -> Tensor:
    for gate, layer in zip(m.gates, m.layers, strict=True):
        x = torch.lerp(x, layer(x).relu(), gate(x).sigmoid())
    return x


def _mixed_up(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Mixup (Zhang et al. 2017): pairs mixed by a draw of the beta distribution."""
    share = torch.distributions.Beta(0.4, 0.4).sample((len(x), 1))
    order = torch.randperm(len(x))
    scores = m.body(share * x + (1 - share) * x[order])
    losses = (
        F.cross_entropy(scores, y, reduction="none"),
        F.cross_entropy(scores, y[order], reduction="none"),
    )
    return (share[:, 0] * losses[0] + (1 - share[:, 0]) * losses[1]).mean()


def _early(m: nn.Module, x: Tensor) -> Tensor:
    """Stops when it is sure, which depends on what it computes."""
    for layer in m.layers:
        x = layer(x).relu()
        if x.mean() > 1:
            break
    return x


def _hooked() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU())
    model[0].register_forward_hook(lambda module, args, output: 2 * output)
    return model


def _linears(*widths: int) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))


_X = batches(normal(5, 6, grad=True))


def all_of() -> list[Architecture]:
    """The compositions of the zoo."""
    return architectures_of(
        "composition",
        *(
            (f"experts {kind}", lambda kind=kind: Experts(kind), batches(normal(8, 6)))
            for kind in ("dense", "index", "capacity")
        ),
        ("siamese", lambda: Composed(
            _siamese, body=nn.Linear(6, 4), bilinear=nn.Bilinear(4, 4, 1),
            distance=nn.PairwiseDistance(),
        ), batches(normal(5, 6), normal(5, 6))),
        *(
            (f"deep supervision {kind.__name__}", lambda kind=kind: DeeplySupervised(kind), _X)
            for kind in (Scores, dict, Pair)
        ),
        ("multi-task", MultiTask, lambda step: (_X(step)[0], {"task": ("cats", "dogs")[step % 2]})),
        ("checkpointed", lambda: Checkpointed(segments=False), _X),
        ("checkpointed in segments", lambda: Checkpointed(segments=True), _X),
        ("stochastic depth", lambda: StochasticDepth(by_sample=False), _X),
        ("stochastic depth by sample", lambda: StochasticDepth(by_sample=True), _X),
        ("changing buffers", Counter, _X),
        ("changing attributes", Remembering, _X),
        ("recurrent depth", lambda: Composed(
            _recurrent_depth, layer=nn.Linear(6, 6), norm=nn.LayerNorm(6)
        ), _X),
        ("highway", lambda: Composed(
            _highway, gates=_linears(6, 6, 6), layers=_linears(6, 6, 6)
        ), _X),
        ("mixup", lambda: Composed(_mixed_up, body=nn.Linear(6, 4)), batches(
            normal(5, 6), below(4, 5)
        )),
        ("early exit", lambda: Composed(_early, layers=_linears(6, 5, 5)), _X),
        ("hooked submodule", _hooked, _X),
        ("nested residuals", lambda: Residual(
            nn.LayerNorm(6), Residual(nn.Linear(6, 6), nn.GELU()), nn.Dropout(0.2)
        ), _X),
    )  # fmt: skip
