"""Global modes change between two calls."""

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from helpers import chain
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from fxckpt import unit
from traps import (
    EITHER,
    MODES,
    Guard,
    Make,
    Stage,
    Trap,
    all_of,
    constant,
    function,
    rows,
    same,
)

cuda, cudnn, mkldnn = torch.backends.cuda, torch.backends.cudnn, torch.backends.mkldnn
Scope = Callable[[], Any]  # makes a context manager


def scopes(name: str, make: Make, *inside: Scope, guard: Guard = MODES, **options: Any) -> Trap:
    """Steps outside, and inside of each of some context managers, twice in turn."""

    def play(stage: Stage) -> None:
        for scope in (contextlib.nullcontext, *inside) * 2:
            with scope():
                stage.step(rows())

    return Trap(name, lambda: same(make, play, **options), guard)


def reads(name: str, get: Callable[[], Any], put: Callable[[Any], Any], value: Any) -> Trap:
    """Python in forward reads a setting."""
    make = function(lambda m, x: x @ m.weight * len(str(get())))
    return scopes(f"reads {name}", make, lambda: setting(get, put, value))


def flag(owner: Any, name: str, value: Any) -> tuple[Any, Any, Any]:
    """How to get and put a setting that is an attribute, and another value for it."""
    return lambda: getattr(owner, name), lambda v: setattr(owner, name, v), value


@contextlib.contextmanager
def setting(get: Callable[[], Any], put: Callable[[Any], Any], value: Any) -> Iterator[None]:
    """A global setting at another value for a while."""
    before = get()
    put(value)
    try:
        yield
    finally:
        put(before)


def autocast(**kwargs: Any) -> Scope:
    """Autocast on the CPU."""
    return lambda: torch.autocast("cpu", **kwargs)


def attend(m: Any, x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    q = (x @ m.weight)[None, None].to(dtype).sin()
    return F.scaled_dot_product_attention(q, q * 2, q.sin())


def backends(*which: SDPBackend, low: bool = False) -> Scope:
    """These backends of attention; `low`: with sums in low precision."""
    get, put = cuda.fp16_bf16_reduction_math_sdp_allowed, cuda.allow_fp16_bf16_reduction_math_sdp

    @contextlib.contextmanager
    def scope() -> Iterator[None]:
        with sdpa_kernel(list(which)), setting(get, put, low):
            yield

    return scope


class Recurrent(nn.LSTM):
    """Returns its output alone."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[0]


class CosForSin(TorchFunctionMode):
    """Another function for one of torch."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return (torch.cos if func is torch.sin else func)(*args, **(kwargs or {}))


class Parts(nn.Module):
    """Cannot be captured as a whole; a part of it is called often, or has a weight in common."""

    def __init__(self, *, tied: bool = False, times: int = 1, around: bool = False) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.GELU())
        self.last, self.times, self.around = nn.Linear(4, 4), times, around
        if tied:
            self.last.weight = self.block[2].weight

    def forward(self, x: Tensor) -> Tensor:
        if random.random() >= 0:  # which cannot be captured
            x = x * 2
        if self.around:
            x = self.last(x)
        for _ in range(self.times):
            x = self.block(x)
        return self.last(x)


def parts(name: str, **options: Any) -> Trap:
    """In autocast, where eager casts each weight once and sums gradients of the cast one."""

    def play(stage: Stage) -> None:
        for _ in range(3):
            with torch.autocast("cpu", torch.bfloat16):
                stage.step(rows(8))

    return Trap(name, lambda: same(lambda: Parts(**options), play, warns=EITHER))


def grad_modes(stage: Stage) -> None:
    """Without gradients now and then."""
    for scope in (contextlib.nullcontext, torch.no_grad, torch.inference_mode) * 2:
        with scope():
            out = stage.model(rows())
            stage.note("result", (out.requires_grad, out.is_inference(), out.detach().clone()))
        if out.requires_grad:
            stage.steps += 1
            out.sum().backward()
            stage.update()


SIN = function(lambda m, x: torch.sin(x @ m.weight))
PRODUCTS = function(lambda m, x: x @ m.weight @ m.weight)
MATH, FLASH = SDPBackend.MATH, SDPBackend.FLASH_ATTENTION
PRECISION = torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "medium"
CACHE = torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled, False

TRAPS = [
    Trap("grad mode", lambda: same(lambda: chain(2, 4), grad_modes)),
    scopes("autocast", SIN, autocast(dtype=torch.bfloat16)),
    scopes("dtype of autocast", SIN, autocast(dtype=torch.bfloat16), autocast(dtype=torch.half)),
    scopes("autocast off", SIN, autocast(dtype=torch.bfloat16), autocast(enabled=False)),
    scopes("cache of autocast", PRODUCTS, autocast(dtype=torch.bfloat16, cache_enabled=False),
           autocast(dtype=torch.bfloat16)),
    parts("autocast and parts"),
    parts("autocast and a part called often", times=3),
    parts("autocast and a part with a tied weight", tied=True),
    parts("autocast and a layer before and after a part", around=True),
    scopes("default dtype", function(lambda m, x: x @ m.weight * torch.ones(4).element_size()),
           lambda: setting(torch.get_default_dtype, torch.set_default_dtype, torch.float64)),
    scopes("attention", function(attend), backends(MATH), backends(FLASH)),
    scopes("attention in low precision", function(lambda m, x: attend(m, x, torch.bfloat16)),
           backends(MATH), backends(MATH, low=True)),
    scopes("mkldnn of a recurrent layer", lambda: Recurrent(4, 4),
           lambda: setting(*flag(mkldnn, "enabled", False))),
    scopes("function mode", SIN, CosForSin, graph=2,
           guard=all_of(MODES, constant(unit, "_has_function_mode", False))),
    reads("determinism", torch.are_deterministic_algorithms_enabled,
          torch.use_deterministic_algorithms, True),
    reads("determinism, warnings", torch.is_deterministic_algorithms_warn_only_enabled,
          lambda v: torch.use_deterministic_algorithms(v, warn_only=v), True),
    reads("precision of products", *PRECISION),
    reads("cache of autocast", *CACHE),
    reads("mkldnn", *flag(mkldnn, "enabled", False)),
    reads("cudnn", *flag(cudnn, "enabled", False)),
    reads("cudnn.benchmark", *flag(cudnn, "benchmark", True)),
    reads("cudnn.deterministic", *flag(cudnn, "deterministic", True)),
    reads("tf32", *flag(cuda.matmul, "allow_tf32", True)),
    reads("sums in bfloat16", *flag(cuda.matmul, "allow_bf16_reduced_precision_reduction", False)),
]  # fmt: skip
