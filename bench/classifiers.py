"""Image classifiers of the literature on checkpointing: VGG-16, GoogLeNet, MobileNet-V2."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class WithLoss(nn.Module):
    """A classifier that returns its cross entropy."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch."""
        return F.cross_entropy(self.body(images), labels)


def vgg16(classes: int = 1000) -> nn.Sequential:
    """VGG-16 without BatchNorm (Simonyan and Zisserman 2015), with in-place activations."""
    layers: list[nn.Module] = []
    channels = 3
    for width, repeats in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(repeats):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
            channels = width
        layers.append(nn.MaxPool2d(2))
    layers += [nn.AdaptiveAvgPool2d(7), nn.Flatten()]
    for inputs in (512 * 49, 4096):
        layers += [nn.Linear(inputs, 4096), nn.ReLU(inplace=True), nn.Dropout(0.5)]
    return nn.Sequential(*layers, nn.Linear(4096, classes))


def _unit(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs)]


def _activated(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(*_unit(inputs, outputs, kernel, stride), nn.ReLU(inplace=True))


class Inception(nn.Module):
    """Four branches side by side: 1x1, 3x3, 5x5 (as 3x3) and pooling."""

    def __init__(self, inputs: int, widths: Sequence[int]) -> None:
        super().__init__()
        one, before_three, three, before_five, five, pooled = widths
        self.branches = nn.ModuleList(
            [
                _activated(inputs, one, 1),
                nn.Sequential(
                    _activated(inputs, before_three, 1), _activated(before_three, three, 3)
                ),
                nn.Sequential(_activated(inputs, before_five, 1), _activated(before_five, five, 3)),
                nn.Sequential(nn.MaxPool2d(3, 1, padding=1), _activated(inputs, pooled, 1)),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        """The branches' channels one after the other."""
        return torch.cat([branch(x) for branch in self.branches], 1)


def googlenet(classes: int = 1000) -> nn.Sequential:
    """GoogLeNet with BatchNorm, without auxiliary classifiers (Szegedy et al. 2015)."""
    stages = (
        ((64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64)),
        (
            (192, 96, 208, 16, 48, 64),
            (160, 112, 224, 24, 64, 64),
            (128, 128, 256, 24, 64, 64),
            (112, 144, 288, 32, 64, 64),
            (256, 160, 320, 32, 128, 128),
        ),
        ((256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128)),
    )
    pool = {"stride": 2, "ceil_mode": True}
    layers: list[nn.Module] = [_activated(3, 64, 7, 2), nn.MaxPool2d(3, **pool)]
    layers += [_activated(64, 64, 1), _activated(64, 192, 3)]
    channels = 192
    for stage in stages:
        layers.append(nn.MaxPool2d(3, **pool))
        for widths in stage:
            layers.append(Inception(channels, widths))
            channels = widths[0] + widths[2] + widths[4] + widths[5]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(channels, classes)]
    return nn.Sequential(*layers, *head)


class Inverted(nn.Module):
    """Widens, convolves each channel alone, narrows; with a shortcut where the shapes allow it."""

    def __init__(self, inputs: int, outputs: int, stride: int, factor: int) -> None:
        super().__init__()
        wide = inputs * factor
        layers = [*_unit(inputs, wide, 1), nn.ReLU6(inplace=True)] if factor > 1 else []
        layers += [*_unit(wide, wide, 3, stride, wide), nn.ReLU6(inplace=True)]
        self.body = nn.Sequential(*layers, *_unit(wide, outputs, 1))
        self.has_shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """A tensor with `outputs` channels."""
        return x + self.body(x) if self.has_shortcut else self.body(x)


def mobilenet_v2(classes: int = 1000) -> nn.Sequential:
    """MobileNet-V2 (Sandler et al. 2018)."""
    layers: list[nn.Module] = [*_unit(3, 32, 3, 2), nn.ReLU6(inplace=True)]
    channels = 32
    for factor, width, repeats, stride in (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    ):
        for index in range(repeats):
            layers.append(Inverted(channels, width, stride if index == 0 else 1, factor))
            channels = width
    layers += [*_unit(channels, 1280, 1), nn.ReLU6(inplace=True), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.2), nn.Linear(1280, classes))
