"""No fake tensor stays where the program can find it, and what it keeps is what eager keeps."""

from __future__ import annotations

import copy
import functools
import gc
import threading
import types
import warnings
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import pytest
import torch
from helpers import Function, assert_same, captures, content, grads_of, leaves, seed_all, total
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

import fxckpt
from fxckpt import CaptureError, FallbackWarning
from fxckpt.escapes import Escapes

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
    eager, _, expected = trained(forward, batches)
    with warnings.catch_warnings():
        if not strict:
            warnings.simplefilter("ignore", FallbackWarning)
        ours, model, places = trained(forward, batches, strict=strict)
    assert_same(eager, ours)
    assert not any(issubclass(type(t), FakeTensor) for t in tensors_reached(places))
    assert contents(places) == contents(expected)
    return model, places


def tensors_reached(root: Any, but: tuple[type, ...] = ()) -> list[Tensor]:
    """All tensors that can be reached from an object, but for functions and modules."""
    found, seen, stack = [], set(), [root]
    while stack:
        value = stack.pop()
        if id(value) in seen or isinstance(value, (type(torch), nn.Module, *but)):
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            found.append(value)
        elif not isinstance(value, types.FunctionType):
            stack += gc.get_referents(value)
        else:
            stack += vars(value).values()
    return found


def contents(places: Places) -> list[Any]:
    """What is kept, in no order; a bounded `lru_cache` may be empty."""
    found = tensors_reached(places, but=(type(places.lru),))
    return sorted((content(t) for t in found), key=repr)


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
    copied = copy.deepcopy(model)  # what was kept is of use to a copy as well
    for m in (model, copied):
        m.zero_grad()
        total(m(batch(4))).backward()
    assert_same(*([(n, content(g)) for n, g in leaves(grads_of(m))] for m in (model, copied)))


def test_what_was_kept_is_a_constant_of_the_next_capture() -> None:
    def forward(p: Places, m: Function, x: Tensor) -> Tensor:
        return x @ m.weight * cached(p.dict, "row", lambda: ones(4))

    model, places = same(forward, BATCHES, strict=True)
    for captured in captures(model):
        kept = [t.source[0][0] for t in captured.tape.primals if t.kind == "constant"]
        assert [id(t) for t in kept] == [id(places.dict["row"])]


def test_eager_finds_what_the_capture_kept() -> None:
    """In evaluation, in another model, and the other way round."""
    places = Places()

    def forward(m: Function, x: Tensor) -> Tensor:
        return x @ m.weight * cached(places.dict, x.shape[0], lambda: ones(4))

    model, other = Function(forward), Function(forward)
    fxckpt.rewrite_(model, "nothing", strict=True)
    model(batch(3)).sum().backward()
    kept = places.dict[3]
    assert type(kept) is Tensor
    assert torch.equal(kept, ones(4))
    total(other(batch(3))).backward()
    other(batch(2))
    model(batch(2)).sum().backward()
    assert places.dict[3] is kept
    assert [*places.dict] == [3, 2]


# --- what changes -------------------------------------------------------------------------------


def closure_variable(p: Places) -> Forward:
    last: Any = None

    def forward(m: Function, x: Tensor) -> Tensor:
        nonlocal last
        y = x @ m.weight + (0 if last is None else last.sum())
        last = y.detach()
        return y

    return forward


def running(owner: Any, value: Tensor) -> Tensor:
    """A statistic that starts as a number, and is assigned anew."""
    before = getattr(owner, "value", None)
    owner.value = 0.5 * (0.0 if before is None else before) + value
    return owner.value


def counted(store: Any, make: Callable[[], Tensor]) -> Tensor:
    if "n" not in store:
        store["n"] = make()
    store["n"] += 1
    return store["n"]


def first_batch(store: Any, x: Tensor) -> Tensor:
    return cached(store, "mean", lambda: x.detach().mean(0))


REFUSED: dict[str, Callable[[Places, Function, Tensor], Tensor]] = {
    "activations in a list": lambda p, m, x: (p.list.append(x @ m.weight), p.list[-1].sin())[1],
    "detached in a list": lambda p, m, x: (
        p.list.append(y := (x @ m.weight)), p.list.append(y.detach()), y.sin()
    )[2],
    "bounded deque": lambda p, m, x: (
        p.deque.append((y := x @ m.weight).detach().sum()), y * sum(p.deque)
    )[1],
    "set": lambda p, m, x: (p.set.add((y := x @ m.weight).detach()), y * len(p.set))[1],
    "input": lambda p, m, x: (p.dict.update(x=x), (x @ m.weight).sin())[1],
    "last in a dictionary": lambda p, m, x: (
        (y := (x @ m.weight)).sum() * len(p.dict), p.dict.update(last=y.detach()), y
    )[2],
    "previous in a dictionary": lambda p, m, x: (
        (y := (x @ m.weight) * p.dict.get("scale", 2.0)),
        p.dict.update(scale=y.detach().abs().mean()),
        y,
    )[2],
    "sum in an object": lambda p, m, x: running(p.object, (x @ m.weight).detach().mean()) * x,
    "sum in slots": lambda p, m, x: running(p.slots, (x @ m.weight).detach().mean()) * x,
    "sum in a class": lambda p, m, x: running(p.cls, (x @ m.weight).mean().detach()) * x,
    "sum in an object, with gradient": lambda p, m, x: (
        setattr(p.cls, "value", 0.0), running(p.cls, (x @ m.weight).mean())
    )[1],
    "first batch": lambda p, m, x: (x @ m.weight) * first_batch(p.dict, x),
    "counter": lambda p, m, x: x @ m.weight * counted(p.dict, lambda: torch.zeros(())),
    "counter in lru_cache": lambda p, m, x: x @ m.weight * p.lru(4).add_(1),
    "random": lambda p, m, x: x @ m.weight * cached(p.dict, "r", lambda: torch.rand(4)),
    "parameter made in forward": lambda p, m, x: x @ cached(
        p.dict, "w", lambda: nn.Parameter(torch.ones(4, 4))
    ),
    "tuple": lambda p, m, x: (p.dict.update(a=(x @ m.weight, 1)), p.dict["a"][0].sin())[1],
    "tuple in an lru_cache": lambda p, m, x: functools_cached(p, m, x),
    "thread local": lambda p, m, x: (
        setattr(p.local, "value", (y := x @ m.weight).detach()), y.sin()
    )[1],
    "context variable": lambda p, m, x: (
        p.context.set(((y := x @ m.weight) * 2).detach()), y * p.context.get()
    )[1],
    "random, every time": lambda p, m, x: (
        p.dict.update(r=torch.rand(4)), x @ m.weight * p.dict["r"]
    )[1],
    "list of constants": lambda p, m, x: (p.list.append(ones(4)), x @ m.weight * sum(p.list))[1],
    "attribute of a real tensor": lambda p, m, x: (
        setattr(cached(p.dict, "t", lambda: ones(4)), "last", (y := x @ m.weight).detach()), y
    )[1],
}  # fmt: skip


def functools_cached(p: Places, m: Function, x: Tensor) -> Tensor:
    """A cache that is keyed by a tensor."""
    if not hasattr(p, "pairs"):
        p.pairs = functools.lru_cache(8)(lambda t: (t * 2, t.sin()))  # type: ignore[attr-defined]
    return p.pairs(x @ m.weight)[1]  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", REFUSED)
def test_what_changes_is_kept_as_in_eager(kind: str) -> None:
    same(REFUSED[kind], BATCHES, strict=False)


def test_closure_variable() -> None:
    results = []
    for rewritten in (False, True):
        seed_all(0)
        model: nn.Module = Function(closure_variable(Places()))
        if rewritten:
            model = fxckpt.rewrite(model, "nothing")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FallbackWarning)
            results.append([("", content(model(x))) for x in BATCHES])
    assert_same(*results)


STATE: dict[str, Any] = {}


def test_global_state_is_as_before_a_capture_that_fails() -> None:
    old = torch.ones(4)
    STATE.update(old=old, list=[1, old], nested={"a": old})

    def forward(m: Function, x: Tensor) -> Tensor:
        y = x @ m.weight
        STATE["old"] = STATE["old"] + y.detach().sum()
        STATE["new"] = (y, [y])
        STATE["list"].append(y)
        STATE["nested"]["a"] = [y]
        STATE["nested"]["b"] = y.sin()
        if fails:
            y.numpy()
        return y

    for fails in (False, True):  # noqa: B007 (forward reads it)
        with pytest.raises(CaptureError):
            fxckpt.rewrite(Function(forward), "nothing", strict=True, example_inputs=(batch(3),))
        assert STATE == {"old": old, "list": [1, old], "nested": {"a": old}}
        assert STATE["old"] is old


def test_message() -> None:
    places = Places()

    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            places.list.append(x.sin())
            return x

    model = nn.Sequential(nn.Linear(4, 4), Inner())
    with pytest.raises(CaptureError, match="keeps a tensor outside of its modules") as caught:
        fxckpt.rewrite(model, "nothing", strict=True, example_inputs=(batch(3),))
    assert caught.value.path == "1"
    assert caught.value.source.startswith("test_escapes.py:")
    assert caught.value.hint
    assert places.list == []


def test_errors_of_the_program_are_not_logged(capfd, caplog) -> None:
    model = Function(lambda m, x: x @ m.weight + torch.ones(3) @ m.weight)
    with pytest.raises(CaptureError, match="forward raised RuntimeError"):
        fxckpt.rewrite(model, "nothing", strict=True, example_inputs=(batch(3),))
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []


# --- backward -----------------------------------------------------------------------------------

GRADIENTS: list[Any] = []
LAST: dict[str, Any] = {}


class Keeps(torch.autograd.Function):
    """A custom function whose backward keeps what it gets."""

    last: Any = None
    calls = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor, how: str) -> Tensor:
        ctx.how, ctx.x = how, x
        return x.sin()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        if ctx.how == "list":
            GRADIENTS.append(grad)
        elif ctx.how == "dictionary":
            LAST["grad"] = grad * 2
        elif ctx.how == "class":
            Keeps.last = [grad]
        elif ctx.how == "count":
            Keeps.calls += 1
        return grad * ctx.x.cos(), None


@pytest.mark.parametrize("how", ["list", "dictionary", "class", "count", "nothing"])
def test_backward_keeps_what_it_keeps_in_eager(how: str) -> None:
    results = []
    for rewritten in (False, True):
        GRADIENTS.clear()
        LAST.clear()
        Keeps.last, Keeps.calls = None, 0
        seed_all(0)
        model: nn.Module = Function(lambda m, x: Keeps.apply(x @ m.weight, how))
        if rewritten:
            model = fxckpt.rewrite(model, "nothing", strict=how == "nothing")
        record: list[Any] = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FallbackWarning)
            for x in BATCHES:
                model.zero_grad()
                total(model(x)).backward()
                record += [("", content(t)) for t in (model.weight.grad, *GRADIENTS)]
                record += [("", content(t)) for t in (*LAST.values(), *(Keeps.last or ()))]
                record.append(("calls", Keeps.calls))
        results.append(record)
    assert_same(*results)
    Keeps.last = None


def test_order_of_a_set_is_no_change() -> None:
    """A set that was larger for a while has its elements in another order."""

    def forward(m: Function, x: Tensor) -> Tensor:
        m.numbers.update(range(100))
        m.numbers.difference_update({*range(100)} - {9, 64})
        return x @ m.weight * len(m.numbers)

    model: nn.Module = Function(forward)
    model.numbers = {9, 64}
    before = [*model.numbers]
    forward(model, BATCHES[0])
    assert [*model.numbers] != before
    model.numbers = {9, 64}
    model = fxckpt.rewrite(model, "nothing", strict=True)
    for x in BATCHES:
        total(model(x)).backward()
    assert captures(model)
    assert model.numbers == {9, 64}


class Nested(nn.Module):
    """Layers in layers, the innermost of which cannot be captured."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.inner = Nested(depth - 1) if depth else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x).tanh()
        if self.inner is None:
            return x if x.sum() > 0 else -x
        return self.inner(x * 2)


def test_a_failed_capture_leaves_nothing_to_be_searched_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each search goes through all objects of the process."""
    searches = []
    search = Escapes._referrers
    monkeypatch.setattr(Escapes, "_referrers", lambda *a: searches.append(1) or search(*a))
    with pytest.warns(FallbackWarning, match="floating-point data"):
        fxckpt.rewrite(Nested(3), "nothing")(torch.randn(2, 4)).sum().backward()
    assert not searches
