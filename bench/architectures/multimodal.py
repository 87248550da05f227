"""Models of transformers that join texts with images, by contrast or in one encoder."""

from typing import Any

import torch

from bench.architectures import data
from bench.architectures.case import Architecture
from bench.architectures.tiny import architecture

_TEXT = {"projection_size": 32}
_CONTRASTED: dict[str, tuple[str, dict[str, Any]]] = {
    "align": (
        "AlignModel",
        {
            "projection_dim": 24,
            "vision_config": {
                "kernel_sizes": [3, 5],
                "in_channels": [32, 16],
                "out_channels": [16, 24],
                "strides": [1, 2],
                "num_block_repeats": [1, 2],
                "expand_ratios": [1, 2],
                "width_coefficient": 1.0,
                "depth_coefficient": 1.0,
                "hidden_dim": 24,
            },
        },
    ),
    "aimv2": ("Aimv2Model", {}),
    "altclip": ("AltCLIPModel", {"text_config": {"project_dim": 32}}),
    "blip": ("BlipModel", {}),
    "chinese_clip": ("ChineseCLIPModel", {}),
    "clip+contrast": ("CLIPModel", {}),
    "groupvit": (
        "GroupViTModel",
        {
            "vision_config": {
                "depths": (1, 1, 1),
                "num_group_tokens": (4, 2, 0),
                "num_output_groups": (4, 2, 2),
            },
            "projection_intermediate_dim": 32,
        },
    ),
    "metaclip_2+contrast": ("MetaClip2Model", {}),
    "owlv2": ("Owlv2Model", {}),
    "owlvit": ("OwlViTModel", {}),
    "siglip+contrast": ("SiglipModel", {"text_config": _TEXT}),
    "tipsv2+contrast": ("Tipsv2Model", {"vision_config": {"out_features": ["stage2"]}}),
    "vision-text-dual-encoder": ("VisionTextDualEncoderModel", {}),
}
_BOXED = {"coordinate_size": 6, "shape_size": 4, "max_2d_position_embeddings": 64}


def _contrasted(step: int) -> dict[str, Any]:
    text = data.padded_tokens(step)
    return {
        "input_ids": text["input_ids"],
        "attention_mask": text["attention_mask"],
        "pixel_values": data.noise(step, 3, 32, 32),
        "return_loss": True,
    }


def _boxes(step: int) -> torch.Tensor:
    corners = torch.randint(30, (data.SIZE, data.LENGTH, 2), generator=data.generator(step))
    return torch.cat([corners, corners + 10], -1)


def _documents(step: int) -> dict[str, Any]:
    return {**data.padded_tokens(step), "bbox": _boxes(step), "labels": data.ids(step) % 2}


def _float_documents(step: int) -> dict[str, Any]:
    return {**_documents(step), "bbox": torch.cat([_boxes(step)] * 2, -1) / 64}


def _seen_documents(step: int) -> dict[str, Any]:
    return {**_documents(step), "pixel_values": data.noise(step, 3, 32, 32)}


def _read_documents(step: int) -> dict[str, Any]:
    return {**_seen_documents(step), "labels": data.ids(step + 100)}


def _seen_tokens(step: int) -> dict[str, Any]:
    return {**data.padded_tokens(step), "pixel_values": data.noise(step, 3, 32, 32)}


def _only_seen(step: int) -> dict[str, Any]:
    return {**data.tokens(step), "pixel_values": data.noise(step, 3, 32, 32)}


def _regions(step: int) -> dict[str, Any]:
    labels = torch.randint(96, (data.SIZE, data.LENGTH + 4), generator=data.generator(step))
    return {
        **data.padded_tokens(step),
        "visual_embeds": data.noise(step, 4, 32),
        "visual_attention_mask": torch.ones(data.SIZE, 4),
        "labels": labels,
    }


def _lxmert(step: int) -> dict[str, Any]:
    return {
        **data.padded_tokens(step),
        "visual_feats": data.noise(step, 4, 32),
        "visual_pos": data.noise(step, 4, 4),
        "matched_label": data.CLASSES,
    }


def _flava(step: int) -> dict[str, Any]:
    return {"input_ids": data.ids(step), "pixel_values": data.noise(step, 3, 32, 32)}


_FUSED: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "blip+caption": ("BlipForConditionalGeneration", _only_seen, {}),
    "bridgetower": (
        "BridgeTowerForMaskedLM",
        _seen_tokens,
        {
            "hidden_size": 64,
            "text_config": {"hidden_size": 64},
            "vision_config": {"hidden_size": 64},
        },
    ),
    "bros": ("BrosForTokenClassification", _float_documents, {"hidden_size": 64}),
    "flava": ("FlavaModel", _flava, {}),
    "git": ("GitForCausalLM", _only_seen, {}),
    "layoutlmv3": (
        "LayoutLMv3ForTokenClassification",
        _seen_documents,
        {**_BOXED, "input_size": 32},
    ),
    "lilt": (
        "LiltForTokenClassification",
        _documents,
        {"hidden_size": 48, "max_2d_position_embeddings": 64},
    ),
    "lxmert": (
        "LxmertForPreTraining",
        _lxmert,
        {
            "l_layers": 1,
            "x_layers": 1,
            "r_layers": 1,
            "visual_feat_dim": 32,
            "task_obj_predict": False,
            "num_qa_labels": 4,
        },
    ),
    "udop": (
        "UdopForConditionalGeneration",
        _read_documents,
        {"max_2d_position_embeddings": 64, "decoder_start_token_id": 3},
    ),
    "vilt": ("ViltForMaskedLM", _seen_tokens, {}),
    "visual_bert": ("VisualBertForPreTraining", _regions, {"visual_embedding_dim": 32}),
}


def all_of() -> list[Architecture]:
    """The models of texts and images."""
    entries = {name: (cls, _contrasted, own) for name, (cls, own) in _CONTRASTED.items()}
    return [
        architecture(name, "multimodal", model_class, batch, overrides)
        for name, (model_class, batch, overrides) in {**entries, **_FUSED}.items()
    ]
