"""Models of transformers called or configured in ways that change what happens inside."""

import functools
from typing import Any

import torch
from torch import nn

from bench.architectures import data
from bench.architectures.case import Architecture
from bench.architectures.tiny import architecture, build

_STATES = {"output_hidden_states": True, "output_attentions": True}
_EAGER = {"attn_implementation": "eager"}
_LABELS = {"decoder_start_token_id": 3}


def _with(batch: Any, **options: Any) -> Any:
    return lambda step: {**batch(step), **options}


def _padded_left(step: int) -> dict[str, Any]:
    batch = data.tokens(step)
    mask = torch.ones_like(batch["input_ids"])
    mask[0, :5] = 0
    return {**batch, "attention_mask": mask, "labels": batch["labels"].where(mask == 1, -100)}


def _embedded(step: int) -> dict[str, Any]:
    return {"inputs_embeds": data.noise(step, data.LENGTH, 32), "labels": data.ids(step)}


def _longer_each_step(step: int) -> dict[str, Any]:
    tokens = data.ids(step, data.LENGTH + step)
    return {"input_ids": tokens, "labels": tokens}


_CALLS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "bert+states": ("BertForMaskedLM", _with(data.padded_tokens, **_STATES), _EAGER),
    "gpt2+states": ("GPT2LMHeadModel", _with(data.tokens, **_STATES), _EAGER),
    "t5+states": (
        "T5ForConditionalGeneration",
        _with(data.translated_tokens, **_STATES),
        _LABELS,
    ),
    "llama+states": ("LlamaForCausalLM", _with(data.tokens, output_hidden_states=True), {}),
    "mixtral+router": ("MixtralForCausalLM", _with(data.tokens, output_router_logits=True), {}),
    "qwen3_moe+router": (
        "Qwen3MoeForCausalLM",
        _with(data.padded_tokens, output_router_logits=True),
        {},
    ),
    "llama+padding": ("LlamaForCausalLM", _padded_left, {}),
    "mistral+padding": ("MistralForCausalLM", _padded_left, {}),
    "mamba+padding": ("MambaForCausalLM", _padded_left, {}),
    "llama+eager": ("LlamaForCausalLM", data.tokens, {**_EAGER, "attention_dropout": 0.1}),
    "llama+embeddings": ("LlamaForCausalLM", _embedded, {}),
    "llama+lengths": ("LlamaForCausalLM", _longer_each_step, {}),
    "llama+tuple": ("LlamaForCausalLM", _with(data.tokens, return_dict=False), {}),
    "llama+logits": ("LlamaForCausalLM", _with(data.tokens, logits_to_keep=4, labels=None), {}),
    "llama+no_cache": ("LlamaForCausalLM", _with(data.tokens, use_cache=False), {}),
    "m2m_100+no_cache": (
        "M2M100ForConditionalGeneration",
        _with(data.translated_tokens, use_cache=False),
        {},
    ),
    "llama+tied": ("LlamaForCausalLM", data.tokens, {"tie_word_embeddings": True}),
}


def _checkpointed(model_class: str, model_type: str) -> nn.Module:
    model = build(model_class, model_type, {})
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def _frozen(model_class: str, model_type: str) -> nn.Module:
    model = build(model_class, model_type, {})
    for parameter in model.get_input_embeddings().parameters():
        parameter.requires_grad_(False)
    return model


def _half(model_class: str, model_type: str) -> nn.Module:
    return build(model_class, model_type, {}).to(torch.bfloat16)


_CHANGED = {"checkpointed": _checkpointed, "frozen": _frozen, "bfloat16": _half}
_MODELS = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "bert": "BertForMaskedLM"}


def all_of() -> list[Architecture]:
    """The models with options."""
    found = [
        architecture(name, "transformers options", model_class, batch, overrides)
        for name, (model_class, batch, overrides) in _CALLS.items()
    ]
    for model_type, model_class in _MODELS.items():
        for change, make in _CHANGED.items():
            found.append(
                Architecture(
                    f"hf/{model_type}+{change}",
                    "transformers options",
                    functools.partial(make, model_class, model_type),
                    lambda step: ((), data.padded_tokens(step)),
                )
            )
    return found
