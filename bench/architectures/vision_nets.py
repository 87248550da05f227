"""Networks for images from the literature, small, in the form in which people write them."""

import itertools
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from bench import networks
from bench.architectures.case import Architecture
from bench.architectures.tables import Composed, Residual, architectures_of, batches, normal
from bench.networks import conv_bn


def _unit(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Module:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU6(inplace=True))


def _classifier(body: nn.Module, channels: int, classes: int = 5) -> nn.Module:
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))
    return nn.Sequential(body, head)


def lenet() -> nn.Module:
    """LeNet-5 (LeCun et al. 1998)."""
    features = (nn.Conv2d(3, 6, 5), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(6, 8, 3), nn.Tanh())
    return nn.Sequential(*features, nn.Flatten(), nn.LazyLinear(12), nn.Tanh(), nn.Linear(12, 5))


def vgg() -> nn.Module:
    """VGG with dropout in its classifier (Simonyan and Zisserman 2014)."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise((3, 4, 8)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(True)]
        layers += [nn.Conv2d(outputs, outputs, 3, padding=1), nn.ReLU(True), nn.MaxPool2d(2)]
    head = (nn.Flatten(), nn.Linear(8 * 16, 16), nn.ReLU(True), nn.Dropout(), nn.Linear(16, 5))
    return nn.Sequential(*layers, *head)


class DenseLayer(nn.Module):
    """Adds channels to all those before (Huang et al. 2016); its norm may be checkpointed."""

    def __init__(self, inputs: int, growth: int, *, lean: bool) -> None:
        super().__init__()
        self.norm, self.lean = nn.BatchNorm2d(inputs), lean
        self.conv = nn.Conv2d(inputs, growth, 3, padding=1)

    def forward(self, *features: Tensor) -> Tensor:
        """The new channels."""
        if self.lean:
            return self.conv(checkpoint(self._joined, *features, use_reentrant=False))
        return self.conv(self._joined(*features))

    def _joined(self, *features: Tensor) -> Tensor:
        return F.relu(self.norm(torch.cat(features, 1)), inplace=True)


class DenseNet(nn.Module):
    """Two dense blocks with a transition."""

    def __init__(self, *, lean: bool = False, growth: int = 4, layers: int = 3) -> None:
        super().__init__()
        width = 2 * growth + growth * layers
        self.stem = nn.Conv2d(3, 2 * growth, 3, padding=1)
        self.first, self.second = (
            nn.ModuleList(DenseLayer((2 + i) * growth, growth, lean=lean) for i in range(layers))
            for _ in range(2)
        )
        self.transition = nn.Sequential(nn.Conv2d(width, 2 * growth, 1), nn.AvgPool2d(2))
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Classifies images."""
        x = self.transition(self._block(self.first, self.stem(x)))
        return self.head(self._block(self.second, x).mean((2, 3)))

    def _block(self, layers: nn.ModuleList, x: Tensor) -> Tensor:
        features = [x]
        for layer in layers:
            features.append(layer(*features))
        return torch.cat(features, 1)


class Gate(nn.Module):
    """Squeeze and excitation (Hu et al. 2017)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Conv2d(channels, 2, 1), nn.Conv2d(2, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Scales the channels."""
        return x * self.excite(F.silu(self.squeeze(x.mean((2, 3), keepdim=True)), True)).sigmoid()


class DropPath(nn.Module):
    """Drops the layer for some of the samples (Huang et al. 2016)."""

    def forward(self, x: Tensor) -> Tensor:
        """Scales what is kept."""
        if not self.training:
            return x
        kept = x.new_empty(x.shape[0], *[1] * (x.dim() - 1)).bernoulli_(0.8)
        return x * kept.div_(0.8)


def _inverted(channels: int, *, gated: bool) -> nn.Module:
    """An inverted bottleneck: wide inside, depthwise, linear at the end."""
    wide = 3 * channels
    inner = [_unit(channels, wide, 1), _unit(wide, wide, 3, groups=wide)]
    gate = [Gate(wide)] if gated else []
    return Residual(*inner, *gate, conv_bn(wide, channels, 1), *([DropPath()] if gated else []))


def mobile(*, gated: bool = False) -> nn.Module:
    """MobileNetV2 (Sandler et al. 2018); gated, it is like EfficientNet (Tan and Le 2019)."""
    blocks = [_inverted(8, gated=gated) for _ in range(2)]
    return _classifier(nn.Sequential(_unit(3, 8, 3, 2), *blocks, _unit(8, 16, 1)), 16)


class ConvNeXtBlock(nn.Module):
    """A depthwise convolution, then channels last: LayerNorm, linear layers, layer scale."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm, self.drop = nn.LayerNorm(channels, eps=1e-6), DropPath()
        self.wide, self.narrow = (
            nn.Linear(channels, 4 * channels),
            nn.Linear(4 * channels, channels),
        )
        self.scale = nn.Parameter(1e-2 * torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Adds to the input (Liu et al. 2022)."""
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.scale * self.narrow(F.gelu(self.wide(y)))
        return x + self.drop(y.permute(0, 3, 1, 2))


class Inception(nn.Module):
    """Branches of several sizes, joined, and a classifier halfway (Szegedy et al. 2014)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _unit(3, 6, 3, 2)
        self.first, self.second = self._branches(6), self._branches(10)
        self.halfway, self.head = nn.Linear(10, 5), nn.Linear(10, 5)

    @staticmethod
    def _branches(inputs: int) -> nn.ModuleList:
        pooled = nn.Sequential(nn.MaxPool2d(3, 1, 1), _unit(inputs, 2, 1))
        deep = nn.Sequential(_unit(inputs, 3, 1), _unit(3, 4, 3))
        tall = nn.Sequential(nn.Conv2d(inputs, 2, (1, 3), padding=(0, 1)), nn.ReLU())
        return nn.ModuleList([_unit(inputs, 2, 1), deep, tall, pooled])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scores, and in training those from halfway."""
        x = torch.cat([branch(self.stem(x)) for branch in self.first], 1)
        halfway = self.halfway(x.mean((2, 3))) if self.training else None
        x = torch.cat([branch(x) for branch in self.second], 1)
        return self.head(F.dropout(x.mean((2, 3)), 0.4, self.training)), halfway


class Shuffled(nn.Module):
    """Half of the channels pass, the other half is convolved, then all mix (Ma et al. 2018)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.branch = nn.Sequential(
            _unit(half, half, 1), conv_bn(half, half, 3), _unit(half, half, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Splits, convolves and shuffles."""
        kept, x = x.chunk(2, 1)
        return F.channel_shuffle(torch.cat([kept, self.branch(x)], 1), 2)


def _fire(m: nn.Module, x: Tensor) -> Tensor:
    """SqueezeNet's module (Iandola et al. 2016)."""
    x = m.squeeze(x).relu_()
    return torch.cat([m.narrow(x).relu_(), m.wide(x).relu_()], 1)


def _fused(m: nn.Module, x: Tensor) -> Tensor:
    """RepVGG: branches that could be one convolution (Ding et al. 2021)."""
    return m.head((m.wide(x) + m.narrow(x) + m.same(x)).relu().mean((2, 3)))


def _window(m: nn.Module, x: Tensor) -> Tensor:
    """Attention within shifted windows (Liu et al. 2021)."""
    x = m.patches(x).permute(0, 2, 3, 1)
    for shift in (0, 1):
        y = torch.roll(m.norm(x), (-shift, -shift), (1, 2))
        b, h, w, c = y.shape
        y = y.view(b, h // 2, 2, w // 2, 2, c).transpose(2, 3).reshape(-1, 4, c)
        y = m.attention(y, y, y)[0].view(b, h // 2, w // 2, 2, 2, c).transpose(2, 3)
        x = x + torch.roll(y.reshape(b, h, w, c), (shift, shift), (1, 2))
    return m.head(x.mean((1, 2)))


def _scores(output: object) -> Tensor:
    """Cross entropy against classes in turn."""
    scores = output[0] if isinstance(output, tuple) else output
    return F.cross_entropy(scores, torch.arange(len(scores)) % scores.shape[1])


def _with_shapes(model: nn.Module) -> nn.Module:
    model(torch.zeros(2, 3, 16, 16))
    return model


_IMAGES = batches(normal(3, 3, 16, 16))


def all_of() -> list[Architecture]:
    """The networks of the zoo for images."""
    classifiers = {
        "LeNet": lambda: _with_shapes(lenet()),
        "VGG": vgg,
        "ResNet-10": partial(networks.ResNet, 10, 4, 5),
        "ResNet-50": partial(networks.ResNet, 50, 2, 5),
        "DenseNet": DenseNet,
        "DenseNet checkpointed": partial(DenseNet, lean=True),
        "MobileNetV2": mobile,
        "EfficientNet": partial(mobile, gated=True),
        "ConvNeXt": lambda: _classifier(
            nn.Sequential(nn.Conv2d(3, 8, 4, 4), ConvNeXtBlock(8), ConvNeXtBlock(8)), 8
        ),
        "GoogLeNet": Inception,
        "ShuffleNetV2": lambda: _classifier(nn.Sequential(_unit(3, 8, 3, 2), Shuffled(8)), 8),
        "ResNeXt": lambda: _classifier(
            nn.Sequential(_unit(3, 8, 3, 2), Residual(_unit(8, 8, 1), _unit(8, 8, 3, groups=4))), 8
        ),
        "SqueezeNet": lambda: _classifier(
            Composed(
                _fire,
                squeeze=nn.Conv2d(3, 4, 3, 2),
                narrow=nn.Conv2d(4, 4, 1),
                wide=nn.Conv2d(4, 4, 3, padding=1),
            ),
            8,
        ),
        "RepVGG": lambda: Composed(
            _fused, wide=conv_bn(3, 3, 3), narrow=conv_bn(3, 3, 1), same=nn.BatchNorm2d(3),
            head=nn.Linear(3, 5),
        ),
        "Swin": lambda: Composed(
            _window, patches=nn.Conv2d(3, 8, 4, 4), norm=nn.LayerNorm(8), head=nn.Linear(8, 5),
            attention=nn.MultiheadAttention(8, 2, batch_first=True),
        ),
    }  # fmt: skip
    return architectures_of(
        "images",
        *((name, make, _IMAGES, _scores) for name, make in classifiers.items()),
    )  # fmt: skip
