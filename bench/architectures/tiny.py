"""Any model of transformers at a tiny size: its own configuration with every size made small.

Dropout, layer drop, activations and all other settings keep their defaults.
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from bench.architectures.case import Architecture, total

Batch = Callable[[int], dict[str, Any]]

VOCABULARY = 96
PLAIN = range(8, 48)
"""Ids of ordinary tokens: below are padding, start and end, above what stands for images etc."""

_TOKENS = {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 3,
    "mask_token_id": 4,
    "sep_token_id": 5,
    "cls_token_id": 6,
}
_WIDTH = dict.fromkeys(
    "hidden_size d_model n_embd dim embed_dim embedding_size hidden_dim word_embed_proj_dim "
    "encoder_hidden_dim projection_dim fusion_hidden_size decoder_hidden_size output_dim "
    "out_hidden_size emb_dim backbone_hidden_size attention_hidden_size lru_width "
    "projector_hidden_size encoder_hidden_size text_hidden_size hidden_size_per_layer_input "
    "decoder_hidden_dim mask_feature_size feature_size classifier_proj_size tokenizer_hidden_size "
    "text_embed_dim vision_embed_dim out_dim conv_out_channels output_proj_dim q_lora_rank "
    "kv_lora_rank codevector_dim proj_codevector_dim".split(),
    32,
)
_FEED_FORWARD = dict.fromkeys(
    "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff n_inner mlp_dim "
    "ffn_hidden_size moe_intermediate_size dim_feedforward shared_expert_intermediate_size "
    "expert_ffn_hidden_size "
    "decoder_intermediate_size shared_intermediate_size d_inner encoder_intermediate_size "
    "moe_shared_expert_intermediate_size mlp_hidden_size".split(),
    48,
)
_LAYERS = dict.fromkeys(
    "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers depth "
    "num_decoder_layers num_encoder_layers decoder_num_hidden_layers decoder_num_layers "
    "encoder_num_layers".split(),
    2,
)
_HEADS = dict.fromkeys(
    "num_attention_heads n_head n_heads num_heads encoder_attention_heads "
    "decoder_attention_heads attention_heads decoder_num_attention_heads "
    "encoder_num_attention_heads".split(),
    4,
)
_COUNTS = {
    **dict.fromkeys("num_experts num_local_experts n_routed_experts moe_num_experts".split(), 4),
    **dict.fromkeys("num_experts_per_tok moe_topk num_key_value_heads".split(), 2),
    **dict.fromkeys("n_group topk_group n_groups first_k_dense_replace".split(), 1),
    "num_queries": 6,
    "max_window_layers": 1,
}
_LENGTHS = {
    **dict.fromkeys("max_position_embeddings n_positions max_seq_len n_ctx".split(), 64),
    **dict.fromkeys("head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim d_kv".split(), 8),
    **dict.fromkeys("sliding_window window_size".split(), 4),
    "image_size": 32,
    "patch_size": 8,
    "num_mel_bins": 16,
}
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    **_TOKENS,
    **_WIDTH,
    **_FEED_FORWARD,
    **_LAYERS,
    **_HEADS,
    **_COUNTS,
    **_LENGTHS,
}


def configuration(model_type: str, **overrides: Any) -> Any:
    """The configuration of a model type of transformers, with small sizes.

    Args:
        model_type: as in `AutoConfig.for_model`.
        **overrides: of single settings; those of an inner configuration as a dictionary, in which
            `model_type` chooses another kind.

    Example:
        >>> configuration("gpt2", n_layer=1).n_layer
        1
    """
    from transformers import CONFIG_MAPPING

    return _shrunk(CONFIG_MAPPING[model_type](), overrides)


def build(model_class: str, model_type: str, overrides: dict[str, Any]) -> nn.Module:
    """A model with such a configuration, in train mode.

    Args:
        model_class: a name in transformers, or in the file of the model type; `AutoModel...`
            chooses the class by the configuration.
        model_type: see `configuration`.
        overrides: see `configuration`.
    """
    import transformers

    config = configuration(model_type, **overrides)
    cls = getattr(transformers, model_class, None)
    if cls is None:
        file = type(config).__module__.replace(".configuration_", ".modeling_")
        cls = getattr(importlib.import_module(file), model_class)
    model = cls.from_config(config) if model_class.startswith("AutoModel") else cls(config)
    return model.train()


def unchanged(model_types: str) -> dict[str, dict[str, Any]]:
    """A table, as `families` takes it, of model types that need no overrides."""
    return {model_type: {} for model_type in model_types.split()}


def families(
    family: str,
    model_class: str,
    batch: Batch,
    table: dict[str, dict[str, Any]],
    suffix: str = "",
    whole: dict[str, Any] | None = None,
) -> list[Architecture]:
    """An architecture for each model type of `table`, which gives its overrides.

    Args:
        family: of all of them.
        model_class: see `build`.
        batch: number of the step to keyword arguments.
        table: model type to overrides, see `configuration`.
        suffix: of the names, which are `hf/<model type><suffix>`.
        whole: more overrides, which make what can be captured whole.
    """
    return [
        architecture(model_type + suffix, family, model_class, batch, overrides, whole)
        for model_type, overrides in table.items()
    ]


def architecture(
    name: str,
    family: str,
    model_class: str,
    batch: Batch,
    overrides: dict[str, Any],
    whole: dict[str, Any] | None = None,
    loss: Callable[[Any], Tensor] = total,
) -> Architecture:
    """One architecture, called `hf/<name>`; see `families`.

    The model type is the name up to a plus.
    """
    make = functools.partial(build, model_class, name.partition("+")[0])
    return Architecture(
        f"hf/{name}",
        family,
        functools.partial(make, overrides),
        lambda step: ((), batch(step)),
        loss,
        None if whole is None else functools.partial(make, {**overrides, **whole}),
    )


def _shrunk(default: Any, overrides: dict[str, Any]) -> Any:
    """A configuration of the class of `default`."""
    default.allow_global_per_layer_attribute_access = True
    settings: dict[str, Any] = {}
    others = iter(range(VOCABULARY - 1, PLAIN.stop, -1))
    for name in (field.name for field in dataclasses.fields(default)):
        value = getattr(default, name)
        if _is_configuration(value):
            inner = overrides.get(name, {})
            settings[name] = (
                configuration(**inner) if "model_type" in inner else _shrunk(value, inner)
            )
        elif name in _TOKENS and name != "decoder_start_token_id":
            settings[name] = _TOKENS[name]
        elif isinstance(value, int) and not isinstance(value, bool):
            if name in SIZES:
                settings[name] = SIZES[name]
            elif name.endswith(("_token_id", "_token_index")):
                settings[name] = next(others)
    own = {
        key: value for key, value in overrides.items() if not _is_configuration(settings.get(key))
    }
    return type(default)(**{**settings, **own})


def _is_configuration(value: Any) -> bool:
    from transformers import PreTrainedConfig

    return isinstance(value, PreTrainedConfig)
