"""Convolutional networks by what they are made of: pooling, padding, dropout, resampling, gates."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.architectures.case import Architecture
from bench.architectures.tables import (
    Composed,
    Residual,
    architectures_of,
    batches,
    below,
    normal,
    weight,
)


class SegNet(nn.Module):
    """Encoder and decoder joined by the indices of max pooling (Badrinarayanan et al. 2015)."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 8, 3, padding=1)
        self.up2, self.up1 = nn.Conv2d(8, 4, 3, padding=1), nn.Conv2d(4, 2, 3, padding=1)
        self.pool, self.unpool = nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of two classes for each pixel."""
        x, first = self.pool(F.relu(self.down1(x)))
        x, second = self.pool(F.relu(self.down2(x)))
        x = F.relu(self.up2(self.unpool(x, second)))
        return self.up1(self.unpool(x, first))


class SpatialTransformer(nn.Module):
    """Samples the image on a grid that it predicts (Jaderberg et al. 2015)."""

    def __init__(self) -> None:
        super().__init__()
        self.locate = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.Flatten())
        self.affine, self.conv = nn.LazyLinear(6), nn.Conv2d(3, 4, 3)
        self.affine(self.locate(torch.zeros(1, 3, 8, 8)))

    def forward(self, x: Tensor) -> Tensor:
        """Convolves the transformed image."""
        theta = self.affine(self.locate(x)).view(-1, 2, 3)
        theta = theta + torch.eye(2, 3, device=x.device)
        grid = F.affine_grid(theta, list(x.shape), align_corners=False)
        return self.conv(F.grid_sample(x, grid, align_corners=False))


class Involution(nn.Module):
    """Kernels by position, applied to unfolded patches (Li et al. 2021), folded again."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.stem, self.kernel = nn.Conv2d(3, channels, 1), nn.Conv2d(channels, 9, 1)
        self.unfold, self.fold = nn.Unfold(3, padding=1), nn.Fold((6, 6), 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Filters, then overlaps the patches."""
        x = self.stem(x)
        patches = self.unfold(x).view(x.shape[0], x.shape[1], 9, -1)
        patches = patches * self.kernel(x).flatten(2)[:, None]
        return self.fold(patches.flatten(1, 2))


class WaveNet(nn.Module):
    """Dilated causal convolutions with gates and skips (van den Oord et al. 2016)."""

    def __init__(self, width: int = 4, layers: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv1d(1, width, 1)
        self.gates = nn.ModuleList(
            nn.Conv1d(width, 2 * width, 2, dilation=2**i) for i in range(layers)
        )
        self.mixes = nn.ModuleList(nn.Conv1d(width, 2 * width, 1) for _ in range(layers))
        self.out = nn.Conv1d(width, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Scores for each next sample."""
        x, skips = self.stem(x), 0.0
        for gate, mix in zip(self.gates, self.mixes, strict=True):
            left, right = gate(F.pad(x, (gate.dilation[0], 0))).chunk(2, 1)
            residual, skip = mix(left.tanh() * right.sigmoid()).chunk(2, 1)
            x, skips = x + residual, skips + skip
        return self.out(F.relu(skips))


class TextCNN(nn.Module):
    """Convolutions of several widths over words, max over time (Kim 2014)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.drop = nn.Embedding(11, 6), nn.Dropout(0.5)
        self.convs = nn.ModuleList(nn.Conv1d(6, 4, size) for size in (2, 3, 4))
        self.out = nn.Linear(12, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        """Classifies texts."""
        x = self.embedding(tokens).mT
        pooled = [F.relu(conv(x)).max(2).values for conv in self.convs]
        return self.out(self.drop(torch.cat(pooled, 1)))


class AttentionModule(nn.Module):
    """Channel and spatial attention (Woo et al. 2018)."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.stem, self.spatial = (
            nn.Conv2d(3, channels, 3, padding=1),
            nn.Conv2d(2, 1, 3, padding=1),
        )
        self.channel = nn.Sequential(nn.Linear(channels, 2), nn.ReLU(), nn.Linear(2, channels))

    def forward(self, x: Tensor) -> Tensor:
        """Gates features twice."""
        x = self.stem(x)
        gate = self.channel(x.mean((2, 3))) + self.channel(x.amax((2, 3)))
        x = x * gate.sigmoid()[..., None, None]
        statistics = torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True)[0]], 1)
        return x * self.spatial(statistics).sigmoid()


class NonLocal(nn.Module):
    """Every pixel attends to every other (Wang et al. 2018)."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.stem, self.qkv = nn.Conv2d(3, channels, 1), nn.Conv2d(channels, 3 * channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Adds what was attended to."""
        x = self.stem(x)
        q, k, v = self.qkv(x).flatten(2).chunk(3, 1)
        return x + torch.bmm(v, torch.bmm(k.mT, q).softmax(1)).view_as(x)


class FourierOperator(nn.Module):
    """Mixes low frequencies with complex weights (Li et al. 2020)."""

    def __init__(self, width: int = 4, modes: int = 3) -> None:
        super().__init__()
        self.modes, self.lift, self.out = modes, nn.Conv1d(1, width, 1), nn.Conv1d(width, 1, 1)
        self.mix = weight(width, width, modes, dtype=torch.complex64)

    def forward(self, x: Tensor) -> Tensor:
        """Maps functions on a grid to functions."""
        x = self.lift(x)
        spectrum = torch.fft.rfft(x)
        kept = torch.einsum("bim,iom->bom", spectrum[..., : self.modes], self.mix)
        padded = F.pad(kept, (0, spectrum.shape[-1] - self.modes))
        return self.out(F.gelu(x + torch.fft.irfft(padded, n=x.shape[-1])))


def _conv(*modules: nn.Module, channels: int = 4, **options: object) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, channels, 3, **options), *modules)


def _coordinates(m: nn.Module, x: Tensor) -> Tensor:
    """Coordinates as two more channels (Liu et al. 2018)."""
    axes = torch.linspace(-1, 1, x.shape[2]), torch.linspace(-1, 1, x.shape[3])
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij")).expand(x.shape[0], -1, -1, -1)
    return m.conv(torch.cat([x, grid], 1))


def _fourier_mix(m: nn.Module, x: Tensor) -> Tensor:
    """FNet: the real part of a two-dimensional transform in place of attention."""
    x = m.norm(m.embedding(x))
    return m.norm(x + m.out(torch.fft.fft2(x).real))


def _blur(m: nn.Module, x: Tensor) -> Tensor:
    """Low-pass filter before subsampling (Zhang 2019), a buffer as kernel."""
    x = F.pad(m.conv(x), (1, 1, 1, 1), mode="reflect")
    return F.conv2d(x, m.kernel.expand(x.shape[1], 1, 3, 3), stride=2, groups=x.shape[1])


def _maxout(m: nn.Module, x: Tensor) -> Tensor:
    return m.out(m.inner(x).unflatten(1, (3, -1)).amax(1))


def _channels_last(m: nn.Module, x: Tensor) -> Tensor:
    return m.body(x.contiguous(memory_format=torch.channels_last))


def _text_mixer() -> nn.Module:
    return Composed(
        _fourier_mix, embedding=nn.Embedding(11, 8), norm=nn.LayerNorm(8), out=nn.Linear(8, 8)
    )


def _initialised() -> nn.Module:
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(2))
    model(torch.zeros(2, 3, 8, 8))
    return model


_IMAGES = batches(normal(2, 3, 8, 8, grad=True))
_SMALL = batches(normal(2, 3, 6, 6))


def all_of() -> list[Architecture]:
    """The convolutional networks of the zoo."""
    return architectures_of(
        "convolutional",
        ("segnet", SegNet, _IMAGES),
        ("spatial transformer", SpatialTransformer, _IMAGES),
        ("involution", Involution, _SMALL),
        ("wavenet", WaveNet, batches(normal(2, 1, 16))),
        ("text cnn", TextCNN, batches(below(11, 2, 8))),
        ("cbam", AttentionModule, _SMALL),
        ("non-local", NonLocal, _SMALL),
        ("fourier operator", FourierOperator, batches(normal(2, 1, 16))),
        ("fnet", _text_mixer, batches(below(11, 2, 8))),
        ("coord conv", lambda: Composed(_coordinates, conv=nn.Conv2d(5, 4, 3)), _SMALL),
        ("blur pool", lambda: Composed(
            _blur, conv=nn.Conv2d(3, 4, 1), kernel=torch.full((1, 1, 3, 3), 1 / 9)
        ), _SMALL),
        ("maxout", lambda: Composed(
            _maxout, inner=nn.Conv2d(3, 12, 3), out=nn.Conv2d(4, 2, 1)
        ), _SMALL),
        ("channels last", lambda: Composed(
            _channels_last, body=_conv(nn.BatchNorm2d(4), nn.ReLU(True), nn.MaxPool2d(2))
        ), _IMAGES),
        ("lazy conv", _initialised, _IMAGES),
        ("depthwise separable", lambda: Residual(
            nn.Conv2d(3, 6, 3, padding=1, groups=3), nn.SiLU(True), nn.Conv2d(6, 3, 1)
        ), _SMALL),
        ("dcgan generator", lambda: nn.Sequential(
            nn.ConvTranspose2d(5, 6, 4), nn.BatchNorm2d(6), nn.ReLU(True),
            nn.ConvTranspose2d(6, 3, 4, 2, 1), nn.Tanh(),
        ), batches(normal(2, 5, 1, 1))),
    )  # fmt: skip
