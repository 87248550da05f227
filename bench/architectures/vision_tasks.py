"""Networks that map images to maps, boxes or larger images."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench import networks
from bench.architectures.case import Architecture
from bench.architectures.tables import Composed, Residual, architectures_of, batches, normal
from bench.networks import conv_bn


def _unit(inputs: int, outputs: int) -> nn.Module:
    """Halves the image."""
    return nn.Sequential(conv_bn(inputs, outputs, 3, 2), nn.ReLU(inplace=True))


def _super_resolution(m: nn.Module, x: Tensor) -> Tensor:
    """EDSR: residual blocks without norm, then pixel shuffle, beside plain interpolation."""
    y = m.body(m.stem(x))
    return F.pixel_shuffle(m.grow(y), 2) + F.interpolate(x, scale_factor=2, mode="bicubic")


class Pyramid(nn.Module):
    """Features of all sizes with shared heads (Lin et al. 2016, 2017), as lists."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(_unit(a, b) for a, b in ((3, 4), (4, 8), (8, 16)))
        self.side = nn.ModuleList(nn.Conv2d(c, 6, 1) for c in (4, 8, 16))
        self.classes, self.boxes = nn.Conv2d(6, 5, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1)

    def forward(self, x: Tensor) -> dict[str, list[Tensor]]:
        """Scores and boxes at each size."""
        features = []
        for down, side in zip(self.down, self.side, strict=True):
            x = down(x)
            features.append(side(x))
        levels = features[-1:]
        for feature in features[-2::-1]:
            levels.append(feature + F.interpolate(levels[-1], size=feature.shape[-2:]))
        return {
            "classes": [self.classes(level).flatten(2) for level in levels],
            "boxes": [self.boxes(level).exp() for level in levels],
        }


class Atrous(nn.Module):
    """Dilated convolutions beside a pooled branch, upsampled (Chen et al. 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.pooled = _unit(3, 6), nn.Conv2d(6, 3, 1)
        self.dilated = nn.ModuleList(
            nn.Conv2d(6, 3, 3, padding=rate, dilation=rate) for rate in (1, 2, 4)
        )
        self.head = nn.Conv2d(12, 4, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Scores for each pixel."""
        x = self.stem(images)
        pooled = self.pooled(x.mean((2, 3), keepdim=True)).expand(-1, -1, *x.shape[2:])
        x = self.head(torch.cat([pooled, *(conv(x) for conv in self.dilated)], 1))
        return F.interpolate(x, images.shape[2:], mode="bilinear", align_corners=False)


class Detector(nn.Module):
    """Boxes on a grid, the best anchor matched to each target (Redmon et al. 2015)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(_unit(3, 8), _unit(8, 8), nn.Conv2d(8, 2 * 5, 1))

    def forward(self, images: Tensor, boxes: Tensor) -> Tensor:
        """The loss for one target in each image."""
        x = self.body(images).unflatten(1, (2, 5)).permute(0, 1, 3, 4, 2)
        centre, size = x[..., :2].sigmoid(), x[..., 2:4].exp()
        low, high = centre - size / 2, centre + size / 2
        want = boxes[:, None, None, None]
        overlap = (torch.min(high, want[..., 2:]) - torch.max(low, want[..., :2])).clamp(min=0)
        shared = overlap.prod(-1)
        quality = shared / (
            size.prod(-1) + 1e-3 + (want[..., 2:] - want[..., :2]).prod(-1) - shared
        )
        best = quality.detach().flatten(1).argmax(1)
        found = torch.zeros_like(quality).flatten(1).scatter(1, best[:, None], 1.0)
        sure = F.binary_cross_entropy_with_logits(x[..., 4].flatten(1), found)
        return sure - quality.flatten(1).gather(1, best[:, None]).mean()


def _residual(channels: int) -> nn.Module:
    convs = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
    return Residual(next(convs), nn.ReLU(inplace=True), next(convs))


def _boxes(g: torch.Generator) -> Tensor:
    low = torch.rand(2, 2, generator=g) / 2
    return torch.cat([low, low + 0.4], 1)


_IMAGES = batches(normal(2, 3, 16, 16))


def all_of() -> list[Architecture]:
    """The networks of the zoo that see more than a class in an image."""
    return architectures_of(
        "image tasks",
        ("U-Net", partial(networks.UNet, 2, 4, 3), batches(normal(2, 3, 16, 16))),
        ("FPN", Pyramid, _IMAGES),
        ("DeepLab", Atrous, _IMAGES),
        ("YOLO", Detector, batches(normal(2, 3, 16, 16), _boxes)),
        ("EDSR", lambda: Composed(
            _super_resolution, stem=nn.Conv2d(3, 6, 3, padding=1), grow=nn.Conv2d(6, 12, 1),
            body=nn.Sequential(*(_residual(6) for _ in range(2))),
        ), _IMAGES),
    )  # fmt: skip
