"""Objects among the arguments: what forward puts into them is what eager puts there."""

from __future__ import annotations

import copy
import dataclasses
import gc
import types
import warnings
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import Function, assert_same, assert_same_training, captures, total, train
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache

import fxckpt
from fxckpt import CaptureError, FallbackWarning

REFUSED = "forward changes an object that was passed as an argument"
Fill = Callable[[Function, Tensor, Any], Any]


class Rows(list):
    """A list of a class of its own, with an attribute."""

    scale = 1.0


class Named(dict):
    """A dictionary of a class of its own."""


class Slotted:
    """An object without a dictionary."""

    __slots__ = ("count", "value")

    def __init__(self, value: Any = None) -> None:
        self.value, self.count = value, 0


@dataclasses.dataclass
class Statistics:
    """What a program collects."""

    mean: Tensor | None = None
    seen: list[Any] = dataclasses.field(default_factory=list)


def contents(held: Any) -> Any:
    """What can be seen of an object, by class and in order."""
    if isinstance(held, (Tensor, int, float, str, type(None))):
        return held
    if isinstance(held, dict):
        inner: Any = [(k, contents(v)) for k, v in held.items()]
    elif isinstance(held, (list, tuple, deque)):
        inner = [contents(v) for v in held]
    else:
        slots = [(n, getattr(held, n)) for n in getattr(type(held), "__slots__", ())]
        inner = [(k, contents(v)) for k, v in [*getattr(held, "__dict__", {}).items(), *slots]]
    return (type(held).__name__, inner, contents(vars(held)) if isinstance(held, Rows) else ())


def hidden(m: Function, x: Tensor) -> Tensor:
    return torch.tanh(x @ m.weight)


def step_with(make: Callable[[Tensor], Any]) -> Callable[[nn.Module, int], Any]:
    """A training step of a model of (x, held), with a loss of all that is in both."""

    def step(model: nn.Module, number: int) -> tuple[list[Tensor], Any, Tensor]:
        x = torch.randn(3, 4, generator=torch.Generator().manual_seed(number))
        held = make(x)
        result = model(x, held)
        seen = contents(held)
        return [x], (result, seen), total((result, seen))

    return step


def assert_same_contents(
    fill: Fill, make: Callable[[Tensor], Any], *, strict: bool = True, **options: Any
) -> nn.Module:
    """Trains eagerly and rewritten, and asserts that the objects passed are filled alike."""

    def model() -> Function:
        torch.manual_seed(0)
        return Function(fill)

    eager = train(model(), step_with(make))
    ours = fxckpt.rewrite(model(), "nothing", strict=strict, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_same(eager, train(ours, step_with(make)))
    assert bool(captures(ours)) is strict
    return ours


# --- what is put into which object ---------------------------------------------------------------


def appends(m: Function, x: Tensor, held: Any) -> Tensor:
    h = hidden(m, x)
    held.append(h)
    held.append({"detached": h.detach(), "number": len(held)})
    return h.exp() @ m.weight


def inserts(m: Function, x: Tensor, held: Any) -> Tensor:
    h = hidden(m, x)
    held.insert(0, h.exp())
    del held[-1]
    return h


def assigns(m: Function, x: Tensor, held: Any) -> Tensor:
    h = hidden(m, x)
    held["old"], held["new"] = held.pop("first"), h.sum(0)
    return h.exp()


def sets(m: Function, x: Tensor, held: Any) -> Tensor:
    h = hidden(m, x)
    held.value, held.count = h * 2, held.count + 1
    return h.exp()


def nests(m: Function, x: Tensor, held: Any) -> Tensor:
    h = hidden(m, x)
    held.append(Statistics(h.mean(), [Statistics(), ("layer", h.exp())]))
    held.append(types.SimpleNamespace(part=h.sum(1)))
    return h


def deletes(m: Function, x: Tensor, held: Any) -> Tensor:
    h = hidden(m, x)
    del held.count
    held.extra = h
    return h.exp()


CHANGES: dict[str, tuple[Fill, Callable[[Tensor], Any]]] = {
    "list": (appends, lambda x: []),
    "list with tensors": (inserts, lambda x: [x * 2, x * 3]),
    "subclass of list": (appends, lambda x: Rows([x * 2])),
    "deque": (appends, lambda x: deque([x, x * 2], maxlen=3)),
    "dict": (assigns, lambda x: {"first": x * 2, "last": 3}),
    "ordered": (assigns, lambda x: OrderedDict(first=x * 2, last=3)),
    "default": (assigns, lambda x: defaultdict(list, first=x * 2)),
    "subclass of dict": (assigns, lambda x: Named(first=x * 2)),
    "object": (sets, lambda x: types.SimpleNamespace(count=3, value=None)),
    "slots": (sets, lambda x: Slotted(x)),
    "deleted": (deletes, lambda x: types.SimpleNamespace(count=3, value=x)),
    "new objects": (nests, lambda x: []),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_forward_puts_into_an_object_is_what_eager_puts_there(name: str) -> None:
    model = assert_same_contents(*CHANGES[name])
    assert len(captures(model)) == 1


def test_what_stays_in_an_object_stays_the_same_object() -> None:
    inner, first = {"a": 1}, torch.ones(4)
    held = [inner, first, Statistics, (1, inner)]

    def fill(m: Function, x: Tensor, held: Any) -> Any:
        held.append(hidden(m, x))
        return held, held[0]

    model = fxckpt.rewrite(Function(fill), "nothing", strict=True)
    for number in range(3):
        passed = [*held]
        result, item = model(torch.randn(3, 4), passed)
        assert result is passed, number
        assert item is inner, number
        assert all(a is b for a, b in zip(passed, held, strict=False)), number
        assert len(passed) == 5, number


def test_new_objects_are_others_at_each_call() -> None:
    model = fxckpt.rewrite(Function(nests), "nothing", strict=True)
    found = []
    for _ in range(3):
        held: list[Any] = []
        model(torch.randn(3, 4), held)
        found += [held[0], held[0].seen, held[0].seen[0], held[1]]
    assert len({*map(id, found)}) == 12


def test_an_object_may_be_filled_by_one_call_after_the_other() -> None:

    def step(model: nn.Module, number: int) -> tuple[list[Tensor], Any, Tensor]:
        x = torch.randn(3, 4, generator=torch.Generator().manual_seed(number))
        held: list[Any] = []
        results = [model(x, held), model(x * 2, held)]
        return [x], (results, contents(held)), total((results, contents(held)))

    torch.manual_seed(0)
    plain = Function(appends)
    assert_same(train(plain, step), train(fxckpt.rewrite(plain, "nothing", strict=True), step))


def test_layers_fill_caches() -> None:
    """As in transformers, where each layer is captured alone because layers are dropped."""

    class Layer(nn.Module):
        def __init__(self, index: int) -> None:
            super().__init__()
            self.index, self.key, self.value = index, nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor, cache: Any) -> Tensor:
            k, v = (p(x).view(2, -1, 2, 2).transpose(1, 2) for p in (self.key, self.value))
            k, v = cache.self_attention_cache.update(k, v, self.index)
            cache.is_updated[self.index] = True
            return x + torch.tanh(k * v).transpose(1, 2).reshape(x.shape)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(map(Layer, range(3)))

        def forward(self, x: Tensor) -> Any:
            cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
            for layer in self.layers:
                if torch.rand(()) >= 0.0 + x.shape[1] * 0.01:
                    x = layer(x, cache)
            kept = [(layer.keys, layer.values) for layer in cache.self_attention_cache.layers]
            return x, kept, [*cache.is_updated]

    def step(model: nn.Module, number: int) -> tuple[list[Tensor], Any, Tensor]:
        x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(number))
        result = model(x)
        return [x], result, total(result)

    plain = Model()
    lean = copy.deepcopy(plain)
    with pytest.warns(FallbackWarning, match=r"3 of its parts \(layers\.\*\).*random draw"):
        ours = train(fxckpt.rewrite(lean, "nothing"), step, steps=6)
    assert_same(train(plain, step, steps=6), ours)


def test_a_second_derivative_goes_through_what_was_put_into_a_list() -> None:
    def run(model: nn.Module) -> list[Tensor]:
        x, held = torch.linspace(-1, 1, 12).view(3, 4).requires_grad_(), []
        model(x, held)
        (slope,) = torch.autograd.grad(held[0].square().sum(), x, create_graph=True)
        slope.square().sum().backward()
        return [x.grad]

    plain = Function(appends)
    torch.testing.assert_close(run(plain), run(fxckpt.rewrite(plain, "nothing", strict=True)))


def test_a_second_derivative_goes_through_an_assigned_attribute() -> None:
    def assign(m: Function, x: Tensor) -> Tensor:
        m.latest = hidden(m, x)
        return m.latest.exp()

    def run(model: Any) -> list[Tensor]:
        x = torch.linspace(-1, 1, 12).view(3, 4).requires_grad_()
        model(x)
        (slope,) = torch.autograd.grad(model.latest.square().sum(), x, create_graph=True)
        slope.square().sum().backward()
        return [x.grad]

    plain = Function(assign)
    expected = run(plain)
    del plain.latest
    torch.testing.assert_close(expected, run(fxckpt.rewrite(plain, "nothing", strict=True)))


def test_verify_gives_each_run_objects_of_its_own() -> None:
    for held in ([], types.SimpleNamespace(value=None, count=0)):
        fill = appends if held == [] else sets
        fxckpt.verify(Function(fill), torch.randn(3, 4), held, policy="nothing")
    assert held.count == 0


# --- what is refused -----------------------------------------------------------------------------


def test_an_object_that_is_passed_twice_is_refused_only_where_it_is() -> None:
    def fill(m: Function, x: Tensor, held: Any) -> Tensor:
        first, second = held
        first.append(hidden(m, x))
        return m.weight * len(second)

    def shared(_: Tensor) -> Any:
        return [[]] * 2

    assert_same_contents(fill, lambda _: ([], []))
    assert_same_contents(fill, shared, strict=False)
    torch.manual_seed(0)
    plain = Function(fill)
    model = fxckpt.rewrite(plain, "nothing", strict=True)
    train(model, step_with(lambda _: ([], [])))
    with pytest.raises(CaptureError, match=REFUSED):
        train(model, step_with(shared))


def holds(m: Function, x: Tensor, held: Any) -> Tensor:
    held.append(hidden(m, x))
    return m.weight * len(m.held)


COLLECTED: list[Any] = []


def reads_global(m: Function, x: Tensor, held: Any) -> Tensor:
    held.append(hidden(m, x))
    return m.weight * len(COLLECTED)


def test_an_object_that_forward_reaches_in_another_way_is_refused() -> None:
    model = Function(holds)
    model.held = []  # type: ignore[assignment]
    for each, held in ((model, model.held), (Function(reads_global), COLLECTED)):
        with pytest.raises(CaptureError, match=REFUSED):
            fxckpt.rewrite(each, "nothing", strict=True)(torch.randn(3, 4), held)
        assert held == []


def shares(m: Function, x: Tensor, held: Any) -> Tensor:
    new = [hidden(m, x)]
    held["a"], held["b"] = new, new
    return m.weight


def views(m: Function, x: Tensor, held: Any) -> Tensor:
    h = hidden(m, x)
    held["a"] = h.t()
    return h.exp()


@pytest.mark.parametrize(("fill", "why"), [(shares, REFUSED), (views, "forward puts a view into")])
def test_what_no_run_could_do_likewise_is_refused(fill: Fill, why: str) -> None:
    with pytest.raises(CaptureError, match=why):
        fxckpt.rewrite(Function(fill), "nothing", strict=True)(torch.randn(3, 4), {})
    assert_same_contents(fill, lambda _: {}, strict=False)


def test_what_capture_did_to_an_object_that_has_no_copy_is_undone() -> None:
    def fill(m: Function, x: Tensor, held: Any) -> Tensor:
        held.add(len(held))
        return hidden(m, x)

    held: set[int] = set()
    with pytest.warns(FallbackWarning, match=REFUSED):
        fxckpt.rewrite(Function(fill), "nothing")(torch.randn(3, 4), held)
    assert held == {0}


def scaled(x: Tensor) -> Tensor:
    return x * 2


CALLS = [0]


def test_globals_beside_a_function_that_is_passed_are_watched() -> None:
    """Also if the function is defined where the counter is."""

    def fill(m: Function, x: Tensor, function: Any) -> Tensor:
        CALLS[0] += 1
        return function(hidden(m, x))

    model = fxckpt.rewrite(Function(fill), "nothing")
    before = CALLS[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(4):
            model(torch.randn(3, 4), scaled)
    assert CALLS[0] == before + 4


def test_an_object_of_a_class_that_cannot_be_copied_is_refused() -> None:
    class Odd(Exception):
        value: Any = None

    odd = Odd()
    odd.value = torch.randn(3, 4)
    model = fxckpt.rewrite(Function(lambda m, o: o.value @ m.weight), "nothing", strict=True)
    with pytest.raises(CaptureError, match="an argument or result of type Odd cannot be copied"):
        model(odd)


# --- what is only read ---------------------------------------------------------------------------

READ: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "subclass of list": (lambda x: Rows([x]), lambda held: held[0]),
    "subclass of dict": (lambda x: Named(x=x), lambda held: held["x"]),
    "subclass of tuple": (lambda x: type("Pair", (tuple,), {})((x, 2)), lambda held: held[0]),
    "slots": (Slotted, lambda held: held.value),
}


@pytest.mark.parametrize("name", READ)
def test_tensors_in_an_object_are_those_of_the_call(name: str) -> None:
    make, read = READ[name]
    model = assert_same_training(
        lambda: Function(lambda m, held: (read(held) @ m.weight).exp()),
        lambda _: (make(torch.randn(3, 4)),),
    )
    if name != "subclass of tuple":  # another class at each call
        assert len(captures(model)) == 1


def test_what_was_captured_keeps_no_object_of_the_call() -> None:
    model = fxckpt.rewrite(Function(lambda m, held: held.value @ m.weight), "nothing")
    held = Slotted(torch.randn(3, 4))
    value = weakref.ref(held.value)
    model(held).sum().backward()
    del held
    gc.collect()
    assert value() is None
