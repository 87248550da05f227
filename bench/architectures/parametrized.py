"""Parameters that are computed, masked, tied, quantised or made by other networks."""

import warnings
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

from bench.architectures.case import Architecture
from bench.architectures.tables import Composed, architectures_of, batches, below, normal, weight


def _network(change: object) -> nn.Module:
    """Two layers, each changed."""
    return nn.Sequential(change(nn.Linear(6, 6)), nn.Tanh(), change(nn.Linear(6, 4)))


def _convolutions(change: object) -> nn.Module:
    return nn.Sequential(change(nn.Conv2d(3, 4, 3)), nn.LeakyReLU(0.2), change(nn.Conv2d(4, 2, 3)))


class Symmetric(nn.Module):
    """Mirrors the upper triangle."""

    def forward(self, x: Tensor) -> Tensor:
        """The symmetric matrix."""
        return x.triu() + x.triu(1).mT


class Exponential(nn.Module):
    """From skew-symmetric to orthogonal matrices."""

    def forward(self, x: Tensor) -> Tensor:
        """The orthogonal matrix."""
        return torch.matrix_exp(x - x.mT)


class LowRank(nn.Module):
    """Adds a product of narrow matrices to a frozen weight (Hu et al. 2021)."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.down, self.up = weight(2, columns), nn.Parameter(torch.zeros(rows, 2))

    def forward(self, frozen: Tensor) -> Tensor:
        """The adapted weight."""
        return frozen + 0.5 * self.up @ self.down


class DropConnect(nn.Module):
    """Drops weights, anew at each use."""

    def forward(self, x: Tensor) -> Tensor:
        """The thinned weight."""
        return F.dropout(x, 0.3, self.training)


def _adapted(layer: nn.Linear) -> nn.Linear:
    layer.requires_grad_(False)
    parametrize.register_parametrization(layer, "weight", LowRank(*layer.weight.shape))
    layer.parametrizations.weight.original.requires_grad_(False)
    return layer


def _with(*maps: type[nn.Module]) -> nn.Module:
    layer = nn.Linear(6, 6)
    for m in maps:
        parametrize.register_parametrization(layer, "weight", m())
    return nn.Sequential(layer, nn.ReLU(), nn.Linear(6, 2))


class Cached(nn.Module):
    """A recurrence whose orthogonal matrix is computed once a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = parametrizations.orthogonal(nn.Linear(6, 6, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """Applies the layer three times."""
        with parametrize.cached():
            for _ in range(3):
                x = self.layer(x).tanh()
        return x


class HyperNetwork(nn.Module):
    """A network that makes the weights of another one (Ha et al. 2016), for each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.maker, self.made = nn.Linear(3, 6 * 4 + 4), nn.Linear(6, 4).requires_grad_(False)

    def forward(self, x: Tensor, conditions: Tensor) -> Tensor:
        """Calls the made network with made parameters."""
        outputs = []
        for row, made in zip(x, self.maker(conditions), strict=True):
            parameters = {"weight": made[:24].view(4, 6), "bias": made[24:]}
            outputs.append(functional_call(self.made, parameters, (row,)))
        return torch.stack(outputs)


class Ensemble(nn.Module):
    """Equal networks, run at once by `vmap` over their stacked parameters."""

    def __init__(self) -> None:
        super().__init__()
        networks = [nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)) for _ in range(3)]
        parameters, _ = stack_module_state(networks)
        self.names = list(parameters)
        self.stacked = nn.ParameterList(parameters.values())
        self.template = [networks[0].to("meta")]

    def forward(self, x: Tensor) -> Tensor:
        """The outputs of all."""
        parameters = dict(zip(self.names, self.stacked, strict=True))
        call = lambda p, x: functional_call(self.template[0], p, (x,))  # noqa: E731
        return vmap(call, in_dims=(0, None))(parameters, x)


class MetaLearner(nn.Module):
    """A step of gradient descent inside of forward (Finn et al. 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.rate = nn.Linear(6, 1), nn.Parameter(torch.tensor(0.1))

    def forward(self, support: Tensor, aim: Tensor, query: Tensor) -> Tensor:
        """Predicts with adapted parameters."""
        parameters = dict(self.body.named_parameters())
        loss = F.mse_loss(functional_call(self.body, parameters, (support,)), aim)
        grads = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
        adapted = {
            n: p - self.rate * g for (n, p), g in zip(parameters.items(), grads, strict=True)
        }
        return functional_call(self.body, adapted, (query,))


class Tied(nn.Module):
    """An autoencoder whose decoder is the transposed encoder, and a shared embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.encoder = nn.Embedding(11, 6), nn.Linear(6, 4)
        self.shift, self.out = nn.Parameter(torch.zeros(6)), nn.Linear(6, 11, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Reconstructs tokens."""
        hidden = self.encoder(self.embedding(tokens)).relu()
        return self.out(F.linear(hidden, self.encoder.weight.T, self.shift))


class TensorTrain(nn.Module):
    """A matrix as a chain of small tensors (Novikov et al. 2015)."""

    def __init__(self) -> None:
        super().__init__()
        self.cores = nn.ParameterList([weight(2, 2, 3), weight(3, 3, 2, 2), weight(2, 2, 2)])

    def forward(self, x: Tensor) -> Tensor:
        """Contracts without building the matrix."""
        x = x.view(-1, 2, 3, 2)
        return torch.einsum("bijk,iar,rjcs,ske->bace", x, *self.cores).flatten(1)


def _factors(m: nn.Module, x: Tensor) -> Tensor:
    """A covariance from its Cholesky factor; solved, not inverted."""
    factor = m.factor.tril(-1) + m.factor.diagonal().exp().diag()
    solved = torch.linalg.solve_triangular(factor, x.T, upper=False)
    return solved.square().sum(0) + 2 * m.factor.diagonal().sum()


_X = batches(normal(5, 6, grad=True))
_IMAGES = batches(normal(2, 3, 6, 6))


def _orthogonal(kind: str) -> object:
    return partial(parametrizations.orthogonal, orthogonal_map=kind)


def _by_hook(change: object) -> object:
    def quietly(layer: nn.Module) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return change(layer)

    return quietly


def all_of() -> list[Architecture]:
    """The parametrized networks of the zoo."""
    return architectures_of(
        "parametrization",
        ("weight norm", lambda: _network(parametrizations.weight_norm), _X),
        ("spectral norm", lambda: _convolutions(parametrizations.spectral_norm), _IMAGES),
        *(
            (f"orthogonal {kind}", lambda kind=kind: _network(_orthogonal(kind)), _X)
            for kind in ("householder", "cayley", "matrix_exp")
        ),
        ("weight norm by hook", lambda: _network(_by_hook(nn.utils.weight_norm)), _X),
        ("spectral norm by hook", lambda: _convolutions(_by_hook(nn.utils.spectral_norm)), _IMAGES),
        ("pruned at random", lambda: _network(
            partial(prune.random_unstructured, name="weight", amount=0.3)
        ), _X),
        ("pruned by norm", lambda: _convolutions(
            partial(prune.ln_structured, name="weight", amount=0.5, n=2, dim=0)
        ), _IMAGES),
        ("symmetric", lambda: _with(Symmetric), _X),
        ("symmetric exponential", lambda: _with(Symmetric, Exponential), _X),
        ("drop connect", lambda: _with(DropConnect), _X),
        ("low-rank adapters", lambda: _network(_adapted), _X),
        ("cached parametrization", Cached, _X),
        ("hypernetwork", HyperNetwork, batches(normal(3, 6), normal(3, 3))),
        ("ensemble by vmap", Ensemble, _X),
        ("meta-learner", MetaLearner, batches(normal(4, 6), normal(4, 1), normal(2, 6))),
        ("tied weights", Tied, batches(below(11, 3, 4))),
        ("tensor train", TensorTrain, batches(normal(5, 12))),
        ("cholesky factor", lambda: Composed(_factors, factor=weight(6, 6)), _X),
    )  # fmt: skip
