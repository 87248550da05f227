"""Models of transformers for videos, poses, mattes, masked images and texts in images."""

from typing import Any

import torch

from bench.architectures import data
from bench.architectures.case import Architecture
from bench.architectures.tiny import architecture

_HIERA = {
    "embed_dim": 8,
    "image_size": (32, 32),
    "depths": (1, 1, 2, 1),
    "num_heads": (1, 1, 2, 2),
    "masked_unit_size": (8, 8),
}
_FRAMES = {"num_frames": 4, "tubelet_size": 2}


def _videos(step: int) -> dict[str, Any]:
    return {"pixel_values": data.noise(step, 4, 3, 32, 32), "labels": data.CLASSES}


def _pixels(step: int) -> dict[str, Any]:
    return {"pixel_values": data.noise(step, 3, 32, 32)}


def _videos_of_tubes(step: int) -> dict[str, Any]:
    return {"pixel_values_videos": data.noise(step, 4, 3, 32, 32)}


def _masked_videos(step: int) -> dict[str, Any]:
    mask = torch.arange(32).repeat(data.SIZE, 1) % 2 == step % 2
    return {"pixel_values": data.noise(step, 4, 3, 32, 32), "bool_masked_pos": mask}


def _masked_images(step: int) -> dict[str, Any]:
    mask = torch.arange(16).repeat(data.SIZE, 1) % 3 == step % 3
    return {**_pixels(step), "bool_masked_pos": mask}


def _lines(step: int) -> dict[str, Any]:
    return {"pixel_values": data.noise(step, 3, 32, 128)}


def _captioned(step: int) -> dict[str, Any]:
    return {**_pixels(step), "labels": data.ids(step)}


def _flattened(step: int) -> dict[str, Any]:
    patches = data.noise(step, 8, 34)
    patches[..., 0] = torch.arange(8) // 4 + 1
    patches[..., 1] = torch.arange(8) % 4 + 1
    return {"flattened_patches": patches, "labels": data.ids(step)}


def _prompted(step: int) -> dict[str, Any]:
    points = torch.rand(data.SIZE, 1, 2, 2, generator=data.generator(step)) * 32
    return {**_pixels(step), "input_points": points}


def _queried(step: int) -> dict[str, Any]:
    return {**_pixels(step), "input_ids": data.ids(step)}


def _objects(output: Any) -> torch.Tensor:
    # The other outputs are views of what forward reads again: see docs/limits.md.
    return output.logits.square().mean() + output.pred_boxes.square().mean()


_MODELS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "timesformer": ("TimesformerForVideoClassification", _videos, {"num_frames": 4}),
    "videomae": ("VideoMAEForVideoClassification", _videos, _FRAMES),
    "videomae+pretraining": (
        "VideoMAEForPreTraining",
        _masked_videos,
        {**_FRAMES, "norm_pix_loss": False},
    ),
    "vivit": ("VivitForVideoClassification", _videos, {"num_frames": 4, "tubelet_size": (2, 8, 8)}),
    "vjepa2": (
        "VJEPA2Model",
        _videos_of_tubes,
        {
            "crop_size": 32,
            "frames_per_clip": 4,
            "pred_hidden_size": 32,
            "pred_num_attention_heads": 4,
            "pred_num_hidden_layers": 2,
        },
    ),
    "vit_mae": ("ViTMAEForPreTraining", _pixels, {}),
    "hiera+pretraining": (
        "HieraForPreTraining",
        _pixels,
        {**_HIERA, "decoder_hidden_size": 16, "decoder_depth": 1, "decoder_num_heads": 2},
    ),
    "vit+masked": ("ViTForMaskedImageModeling", _masked_images, {"encoder_stride": 8}),
    "dinov3_vit": ("DINOv3ViTModel", _pixels, {"out_features": ["stage2"]}),
    "radio": ("RadioModel", _pixels, {}),
    "swin2sr": (
        "Swin2SRForImageSuperResolution",
        _pixels,
        {"embed_dim": 8, "depths": (1, 2), "num_heads": (1, 2), "patch_size": 1},
    ),
    "superpoint": ("SuperPointForKeypointDetection", _pixels, {}),
    "mgp-str": (
        "MgpstrForSceneTextRecognition",
        _lines,
        {
            "image_size": (32, 128),
            "patch_size": 8,
            "num_bpe_labels": 96,
            "num_wordpiece_labels": 96,
        },
    ),
    "vision-encoder-decoder": (
        "VisionEncoderDecoderModel",
        _captioned,
        {
            "decoder": {"is_decoder": True, "add_cross_attention": True},
            "decoder_start_token_id": 3,
            "pad_token_id": 0,
        },
    ),
    "pix2struct": (
        "Pix2StructForConditionalGeneration",
        _flattened,
        {"vision_config": {"patch_embed_hidden_size": 32, "seq_len": 16}},
    ),
    "sam": (
        "SamModel",
        _prompted,
        {
            "vision_config": {
                "output_channels": 32,
                "num_pos_feats": 16,
                "global_attn_indexes": (1,),
            },
            "prompt_encoder_config": {"mask_input_channels": 4, "image_embedding_size": 4},
            "mask_decoder_config": {"iou_head_hidden_dim": 32},
        },
    ),
    "clipseg": (
        "CLIPSegForImageSegmentation",
        _queried,
        {"extract_layers": (0, 1), "reduce_dim": 16},
    ),
}


_OBJECTS = {"owlvit": "OwlViTForObjectDetection", "owlv2": "Owlv2ForObjectDetection"}


def all_of() -> list[Architecture]:
    """The models of what is seen."""
    found = [
        architecture(name, "perception", model_class, batch, overrides)
        for name, (model_class, batch, overrides) in _MODELS.items()
    ]
    return [
        *found,
        *(
            architecture(f"{name}+objects", "perception", cls, _queried, {}, loss=_objects)
            for name, cls in _OBJECTS.items()
        ),
    ]
