"""Networks of the benchmark that come from no library: ResNet, U-Net, MLP.

Repeated blocks sit in `nn.ModuleList`s, where `models.block_names` finds them. In the convolutional
ones activations are in place and normalisation is BatchNorm, as in those that people checkpoint.
"""

import torch
from torch import Tensor, nn


def conv_bn(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """A convolution that keeps the image size (divided by `stride`), then BatchNorm."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2016, ResNet-18 and -34)."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv_bn(inputs, width, 3, stride), nn.ReLU(inplace=True), conv_bn(width, width, 3)
        )
        self.shortcut = _shortcut(inputs, width, stride)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x)
        out += self.shortcut(x)
        return self.relu(out)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions and a shortcut (He et al. 2016, ResNet-50 and deeper)."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = width * self.expansion
        self.body = nn.Sequential(
            conv_bn(inputs, width, 1),
            nn.ReLU(inplace=True),
            conv_bn(width, width, 3, stride),
            nn.ReLU(inplace=True),
            conv_bn(width, outputs, 1),
        )
        self.shortcut = _shortcut(inputs, outputs, stride)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x)
        out += self.shortcut(x)
        return self.relu(out)


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return conv_bn(inputs, outputs, 1, stride)


RESNETS: dict[int, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, ...]]] = {
    10: (BasicBlock, (1, 1, 1, 1)),
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
}
"""Depth to block class and blocks a stage."""


class ResNet(nn.Module):
    """ResNet of He et al. 2016: a stem, four stages that halve the image, a linear classifier."""

    def __init__(self, depth: int, width: int, classes: int) -> None:
        super().__init__()
        if depth not in RESNETS:
            raise ValueError(f"resnet has depths {sorted(RESNETS)}, got layers={depth}")
        block, repeats = RESNETS[depth]
        self.stem = nn.Sequential(
            conv_bn(3, width, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, padding=1)
        )
        self.blocks = nn.ModuleList()
        channels = width
        for stage, repeat in enumerate(repeats):
            for index in range(repeat):
                stride = 2 if stage > 0 and index == 0 else 1
                self.blocks.append(block(channels, width * 2**stage, stride))
                channels = width * 2**stage * block.expansion
        self.head = nn.Linear(channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(dim=(2, 3)))


class DoubleConv(nn.Sequential):
    """Two 3x3 convolutions, each with BatchNorm and an in-place ReLU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(
            conv_bn(inputs, outputs, 3),
            nn.ReLU(inplace=True),
            conv_bn(outputs, outputs, 3),
            nn.ReLU(inplace=True),
        )


class UNet(nn.Module):
    """U-Net of Ronneberger et al. 2015: long skips keep early activations alive to the end."""

    def __init__(self, levels: int, width: int, classes: int) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(levels + 1)]
        self.down = nn.ModuleList(
            DoubleConv(before, after) for before, after in zip([3, *widths], widths, strict=False)
        )
        pairs = list(zip(widths[1:], widths, strict=False))[::-1]
        self.grow = nn.Sequential(*(nn.ConvTranspose2d(wide, thin, 2, 2) for wide, thin in pairs))
        self.up = nn.ModuleList(DoubleConv(2 * thin, thin) for _, thin in pairs)
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        skips = [self.down[0](images)]
        for block in self.down[1:]:
            skips.append(block(self.pool(skips[-1])))
        x = skips.pop()
        for grow, block in zip(self.grow, self.up, strict=True):
            x = block(torch.cat([skips.pop(), grow(x)], dim=1))
        return self.head(x)


class MLP(nn.Module):
    """Equal residual layers of LayerNorm, Linear, GELU, Linear, Dropout; a linear classifier."""

    def __init__(self, layers: int, width: int, classes: int, dropout: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width),
                nn.Linear(width, 4 * width),
                nn.GELU(),
                nn.Linear(4 * width, width),
                nn.Dropout(dropout),
            )
            for _ in range(layers)
        )
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)
