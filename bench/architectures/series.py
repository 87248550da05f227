"""Networks for series, tables and decisions."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.architectures.case import Architecture
from bench.architectures.tables import Composed, architectures_of, batches, normal, weight


class ObliviousTrees(nn.Module):
    """Soft decision trees with one question a level (Popov et al. 2019)."""

    def __init__(self, trees: int = 3, depth: int = 3) -> None:
        super().__init__()
        self.ask, self.leaves = nn.Linear(6, trees * depth), weight(trees, 2**depth)
        self.depth = depth

    def forward(self, x: Tensor) -> Tensor:
        """Sums over trees."""
        answers = self.ask(x).unflatten(1, (-1, self.depth)).sigmoid()
        paths = torch.ones(*answers.shape[:2], 1)
        for answer in answers.unbind(2):
            paths = torch.cat([paths * answer[..., None], paths * (1 - answer[..., None])], 2)
        return torch.einsum("btl,tl->b", paths, self.leaves)


class SplineNetwork(nn.Module):
    """A learnt function on each edge, by B-splines (Liu et al. 2024)."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes, self.base = weight(6, 3, 5), nn.Linear(6, 3)
        self.register_buffer("knots", torch.linspace(-2, 2, 8))

    def forward(self, x: Tensor) -> Tensor:
        """Sums over the edges."""
        x, t = x[..., None], self.knots
        basis = ((x >= t[:-1]) & (x < t[1:])).to(x.dtype)
        for k in (1, 2):
            left = (x - t[: -k - 1]) / (t[k:-1] - t[: -k - 1]) * basis[..., :-1]
            basis = left + (t[k + 1 :] - x) / (t[k + 1 :] - t[1:-k]) * basis[..., 1:]
        return self.base(F.silu(x[..., 0])) + torch.einsum("bif,iof->bo", basis, self.shapes)


class GaussianProcess(nn.Module):
    """The marginal likelihood under a learnt kernel of learnt features (Wilson et al. 2015)."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.noise = nn.Linear(6, 3), nn.Parameter(torch.tensor(0.0))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The loss."""
        x = self.features(x)
        k = (-torch.cdist(x, x).square()).exp() + (F.softplus(self.noise) + 0.1) * torch.eye(len(x))
        y = torch.distributions.MultivariateNormal(
            torch.zeros(len(x)), k, validate_args=False
        ).log_prob(y)
        return -y


class ActorCritic(nn.Module):
    """A policy that acts in forward, and the value of its state (Mnih et al. 2016)."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.policy, self.value = nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(8, 1)

    def forward(self, states: Tensor, rewards: Tensor) -> Tensor:
        """The loss of a sampled action."""
        x = self.body(states).tanh()
        policy = torch.distributions.Categorical(logits=self.policy(x), validate_args=False)
        action, value = policy.sample(), self.value(x).squeeze(1)
        gain = (rewards.gather(1, action[:, None]).squeeze(1) - value).detach()
        actor = -policy.log_prob(action) * gain - 0.01 * policy.entropy()
        return (actor + F.smooth_l1_loss(value, rewards.mean(1), reduction="none")).mean()


def _mixer(m: nn.Module, x: Tensor) -> Tensor:
    x = m.embed(x)
    x = x + m.tokens(m.norm(x).mT).mT
    return x + m.channels(m.norm(x))


def _decomposed(m: nn.Module, x: Tensor) -> Tensor:
    """DLinear: trend and remainder of a series, each by a linear layer."""
    trend = F.avg_pool1d(F.pad(x[:, None], (2, 2), mode="replicate"), 5, 1).squeeze(1)
    return m.trend(trend) + m.rest(x - trend)


def _stacks(m: nn.Module, x: Tensor) -> Tensor:
    """N-BEATS: each block takes its backcast away and adds its forecast."""
    forecast = 0.0
    for block in m.blocks:
        back, ahead = block(x).split((8, 3), 1)
        x, forecast = x - back, forecast + ahead
    return forecast


def _selective(m: nn.Module, x: Tensor) -> Tensor:
    """A selective state space, step by step (Gu and Dao 2023)."""
    rate, b, c = m.project(x).split((6, 4, 4), -1)
    decay = torch.exp(F.softplus(rate)[..., None] * -m.log_a.exp())
    drive = (F.softplus(rate) * x)[..., None] * b[:, :, None]
    state, outputs = torch.zeros(x.shape[0], 6, 4), []
    for i in range(x.shape[1]):
        state = decay[:, i] * state + drive[:, i]
        outputs.append((state * c[:, i, None]).sum(-1))
    return torch.stack(outputs, 1)


def _delta(m: nn.Module, x: Tensor) -> Tensor:
    """A memory written by the delta rule, in place (Schlag et al. 2021)."""
    q, k, v = m.qkv(x).chunk(3, -1)
    k, rate = F.normalize(k, dim=-1), m.rate(x).sigmoid()
    memory, outputs = torch.zeros(x.shape[0], 6, 6), []
    for i in range(x.shape[1]):
        missed = v[:, i] - torch.einsum("bij,bj->bi", memory, k[:, i])
        memory = memory + torch.einsum("bi,bj->bij", rate[:, i] * missed, k[:, i])
        outputs.append(torch.einsum("bij,bj->bi", memory, q[:, i]))
    return torch.stack(outputs, 1)


def _warped(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Soft dynamic time warping between embedded series (Cuturi and Blondel 2017)."""
    costs = torch.cdist(m.body(x), m.body(y))
    far = torch.full(costs.shape[:1], 1e4)
    row = [torch.zeros_like(far)] + [far] * costs.shape[2]
    for i in range(costs.shape[1]):
        new = [far]
        for j in range(costs.shape[2]):
            best = -torch.stack([row[j], row[j + 1], new[j]]).neg().logsumexp(0)
            new.append(costs[:, i, j] + best)
        row = new
    return row[-1]


def _dueling(m: nn.Module, x: Tensor) -> Tensor:
    advantage = m.advantage(m.body(x).relu())
    return m.value(m.body(x).relu()) + advantage - advantage.mean(1, keepdim=True)


def _linears(**widths: tuple[int, int]) -> dict[str, nn.Module]:
    return {name: nn.Linear(*pair) for name, pair in widths.items()}


def _mlp(*widths: int) -> nn.Module:
    return nn.Sequential(nn.Linear(*widths[:2]), nn.GELU(), nn.Linear(*widths[1:]))


_X, _SERIES = batches(normal(5, 6)), batches(normal(2, 5, 6))


def all_of() -> list[Architecture]:
    """The networks of the zoo for series and tables."""
    return architectures_of(
        "series and tables",
        ("spline network", SplineNetwork, _X),
        ("oblivious trees", ObliviousTrees, _X),
        ("gaussian process", GaussianProcess, batches(normal(5, 6), normal(5))),
        ("mlp mixer", lambda: Composed(
            _mixer, embed=nn.Linear(6, 8), norm=nn.LayerNorm(8), tokens=_mlp(5, 7, 5),
            channels=_mlp(8, 12, 8),
        ), _SERIES),
        ("series decomposition", lambda: Composed(
            _decomposed, **_linears(trend=(8, 3), rest=(8, 3))
        ), batches(normal(4, 8))),
        ("n-beats", lambda: Composed(
            _stacks, blocks=nn.ModuleList(_mlp(8, 6, 11) for _ in range(3))
        ), batches(normal(4, 8))),
        ("selective state space", lambda: Composed(
            _selective, project=nn.Linear(6, 14), log_a=weight(6, 4)
        ), _SERIES),
        ("delta memory", lambda: Composed(_delta, **_linears(qkv=(6, 18), rate=(6, 1))), _SERIES),
        ("time warping", lambda: Composed(_warped, body=nn.Linear(6, 3)), batches(
            normal(2, 4, 6), normal(2, 3, 6)
        )),
        ("dueling network", lambda: Composed(
            _dueling, **_linears(body=(6, 8), value=(8, 1), advantage=(8, 4))
        ), _X),
        ("actor and critic", ActorCritic, batches(normal(5, 6), normal(5, 4))),
    )  # fmt: skip
