"""Memory of one training step on the CPU, exact to the byte; shared by the examples.

On a GPU `torch.cuda.max_memory_allocated` says it; see docs/measuring-memory.md.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else each profile prints two lines

from torch import Tensor
from torch.autograd.profiler import profile, record_function

_BACKWARD = "example: backward starts"


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one step above what was allocated before it.

    Attributes:
        saved: what forward left for backward.
        peak: the most at any moment: activations, temporaries and gradients.
    """

    saved: int
    peak: int

    def __str__(self) -> str:
        return f"peak {self.peak / 2**20:.2f} MiB, of it saved {self.saved / 2**20:.2f} MiB"


def measure(loss: Callable[[], Tensor]) -> Memory:
    """Runs `loss().backward()` and sums up what the allocator hands out and takes back."""
    with profile(profile_memory=True) as profiler:
        value = loss()
        with record_function(_BACKWARD):
            pass
        value.backward()
    live = peak = saved = 0
    for event in sorted(profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == _BACKWARD:
            saved = live
        elif event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return Memory(saved, peak)


def second_step(loss: Callable[[], Tensor], forget: Callable[[], None]) -> Memory:
    """Like `measure`, but of a step after the first, which captures; `forget` clears gradients."""
    loss().backward()
    forget()
    memory = measure(loss)
    forget()
    return memory
