"""Networks that return their loss: every loss of torch, and others from the literature."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.architectures.case import Architecture
from bench.architectures.tables import (
    Batch,
    Composed,
    Draw,
    architectures_of,
    batches,
    below,
    fixed,
    mask,
    normal,
    uniform,
    weight,
)


def _scored(loss: nn.Module, x: Callable[[Tensor], Tensor] = lambda x: x) -> nn.Module:
    """The loss of a linear layer's output, perhaps squashed first, and the targets."""
    return Composed(lambda m, v, *to: m.loss(x(m.body(v)), *to), body=nn.Linear(6, 4), loss=loss)


def _siamese(loss: nn.Module) -> nn.Module:
    """The loss of several outputs of one network, and the targets."""
    return Composed(
        lambda m, *xs, to=(): m.loss(*map(m.body, xs), *to), body=nn.Linear(6, 4), loss=loss
    )


def _to(*targets: Draw) -> Batch:
    return batches(normal(3, 6), *targets)


def _pairs(*targets: Draw, count: int = 2) -> Batch:
    return batches(*[normal(3, 6)] * count, to=lambda g: [t(g) for t in targets])


_CLASSES, _VALUES, _SIGNS = below(4, 3), normal(3, 4), lambda g: 2.0 * below(2, 3)(g) - 1


class CTC(nn.Module):
    """A recurrent network whose outputs are aligned by CTC (Graves et al. 2006)."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.out, self.loss = nn.GRU(5, 6), nn.Linear(6, 4), nn.CTCLoss()

    def forward(
        self, x: Tensor, targets: Tensor, lengths: Tensor, target_lengths: Tensor
    ) -> Tensor:
        """Returns the loss."""
        scores = self.out(self.body(x)[0]).log_softmax(2)
        return self.loss(scores, targets, lengths, target_lengths)


class Margins(nn.Module):
    """Angular margins between classes (Deng et al. 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.centres = nn.Linear(6, 5), weight(4, 5)

    def forward(self, x: Tensor, classes: Tensor) -> Tensor:
        """Returns the loss."""
        cosines = F.linear(F.normalize(self.body(x)), F.normalize(self.centres))
        angles = cosines.clamp(-1 + 1e-6, 1 - 1e-6).acos()
        chosen = F.one_hot(classes, 4).bool()
        return F.cross_entropy(16 * torch.where(chosen, angles + 0.3, angles).cos(), classes)


class MixtureDensity(nn.Module):
    """Parameters of a mixture of normal distributions (Bishop 1994)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 9))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Negative log-likelihood."""
        logits, mean, log_scale = self.body(x).chunk(3, 1)
        parts = torch.distributions.Normal(mean, log_scale.exp(), validate_args=False)
        return -(logits.log_softmax(1) + parts.log_prob(y[:, None])).logsumexp(1).mean()


class MeanTeacher(nn.Module):
    """A student matches the moving average of itself (Tarvainen and Valpola 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = nn.Linear(6, 4), nn.Linear(6, 4).requires_grad_(False)
        self.teacher.load_state_dict(self.student.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        """Moves the teacher first; its parameters need no gradient."""
        with torch.no_grad():
            for slow, fast in zip(
                self.teacher.parameters(), self.student.parameters(), strict=True
            ):
                slow.lerp_(fast, 0.01)
            aim = self.teacher(x + 0.1 * torch.randn_like(x)).softmax(1)
        return F.kl_div(self.student(x).log_softmax(1), aim, reduction="batchmean")


def _contrastive(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """InfoNCE of two views with a learnt temperature (Radford et al. 2021)."""
    a, b = F.normalize(m.left(x)), F.normalize(m.right(y))
    logits = m.scale.exp() * a @ b.mT
    aim = torch.arange(len(x))
    return (F.cross_entropy(logits, aim) + F.cross_entropy(logits.mT, aim)) / 2


def _decorrelated(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Barlow Twins: the cross-correlation matrix goes to the identity."""
    a, b = m.norm(m.body(x)), m.norm(m.body(y))
    c = a.T @ b / len(x)
    return (c.diagonal() - 1).square().sum() + 0.01 * (c - c.diagonal().diag()).square().sum()


def _covariant(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """VICReg: variance, invariance, covariance."""
    a, b = m.body(x), m.body(y)
    spread = sum(F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean() for z in (a, b))
    off = ~torch.eye(a.shape[1], dtype=torch.bool)
    return F.mse_loss(a, b) + spread + torch.cov(a.T)[off].square().sum()


def _focal(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    losses = F.cross_entropy(m.body(x), y, reduction="none")
    return ((1 - (-losses).exp()) ** 2 * losses).mean()


def _dice(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    p, y = m.body(x).sigmoid(), y.float()
    return 1 - (2 * (p * y).sum(1) + 1) / (p.sum(1) + y.sum(1) + 1)


def _centre(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    x = m.body(x)
    return torch.cdist(x, m.centres).gather(1, y[:, None]).square().mean() + x.abs().mean()


def _ranked(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """ListNet with a Plackett-Luce likelihood: sort, reversed cumulative log-sum-exp."""
    order = y.argsort(1, descending=True)
    scores = m.body(x).gather(1, order)
    return (scores.flip(1).logcumsumexp(1).flip(1) - scores).sum(1).mean()


def _quantile(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    error = y - m.body(x)
    levels = torch.tensor([0.1, 0.4, 0.6, 0.9])
    return torch.maximum(levels * error, (levels - 1) * error).mean()


def _matched(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Entropic optimal transport between outputs and targets by Sinkhorn's iteration."""
    costs = torch.cdist(m.body(x), y)
    kernel = (-costs / 4).exp()
    u = v = torch.ones(len(x)) / len(x)
    for _ in range(5):
        u, v = 1 / (kernel @ v), 1 / (kernel.T @ u)
    return (u[:, None] * kernel * v * costs).mean()


def _kernel_distance(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Maximum mean discrepancy with a median bandwidth."""
    z = torch.cat([m.body(x), y])
    distances = torch.cdist(z, z).square()
    k = (-distances / distances.detach().median()).exp()
    n = len(x)
    return k[:n, :n].mean() + k[n:, n:].mean() - 2 * k[:n, n:].mean()


_OWN = {
    "focal": (_focal, _CLASSES),
    "dice": (_dice, mask(3, 4)),
    "plackett-luce": (_ranked, _VALUES),
    "quantile": (_quantile, _VALUES),
    "sinkhorn": (_matched, _VALUES),
    "mean discrepancy": (_kernel_distance, _VALUES),
}


def _of_torch() -> list[tuple[str, Callable[[], nn.Module], Batch]]:
    signs, labels = (lambda g: 2.0 * below(2, 3, 4)(g) - 1), below(5, 3, 4, low=-1)
    logarithms = lambda x: x.log_softmax(1)  # noqa: E731
    rows = [
        (nn.CrossEntropyLoss, {"label_smoothing": 0.1}, _to(_CLASSES)),
        (nn.NLLLoss, {}, _to(_CLASSES), logarithms),
        (nn.GaussianNLLLoss, {}, _to(_VALUES, fixed(torch.ones(3, 4)))),
        (nn.PoissonNLLLoss, {"full": True}, _to(below(9, 3, 4))),
        (nn.KLDivLoss, {"log_target": True, "reduction": "sum"}, _to(_VALUES), logarithms),
        (nn.L1Loss, {}, _to(_VALUES)),
        (nn.SmoothL1Loss, {"beta": 0.5}, _to(_VALUES)),
        (nn.HuberLoss, {"delta": 0.7}, _to(_VALUES)),
        (nn.SoftMarginLoss, {}, _to(signs)),
        (nn.HingeEmbeddingLoss, {}, _to(signs)),
        (nn.BCELoss, {}, _to(uniform(3, 4)), torch.sigmoid),
        (nn.BCEWithLogitsLoss, {"pos_weight": torch.arange(1.0, 5)}, _to(uniform(3, 4))),
        (nn.MultiMarginLoss, {"p": 2}, _to(_CLASSES)),
        (nn.MultiLabelMarginLoss, {}, _to(lambda g: labels(g).clamp(max=3))),
        (nn.MultiLabelSoftMarginLoss, {}, _to(below(2, 3, 4))),
    ]
    return [
        (kind.__name__, lambda k=kind, o=options, f=squash: _scored(k(**o), *f), batch)
        for kind, options, batch, *squash in rows
    ]


def all_of() -> list[Architecture]:
    """The losses of the zoo."""
    body = lambda: nn.Linear(6, 4)  # noqa: E731
    return architectures_of(
        "loss",
        *_of_torch(),
        ("CrossEntropyLoss of classes", lambda: _scored(
            nn.CrossEntropyLoss(torch.arange(1.0, 5), ignore_index=0, reduction="none")
        ), _to(_CLASSES)),
        ("CrossEntropyLoss weighted and smoothed", lambda: _scored(
            nn.CrossEntropyLoss(torch.tensor([0.3, 1.7, 2.2, 0.9]), None, 0, label_smoothing=0.1)
        ), batches(normal(9, 6), below(4, 9))),
        ("CrossEntropyLoss of distributions", lambda: _scored(nn.CrossEntropyLoss()), _to(
            lambda g: normal(3, 4)(g).softmax(1)
        )),
        ("AdaptiveLogSoftmaxWithLoss", lambda: Composed(
            lambda m, x, y: m.loss(m.body(x), y).loss, body=body(),
            loss=nn.AdaptiveLogSoftmaxWithLoss(4, 12, [3, 7], 2.0),
        ), _to(below(12, 3))),
        ("CTCLoss", CTC, batches(
            normal(8, 2, 5), below(4, 2, 3, low=1), fixed(torch.tensor([8, 6])), below(4, 2, low=1)
        )),
        ("MarginRankingLoss", lambda: _siamese(nn.MarginRankingLoss()), _pairs(
            lambda g: 2.0 * below(2, 3, 1)(g) - 1
        )),
        ("CosineEmbeddingLoss", lambda: _siamese(nn.CosineEmbeddingLoss(0.2)), _pairs(_SIGNS)),
        ("TripletMarginLoss", lambda: _siamese(nn.TripletMarginLoss(swap=True)), _pairs(count=3)),
        ("TripletMarginWithDistanceLoss", lambda: _siamese(
            nn.TripletMarginWithDistanceLoss(distance_function=nn.PairwiseDistance(p=1))
        ), _pairs(count=3)),
        ("angular margins", Margins, _to(_CLASSES)),
        ("mixture density", MixtureDensity, _to(normal(3))),
        ("mean teacher", MeanTeacher, _to()),
        ("contrastive", lambda: Composed(
            _contrastive, left=body(), right=body(), scale=weight(1)
        ), _to(normal(3, 6))),
        ("centre loss", lambda: Composed(
            _centre, body=body(), centres=weight(4, 4)
        ), _to(_CLASSES)),
        ("decorrelation", lambda: Composed(
            _decorrelated, body=body(), norm=nn.BatchNorm1d(4, affine=False)
        ), _to(normal(3, 6))),
        ("variance and covariance", lambda: Composed(_covariant, body=body()), _to(normal(3, 6))),
        *((n, lambda f=f: Composed(f, body=body()), _to(y)) for n, (f, y) in _OWN.items()),
    )  # fmt: skip
