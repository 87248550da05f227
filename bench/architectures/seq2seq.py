"""Encoders with decoders of transformers: a text is predicted from another one."""

from typing import Any

from bench.architectures import data
from bench.architectures.case import Architecture
from bench.architectures.tiny import architecture, families, unchanged

_TEXTS: dict[str, dict[str, Any]] = {
    **unchanged(
        "bart blenderbot blenderbot-small marian mbart mt5 mvp pegasus plbart umt5 t5 "
        "t5gemma t5gemma2 prophetnet switch_transformers"
    ),
    "bigbird_pegasus": {"block_size": 2, "num_random_blocks": 1},
    "fsmt": {"src_vocab_size": 96, "tgt_vocab_size": 96},
    "led": {
        "attention_window": 4,
        "max_encoder_position_embeddings": 64,
        "max_decoder_position_embeddings": 64,
    },
    "longt5": {"local_radius": 2, "global_block_size": 4},
    "pegasus_x": {"block_size": 4, "num_global_tokens": 2},
}


_DROPPING = unchanged("m2m_100 nllb-moe seamless_m4t seamless_m4t_v2")
_CALM = {"encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0}


def all_of() -> list[Architecture]:
    """The encoder-decoders."""
    found = []
    for table, whole in ((_TEXTS, None), (_DROPPING, _CALM)):
        started = {name: {"decoder_start_token_id": 3, **own} for name, own in table.items()}
        found += families(
            "encoder-decoder",
            "AutoModelForSeq2SeqLM",
            data.translated_tokens,
            started,
            whole=whole,
        )
    name, settings = "encoder-decoder", {"decoder_start_token_id": 3}
    batch = data.translated_tokens
    return [*found, architecture(name, name, "EncoderDecoderModel", batch, settings)]
