"""Normalisation of every kind, in small networks of convolutions or linear layers."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.architectures.case import Architecture
from bench.architectures.tables import Composed, architectures_of, batches, below, normal, weight


def _images(norm: nn.Module) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), norm, nn.ReLU(inplace=True), nn.Conv2d(8, 2, 3)
    )


def _vectors(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), norm, nn.GELU(), nn.Linear(8, 2))


class WeightStandardised(nn.Conv2d):
    """A convolution with standardised weights (Qiao et al. 2019)."""

    def forward(self, x: Tensor) -> Tensor:
        """Convolves."""
        deviation, mean = torch.std_mean(self.weight, (1, 2, 3), keepdim=True)
        w = (self.weight - mean) / (deviation + 1e-5)
        return F.conv2d(x, w, self.bias, self.stride, self.padding)


class FilterResponseNorm(nn.Module):
    """Normalisation without mean or batch, thresholded (Singh and Krishnan 2019)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        shape = (1, channels, 1, 1)
        self.gain, self.shift = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.zeros(shape))
        self.threshold = nn.Parameter(torch.zeros(shape))

    def forward(self, x: Tensor) -> Tensor:
        """Normalises each channel of each image."""
        x = x * torch.rsqrt(x.square().mean((2, 3), keepdim=True) + 1e-6)
        return torch.max(self.gain * x + self.shift, self.threshold)


class AdaptiveInstanceNorm(nn.Module):
    """Statistics of a style image on the content (Huang and Belongie 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 3, 3)

    def forward(self, content: Tensor, style: Tensor) -> Tensor:
        """Returns the restyled content."""
        content, style = self.encoder(content), self.encoder(style).flatten(2)
        deviation, mean = torch.std_mean(style, 2, keepdim=True)
        x = F.instance_norm(content) * deviation[..., None] + mean[..., None]
        return self.decoder(x)


class ConditionalBatchNorm(nn.Module):
    """Gain and shift by class (Dumoulin et al. 2017)."""

    def __init__(self, channels: int = 8, classes: int = 5) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, channels, 3), nn.BatchNorm2d(channels, affine=False)
        self.style = nn.Embedding(classes, 2 * channels)

    def forward(self, x: Tensor, classes: Tensor) -> Tensor:
        """Normalises features, then modulates them."""
        gain, shift = self.style(classes)[..., None, None].chunk(2, 1)
        return (1 + gain) * self.norm(self.conv(x)) + shift


class SpatiallyAdaptive(nn.Module):
    """Gain and shift by pixel, from a map of classes (Park et al. 2019)."""

    def __init__(self, channels: int = 8, classes: int = 4) -> None:
        super().__init__()
        self.classes, self.conv = classes, nn.Conv2d(3, channels, 3, padding=1)
        self.norm = nn.InstanceNorm2d(channels)
        self.shared = nn.Conv2d(classes, 6, 3, padding=1)
        self.gain, self.shift = (nn.Conv2d(6, channels, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor, classes: Tensor) -> Tensor:
        """Normalises features, then modulates them."""
        layout = F.one_hot(classes, self.classes).permute(0, 3, 1, 2).float()
        shared = F.relu(self.shared(layout))
        return self.norm(self.conv(x)) * (1 + self.gain(shared)) + self.shift(shared)


class BatchRenorm(nn.Module):
    """Batch statistics corrected towards the running ones (Ioffe 2017), running ones in place."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.gain, self.shift = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(width))
        self.register_buffer("steps", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        """Normalises over the batch."""
        deviation, mean = x.std(0) + 1e-3, x.mean(0)
        r = (deviation.detach() / self.deviation).clamp(1 / 3, 3)
        d = ((mean.detach() - self.mean) / self.deviation).clamp(-5, 5)
        self.mean.lerp_(mean.detach(), 0.1)
        self.deviation += 0.1 * (deviation.detach() - self.deviation)
        self.steps += 1
        return self.gain * ((x - mean) / deviation * r + d) + self.shift


class FrozenBatchNorm(nn.Module):
    """A trained network whose BatchNorm stays in evaluation mode, as when fine-tuning."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = _images(nn.BatchNorm2d(8)), nn.Linear(2, 2)

    def train(self, mode: bool = True) -> "FrozenBatchNorm":
        """Leaves the norms in evaluation mode."""
        super().train(mode)
        self.body.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Classifies images."""
        return self.head(self.body(x).mean((2, 3)))


def _ghost(m: nn.Module, x: Tensor) -> Tensor:
    """Ghost batches: statistics of two samples each (Hoffer et al. 2017)."""
    return m.out(torch.cat([m.norm(part) for part in m.inner(x).split(2)]))


def _over_time(m: nn.Module, x: Tensor) -> Tensor:
    """BatchNorm between linear layers over sequences: channels last to linear, first to norm."""
    return m.out(m.norm(m.inner(x).mT).mT.relu())


def _scale_norm(m: nn.Module, x: Tensor) -> Tensor:
    x = m.inner(x)
    return m.out(m.gain * x / x.norm(dim=-1, keepdim=True).clamp(min=1e-5))


def _layer_stack() -> nn.Module:
    return nn.Sequential(
        nn.LayerNorm(6), nn.Linear(6, 8), nn.LayerNorm(8, elementwise_affine=False)
    )


_IMAGES = batches(normal(2, 3, 6, 6))
_VECTORS = batches(normal(4, 6, grad=True))
_VOLUMES = batches(normal(2, 1, 4, 4, 4))


def all_of() -> list[Architecture]:
    """The normalised networks of the zoo."""
    return architectures_of(
        "norm",
        ("batch norm 1d", lambda: _vectors(nn.BatchNorm1d(8)), _VECTORS),
        ("batch norm 2d", lambda: _images(nn.BatchNorm2d(8)), _IMAGES),
        (
            "batch norm 3d",
            lambda: nn.Sequential(nn.Conv3d(1, 4, 3), nn.BatchNorm3d(4), nn.ELU(inplace=True)),
            _VOLUMES,
        ),
        ("batch norm cumulative", lambda: _images(nn.BatchNorm2d(8, momentum=None)), _IMAGES),
        (
            "batch norm untracked",
            lambda: _images(nn.BatchNorm2d(8, affine=False, track_running_stats=False)),
            _IMAGES,
        ),
        ("batch norm frozen", FrozenBatchNorm, _IMAGES),
        ("batch norm synchronised", lambda: _images(nn.SyncBatchNorm(8)), _IMAGES),
        (
            "batch norm ghost",
            lambda: Composed(
                _ghost, inner=nn.Linear(6, 8), norm=nn.BatchNorm1d(8), out=nn.Linear(8, 2)
            ),
            _VECTORS,
        ),
        (
            "batch norm over time",
            lambda: Composed(
                _over_time, inner=nn.Linear(6, 8), norm=nn.BatchNorm1d(8), out=nn.Linear(8, 2)
            ),
            batches(normal(2, 5, 6)),
        ),
        ("batch renorm", lambda: _vectors(BatchRenorm()), _VECTORS),
        ("batch norm by class", ConditionalBatchNorm, batches(normal(3, 3, 6, 6), below(5, 3))),
        ("layer norm", _layer_stack, _VECTORS),
        ("layer norm over images", lambda: _images(nn.LayerNorm((8, 6, 6), bias=False)), _IMAGES),
        ("rms norm", lambda: _vectors(nn.RMSNorm(8)), _VECTORS),
        (
            "scale norm",
            lambda: Composed(
                _scale_norm, inner=nn.Linear(6, 8), gain=weight(1), out=nn.Linear(8, 2)
            ),
            _VECTORS,
        ),
        ("group norm", lambda: _images(nn.GroupNorm(4, 8)), _IMAGES),
        ("instance norm", lambda: _images(nn.InstanceNorm2d(8)), _IMAGES),
        (
            "instance norm tracked",
            lambda: _images(nn.InstanceNorm2d(8, affine=True, track_running_stats=True)),
            _IMAGES,
        ),
        ("instance norm adaptive", AdaptiveInstanceNorm, batches(*[normal(2, 3, 6, 6)] * 2)),
        (
            "instance norm by pixel",
            SpatiallyAdaptive,
            batches(normal(2, 3, 6, 6), below(4, 2, 6, 6)),
        ),
        ("local response norm", lambda: _images(nn.LocalResponseNorm(3)), _IMAGES),
        (
            "cross map norm",
            lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.CrossMapLRN2d(3), nn.Conv2d(8, 2, 3)),
            _IMAGES,
        ),
        ("filter response norm", lambda: _images(FilterResponseNorm(8)), _IMAGES),
        (
            "weight standardisation",
            lambda: nn.Sequential(WeightStandardised(3, 8, 3), nn.GroupNorm(2, 8), nn.SiLU()),
            _IMAGES,
        ),
    )
