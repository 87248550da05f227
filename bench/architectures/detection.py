"""Models of transformers that find objects in images, segment them or estimate depth."""

from typing import Any

import torch

from bench.architectures import data
from bench.architectures.case import Architecture
from bench.architectures.tiny import families

_STAGES = {"hidden_sizes": (8, 8, 16, 16), "depths": (1, 1, 1, 1), "embedding_size": 8}
_RESNET = {
    "use_timm_backbone": False,
    "backbone": None,
    "backbone_config": {"model_type": "resnet", **_STAGES, "out_features": ["stage4"]},
}
_SWIN = {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2), "patch_size": 2}
_FOUR = {"hidden_sizes": (8, 8, 16, 16), "depths": (1, 1, 1, 1)}
_PYRAMID = {**_FOUR, "num_attention_heads": (1, 1, 2, 2), "mlp_ratios": (2, 2, 2, 2)}
_THREE = {
    **_RESNET,
    "backbone_config": {
        **_RESNET["backbone_config"],
        "out_features": ["stage2", "stage3", "stage4"],
    },
}
_RT = {
    "backbone_config": {
        "model_type": "rt_detr_resnet",
        **_STAGES,
        "out_features": ["stage2", "stage3", "stage4"],
    },
    "encoder_in_channels": (8, 16, 16),
    "decoder_in_channels": (32, 32, 32),
    "num_queries": 6,
    "num_denoising": 4,
    "encoder_hidden_dim": 32,
}
_HG = {
    "model_type": "hgnet_v2",
    "embedding_size": 8,
    "hidden_sizes": [16, 16, 16, 16],
    "stem_channels": (3, 8, 8),
    "stage_in_channels": (8, 16, 16, 16),
    "stage_mid_channels": (8, 8, 8, 8),
    "stage_out_channels": (16, 16, 16, 16),
    "stage_num_blocks": (1, 1, 1, 1),
    "stage_numb_of_layers": (2, 2, 2, 2),
    "out_features": ["stage2", "stage3", "stage4"],
}
_FINE = {**_RT, "backbone_config": _HG, "encoder_in_channels": (16, 16, 16)}

_DETECTED: dict[str, dict[str, Any]] = {
    "detr": _RESNET,
    "conditional_detr": _RESNET,
    "dab-detr": _RESNET,
    "deformable_detr": _THREE,
    "table-transformer": _RESNET,
    "rt_detr": _RT,
    "rt_detr_v2": _RT,
    "d_fine": _FINE,
    "deimv2": _FINE,
    "yolos": {"image_size": (64, 64), "num_detection_tokens": 6},
    "rf_detr": {},
}
_MASKED: dict[str, dict[str, Any]] = {
    "eomt": {"image_size": 64, "num_queries": 6, "num_blocks": 1},
    "mask2former": {
        "backbone_config": {
            **_SWIN,
            "model_type": "swin",
            "out_features": ["stage1", "stage2", "stage3", "stage4"],
        },
        "feature_size": 32,
        "mask_feature_size": 32,
        "train_num_points": 32,
    },
    "maskformer": {
        "backbone_config": {
            **_SWIN,
            "model_type": "swin",
            "out_features": ["stage1", "stage2", "stage3", "stage4"],
        },
        "fpn_feature_size": 32,
        "mask_feature_size": 32,
        "decoder_config": {},
    },
}
_SEGMENTED: dict[str, dict[str, Any]] = {
    "beit": {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4], "use_auxiliary_head": False},
    "dpt": {
        "num_hidden_layers": 4,
        "backbone_out_indices": [0, 1, 2, 3],
        "neck_hidden_sizes": [8, 8, 8, 8],
        "image_size": 64,
    },
    "mobilenet_v2": {"depth_multiplier": 0.25},
    "mobilevit": {
        "hidden_sizes": (16, 16, 16),
        "neck_hidden_sizes": (8, 8, 8, 8, 8, 8, 16),
        "patch_size": 2,
        "aspp_out_channels": 16,
    },
    "mobilevitv2": {
        "width_multiplier": 0.25,
        "n_attn_blocks": (1, 1, 1),
        "patch_size": 2,
        "aspp_out_channels": 16,
    },
    "segformer": _PYRAMID,
    "upernet": {
        "backbone_config": {
            "model_type": "resnet",
            **_STAGES,
            "out_features": ["stage1", "stage2", "stage3", "stage4"],
        },
        "auxiliary_in_channels": 16,
        "auxiliary_channels": 8,
    },
}
_DINO = {
    "model_type": "dinov2",
    "image_size": 64,
    "num_hidden_layers": 4,
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
    "reshape_hidden_states": False,
}
_DEPTHS: dict[str, dict[str, Any]] = {
    "depth_anything": {
        "backbone_config": _DINO,
        "reassemble_hidden_size": 32,
        "neck_hidden_sizes": (8, 8, 8, 8),
        "patch_size": 8,
    },
    "dpt": _SEGMENTED["dpt"],
    "glpn": _PYRAMID,
    "prompt_depth_anything": {
        "backbone_config": _DINO,
        "reassemble_hidden_size": 32,
        "neck_hidden_sizes": (8, 8, 8, 8),
        "patch_size": 8,
    },
    "zoedepth": {
        "backbone_config": {
            "model_type": "beit",
            "image_size": 64,
            "num_hidden_layers": 4,
            "out_indices": [1, 2, 3, 4],
            "reshape_hidden_states": False,
        },
        "neck_hidden_sizes": (8, 8, 8, 8),
        "fusion_hidden_size": 8,
        "bottleneck_features": 8,
        "num_relative_features": 8,
        "bin_embedding_dim": 8,
        "num_attractors": (2, 1, 1, 1),
    },
}


def _detected(step: int) -> dict[str, Any]:
    generator = data.generator(step)
    boxes = torch.rand(data.SIZE, 2, 4, generator=generator) * 0.3 + 0.2
    labels = [{"class_labels": torch.tensor([0, 1]), "boxes": each} for each in boxes]
    return {"pixel_values": data.noise(step, 3, 64, 64), "labels": labels}


def _masked(step: int) -> dict[str, Any]:
    masks = (data.noise(step, 2, 64, 64) > 0).float()
    classes = [torch.tensor([0, 1]), torch.tensor([1, 0])]
    return {
        "pixel_values": data.noise(step + 10, 3, 64, 64),
        "mask_labels": list(masks),
        "class_labels": classes,
    }


def _segmented(step: int) -> dict[str, Any]:
    labels = (data.noise(step, 64, 64) > 0).long()
    return {"pixel_values": data.noise(step + 10, 3, 64, 64), "labels": labels}


def _images(step: int) -> dict[str, Any]:
    return {"pixel_values": data.noise(step, 3, 64, 64)}


def all_of() -> list[Architecture]:
    """The models of objects, segments and depth."""
    family = "detection and segmentation"
    found = families(family, "AutoModelForObjectDetection", _detected, _DETECTED)
    found += families(family, "AutoModelForUniversalSegmentation", _masked, _MASKED)
    found += families(
        family, "AutoModelForSemanticSegmentation", _segmented, _SEGMENTED, "+segments"
    )
    found += families(family, "AutoModelForDepthEstimation", _images, _DEPTHS, "+depth")
    return found
