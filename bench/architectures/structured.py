"""Networks for data with a structure: graphs, sets, points, series, tables, decisions."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.architectures.case import Architecture
from bench.architectures.tables import (
    Composed,
    Draw,
    architectures_of,
    batches,
    below,
    fixed,
    normal,
    uniform,
    weight,
)


class GraphConvolution(nn.Module):
    """Averages over neighbours by a dense matrix (Kipf and Welling 2016)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.drop = nn.Linear(5, 8), nn.Linear(8, 3), nn.Dropout(0.3)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        """Two layers."""
        a = adjacency + torch.eye(len(adjacency))
        scale = a.sum(1).rsqrt()
        a = scale[:, None] * a * scale
        return a @ self.second(self.drop((a @ self.first(x)).relu()))


class GraphAttention(nn.Module):
    """Softmax over each node's edges, by scattering (Velickovic et al. 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.value, self.source, self.target = nn.Linear(5, 6), nn.Linear(6, 1), nn.Linear(6, 1)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        """One head."""
        x, (start, end) = self.value(x), edges
        scores = F.leaky_relu(self.source(x)[start] + self.target(x)[end], 0.2).squeeze(1)
        most = torch.full((len(x),), -math.inf).scatter_reduce(0, end, scores, "amax").detach()
        scores = (scores - most[end]).exp()
        sums = torch.zeros(len(x)).index_add(0, end, scores)
        return torch.zeros_like(x).index_add(0, end, x[start] * (scores / sums[end])[:, None])


class MessagePassing(nn.Module):
    """Edge networks and a recurrent update, pooled by graph (Gilmer et al. 2017)."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.message = nn.Sequential(nn.Linear(2 * width + 2, width), nn.ReLU())
        self.update, self.read = nn.GRUCell(width, width), nn.Linear(width, 2)

    def forward(self, x: Tensor, edges: Tensor, features: Tensor, graphs: Tensor) -> Tensor:
        """Three rounds."""
        start, end = edges
        for _ in range(3):
            sent = self.message(torch.cat([x[start], x[end], features], 1))
            x = self.update(
                torch.zeros_like(x).scatter_add(0, end[:, None].expand_as(sent), sent), x
            )
        return self.read(torch.zeros(2, x.shape[1]).index_add(0, graphs, x))


class PointNet(nn.Module):
    """A set of points, aligned by a predicted matrix, pooled by maximum (Qi et al. 2016)."""

    def __init__(self) -> None:
        super().__init__()
        self.align = nn.Sequential(nn.Conv1d(3, 8, 1), nn.BatchNorm1d(8), nn.ReLU())
        self.matrix, self.out = nn.Linear(8, 9), nn.Linear(8, 4)
        self.body = nn.Sequential(nn.Conv1d(3, 8, 1), nn.BatchNorm1d(8), nn.ReLU(inplace=True))

    def forward(self, points: Tensor) -> Tensor:
        """Classifies clouds of points."""
        x = points.mT
        matrix = self.matrix(self.align(x).amax(2)).view(-1, 3, 3) + torch.eye(3)
        return self.out(self.body(torch.bmm(matrix, x)).max(2)[0])


class EdgeConvolution(nn.Module):
    """Neighbours in the space of features, found anew in each layer (Wang et al. 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 5), nn.Linear(10, 5)])

    def forward(self, points: Tensor) -> Tensor:
        """Features of each point."""
        x = points
        for layer in self.layers:
            near = torch.cdist(x, x).topk(3, -1, largest=False).indices
            found = x.gather(1, near.flatten(1)[..., None].expand(-1, -1, x.shape[2]))
            found = found.view(*near.shape, -1)
            here = x[:, :, None].expand_as(found)
            x = layer(torch.cat([here, found - here], -1)).relu().amax(2)
        return x


class Radiance(nn.Module):
    """Colours along rays, integrated (Mildenhall et al. 2020)."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.out = nn.Linear(18, 8), nn.Linear(8, 4)

    def forward(self, origins: Tensor, directions: Tensor) -> Tensor:
        """The colours of pixels, at jittered depths."""
        depths = torch.linspace(0, 1, 6) + torch.rand(len(origins), 6) / 6
        x = origins[:, None] + directions[:, None] * depths[..., None]
        x = torch.cat([f(x * 2**i) for i in range(3) for f in (torch.sin, torch.cos)], -1)
        colour, density = self.out(self.body(x).relu()).split((3, 1), -1)
        gaps = F.pad(depths.diff(dim=1), (0, 1), value=1.0)
        opacity = 1 - (-density.squeeze(-1).relu() * gaps).exp()
        passed = F.pad((1 - opacity + 1e-6).log().cumsum(1)[:, :-1], (1, 0)).exp()
        return ((opacity * passed)[..., None] * colour.sigmoid()).sum(1)


class Capsules(nn.Module):
    """Routing by agreement (Sabour et al. 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.transform = weight(6, 3, 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Lengths of the output capsules."""
        votes = torch.einsum("bic,ijcd->bijd", x, self.transform)
        logits = torch.zeros(votes.shape[:3])
        for _ in range(3):
            poses = torch.einsum("bij,bijd->bjd", logits.softmax(2), votes)
            length = poses.norm(dim=2, keepdim=True)
            poses = length / (1 + length.square()) * poses
            logits = logits + torch.einsum("bijd,bjd->bij", votes, poses)
        return poses.norm(dim=2)


def _deep_set(m: nn.Module, x: Tensor) -> Tensor:
    return m.outer(F.relu(m.inner(x)).sum(1) / x.shape[1])


def _sine(m: nn.Module, x: Tensor) -> Tensor:
    """SIREN."""
    return m.outer(torch.sin(30 * m.inner(x)))


def _hopfield(m: nn.Module, x: Tensor) -> Tensor:
    """Modern Hopfield network: retrieves stored patterns, repeatedly."""
    for _ in range(3):
        x = (4 * x @ m.patterns.T).softmax(1) @ m.patterns
    return x


def _radial(m: nn.Module, x: Tensor) -> Tensor:
    distances = (x[:, None] - m.centres).square().sum(2)
    return m.out((-distances * m.widths.exp()).exp())


def _linears(**widths: tuple[int, int]) -> dict[str, nn.Module]:
    return {name: nn.Linear(*pair) for name, pair in widths.items()}


_NODES, _EDGES, _X = normal(7, 5), below(7, 2, 12), batches(normal(5, 6))
_SERIES = batches(normal(2, 5, 6))
_ADJACENCY: Draw = lambda g: (uniform(7, 7)(g) < 0.4).float()  # noqa: E731
_GRAPHS = fixed(torch.tensor([0, 0, 0, 1, 1, 1, 1]))


def all_of() -> list[Architecture]:
    """The networks of the zoo for structured data."""
    return architectures_of(
        "structured",
        ("graph convolution", GraphConvolution, batches(_NODES, _ADJACENCY)),
        ("graph attention", GraphAttention, batches(_NODES, _EDGES)),
        ("message passing", MessagePassing, batches(_NODES, _EDGES, normal(12, 2), _GRAPHS)),
        ("point net", PointNet, batches(normal(2, 6, 3))),
        ("edge convolution", EdgeConvolution, batches(normal(2, 6, 3))),
        ("deep set", lambda: Composed(_deep_set, **_linears(inner=(6, 8), outer=(8, 2))), _SERIES),
        ("radiance field", Radiance, batches(normal(4, 3), normal(4, 3))),
        ("sine network", lambda: Composed(_sine, **_linears(inner=(6, 8), outer=(8, 2))), _X),
        ("capsules", Capsules, batches(normal(2, 6, 4))),
        ("hopfield", lambda: Composed(_hopfield, patterns=weight(4, 6)), _X),
        ("radial basis", lambda: Composed(
            _radial, centres=weight(4, 6), widths=weight(4), out=nn.Linear(4, 2)
        ), _X),
    )  # fmt: skip
