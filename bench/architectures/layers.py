"""Layers that change images: padding, pooling, resampling, dropout, activations in place."""

from functools import partial

from torch import nn

from bench.architectures.case import Architecture
from bench.architectures.tables import architectures_of, batches, normal


def _conv(*modules: nn.Module, channels: int = 4, **options: object) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, channels, 3, **options), *modules)


def _pooled(pool: type[nn.Module], *args: object, **options: object) -> nn.Module:
    return _conv(nn.Softplus(), pool(*args, **options), nn.Conv2d(4, 2, 2))


def _dropped(drop: type[nn.Module], *args: object) -> nn.Module:
    conv = {nn.Dropout1d: nn.Conv1d, nn.Dropout3d: nn.Conv3d}.get(drop, nn.Conv2d)
    return nn.Sequential(conv(1, 4, 3), drop(*args), conv(4, 1, 2))


def _resampled(conv: type[nn.Module], mode: str, corners: bool | None = None) -> nn.Module:
    upsample = nn.Upsample(scale_factor=2, mode=mode, align_corners=corners)
    return nn.Sequential(conv(1, 3, 3), upsample, conv(3, 1, 2))


_IMAGES = batches(normal(2, 3, 8, 8, grad=True))
_GREY = batches(normal(2, 1, 6, 6))
_LINES = batches(normal(2, 1, 8))
_VOLUMES = batches(normal(2, 1, 4, 4, 4))


def all_of() -> list[Architecture]:
    """The layers of the zoo."""
    return architectures_of(
        "layer",
        *(
            (f"padding {mode}", partial(_conv, padding=2, padding_mode=mode), _IMAGES)
            for mode in ("zeros", "reflect", "replicate", "circular")
        ),
        ("padding same", partial(_conv, padding="same", dilation=2, bias=False), _IMAGES),
        ("padding modules", lambda: _conv(
            nn.ReflectionPad2d(1), nn.ConstantPad2d((1, 0, 2, -1), 0.5), nn.CircularPad2d(1)
        ), _IMAGES),
        ("average pool", partial(
            _pooled, nn.AvgPool2d, 3, 2, 1, ceil_mode=True, count_include_pad=False
        ), _IMAGES),
        ("max pool", partial(_pooled, nn.MaxPool2d, 3, 2, 1, dilation=2, ceil_mode=True), _IMAGES),
        ("adaptive average pool", partial(_pooled, nn.AdaptiveAvgPool2d, (5, None)), _IMAGES),
        ("adaptive max pool", partial(_pooled, nn.AdaptiveMaxPool2d, 3), _IMAGES),
        ("fractional max pool", partial(
            _pooled, nn.FractionalMaxPool2d, 2, output_ratio=(0.7, 0.6)
        ), _IMAGES),
        ("power average pool", partial(_pooled, nn.LPPool2d, 3, 2), _IMAGES),
        ("dropout 1d", partial(_dropped, nn.Dropout1d, 0.3), _LINES),
        ("dropout 2d", partial(_dropped, nn.Dropout2d, 0.3), _GREY),
        ("dropout 3d", partial(_dropped, nn.Dropout3d, 0.3), _VOLUMES),
        ("dropout in place", partial(_dropped, nn.Dropout, 0.3, True), _GREY),
        ("dropout 2d in place", partial(_dropped, nn.Dropout2d, 0.3, True), _GREY),
        ("dropout alpha", partial(_dropped, nn.AlphaDropout, 0.3), _GREY),
        ("dropout feature alpha", partial(_dropped, nn.FeatureAlphaDropout, 0.3), _GREY),
        ("rectifier randomised", partial(_dropped, nn.RReLU), _GREY),
        ("rectifier randomised in place", partial(_dropped, nn.RReLU, 0.1, 0.4, True), _GREY),
        ("upsample nearest", partial(_resampled, nn.Conv1d, "nearest"), _LINES),
        ("upsample linear", partial(_resampled, nn.Conv1d, "linear", False), _LINES),
        ("upsample bilinear", partial(_resampled, nn.Conv2d, "bilinear", True), _GREY),
        ("upsample bicubic", partial(_resampled, nn.Conv2d, "bicubic"), _GREY),
        ("upsample trilinear", partial(_resampled, nn.Conv3d, "trilinear"), _VOLUMES),
        ("pixel shuffle", lambda: _conv(
            nn.PixelShuffle(2), nn.ELU(inplace=True), nn.PixelUnshuffle(2), channels=8
        ), _IMAGES),
        ("channel shuffle", lambda: nn.Sequential(
            nn.Conv2d(3, 8, 1), nn.ChannelShuffle(2), nn.Conv2d(8, 4, 1, groups=2)
        ), _IMAGES),
        ("gated linear units", lambda: _conv(nn.GLU(1), nn.Softmax2d(), nn.Softshrink()), _IMAGES),
        ("activations in place", lambda: _conv(
            nn.LeakyReLU(0.1, True), nn.Conv2d(4, 4, 3), nn.Hardtanh(inplace=True),
            nn.Conv2d(4, 4, 1), nn.Hardswish(True), nn.Conv2d(4, 4, 1), nn.CELU(inplace=True),
            nn.Conv2d(4, 4, 1), nn.SELU(True), nn.Conv2d(4, 4, 1), nn.Mish(True),
            nn.Conv2d(4, 4, 1), nn.Threshold(0.1, 0.0, True),
        ), _IMAGES),
        ("activations", lambda: _conv(
            nn.Hardsigmoid(), nn.Conv2d(4, 4, 1), nn.LogSigmoid(), nn.PReLU(4), nn.Tanhshrink(),
            nn.Conv2d(4, 4, 1), nn.Softsign(), nn.GELU("tanh"), nn.Hardshrink(0.1), nn.ReLU6(),
        ), _IMAGES),
    )  # fmt: skip
