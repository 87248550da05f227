"""Named command lines of bench/compare.py, and the figures that their results must reach."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from bench.report import Result
from bench.rows import EAGER


@dataclass(frozen=True, slots=True)
class Goal:
    """A figure to reach.

    Attributes:
        text: what is measured.
        value: results by row name to the measured figure.
        limit: results to the largest figure that is good enough.
    """

    text: str
    value: Callable[[Mapping[str, Result]], float]
    limit: Callable[[Mapping[str, Result]], float]

    def line(self, results: Mapping[str, Result]) -> str:
        """The figure, its limit and whether it was reached."""
        try:
            value, limit = self.value(results), self.limit(results)
        except (KeyError, ValueError):
            return f"  not measured  {self.text}"
        verdict = "reached" if value <= limit else "MISSED"
        return f"  {verdict:12}  {self.text}: {value:.4g}, at most {limit:.4g}"


@dataclass(frozen=True, slots=True)
class Preset:
    """Options of bench/compare.py, which the command line overrides, and goals."""

    options: dict[str, Any]
    goals: tuple[Goal, ...] = ()


def _time_ratio(row: str, reference: str) -> Callable[[Mapping[str, Result]], float]:
    return lambda results: results[row].time_ratio(results[reference])


def _extra_time(row: str) -> Callable[[Mapping[str, Result]], float]:
    return lambda results: results[row].time_ratio(results[EAGER]) - 1


def _constant(value: float) -> Callable[[Mapping[str, Result]], float]:
    return lambda results: value


_GPT2_SMALL = {
    "model": "gpt2",
    "layers": 12,
    "width": 768,
    "heads": 12,
    "vocab": 50257,
    "seq": 256,
    "batch": 4,
}

PRESETS = {
    "gpt2-cuda": Preset({**_GPT2_SMALL, "seq": 1024, "batch": 8, "dtype": "bf16"}),
    "launch-bound": Preset(
        {
            "model": "gpt2",
            "layers": 6,
            "width": 32,
            "heads": 4,
            "vocab": 128,
            "seq": 8,
            "batch": 1,
            "threads": 1,
            "repeats": 300,
        },
        (
            Goal(
                "step time, fxckpt.everything over eager",
                _time_ratio("fxckpt.everything", EAGER),
                _constant(1.15),
            ),
            Goal(
                "step time, fxckpt.block over transformers' checkpointing",
                _time_ratio("fxckpt.block", "transformers"),
                _constant(0.6),
            ),
        ),
    ),
    "gpt2-small": Preset(
        {**_GPT2_SMALL, "repeats": 5},
        (
            Goal(
                "peak MiB, fxckpt.block against torch.checkpoint",
                lambda results: results["fxckpt.block"].peak / 2**20,
                lambda results: results["torch.checkpoint"].peak / 2**20,
            ),
            Goal(
                "extra step time, fxckpt.block against torch.checkpoint",
                _extra_time("fxckpt.block"),
                _extra_time("torch.checkpoint"),
            ),
            Goal("extra step time, fxckpt.dots", _extra_time("fxckpt.dots"), _constant(0.05)),
            Goal(
                "first call in seconds, fxckpt.block",
                lambda results: results["fxckpt.block"].first_call,
                _constant(10),
            ),
        ),
    ),
}
