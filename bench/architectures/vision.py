"""Image classifiers of transformers: convolutions, transformers and what lies between."""

import functools
from typing import Any

from bench.architectures import data
from bench.architectures.case import Architecture
from bench.architectures.tiny import families, unchanged

_STAGES = {"hidden_sizes": [8, 16], "depths": [1, 1]}
_SWIN = {"embed_dim": 8, "depths": (1, 2), "num_heads": (1, 2), "patch_size": 2}
_FOUR = {"hidden_sizes": (8, 8, 16, 16), "depths": (1, 1, 1, 1)}
_PYRAMID = {**_FOUR, "num_attention_heads": (1, 1, 2, 2), "mlp_ratios": (2, 2, 2, 2)}

_SMALL: dict[str, dict[str, Any]] = {
    **unchanged(
        "beit clip data2vec-vision dinov2 dinov2_with_registers ijepa metaclip_2 siglip vit vit_msn"
    ),
    "bit": {**_FOUR, "embedding_size": 8, "num_groups": 2},
    "cvt": {
        "embed_dim": (8, 8, 16),
        "num_heads": (1, 1, 2),
        "depth": (1, 2, 3),
        "drop_path_rate": (0.0, 0.0, 0.1),
    },
    "donut-swin": _SWIN,
    "efficientnet": {
        "kernel_sizes": (3, 5),
        "in_channels": (32, 16),
        "out_channels": (16, 24),
        "strides": (1, 2),
        "num_block_repeats": (1, 2),
        "expand_ratios": (1, 2),
        "depthwise_padding": (),
        "hidden_dim": 1280,
        "width_coefficient": 1.0,
        "depth_coefficient": 1.0,
    },
    "focalnet": {**_FOUR, "embed_dim": 8, "hidden_sizes": (8, 16, 16, 16), "patch_size": 2},
    "hgnet_v2": {
        "embedding_size": 8,
        "hidden_sizes": [16, 16, 16, 16],
        "stem_channels": (3, 8, 8),
        "stage_in_channels": (8, 16, 16, 16),
        "stage_mid_channels": (8, 8, 8, 8),
        "stage_out_channels": (16, 16, 16, 16),
        "stage_num_blocks": (1, 1, 1, 1),
        "stage_numb_of_layers": (2, 2, 2, 2),
    },
    "hiera": {
        "embed_dim": 8,
        "image_size": (32, 32),
        "depths": (1, 1, 2, 1),
        "num_heads": (1, 1, 2, 2),
        "masked_unit_size": (8, 8),
    },
    "mobilenet_v1": {"depth_multiplier": 0.25},
    "mobilenet_v2": {"depth_multiplier": 0.25},
    "mobilevit": {
        "hidden_sizes": (16, 16, 16),
        "neck_hidden_sizes": (8, 8, 8, 8, 8, 8, 16),
        "patch_size": 2,
    },
    "poolformer": _FOUR,
    "pp_lcnet": {"scale": 0.25},
    "pvt": {**_PYRAMID, "patch_size": 4},
    "pvt_v2": _PYRAMID,
    "regnet": {**_FOUR, "embedding_size": 8, "groups_width": 4},
    "resnet": {**_FOUR, "embedding_size": 8},
    "segformer": _PYRAMID,
    "swiftformer": {"depths": (1, 1, 1, 1), "embed_dims": (8, 8, 16, 16)},
    "swin": _SWIN,
    "swinv2": _SWIN,
    "textnet": {"hidden_sizes": (8, 8, 8, 16, 16), "stem_out_channels": 8, "image_size": (32, 32)},
}


_LARGER: dict[str, dict[str, Any]] = {
    "convnext": _FOUR,
    "convnextv2": _FOUR,
    "mobilevitv2": {"width_multiplier": 0.25, "n_attn_blocks": (1, 1, 1), "patch_size": 2},
}
_NAMED: dict[str, tuple[str, dict[str, Any]]] = {
    "deit": ("DeiTForImageClassification", {}),
    "levit": (
        "LevitForImageClassification",
        {
            "patch_size": 16,
            "hidden_sizes": (16, 16, 16),
            "num_attention_heads": (2, 2, 2),
            "depths": (1, 1, 1),
            "key_dim": (8, 8, 8),
        },
    ),
}


def _pixels(step: int) -> dict[str, Any]:
    return {"input_ids": data.ids(step), "labels": data.CLASSES}


def all_of() -> list[Architecture]:
    """The image classifiers."""
    automatic = "AutoModelForImageClassification"
    larger = functools.partial(data.images, size=64)
    found = families("vision", automatic, data.images, _SMALL)
    found += families("vision", automatic, larger, _LARGER)
    found += families("vision", automatic, _pixels, {"imagegpt": {}})
    for name, (model_class, overrides) in _NAMED.items():
        found += families("vision", model_class, data.images, {name: overrides})
    return found
