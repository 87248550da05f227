"""Generative models: autoencoders, flows, adversaries, diffusion, autoregression."""

import math

import torch
from torch import Tensor, nn
from torch.distributions import Independent, Normal, kl_divergence
from torch.nn import functional as F

from bench.architectures.case import Architecture
from bench.architectures.tables import (
    Composed,
    architectures_of,
    batches,
    below,
    mask,
    normal,
    uniform,
    weight,
)


class VAE(nn.Module):
    """Variational autoencoder (Kingma and Welling 2013), conditional on a class."""

    def __init__(self, samples: int = 1) -> None:
        super().__init__()
        self.samples, self.condition = samples, nn.Embedding(3, 2)
        self.encoder, self.statistics = nn.Linear(12, 8), nn.Linear(8, 6)
        self.decoder = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 10))

    def forward(self, x: Tensor, classes: Tensor) -> Tensor:
        """The importance-weighted bound (Burda et al. 2015), negative."""
        condition = self.condition(classes)
        hidden = self.encoder(torch.cat([x, condition], 1)).relu()
        mean, log_variance = self.statistics(hidden).chunk(2, 1)
        deviation = (0.5 * log_variance).exp()
        bounds = []
        for _ in range(self.samples):
            z = mean + deviation * torch.randn_like(deviation)
            decoded = self.decoder(torch.cat([z, condition], 1))
            fit = -F.binary_cross_entropy_with_logits(decoded, x, reduction="none").sum(1)
            gap = (z.square() - ((z - mean) / deviation).square() - log_variance).sum(1) / 2
            bounds.append(fit - gap)
        return -torch.stack(bounds).logsumexp(0).mean()


class DistributionVAE(nn.Module):
    """The same with `torch.distributions`, which look at their arguments to validate them."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(10, 6), nn.Linear(3, 10)

    def forward(self, x: Tensor) -> Tensor:
        """The negative bound."""
        mean, scale = self.encoder(x).chunk(2, 1)
        posterior = Independent(Normal(mean, F.softplus(scale)), 1)
        prior = Independent(Normal(torch.zeros(3), torch.ones(3)), 1)
        fit = F.mse_loss(self.decoder(posterior.rsample()), x, reduction="none").sum(1)
        return (fit + kl_divergence(posterior, prior.expand(posterior.batch_shape))).mean()


class VQVAE(nn.Module):
    """Nearest codes, straight-through, codes moved by running averages (Oord et al. 2017)."""

    def __init__(self, codes: int = 7, width: int = 4) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Conv2d(3, width, 2, 2), nn.ConvTranspose2d(width, 3, 2, 2)
        self.register_buffer("codes", torch.randn(codes, width))
        self.register_buffer("counts", torch.ones(codes))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the reconstruction, the commitment loss and the chosen codes."""
        z = self.encoder(x).permute(0, 2, 3, 1)
        chosen = torch.cdist(z.flatten(0, 2), self.codes).argmin(1)
        found = self.codes[chosen].view_as(z)
        with torch.no_grad():
            onehot = F.one_hot(chosen, len(self.codes)).float()
            self.counts.mul_(0.9).add_(onehot.sum(0), alpha=0.1)
            self.codes += 0.1 * (onehot.T @ z.flatten(0, 2) - self.codes) / self.counts[:, None]
        quantised = z + (found - z).detach()
        return self.decoder(quantised.permute(0, 3, 1, 2)), F.mse_loss(z, found.detach()), chosen


class Coupling(nn.Module):
    """Half of the input scales and shifts the other half (Dinh et al. 2016)."""

    def __init__(self, width: int = 6, *, flipped: bool) -> None:
        super().__init__()
        self.flipped = flipped
        self.net = nn.Sequential(nn.Linear(width // 2, 8), nn.Tanh(), nn.Linear(8, width))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the output and its log-determinant."""
        kept, moved = x.chunk(2, 1)[:: -1 if self.flipped else 1]
        scale, shift = self.net(kept).chunk(2, 1)
        moved = moved * scale.tanh().exp() + shift
        parts = (moved, kept) if self.flipped else (kept, moved)
        return torch.cat(parts, 1), scale.tanh().sum(1)


class Flow(nn.Module):
    """Couplings between invertible matrices (Kingma and Dhariwal 2018)."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.steps = nn.ModuleList(Coupling(width, flipped=i % 2 == 1) for i in range(3))
        self.mixes = nn.ParameterList(weight(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """Negative log-likelihood."""
        total = torch.zeros(len(x))
        for mix, step in zip(self.mixes, self.steps, strict=True):
            x, change = step(x @ mix)
            total = total + change + torch.linalg.slogdet(mix).logabsdet
        return (0.5 * x.square().sum(1) + 3 * math.log(2 * math.pi) - total).mean()


class MaskedConv(nn.Conv2d):
    """A convolution that sees only the pixels before (Oord et al. 2016)."""

    def __init__(self, *args: object, centre: bool, **options: object) -> None:
        super().__init__(*args, **options)
        seen = torch.zeros_like(self.weight)
        middle = self.kernel_size[0] // 2
        seen[:, :, :middle] = 1
        seen[:, :, middle, : middle + centre] = 1
        self.register_buffer("seen", seen)

    def forward(self, x: Tensor) -> Tensor:
        """Masks the weight, out of place."""
        return F.conv2d(x, self.weight * self.seen, self.bias, padding=self.padding)


class NADE(nn.Module):
    """Autoregression that shares its running activations (Larochelle and Murray 2011)."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.into, self.out = weight(width, 5), weight(width, 5)
        self.shift, self.start = weight(width), weight(5)

    def forward(self, x: Tensor) -> Tensor:
        """Negative log-likelihood, pixel by pixel."""
        active, losses = self.start.expand(len(x), -1).clone(), []
        for i in range(x.shape[1]):
            logit = active.sigmoid() @ self.out[i] + self.shift[i]
            losses.append(F.binary_cross_entropy_with_logits(logit, x[:, i], reduction="none"))
            active += x[:, i, None] * self.into[i]
        return torch.stack(losses, 1).sum(1).mean()


class Adversaries(nn.Module):
    """Generator and discriminator in one step; the generator's gradient is turned around."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(
            nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 6)
        )
        self.discriminator = nn.Sequential(nn.Linear(6, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1))

    def forward(self, real: Tensor) -> dict[str, Tensor]:
        """Both losses; fakes are judged twice, detached for the discriminator."""
        fake = self.generator(torch.randn(len(real), 3))
        judged, own = self.discriminator(real), self.discriminator(fake.detach())
        return {
            "discriminator": F.softplus(-judged).mean() + F.softplus(own).mean(),
            "generator": F.softplus(-self.discriminator(fake)).mean(),
        }


class Penalised(nn.Module):
    """Critic with a gradient penalty, differentiated inside of forward (Gulrajani et al. 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.critic = nn.Sequential(nn.Linear(6, 8), nn.Softplus(), nn.Linear(8, 1))

    def forward(self, real: Tensor, fake: Tensor) -> Tensor:
        """The critic's loss."""
        mix = torch.rand(len(real), 1)
        between = (mix * real + (1 - mix) * fake).requires_grad_()
        scores = self.critic(between)
        (slope,) = torch.autograd.grad(scores.sum(), between, create_graph=True)
        penalty = (slope.norm(dim=1) - 1).square().mean()
        return self.critic(fake).mean() - self.critic(real).mean() + 10 * penalty


class Diffusion(nn.Module):
    """Predicts the noise at a random time (Ho et al. 2020)."""

    def __init__(self, width: int = 8, times: int = 20) -> None:
        super().__init__()
        self.register_buffer("kept", torch.linspace(0.99, 0.8, times).cumprod(0))
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.down, self.up = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 3, 3, padding=1)
        self.norm, self.attention = nn.GroupNorm(2, width), nn.MultiheadAttention(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        """The loss."""
        t, noise = torch.randint(len(self.kept), (len(x),)), torch.randn_like(x)
        kept = self.kept[t].view(-1, 1, 1, 1)
        x = kept.sqrt() * x + (1 - kept).sqrt() * noise
        angles = t[:, None] / 100 ** (torch.arange(4) / 4)
        x = self.down(x) + self.time(torch.cat([angles.sin(), angles.cos()], 1))[..., None, None]
        pixels = F.silu(self.norm(x)).flatten(2).permute(2, 0, 1)
        attended = self.attention(pixels, pixels, pixels, need_weights=False)[0]
        return F.mse_loss(self.up(x + attended.permute(1, 2, 0).view_as(x)), noise)


def _categorical(m: nn.Module, x: Tensor) -> Tensor:
    """Discrete latents by Gumbel's trick, hard with soft gradients (Jang et al. 2016)."""
    z = F.gumbel_softmax(m.encoder(x).view(-1, 3, 4), tau=0.7, hard=True)
    return F.binary_cross_entropy_with_logits(m.decoder(z.flatten(1)), x)


def _denoised(m: nn.Module, x: Tensor, kept: Tensor) -> Tensor:
    """A masked autoencoder."""
    return F.mse_loss(m.decoder(m.encoder(x * kept).relu())[~kept], x[~kept])


def _boltzmann(m: nn.Module, x: Tensor) -> Tensor:
    """Contrastive divergence by one step of Gibbs sampling (Hinton 2002)."""
    free = lambda v: -(v @ m.visible) - F.softplus(v @ m.weight + m.hidden).sum(1)  # noqa: E731
    with torch.no_grad():
        hidden = (x @ m.weight + m.hidden).sigmoid().bernoulli()
        sampled = (hidden @ m.weight.T + m.visible).sigmoid().bernoulli()
    return (free(x) - free(sampled)).mean()


def _langevin(m: nn.Module, x: Tensor) -> Tensor:
    """An energy whose negative samples follow its own slope (Du and Mordatch 2019)."""
    sample = torch.rand_like(x)
    for _ in range(3):
        sample = sample.detach().requires_grad_()
        (slope,) = torch.autograd.grad(m.energy(sample).sum(), sample)
        sample = sample - 0.1 * slope + 0.01 * torch.randn_like(sample)
    return m.energy(x).mean() - m.energy(sample.detach()).mean()


def _score(m: nn.Module, x: Tensor) -> Tensor:
    """Sliced score matching: a random projection of the Jacobian (Song et al. 2019)."""
    x, direction = x.detach().requires_grad_(), torch.randn_like(x)
    (score,) = torch.autograd.grad(m.energy(x).sum(), x, create_graph=True)
    (bend,) = torch.autograd.grad((score * direction).sum(), x, create_graph=True)
    return ((bend * direction).sum(1) + 0.5 * (score * direction).sum(1).square()).mean()


_X = batches(normal(4, 6))
_BITS = batches(lambda g: uniform(4, 10)(g).round())


def all_of() -> list[Architecture]:
    """The generative models of the zoo."""
    energy = lambda: nn.Sequential(nn.Linear(6, 8), nn.SiLU(), nn.Linear(8, 1))  # noqa: E731
    pixels = lambda: nn.Sequential(  # noqa: E731
        MaskedConv(1, 4, 3, padding=1, centre=False), nn.ReLU(),
        MaskedConv(4, 2, 3, padding=1, centre=True),
    )  # fmt: skip
    return architectures_of(
        "generative",
        ("autoencoder denoising", lambda: Composed(
            _denoised, encoder=nn.Linear(6, 4), decoder=nn.Linear(4, 6)
        ), batches(normal(4, 6), mask(4, 6))),
        ("vae", VAE, batches(uniform(4, 10), below(3, 4))),
        ("vae importance weighted", lambda: VAE(3), batches(uniform(4, 10), below(3, 4))),
        ("vae of distributions", DistributionVAE, batches(uniform(4, 10))),
        ("vae categorical", lambda: Composed(
            _categorical, encoder=nn.Linear(10, 12), decoder=nn.Linear(12, 10)
        ), _BITS),
        ("vq-vae", VQVAE, batches(normal(2, 3, 4, 4))),
        ("glow", Flow, _X),
        ("pixel cnn", pixels, batches(uniform(2, 1, 6, 6))),
        ("nade", NADE, batches(lambda g: uniform(4, 6)(g).round())),
        ("boltzmann machine", lambda: Composed(
            _boltzmann, weight=weight(10, 5), visible=weight(10), hidden=weight(5)
        ), _BITS),
        ("gan", Adversaries, _X),
        ("gan with gradient penalty", Penalised, batches(normal(4, 6), normal(4, 6))),
        ("diffusion", Diffusion, batches(normal(2, 3, 4, 4))),
        ("energy by langevin", lambda: Composed(_langevin, energy=energy()), _X),
        ("score matching", lambda: Composed(_score, energy=energy()), _X),
    )  # fmt: skip
