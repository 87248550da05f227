"""Decoders of transformers: every token is predicted from those before it."""

from typing import Any

from bench.architectures import data
from bench.architectures.case import Architecture
from bench.architectures.tiny import families, unchanged

_LATENT = {"num_key_value_heads": 4}
_ROTARY = {"rotary_dim": 4}
_HEAD_DIM = {"head_dim": 8}

_DENSE: dict[str, dict[str, Any]] = {
    **unchanged(
        "apertus arcee biogpt bitnet bloom cohere cohere2 ctrl cwm diffllama doge ernie4_5 exaone4 "
        "falcon flint gemma gemma2 gemma3_text glm glm4 gpt2 gpt_bigcode gpt_neox "
        "gpt_neox_japanese granite granite_swa helium hrm_text hyperclovax jais2 llama "
        "ministral3 mistral modernbert-decoder mpt nanochat olmo olmo2 olmo3 openai-gpt opt "
        "persimmon phi phi3 qwen2 qwen3 seed_oss smollm3 stablelm starcoder2 "
        "vaultgemma xglm xlm xlnet cpmant"
    ),
    "codegen": _ROTARY,
    "gptj": _ROTARY,
    "gpt_neo": {"attention_types": (((("global", "local"), 1)),)},
    "hunyuan_v1_dense": _HEAD_DIM,
    "minicpm3": _LATENT,
    "ministral": _HEAD_DIM,
    "nemotron": {"num_key_value_heads": 2},
    "youtu": _LATENT,
}
_MIXTURES: dict[str, dict[str, Any]] = {
    **unchanged(
        "afmoe aria_text beam cohere2_moe deepseek_v4 exaone_moe flex_olmo glm4_moe gpt_oss "
        "granitemoe granitemoe_swa granitemoeshared hy_v3 hy_v4 inkling2_text inkling_text jetmoe "
        "kolibri1 laguna llama4_text mellum mimo_v2_flash minimax_m2 minimax_m3_vl_text "
        "mixtral olmoe phimoe qwen2_moe qwen3_moe solar_open"
    ),
    "axk1": _LATENT,
    "deepseek_v2": {**_LATENT, "num_experts_per_tok": 2},
    "deepseek_v3": _LATENT,
    "deepseek_v32": _LATENT,
    "glm4_moe_lite": _LATENT,
    "glm_moe_dsa": _LATENT,
    "hunyuan_v1_moe": _HEAD_DIM,
    "longcat_flash": _LATENT,
}
_RECURRENT: dict[str, dict[str, Any]] = {
    **unchanged("falcon_mamba lfm2 mamba minimax olmo_hybrid rwkv"),
    "bamba": {
        "mamba_n_heads": 4,
        "mamba_d_state": 8,
        "mamba_chunk_size": 4,
        "attn_layer_indices": [1],
    },
    "falcon_h1": {
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_chunk_size": 4,
        "mamba_n_groups": 1,
    },
    "nemotron_h": {
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "chunk_size": 4,
        "n_groups": 2,
    },
}


def all_of() -> list[Architecture]:
    """The decoders, mixtures of experts and state space models."""
    tables = {"decoder": _DENSE, "mixture of experts": _MIXTURES, "state space": _RECURRENT}
    return [
        architecture
        for family, table in tables.items()
        for architecture in families(family, "AutoModelForCausalLM", data.tokens, table)
    ]
