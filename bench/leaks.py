"""What a rewritten model holds in host memory: for each signature, after eviction, over many steps.

python bench/leaks.py [layers]

Measured on the process (resident bytes after the collector ran), so each figure is the mean of
several captures. The walk over objects counts Python objects only: what fake tensors and autograd
nodes have in C++ is the difference between both.
"""

import gc
import linecache
import sys
import types
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.fx import graph_module

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import fxckpt
from bench.models import Case, build
from fxckpt.runtime import Captured

_SHAPES = 20
_STEPS = 1000
_SHARED = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, nn.Module)


def resident() -> float:
    """MB of this process that are in memory, garbage excluded."""
    gc.collect()
    gc.collect()
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1e3


def generated() -> tuple[int, float]:
    """How many texts of generated code torch and Python keep, and their MB."""
    texts = graph_module._loader.eval_cache
    lines = sum(key.startswith("<eval_with_key>") for key in linecache.cache)
    return max(len(texts), lines), sum(map(len, texts.values())) / 1e6


def reachable(root: Any) -> dict[str, tuple[int, int]]:
    """Number and bytes of the Python objects behind one, by type, without modules and classes."""
    seen: set[int] = set()
    count: Counter[str] = Counter()
    size: Counter[str] = Counter()
    stack = [root]
    while stack:
        thing = stack.pop()
        if id(thing) in seen or issubclass(type(thing), _SHARED):
            continue
        if type(thing) in (torch.Tensor, nn.Parameter, torch.UntypedStorage):
            continue
        seen.add(id(thing))
        name = type(thing).__qualname__
        count[name] += 1
        size[name] += sys.getsizeof(thing)
        stack.extend(gc.get_referents(thing))
    return {name: (count[name], size[name]) for name, _ in size.most_common()}


def stepper(model: nn.Module, case: Case, longest: int) -> Callable[[int], None]:
    """A training step at a sequence length that is `number` shorter than the longest."""
    batch = case.batch(0)

    def step(number: int) -> None:
        case.loss(model(**{k: v[:, : longest - number] for k, v in batch.items()})).backward()
        model.zero_grad()

    return step


def print_signatures(step: Callable[[int], None]) -> None:
    """What a cached signature holds."""
    step(0)
    start = resident()
    found = reachable(next(thing for thing in gc.get_objects() if type(thing) is Captured))
    total = sum(size for _, size in found.values())
    for number in range(1, _SHAPES):
        step(number)
        step(number)
    print(f"each cached signature: {(resident() - start) / (_SHAPES - 1):.1f} MB")
    print(f"  of it {total / 1e6:.1f} MB in Python objects:")
    for name, (count, size) in list(found.items())[:12]:
        print(f"  {size / 1e6:6.2f} MB  {count:6d}  {name}")


def print_steps(step: Callable[[int], None]) -> None:
    """What many steps of known shapes leave."""
    before = resident()
    for number in range(_STEPS):
        step(number % _SHAPES)
    print(f"{_STEPS} steps of {_SHAPES} cached shapes: {resident() - before:+.1f} MB")


def print_evictions(step: Callable[[int], None]) -> None:
    """What captures leave that do not fit into the cache."""
    for number in range(_SHAPES):
        step(number)
    before, (texts, size) = resident(), generated()
    for number in range(_SHAPES):
        step(number)
    left, (more_texts, more_size) = resident() - before, generated()
    print(
        f"{_SHAPES} captures that were evicted: {left:+.1f} MB, "
        f"{more_texts - texts:+d} texts of code ({more_size - size:+.2f} MB)"
    )


def main() -> None:
    """Prints the figures."""
    torch.set_num_threads(1)
    layers = int(sys.argv[1]) if len(sys.argv) > 1 else 12
    longest = 2 * _SHAPES
    sizes = {"width": 64, "heads": 4, "vocab": 128, "batch": 2, "seq": longest}
    case = build("gpt2", layers=layers, **sizes)
    print(f"GPT-2, {layers} layers, policy block")
    model = fxckpt.rewrite(case.model, "block", strict=True)
    print_signatures(stepper(model, case, longest))
    print_steps(stepper(model, case, longest))
    model = fxckpt.rewrite(case.model, "block", strict=True, cache_size=2)
    print_evictions(stepper(model, case, longest))


if __name__ == "__main__":
    main()
