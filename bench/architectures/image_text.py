"""Language models of transformers that read images or sounds among their tokens."""

from collections.abc import Callable
from typing import Any

import torch

from bench.architectures import data
from bench.architectures.case import Architecture
from bench.architectures.tiny import PLAIN, architecture

_PLACE = PLAIN.stop + 1  # the token that stands for a piece of an image
_INDEX, _ID = {"image_token_index": _PLACE}, {"image_token_id": _PLACE}
_MULTIROTARY = {
    "text_config": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [1, 1, 2],
        }
    }
}


def _with_places(step: int, places: int) -> dict[str, Any]:
    tokens = data.ids(step, places + 8)
    tokens[:, 2 : 2 + places] = _PLACE
    return {"input_ids": tokens, "labels": tokens.where(tokens != _PLACE, -100)}


def _images(places: int, *shape: int, **others: Any) -> Callable[[int], dict[str, Any]]:
    """Tokens with `places` for an image of `shape`."""

    def batch(step: int) -> dict[str, Any]:
        return {**_with_places(step, places), "pixel_values": data.noise(step, *shape), **others}

    return batch


def _patches(
    places: int, width: int, grid: tuple[int, int, int]
) -> Callable[[int], dict[str, Any]]:
    """Tokens with places for an image that is a list of patches, as Qwen's."""

    def batch(step: int) -> dict[str, Any]:
        count = data.SIZE * grid[0] * grid[1] * grid[2]
        tokens = _with_places(step, places)
        return {
            **tokens,
            "pixel_values": torch.randn(count, width, generator=data.generator(step)),
            "image_grid_thw": torch.tensor([grid] * data.SIZE),
            "mm_token_type_ids": (tokens["input_ids"] == _PLACE).long(),
        }

    return batch


_IMAGE = (3, 32, 32)
_READ: dict[str, tuple[str, Callable[[int], dict[str, Any]], dict[str, Any]]] = {
    "llava": ("LlavaForConditionalGeneration", _images(16, *_IMAGE), _INDEX),
    "vipllava": (
        "VipLlavaForConditionalGeneration",
        _images(16, *_IMAGE),
        {**_INDEX, "vision_feature_layers": (-1, -2), "vision_feature_layer": (-1, -2)},
    ),
    "llava_next": (
        "LlavaNextForConditionalGeneration",
        _images(36, 5, *_IMAGE, image_sizes=torch.tensor([[32, 32]] * 2)),
        {**_INDEX, "image_grid_pinpoints": [[32, 32], [64, 64]]},
    ),
    "llava_onevision": (
        "LlavaOnevisionForConditionalGeneration",
        _images(36, 5, *_IMAGE, image_sizes=torch.tensor([[32, 32]] * 2)),
        {**_INDEX, "image_grid_pinpoints": [[32, 32], [64, 64]]},
    ),
    "paligemma": (
        "PaliGemmaForConditionalGeneration",
        _images(16, *_IMAGE, token_type_ids=torch.tensor([[0] * 20 + [1] * 4] * 2)),
        _INDEX,
    ),
    "aya_vision": (
        "AyaVisionForConditionalGeneration",
        _images(4, *_IMAGE),
        {**_INDEX, "downsample_factor": 2},
    ),
    "deepseek_vl": ("DeepseekVLForConditionalGeneration", _images(16, *_IMAGE), _ID),
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        _images(4, *_IMAGE),
        {**_INDEX, "mm_tokens_per_image": 4},
    ),
    "idefics2": (
        "Idefics2ForConditionalGeneration",
        _images(4, 1, *_IMAGE),
        {
            **_ID,
            "perceiver_config": {
                "resampler_n_latents": 4,
                "resampler_n_heads": 2,
                "resampler_head_dim": 8,
                "resampler_depth": 1,
            },
        },
    ),
    "idefics3": ("Idefics3ForConditionalGeneration", _images(4, 1, *_IMAGE), _ID),
    "smolvlm": ("SmolVLMForConditionalGeneration", _images(4, 1, *_IMAGE), _ID),
    "internvl": (
        "InternVLForConditionalGeneration",
        _images(4, *_IMAGE),
        {**_ID, "vision_config": {"image_size": (32, 32), "patch_size": (8, 8)}},
    ),
    "mistral3": (
        "Mistral3ForConditionalGeneration",
        _images(4, *_IMAGE, image_sizes=torch.tensor([[32, 32]] * 2)),
        _INDEX,
    ),
    "got_ocr2": ("GotOcr2ForConditionalGeneration", _images(1, *_IMAGE), _INDEX),
    "kosmos-2": (
        "Kosmos2ForConditionalGeneration",
        _images(
            4, *_IMAGE, image_embeds_position_mask=torch.tensor([[0, 0, 1, 1, 1, 1] + [0] * 6] * 2)
        ),
        {"latent_query_num": 4, "text_config": {"layers": 2}},
    ),
    "ovis2": ("Ovis2ForConditionalGeneration", _images(16, *_IMAGE), _ID),
    "aria": (
        "AriaForConditionalGeneration",
        _images(4, *_IMAGE),
        {**_INDEX, "projector_patch_to_query_dict": {16: 4}},
    ),
    "blip-2": (
        "Blip2ForConditionalGeneration",
        _images(4, *_IMAGE),
        {**_INDEX, "num_query_tokens": 4},
    ),
    "instructblip": (
        "InstructBlipForConditionalGeneration",
        _images(4, *_IMAGE, qformer_input_ids=torch.full((2, 4), 9)),
        {**_INDEX, "num_query_tokens": 4},
    ),
    "qwen2_vl": (
        "Qwen2VLForConditionalGeneration",
        _patches(4, 3 * 2 * 64, (1, 4, 4)),
        {**_ID, **_MULTIROTARY},
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VLForConditionalGeneration",
        _patches(4, 3 * 2 * 64, (1, 4, 4)),
        {
            **_ID,
            **_MULTIROTARY,
            "vision_config": {"window_size": 32, "fullatt_block_indexes": (1,)},
        },
    ),
    "qwen3_vl": (
        "Qwen3VLForConditionalGeneration",
        _patches(4, 3 * 2 * 64, (1, 4, 4)),
        {**_ID, "vision_config": {"deepstack_visual_indexes": (0,), "num_position_embeddings": 16}},
    ),
    "qwen3_vl_moe": (
        "Qwen3VLMoeForConditionalGeneration",
        _patches(4, 3 * 2 * 64, (1, 4, 4)),
        {**_ID, "vision_config": {"deepstack_visual_indexes": (0,), "num_position_embeddings": 16}},
    ),
    "glm4v": (
        "Glm4vForConditionalGeneration",
        _patches(4, 3 * 2 * 64, (1, 4, 4)),
        {**_ID, **_MULTIROTARY},
    ),
}


def all_of() -> list[Architecture]:
    """The language models that see."""
    return [
        architecture(name, "multimodal", model_class, batch, overrides)
        for name, (model_class, batch, overrides) in _READ.items()
    ]
