"""Encoders of transformers: masked tokens are predicted, or classes of texts, tokens and pairs."""

from typing import Any

import torch

from bench.architectures import data
from bench.architectures.case import Architecture
from bench.architectures.tiny import families, unchanged

_MASKED: dict[str, dict[str, Any]] = {
    **unchanged(
        "albert bert convbert data2vec-text deberta distilbert electra ernie "
        "eurobert flaubert fnet gte ibert jina_embeddings_v3 layoutlm megatron-bert "
        "mobilebert modernbert mpnet mra nomic_bert nystromformer rembert roberta "
        "roberta-prelayernorm roformer squeezebert tapas ultrabert xlm-roberta "
        "xlm-roberta-xl yoso"
    ),
    "big_bird": {"block_size": 2, "num_random_blocks": 1},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "esm": {"vocab_size": 96},
    "esmc": {"num_key_value_heads": 4},
    "funnel": {"block_sizes": (1, 1), "d_head": 8},
    "longformer": {"attention_window": 4},
    "luke": {"entity_vocab_size": 8, "entity_emb_size": 8},
    "perceiver": {
        "num_latents": 8,
        "d_latents": 32,
        "num_self_attends_per_block": 2,
        "max_position_embeddings": data.LENGTH,
    },
    "reformer": {
        "attn_layers": ("local", "lsh"),
        "is_decoder": False,
        "attention_head_size": 8,
        "axial_pos_shape": (4, 4),
        "axial_pos_embds_dim": (16, 16),
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "feed_forward_size": 48,
        "num_hashes": 2,
        "num_buckets": 2,
    },
    "roc_bert": {
        "pronunciation_embed_dim": 8,
        "pronunciation_vocab_size": 96,
        "shape_embed_dim": 8,
        "shape_vocab_size": 96,
    },
    "xmod": {"default_language": "en_XX"},
}
_CLASSIFIED = {
    name: {**_MASKED.get(name, {}), **overrides}
    for name, overrides in {
        "bert": {},
        "canine": {"num_hash_buckets": 64, "upsampling_kernel_size": 2},
        "distilbert": {},
        "gpt2": {},
        "llama": {},
        "longformer": {},
        "markuplm": {
            "max_xpath_tag_unit_embeddings": 8,
            "max_xpath_subs_unit_embeddings": 8,
            "tag_pad_id": 7,
            "subs_pad_id": 7,
            "xpath_unit_hidden_size": 8,
            "max_depth": 4,
        },
        "xlnet": {},
    }.items()
}
_TASKS = {
    "AutoModelForTokenClassification": ("+tokens", ("bert", "deberta-v2", "funnel")),
    "AutoModelForQuestionAnswering": ("+answers", ("bert", "albert", "splinter", "xlnet")),
    "AutoModelForMultipleChoice": ("+choice", ("roberta", "electra")),
    "AutoModelForPreTraining": ("+pretraining", ("electra",)),
}


def _tagged(step: int) -> dict[str, Any]:
    return {**data.padded_tokens(step), "labels": data.ids(step) % 2}


def _answered(step: int) -> dict[str, Any]:
    batch = data.padded_tokens(step)
    del batch["labels"]
    start = torch.tensor([1, 2 + step])
    return {**batch, "start_positions": start, "end_positions": start + 3}


def _chosen(step: int) -> dict[str, Any]:
    pairs = torch.stack([data.ids(step), data.ids(step + 50)], 1)
    return {"input_ids": pairs, "labels": torch.tensor([step % 2, 1])}


def all_of() -> list[Architecture]:
    """The encoders."""
    batches = (_tagged, _answered, _chosen, _tagged)
    found = families("encoder", "AutoModelForMaskedLM", data.padded_tokens, _MASKED)
    found += families(
        "encoder",
        "AutoModelForSequenceClassification",
        data.classified_tokens,
        _CLASSIFIED,
        "+classes",
    )
    for (model_class, (suffix, names)), batch in zip(_TASKS.items(), batches, strict=True):
        table = {name: _MASKED.get(name, {}) for name in names}
        found += families("encoder", model_class, batch, table, suffix)
    return found
