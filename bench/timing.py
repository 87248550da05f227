"""Time of a training step and equality of its gradients, all rows in one process.

Each row trains its own copy of the model, with equal weights and the same random numbers.
"""

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bench.rows import EAGER, Row
from bench.step import Setup, Step

Named = dict[str, Tensor]


@dataclass(slots=True)
class Timing:
    """What one row did.

    Attributes:
        gradients: largest relative difference of a gradient to eager's, 0 if all are bit-identical.
            In eager's own row: to a second run of it.
        buffers_equal: buffers (BatchNorm's statistics) are bit-identical to eager's.
        seconds: of each timed step, by round.
    """

    gradients: float
    buffers_equal: bool
    seconds: list[float] = field(default_factory=list)

    def ratios(self, reference: "Timing") -> list[float]:
        """Step time over the reference's of the same round."""
        return [a / b for a, b in zip(self.seconds, reference.seconds, strict=True)]


@dataclass(frozen=True, slots=True)
class Failure:
    """A row that raised."""

    reason: str

    @classmethod
    def of(cls, error: BaseException) -> "Failure":
        """The error's type and message."""
        return cls(f"{type(error).__name__}: {error}".strip())


def time_rows(
    setup: Setup, rows: Sequence[Row], repeats: int, progress: Callable[[str], None]
) -> dict[str, Timing | Failure]:
    """Checks every row's gradients against eager's, then times all, round-robin.

    Args:
        setup: what is trained.
        rows: eager first.
        repeats: timed rounds; in each, every row takes one step, in a shuffled order.
        progress: is told what happens.

    Returns:
        Row name to its result; rows that raise do not stop the others.
    """
    torch.set_num_threads(setup.threads)
    progress(f"first steps of {EAGER}")
    eager = Step(setup, rows[0])
    reference = Reference(eager)
    steps = {EAGER: eager}
    timings = {EAGER: Timing(reference.difference(eager), buffers_equal=True)}
    failures: dict[str, Failure] = {}
    for row in rows[1:]:
        progress(f"first steps of {row.name}")
        try:
            step = Step(setup, row)
            timings[row.name] = reference.check(step)
            steps[row.name] = step
        except Exception as error:
            failures[row.name] = Failure.of(error)
    _time_rounds(steps, timings, repeats, progress)
    return {**timings, **failures}


class Reference:
    """Eager's gradients and buffers after its first step."""

    def __init__(self, eager: Step) -> None:
        eager.run_seeded()
        self.gradients = _copies(eager.gradients())
        self.buffers = _copies(eager.buffers())

    def check(self, step: Step) -> Timing:
        """Runs a new `step` twice, since the first may capture or compile."""
        first = self.difference(step)
        buffers = step.buffers()
        buffers_equal = all(torch.equal(buffers[name], x) for name, x in self.buffers.items())
        return Timing(_largest([first, self.difference(step)]), buffers_equal)

    def difference(self, step: Step) -> float:
        """Runs `step` and compares its gradients."""
        step.run_seeded()
        difference = _difference(step.gradients(), self.gradients)
        step.clear()
        return difference


def _time_rounds(
    steps: dict[str, Step],
    timings: dict[str, Timing],
    repeats: int,
    progress: Callable[[str], None],
) -> None:
    gc.collect()
    gc.freeze()  # what was built so far is not garbage: keep the collector's time out of the steps
    order = list(steps)
    shuffled = random.Random(0)
    for index in range(repeats):
        if index % max(1, repeats // 20) == 0:
            progress(f"timing: round {index + 1} of {repeats}")
        shuffled.shuffle(order)
        for name in order:
            timings[name].seconds.append(_seconds(steps[name]))


def _seconds(step: Step) -> float:
    torch.manual_seed(0)
    step.synchronize()
    started = time.perf_counter()
    step.run()
    seconds = time.perf_counter() - started
    step.clear()
    return seconds


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) == 1:
        return (values[0],) * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def _copies(tensors: Named) -> Named:
    return {name: x.detach().clone() for name, x in tensors.items()}


def _difference(found: Named, expected: Named) -> float:
    """Largest |found - expected| of a tensor over that tensor's largest |expected|.

    Zero if all are bit-identical, infinite if not the same parameters have gradients. The divisor
    is at least a thousandth of the largest gradient of all: a gradient that is zero but for
    rounding (a key's bias before softmax) has no meaningful relative difference.
    """
    if found.keys() != expected.keys():
        return math.inf
    pairs = [(found[name], x) for name, x in expected.items()]
    if all(torch.equal(a, b) for a, b in pairs):
        return 0.0
    floor = 1e-3 * max(b.abs().max().item() for _, b in pairs)
    return _largest(
        [(a - b).abs().max().item() / max(b.abs().max().item(), floor) for a, b in pairs]
    )


def _largest(values: list[float]) -> float:
    """The maximum; unlike that of `max`, NaN if one is NaN."""
    return float(torch.tensor(values, dtype=torch.float64).max())
