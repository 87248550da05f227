"""No fake tensor stays where the program can find it, and what it keeps is what eager keeps."""

from __future__ import annotations

import copy
import functools
import gc
import threading
import types
import warnings
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from helpers import Function, assert_same, captures, content, grads_of, leaves, seed_all, total
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

import fxckpt
from fxckpt import CaptureError, FallbackWarning

Forward = Callable[[Function, Tensor], Tensor]


class Places:
    """Where programs keep tensors; made anew for each model."""

    def __init__(self) -> None:
        self.dict: dict[Any, Any] = {}
        self.ordered: Any = OrderedDict()
        self.default: Any = defaultdict(dict)
        self.list: list[Any] = []
        self.deque: Any = deque(maxlen=3)
        self.set: set[Any] = set()
        self.object = types.SimpleNamespace()
        self.slots = Slots()
        self.cls: Any = type("Class", (), {"store": {}, "value": None})
        self.lru = functools.lru_cache(maxsize=4)(ones)
        self.unbounded = functools.lru_cache(maxsize=None)(ones)
        self.filled = functools.lru_cache(maxsize=4)(upper)
        self.local = threading.local()
        self.context: ContextVar[Any] = ContextVar("kept", default=None)


class Slots:
    """An object without a dictionary."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: Any = None


class Tables(NamedTuple):
    cos: Tensor
    sin: Tensor


class Entry:
    """An object in a cache."""

    def __init__(self, table: Tensor) -> None:
        self.table = table


def ones(n: int) -> Tensor:
    return torch.linspace(0.5, 1.5, n)


def upper(n: int) -> Tensor:
    """Made in place, as masks are."""
    return torch.full((n, n), 0.5).triu_(1)[0]


def batch(n: int, width: int = 4) -> Tensor:
    return torch.linspace(-1, 1, width * n).view(n, width).cos()


def cached(store: Any, key: Any, make: Callable[[], Any]) -> Any:
    if key not in store:
        store[key] = make()
    return store[key]


def attribute(owner: Any, make: Callable[[], Any]) -> Any:
    if getattr(owner, "value", None) is None:
        owner.value = make()
    return owner.value


def in_list(p: Places, n: int) -> Tensor:
    if not p.list:
        p.list.append(ones(n))
    return p.list[0]


def in_context(p: Places, n: int) -> Tensor:
    if p.context.get() is None:
        p.context.set(ones(n))
    return p.context.get()


def table(n: int) -> Tensor:
    return ones(n).cos() * 0.5


# Each takes the width of a row and gives a row.
CONSTANTS: dict[str, Callable[[Places, int], Tensor]] = {
    "dictionary": lambda p, n: cached(p.dict, n, lambda: ones(n)),
    "ordered dictionary": lambda p, n: cached(p.ordered, "k", lambda: ones(n)),
    "dictionary in a dictionary": lambda p, n: cached(p.default["a"], n, lambda: ones(n)),
    "tuple in a dictionary": lambda p, n: cached(p.dict, n, lambda: (ones(n), table(n)))[1],
    "named tuple": lambda p, n: cached(p.dict, n, lambda: Tables(ones(n), table(n))).sin,
    "tuple in a tuple": lambda p, n: cached(p.dict, n, lambda: (1, (ones(n),)))[1][0],
    "object in a dictionary": lambda p, n: cached(p.dict, n, lambda: Entry(ones(n))).table,
    "list in a dictionary": lambda p, n: cached(p.dict, n, lambda: [ones(n)])[0],
    "list": in_list,
    "object": lambda p, n: attribute(p.object, lambda: ones(n)),
    "slots": lambda p, n: attribute(p.slots, lambda: ones(n)),
    "class": lambda p, n: attribute(p.cls, lambda: ones(n)),
    "dictionary of a class": lambda p, n: cached(p.cls.store, n, lambda: ones(n)),
    "lru_cache": lambda p, n: p.lru(n),
    "unbounded lru_cache": lambda p, n: p.unbounded(n),
    "lru_cache of what is made in place": lambda p, n: p.filled(n),
    "thread local": lambda p, n: attribute(p.local, lambda: ones(n)),
    "function attribute": lambda p, n: attribute(p.lru.__wrapped__, lambda: ones(n)),
    "made in place": lambda p, n: cached(p.dict, n, lambda: torch.zeros(n).fill_(2).cumsum_(0)),
    "view and base": lambda p, n: cached(
        p.dict, n, lambda: ((t := torch.eye(n) + 0.5), t[0])
    )[1],
    "integers": lambda p, n: cached(p.dict, n, lambda: torch.arange(n)).float(),
    "literal": lambda p, n: cached(p.dict, n, lambda: torch.tensor([0.5] * n)),
    "always assigned": lambda p, n: (p.dict.update(a=ones(n)), p.dict["a"])[1],
}  # fmt: skip


@pytest.fixture(autouse=True)
def clean_function() -> Iterator[None]:
    yield
    vars(ones).clear()


def fakes() -> list[Any]:
    """Every fake tensor that is alive."""
    gc.collect()
    return [o for o in gc.get_objects() if issubclass(type(o), FakeTensor)]


def trained(forward: Any, batches: list[Tensor], *, strict: bool | None = None) -> Any:
    """Records a few steps of a model around `forward(places, model, x)`; eager if strict is None.

    Returns:
        The record, the model, and the places.
    """
    seed_all(0)
    places = Places()
    # `places` in a closure, a global of nothing: found all the same.
    model: nn.Module = Function(lambda m, x: forward(places, m, x))
    if strict is not None:
        model = fxckpt.rewrite(model, "nothing", strict=strict)
    record: list[tuple[str, Any]] = []
    for i, x in enumerate(batches):
        x = x.clone()
        if i % 3 == 2:
            model.eval()
            with torch.no_grad():
                record.append((f"{i}: evaluation", content(model(x))))
            model.train()
        model.zero_grad()
        out = model(x)
        if out.requires_grad:
            total(out).backward()
        record.append((f"{i}: result", content(out)))
        record += [(f"{i}: {n}", content(g)) for n, g in leaves(grads_of(model))]
    return record, model, places


def same(forward: Any, batches: list[Tensor], *, strict: bool) -> tuple[nn.Module, Places]:
    """Asserts that eager and rewritten do the same, and that no fake tensor is left."""
    before = {id(t) for t in fakes()}
    eager, _, _ = trained(forward, batches)
    with warnings.catch_warnings():
        if not strict:
            warnings.simplefilter("ignore", FallbackWarning)
        ours, model, places = trained(forward, batches, strict=strict)
    assert_same(eager, ours)
    copied = copy.deepcopy(model)
    for m in (model, copied):  # what was kept is of use to a copy as well
        m.zero_grad()
        total(m(batches[0].clone())).backward()
    assert_same(*([(n, content(g)) for n, g in leaves(grads_of(m))] for m in (model, copied)))
    assert not any(issubclass(type(t), FakeTensor) for t in tensors_reached(places))
    return model, places


def tensors_reached(root: Any) -> list[Tensor]:
    """All tensors that can be reached from an object, but for functions and modules."""
    found, seen, stack = [], set(), [root]
    while stack:
        value = stack.pop()
        if id(value) in seen or isinstance(value, (type(torch), nn.Module)):
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            found.append(value)
        elif not isinstance(value, types.FunctionType):
            stack += gc.get_referents(value)
        else:
            stack += vars(value).values()
    return found


BATCHES = [batch(n) for n in (3, 3, 2, 3, 2)]


@pytest.mark.parametrize("kind", CONSTANTS)
def test_constants_are_kept_as_in_eager(kind: str) -> None:
    keep = CONSTANTS[kind]

    def forward(p: Places, m: Function, x: Tensor) -> Tensor:
        row = keep(p, x.shape[1])
        return (x @ m.weight * row).sin() + keep(p, x.shape[1])

    model, places = same(forward, BATCHES, strict=True)
    assert captures(model)
    assert tensors_reached(places) or "lru" in kind
