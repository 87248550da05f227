"""Models of transformers that hear or speak: recognition, classification, codecs and synthesis."""

from typing import Any

import torch

from bench.architectures import data
from bench.architectures.case import Architecture
from bench.architectures.tiny import architecture, families

_CONVOLUTIONS = {
    "conv_dim": (16, 16),
    "conv_stride": (5, 4),
    "conv_kernel": (10, 4),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
}
_WAVES = {**_CONVOLUTIONS, "mask_time_length": 4, "mask_feature_length": 4}
_SQUEEZED = {**_WAVES, "squeeze_factor": 2}
_XVECTOR = {"tdnn_dim": (16, 16), "tdnn_kernel": (3, 1), "tdnn_dilation": (1, 1)}
_CALM = {"layerdrop": 0.0, "apply_spec_augment": False}

_RECOGNISED: dict[str, dict[str, Any]] = {
    "data2vec-audio": {**_WAVES, "conv_pos_kernel_size": 3},
    "hubert": _WAVES,
    "sew": _SQUEEZED,
    "sew-d": _SQUEEZED,
    "unispeech": {**_WAVES, "num_ctc_classes": 96},
    "unispeech-sat": _WAVES,
    "wav2vec2": _WAVES,
    "wav2vec2-conformer": {**_WAVES, "vocab_size": 96, "conv_depthwise_kernel_size": 3},
    "wavlm": {**_WAVES, "num_buckets": 8, "max_bucket_distance": 16},
}


def _waves(step: int) -> dict[str, Any]:
    return {"input_values": data.noise(step, 800)}


def _recognised_waves(step: int) -> dict[str, Any]:
    return {**_waves(step), "labels": data.ids(step, 4)}


def _classified_waves(step: int) -> dict[str, Any]:
    return {**_waves(step), "labels": data.CLASSES}


def _codec(step: int) -> dict[str, Any]:
    return {"input_values": data.noise(step, 1, 640)}


def _spectra(step: int, length: int = 32, bins: int = 16) -> dict[str, Any]:
    return {"input_features": data.noise(step, length, bins), "labels": data.ids(step, 4)}


def _padded_spectra(step: int) -> dict[str, Any]:
    mask = torch.ones(data.SIZE, 32, dtype=torch.int64)
    mask[1, -8:] = 0
    return {**_spectra(step, 32), "attention_mask": mask}


def _wide_spectra(step: int) -> dict[str, Any]:
    return {**_padded_spectra(step), "input_features": data.noise(step, 32, 64)}


def _long_waves(step: int) -> dict[str, Any]:
    return {"input_values": data.noise(step, 4000), "labels": data.ids(step, 4)}


def _tall_spectra(step: int) -> dict[str, Any]:
    return {"input_features": data.noise(step, 16, 32), "labels": data.ids(step, 8)}


def _classified_spectra(step: int) -> dict[str, Any]:
    return {"input_values": data.noise(step, 32, 16), "labels": data.CLASSES}


def all_of() -> list[Architecture]:
    """The models of sounds."""
    found = families("audio", "AutoModelForCTC", _recognised_waves, _RECOGNISED, "", _CALM)
    table = {name: {**_RECOGNISED[name], **_XVECTOR} for name in ("wav2vec2", "wavlm")}
    classifier = "AutoModelForAudioClassification"
    found += families("audio", classifier, _classified_waves, table, "+classes", _CALM)
    found += families("audio", "AutoModelForAudioXVector", _classified_waves, table, "+x", _CALM)
    for name, model_class, batch, overrides, whole in _others():
        found.append(architecture(name, "audio", model_class, batch, overrides, whole))
    return found


def _others() -> list[tuple[str, str, Any, dict[str, Any], dict[str, Any] | None]]:
    spectrum = {"feature_projection_input_dim": 16, "conv_depthwise_kernel_size": 3}
    conformer = {"conv_kernel_size": 3, "subsampling_conv_channels": 8}
    calm = {"encoder_config": {**conformer, "layerdrop": 0.0}}
    return [
        ("wav2vec2-bert", "Wav2Vec2BertForCTC", _spectra, {**spectrum, "vocab_size": 96}, _CALM),
        (
            "audio-spectrogram-transformer",
            "ASTForAudioClassification",
            _classified_spectra,
            {"max_length": 32, "frequency_stride": 8, "time_stride": 8},
            None,
        ),
        (
            "whisper",
            "WhisperForConditionalGeneration",
            _tall_spectra,
            {"max_source_positions": 16, "max_target_positions": 16},
            None,
        ),
        (
            "speech_to_text",
            "Speech2TextForConditionalGeneration",
            _spectra,
            {"input_feat_per_channel": 16, "conv_channels": 32, "max_source_positions": 64},
            None,
        ),
        ("moonshine", "MoonshineForConditionalGeneration", _long_waves, {}, None),
        ("parakeet_ctc", "ParakeetForCTC", _padded_spectra, {"encoder_config": conformer}, calm),
        ("lasr_ctc", "LasrForCTC", _padded_spectra, {"encoder_config": conformer}, calm),
        (
            "granite_speech5_ctc",
            "GraniteSpeech5ForCTC",
            _wide_spectra,
            {"encoder_config": {"context_size": 8, "num_key_value_heads": 4}},
            None,
        ),
        (
            "encodec",
            "EncodecModel",
            _codec,
            {
                "num_filters": 4,
                "upsampling_ratios": (4, 2),
                "codebook_size": 16,
                "codebook_dim": 32,
            },
            None,
        ),
        (
            "dac",
            "DacModel",
            _codec,
            {
                "encoder_hidden_size": 8,
                "decoder_hidden_size": 32,
                "downsampling_ratios": (2, 4),
                "n_codebooks": 2,
                "codebook_size": 16,
            },
            None,
        ),
        (
            "mimi",
            "MimiModel",
            _codec,
            {
                "num_filters": 4,
                "upsampling_ratios": [4, 2],
                "upsample_groups": 32,
                "codebook_size": 16,
                "codebook_dim": 32,
                "num_quantizers": 4,
                "vector_quantization_hidden_dimension": 32,
            },
            None,
        ),
    ]
