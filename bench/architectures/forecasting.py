"""Models of transformers for time series and decisions."""

from typing import Any

import torch

from bench.architectures import data
from bench.architectures.case import Architecture
from bench.architectures.tiny import architecture

_CONTEXT, _AHEAD, _LAGS = 12, 4, 3
_SERIES = {
    "prediction_length": _AHEAD,
    "context_length": _CONTEXT,
    "lags_sequence": [1, 2, _LAGS],
    "num_time_features": 2,
    "encoder_layerdrop": 0.1,
    "decoder_layerdrop": 0.1,
}
_CALM = {"encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0}
_PATCHES = {"context_length": 16, "prediction_length": _AHEAD, "patch_length": 4, "patch_stride": 4}


def _forecast(step: int) -> dict[str, Any]:
    past, ahead = _CONTEXT + _LAGS, _AHEAD
    return {
        "past_values": data.noise(step, past).abs(),
        "past_time_features": data.noise(step + 10, past, 2),
        "past_observed_mask": torch.ones(data.SIZE, past),
        "future_values": data.noise(step + 20, ahead).abs(),
        "future_time_features": data.noise(step + 30, ahead, 2),
    }


def _channels(step: int, count: int) -> dict[str, Any]:
    return {"past_values": data.noise(step, 16, count)}


def _forecast_channels(step: int) -> dict[str, Any]:
    return {**_channels(step, 2), "future_values": data.noise(step + 10, _AHEAD, 2)}


def _masked_channels(step: int) -> dict[str, Any]:
    return _channels(step, 2)


def _lists(step: int) -> dict[str, Any]:
    return {
        "past_values": list(data.noise(step, 16)),
        "freq": [0, 1],
        "future_values": data.noise(step + 10, 8),
    }


def _decisions(step: int) -> dict[str, Any]:
    return {
        "states": data.noise(step, 4, 5),
        "actions": data.noise(step + 10, 4, 3),
        "rewards": data.noise(step + 20, 4, 1),
        "returns_to_go": data.noise(step + 30, 4, 1),
        "timesteps": torch.arange(4).repeat(data.SIZE, 1),
        "attention_mask": torch.ones(data.SIZE, 4, dtype=torch.int64),
    }


_MODELS: dict[str, tuple[str, Any, dict[str, Any], dict[str, Any] | None]] = {
    "time_series_transformer": (
        "TimeSeriesTransformerForPrediction",
        _forecast,
        _SERIES,
        _CALM,
    ),
    "informer": ("InformerForPrediction", _forecast, _SERIES, _CALM),
    "autoformer": (
        "AutoformerForPrediction",
        _forecast,
        {**_SERIES, "label_length": 4, "moving_average": 3},
        _CALM,
    ),
    "patchtst": (
        "PatchTSTForPrediction",
        _forecast_channels,
        {**_PATCHES, "num_input_channels": 2},
        None,
    ),
    "patchtst+pretraining": (
        "PatchTSTForPretraining",
        _masked_channels,
        {**_PATCHES, "num_input_channels": 2, "do_mask_input": True},
        None,
    ),
    "patchtsmixer": (
        "PatchTSMixerForPrediction",
        _forecast_channels,
        {**_PATCHES, "num_input_channels": 2},
        None,
    ),
    "timesfm": (
        "TimesFmModelForPrediction",
        _lists,
        {"patch_length": 4, "context_length": 16, "horizon_length": 8},
        None,
    ),
    "decision_transformer": (
        "DecisionTransformerModel",
        _decisions,
        {"state_dim": 5, "act_dim": 3, "max_ep_len": 16},
        None,
    ),
}


def all_of() -> list[Architecture]:
    """The models of series."""
    return [
        architecture(name, "time series", model_class, batch, overrides, whole)
        for name, (model_class, batch, overrides, whole) in _MODELS.items()
    ]
