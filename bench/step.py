"""One training step, the same for every row."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.models import Case, build
from bench.rows import Row

STEP = "forward, loss and backward, from gradients set to None; no optimizer update"
DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True)
class Setup:
    """What is trained and where; crosses process boundaries.

    Attributes:
        model: a name of `models.FACTORIES`.
        sizes: overrides of that model's sizes.
        device: "cpu" or "cuda".
        dtype: a key of `DTYPES`; other than fp32 is by autocast, with parameters in fp32.
        threads: of torch on the CPU.
    """

    model: str
    sizes: dict[str, Any]
    device: str
    dtype: str
    threads: int

    def build(self) -> Case:
        """A fresh case on the device; equal weights each time."""
        case = build(self.model, **self.sizes)
        case.model.to(self.device)
        return case

    def autocast(self) -> AbstractContextManager[object]:
        """The context that forward and loss run in."""
        dtype = DTYPES[self.dtype]
        return nullcontext() if dtype is None else torch.autocast(self.device, dtype)


class Step:
    """A model installed as a row says, with a batch: call `run` for one training step."""

    def __init__(self, setup: Setup, row: Row) -> None:
        self.setup = setup
        self.case = setup.build()
        self.batch = {name: x.to(setup.device) for name, x in self.case.batch(0).items()}
        started = time.perf_counter()
        self.call = row.install(self.case)
        self.install_seconds = time.perf_counter() - started

    def run(self, between: Callable[[], None] = lambda: None) -> None:
        """One step as `STEP` describes; `between` is called when forward and loss are done."""
        self.clear()
        with self.setup.autocast():
            loss = self.case.loss(self.call(**self.batch))
        between()
        loss.backward()
        self.synchronize()

    def run_seeded(self) -> None:
        """One step with the random numbers that every row gets."""
        torch.manual_seed(0)
        self.run()

    def clear(self) -> None:
        """Sets the gradients to None."""
        self.case.model.zero_grad(set_to_none=True)

    def synchronize(self) -> None:
        """Waits for the device."""
        if self.setup.device == "cuda":
            torch.cuda.synchronize()

    def gradients(self) -> dict[str, Tensor]:
        """The gradients by parameter name, of the parameters that have one."""
        named = self.case.model.named_parameters()
        return {name: p.grad for name, p in named if p.grad is not None}

    def buffers(self) -> dict[str, Tensor]:
        """The buffers by name."""
        return dict(self.case.model.named_buffers())

    def resident(self) -> list[Tensor]:
        """What is allocated with or without training: parameters, buffers, batch."""
        model = self.case.model
        return [*model.parameters(), *model.buffers(), *self.batch.values()]
