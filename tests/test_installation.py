"""A rewritten module in the hands of Python and of torch: classes, copies, wrappers, exceptions.

Extends `test_module.py`: there one ordinary class, here all the unusual ones.
"""

import abc
import contextlib
import copy
import dataclasses
import functools
import inspect
import io
import pickle
import traceback
import types
import typing
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    Function,
    assert_same,
    assert_same_training,
    captures,
    chain,
    content,
    leaves,
    seed_all,
    total,
)
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import fxckpt
from fxckpt import CaptureError, FallbackWarning, FxckptError

T = TypeVar("T")


def x(rows: int = 3) -> Tensor:
    return torch.linspace(-1, 1, 4 * rows).view(rows, 4).cos()


def batch(number: int) -> tuple[Tensor]:
    return (torch.randn(3, 4),)


class Net(nn.Module):
    """A layer and a normalisation, with state of all kinds."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(width, width), nn.BatchNorm1d(width)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        """Doc of forward."""
        return self.norm(self.layer(x)).tanh() * scale


def both(
    make: Callable[[], nn.Module],
    use: Callable[[nn.Module], Any],
    rewrite: Callable[..., nn.Module] = fxckpt.rewrite,
    **options: Any,
) -> nn.Module:
    """Asserts that `use(model)` returns the same bits eager and rewritten; returns the latter."""
    records = []
    for rewritten in (False, True):
        seed_all(0)
        model = make()
        if rewritten:
            model = rewrite(model, "nothing", **{"strict": True, **options})
        seed_all(1)
        found = use(model)
        record = [(n, content(t) if isinstance(t, Tensor) else repr(t)) for n, t in leaves(found)]
        records.append([*record, ("random state", content(torch.get_rng_state()))])
    assert_same(*records)
    return model


def step(model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """One training step's result, gradients and buffers; leaves no gradients."""
    out = model(*(args or (x(),)), **kwargs)
    total(out).backward()
    found = {
        "out": out,
        "grads": {n: p.grad for n, p in model.named_parameters()},
        "buffers": {n: b.clone() for n, b in model.named_buffers()},
    }
    model.zero_grad()
    return found


def steps(model: nn.Module, count: int = 3) -> list[Any]:
    """Some training steps, with an update by hand after each."""
    found = []
    for number in range(count):
        found.append(step(model, x(3 + number)))
        with torch.no_grad():
            for p, g in zip(model.parameters(), found[-1]["grads"].values(), strict=True):
                if g is not None:
                    p.sub_(g, alpha=0.1)
    return found


# --- unusual classes ------------------------------------------------------------------------------


class Tracing(type):
    """A metaclass that wants an argument, and works on each instance."""

    def __new__(mcs, name: str, bases: Any, namespace: Any, *, tag: str) -> Any:
        return super().__new__(mcs, name, bases, namespace)

    def __init__(cls, name: str, bases: Any, namespace: Any, *, tag: str) -> None:
        super().__init__(name, bases, namespace)
        cls.tag = tag

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        instance = super().__call__(*args, **kwargs)
        instance.tagged = cls.tag
        return instance


class WithMetaclass(Net, metaclass=Tracing, tag="meta"):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * len(self.tagged)


class Registered(Net):
    known: typing.ClassVar[list[str]] = []

    def __init_subclass__(cls, *, name: str, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        assert name not in cls.known, "registered twice"
        cls.known.append(name)
        cls.name = name


class InRegistry(Registered, name="in registry"):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * len(self.name)


class Abstract(Net, abc.ABC):
    @abc.abstractmethod
    def factor(self) -> float: ...

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.factor()


class Concrete(Abstract):
    def factor(self) -> float:
        return 3.0


class OfType(Net, Generic[T]):
    def forward(self, x: Tensor, scale: float = 2.0) -> Tensor:
        return super().forward(x, scale)


class WithSlots(Net):
    __slots__ = ("factor", "never_set")

    def __init__(self) -> None:
        super().__init__()
        self.factor = 2.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.factor


class WithCall(Net):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs) * 2


class WithGetattr(Net):
    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.bias


class WithSetattr(Net):
    def __setattr__(self, name: str, value: Any) -> None:
        assert "fxckpt" not in name
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        assert "fxckpt" not in name
        super().__delattr__(name)


class WithNew(Net):
    def __new__(cls, *args: Any) -> Any:
        new = super().__new__(cls)
        new.__dict__["born"] = 2.0
        return new

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.born


class Empty(Net):
    """False, as an empty container is, and equal to everything."""

    def __len__(self) -> int:
        return 0

    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 1


@dataclasses.dataclass(eq=False)
class Data(nn.Module):
    width: int = 4

    def __post_init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(self.width, self.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.width


class Before:
    """A mixin whose forward stands in front of that of the next class."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).sin()


class Mixed(Before, Net):
    pass


def doubled(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(forward)
    def wrapper(*args: Any, **kwargs: Any) -> Tensor:
        return forward(*args, **kwargs) * 2

    return wrapper


class Decorated(Net):
    @doubled
    def forward(self, x: Tensor, *, shift: float = 1.0) -> Tensor:
        return super().forward(x) + shift


class Autocast(Net):
    @torch.autocast("cpu", torch.bfloat16)
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class OfPartialMethod(Net):
    def run(self, scale: float, x: Tensor) -> Tensor:
        return super().forward(x, scale)

    forward = functools.partialmethod(run, 3.0)


class Static(Net):
    @staticmethod
    def forward(x: Tensor, weight: Tensor | None = None) -> Tensor:
        return (x if weight is None else x @ weight).sin()


class OfClass(Net):
    scale = 2.0

    @classmethod
    def forward(cls, x: Tensor, weight: Tensor | None = None) -> Tensor:
        return (x if weight is None else x @ weight) * cls.scale


class OfPartial(Net):
    forward = functools.partial(F.linear, bias=None)


class Builtin(Net):
    forward = torch.matmul


class Function_:
    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        return (x @ weight).tanh()


class OfObject(Net):
    forward = Function_()


class Borrowed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    forward = Net.forward


CLASSES: dict[str, Callable[[], nn.Module]] = {
    c.__name__: c
    for c in (
        WithMetaclass,
        InRegistry,
        Concrete,
        OfType,
        WithSlots,
        WithCall,
        WithGetattr,
        WithSetattr,
        WithNew,
        Empty,
        Data,
        Mixed,
        Decorated,
        Autocast,
        OfPartialMethod,
        Borrowed,
    )
}
CLASSES["OfType[int]"] = OfType[int]
WITHOUT_SELF = {c.__name__: c for c in (Static, OfClass, OfPartial, Builtin, OfObject)}


@pytest.mark.parametrize("rewrite", [fxckpt.rewrite, fxckpt.rewrite_])
@pytest.mark.parametrize("name", CLASSES)
def test_unusual_class_trains_as_in_eager(name: str, rewrite) -> None:
    assert_same_training(
        CLASSES[name],
        batch,
        rewrite=functools.partial(rewrite, strict=True),
    )


@pytest.mark.parametrize("name", WITHOUT_SELF)
def test_forward_that_takes_no_self(name: str) -> None:
    """Its second argument is where gradients go."""

    def use(model: nn.Module) -> Any:
        seen = []
        for rows in (3, 3, 5):
            weight = torch.eye(4).requires_grad_()
            total(model(x(rows), weight)).backward()
            seen.append(weight.grad)
        return seen

    assert captures(both(WITHOUT_SELF[name], use))


@pytest.mark.parametrize("name", [*CLASSES, *WITHOUT_SELF])
def test_unusual_class_looks_like_itself(name: str) -> None:
    model = {**CLASSES, **WITHOUT_SELF}[name]()
    new = fxckpt.rewrite(model, "nothing")
    cls = type(model)
    assert isinstance(new, cls)
    assert issubclass(type(new), cls)
    for attribute in ("__name__", "__qualname__", "__module__", "__doc__"):
        assert getattr(type(new), attribute) == getattr(cls, attribute)
        if inspect.isfunction(inspect.getattr_static(cls, "forward")):
            assert getattr(new.forward, attribute) == getattr(model.forward, attribute)
    assert repr(new) == repr(model)
    with contextlib.suppress(ValueError):  # some builtins have none
        assert inspect.signature(new.forward) == inspect.signature(model.forward)
    assert bool(new) == bool(model)
    assert sorted(set(vars(new)) - set(vars(model))) == ["_fxckpt_unit"]


@pytest.mark.parametrize("name", CLASSES)
def test_restored_unusual_class(name: str) -> None:
    seed_all(0)
    model = CLASSES[name]()
    cls, before = type(model), dict(vars(model))
    fxckpt.rewrite_(model, "nothing", strict=True)
    model(x())
    fxckpt.restore_(model)
    assert type(model) is cls
    assert vars(model) == before
    for slot in getattr(cls, "__slots__", ()):
        assert hasattr(model, slot) == (slot != "never_set")


def test_registries_do_not_hear_of_us() -> None:
    before = list(Registered.known)
    fxckpt.rewrite(InRegistry(), "nothing")
    assert Registered.known == before


def test_generic_class_stays_generic() -> None:
    new = fxckpt.rewrite(OfType[int](), "nothing")
    assert new.__orig_class__ == OfType[int]
    assert type(new)[int] is not None
    assert typing.get_type_hints(new.forward)["x"] is Tensor


def test_one_class_for_all_instances() -> None:
    """So that `type(a) is type(b)`, and classes do not accumulate."""
    first, second = (fxckpt.rewrite(Net(), "nothing") for _ in range(2))
    assert type(first) is type(second) is not Net


def test_class_of_a_rewritten_module_makes_plain_modules() -> None:
    """`type(model)(config)`, `model.from_pretrained(path)`."""
    model = fxckpt.rewrite(Net(), "nothing", strict=True)
    step(model)

    def use(other: nn.Module) -> Any:
        other.load_state_dict(model.state_dict())
        return step(other), other.eval()(x())

    both(type(model), use)
    fresh = type(model)()
    assert isinstance(fresh, Net)
    assert not fxckpt.is_rewritten(fresh)
    assert type(pickled(fresh)) is Net
    for twin in (copy.copy(fresh), copy.deepcopy(fresh)):
        step(twin)
        assert not fxckpt.is_rewritten(twin)
    with pytest.raises(FxckptError, match="not rewritten"):
        fxckpt.restore_(fresh)


def test_subclass_of_the_class_of_a_rewritten_module() -> None:
    base = type(fxckpt.rewrite(Net(), "nothing"))

    class Derived(base):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).sin()

    assert_same_training(Derived, batch)
    assert not fxckpt.is_rewritten(Derived())


def test_forward_set_on_the_class_later_is_not_ours_to_hide() -> None:
    """A class that is patched before the first call runs what it was patched with."""

    class Patched(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    def use(model: nn.Module) -> Any:
        Patched.forward = lambda self, x: Net.forward(self, x).exp()
        return step(model)

    before = Patched.forward

    def make() -> nn.Module:
        Patched.forward = before
        return Patched()

    both(make, use)


INSTANCE_FORWARDS: dict[str, Callable[[nn.Module], Any]] = {
    "lambda": lambda m: lambda x: Net.forward(m, x, 2.0),
    "partial": lambda m: functools.partial(m.forward, scale=2.0),
    "method": lambda m: types.MethodType(lambda self, x: Net.forward(self, x, 2.0), m),
    "wrapped": lambda m: doubled(m.forward),
    "autocast": lambda m: torch.autocast("cpu", torch.bfloat16)(m.forward),
    "module": lambda m: nn.Sequential(m.layer, nn.Tanh()),
}


def _net_with(kind: str) -> nn.Module:
    model = Net()
    forward = INSTANCE_FORWARDS[kind](model)
    if isinstance(forward, nn.Module):  # registered as a submodule, which is found too late
        return nn.Sequential(forward)
    model.forward = forward
    return model


@pytest.mark.parametrize("kind", INSTANCE_FORWARDS)
def test_forward_of_the_instance(kind: str) -> None:
    """As accelerate, peft and others set it."""
    model = both(lambda: _net_with(kind), steps, fxckpt.rewrite_)
    assert captures(model)
    before = dict(vars(fxckpt.restore_(copy.copy(model))))
    fxckpt.restore_(model)
    assert vars(model).keys() == before.keys()
    step(model)


def test_forward_of_the_instance_set_after_rewriting_wins() -> None:
    """As in eager: what is assigned is what runs."""

    def use(model: nn.Module) -> Any:
        first, inner = step(model), model.forward
        model.forward = lambda x: inner(x).exp()
        second = step(model)
        del model.forward
        return first, second, step(model)

    assert captures(both(Net, use, fxckpt.rewrite_))


# --- attributes -----------------------------------------------------------------------------------


def test_members_are_set_and_deleted_as_ever() -> None:
    def use(model: nn.Module) -> Any:
        seen = [step(model)]
        model.register_module("extra", nn.Linear(4, 2))
        seen.append(step(model))
        model.add_module("extra", nn.Linear(4, 4))
        seen.append(step(model))
        del model.extra
        model.register_buffer("offset", torch.ones(4))
        seen.append(step(model))
        del model.offset
        model.register_parameter("gain", None)
        seen.append(step(model))
        model.gain = nn.Parameter(torch.ones(4))
        seen.append(step(model))
        model.gain = None
        del model.gain
        model[0].bias = None
        seen.append(step(model))
        del model[1]
        seen.append(step(model))
        return seen, [n for n, _ in model.named_modules()], list(model.state_dict())

    both(lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh()), use)


def test_missing_attributes_are_missing() -> None:
    def use(model: nn.Module) -> Any:
        texts = []
        for look in (
            lambda: model.nothing,
            lambda: delattr(model, "nothing"),
            lambda: model.get_submodule("layer.nothing"),
            lambda: model.get_parameter("layer.nothing"),
            lambda: model.register_buffer("layer", None),
            lambda: setattr(model, "layer", 3),
        ):
            with pytest.raises((AttributeError, KeyError, TypeError)) as caught:
                look()
            texts.append((caught.type, str(caught.value)))
        return texts, step(model)

    both(Net, use)


class Settings:
    """A plain object, as configurations are."""

    def __init__(self, **values: Any) -> None:
        vars(self).update(values)


SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], float], Callable[[Any], None]]] = {
    "dict": (lambda: {"a": 2.0}, lambda s: s["a"], lambda s: s.update(a=3.0)),
    "list": (lambda: [2.0], lambda s: s[0], lambda s: s.append(s.pop() + 1)),
    "set": (lambda: {2.0}, lambda s: max(s), lambda s: s.add(s.pop() + 1)),
    "object": (lambda: Settings(a=2.0), lambda s: s.a, lambda s: setattr(s, "a", 3.0)),
    "nested": (lambda: {"b": [2.0, 3.0]}, lambda s: s["b"][0], lambda s: s["b"].reverse()),
    "inner": (lambda: {"b": [2.0]}, lambda s: s["b"][0], lambda s: s.update(b=[3.0])),
    "deep": (
        lambda: Settings(a=[{"b": 2.0}]),
        lambda s: s.a[0]["b"],
        lambda s: s.a[0].update(b=3.0),
    ),
}


@pytest.mark.parametrize("set_", ["before", "after rewriting", "after a call", "in its place"])
@pytest.mark.parametrize("kind", SETTINGS)
def test_settings_changed_in_place(kind: str, set_: str) -> None:
    """Wherever a container comes from, and whenever: what is in it is looked at anew."""
    make, read, change = SETTINGS[kind]

    def forward(m: Function, x: Tensor) -> Tensor:
        return x @ m.weight * (read(m.settings) if hasattr(m, "settings") else 1)

    def build() -> nn.Module:
        model = Function(forward)
        if set_ in ("before", "in its place"):
            model.settings = make()
        return model

    def use(model: nn.Module) -> Any:
        seen = [step(model)] if set_ in ("after a call", "in its place") else []
        if set_ != "before":
            model.settings = make()
        seen.append(step(model))
        change(model.settings)
        seen.append(step(model))
        if kind == "inner":
            model.settings["b"][0] = 5.0
        return seen, step(model)

    both(build, use, fxckpt.rewrite_)


def test_conversions() -> None:
    def use(model: nn.Module) -> Any:
        seen = [step(model)]
        model.to(torch.float64)
        seen.append(step(model, x().double()))
        model.bfloat16()
        seen.append(step(model, x().bfloat16()))
        model.float().requires_grad_(False)
        model.layer.requires_grad_(True)
        seen.append(step(model))
        model.requires_grad_(True).to(memory_format=torch.channels_last)
        seen.append(step(model))
        model.apply(lambda m: m.reset_parameters() if hasattr(m, "reset_parameters") else None)
        seen.append(step(model))
        model.share_memory()
        seen.append(step(model))
        return seen

    both(Net, use)


@pytest.mark.parametrize("option", ["overwrite", "swap"])
def test_conversions_that_replace_parameters(option: str) -> None:
    setter = getattr(torch.__future__, f"set_{option}_module_params_on_conversion")

    def use(model: nn.Module) -> Any:
        seen = [step(model)]
        setter(True)
        try:
            seen.append(step(model.double(), x().double()))
            model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()})
            seen.append(step(model, x().double()))
            return seen, step(model.float())
        finally:
            setter(False)

    both(Net, use)


def test_load_state_dict_by_assignment() -> None:
    def use(model: nn.Module) -> Any:
        seen = [step(model)]
        model.load_state_dict(
            {k: v.clone() * 2 for k, v in model.state_dict().items()}, assign=True
        )
        return seen, step(model)

    both(lambda: chain(2, 4), use)


def test_from_the_meta_device() -> None:
    def make() -> nn.Module:
        with torch.device("meta"):
            return Net()

    def use(model: nn.Module) -> Any:
        model.to_empty(device="cpu")
        for m in (model.layer, model.norm):
            m.reset_parameters()
        return steps(model)

    assert captures(both(make, use))
    new = fxckpt.rewrite(make(), "nothing", strict=True)
    with pytest.raises(CaptureError, match="meta device"):
        new(x())


def test_state_dict_hooks_and_strictness() -> None:
    model = fxckpt.rewrite(Net(), "nothing", strict=True)
    step(model)
    assert set(model.state_dict()) == set(Net().state_dict())
    model.load_state_dict(Net().state_dict(), strict=True)
    Net().load_state_dict(model.state_dict(), strict=True)
    with pytest.raises(RuntimeError, match=r"Missing key.*layer\.bias"):
        model.load_state_dict({k: v for k, v in model.state_dict().items() if k != "layer.bias"})
    extra = {**model.state_dict(), "other": torch.ones(1)}
    assert model.load_state_dict(extra, strict=False).unexpected_keys == ["other"]
    outer = nn.ModuleDict({"inner": model})
    assert all(k.startswith("inner.") for k in outer.state_dict())


# --- copies ---------------------------------------------------------------------------------------


class WithReduce(Net):
    def __reduce__(self) -> Any:
        return WithReduce.again, (self.state_dict(),)

    @staticmethod
    def again(state: dict[str, Tensor]) -> "WithReduce":
        new = WithReduce()
        new.load_state_dict(state)
        new.made_by = "reduce"
        return new


class WithReduceEx(Net):
    def __reduce_ex__(self, protocol: Any) -> Any:
        function, args, state, *rest = super().__reduce_ex__(protocol)
        return function, args, {**state, "made_by": "reduce_ex"}, *rest


class WithState(Net):
    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "names": sorted(self.__dict__)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.made_by = f"setstate of {len(state['names'])}"


class WithDeepcopy(Net):
    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        new = type(self)()
        new.load_state_dict(self.state_dict())
        new.made_by = "deepcopy"
        return new


class WithCopy(Net):
    def __copy__(self) -> Any:
        new = type(self)()
        new.load_state_dict(self.state_dict())
        new.made_by = "copy"
        return new


class WithNewArguments(Net):
    def __new__(cls, width: int = 4) -> Any:
        new = super().__new__(cls)
        new.__dict__["born"] = width
        return new

    def __getnewargs__(self) -> tuple[int]:
        return (7,)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "born"}


class Child(nn.Module):
    def __init__(self, parent: nn.Module) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.above = [parent]  # a list, lest it be registered

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * (2 if self.above[0].training else 3)


class Parent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.child = Child(self)
        self.helpers = {"run": self.run}

    def run(self, x: Tensor) -> Tensor:
        return self.child(x).tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.helpers["run"](x)


class Alone(Net):
    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self


COPIED = {
    c.__name__: c
    for c in (
        Net,
        WithReduce,
        WithReduceEx,
        WithState,
        WithDeepcopy,
        WithCopy,
        WithNewArguments,
        WithMetaclass,
        InRegistry,
        OfType,
        WithGetattr,
        Data,
        Parent,
        Decorated,
    )
}


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickled, saved])
@pytest.mark.parametrize("name", COPIED)
def test_copies_are_made_as_the_class_wants(name: str, duplicate) -> None:
    """What the copy is and shares, how it trains, and that the original is untouched by it."""

    def use(model: nn.Module) -> Any:
        step(model)
        state = {k: v.clone() for k, v in model.state_dict().items()}
        twin = duplicate(model)
        own = {"_fxckpt_unit", "_fxckpt_forward"}
        facts = [
            sorted(set(vars(twin)) - own),
            [(k, v) for k, v in vars(twin).items() if isinstance(v, (str, int, float))],
            [
                a is b
                for a, b in zip(
                    (*model.parameters(), *model.buffers()),
                    (*twin.parameters(), *twin.buffers()),
                    strict=True,
                )
            ],
            step(twin),
        ]
        with torch.no_grad():
            for p in twin.parameters():
                p.mul_(2)
        changed = [not torch.equal(state[k], v) for k, v in model.state_dict().items()]
        return facts, changed, step(twin), step(model)

    def use_and_look(model: nn.Module) -> Any:
        found = use(model)
        if not fxckpt.is_rewritten(model):
            return found
        with torch.random.fork_rng(devices=[]):
            twin = duplicate(model)
            assert fxckpt.is_rewritten(twin) == (duplicate in (copy.copy, copy.deepcopy))
            assert isinstance(twin, COPIED[name])
            if fxckpt.is_rewritten(twin):
                step(twin)
                assert captures(twin)
                assert {id(c) for c in captures(twin)}.isdisjoint(map(id, captures(model)))
                fxckpt.restore_(twin)
            assert type(twin) is COPIED[name]
        return found

    both(COPIED[name], use_and_look, fxckpt.rewrite_)


def test_deepcopy_that_returns_itself() -> None:
    model = fxckpt.rewrite_(Alone(), "nothing", strict=True)
    assert copy.deepcopy(model) is model
    assert fxckpt.is_rewritten(model)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
def test_copy_refers_to_itself_where_the_original_does(duplicate) -> None:
    model = fxckpt.rewrite_(Parent(), "nothing", strict=True)
    step(model)
    twin = duplicate(model)
    assert twin.child.above[0] is twin
    assert twin.helpers["run"].__self__ is twin
    step(twin)
    twin.eval()
    assert twin.child.above[0].training is False
    assert model.child.above[0].training is True


def test_deepcopy_of_a_method_on_the_instance() -> None:
    """accelerate binds forward to the module, and its copies have to be bound to themselves."""
    model = _net_with("method")
    fxckpt.rewrite_(model, "nothing", strict=True)
    step(model)
    twin = copy.deepcopy(model)
    total(twin(x())).backward()
    assert twin.layer.weight.grad is not None
    assert model.layer.weight.grad is None
    assert captures(twin)
    assert fxckpt.restore_(twin).forward.__self__ is twin


def test_deepcopy_of_a_container_copies_each_module_once() -> None:
    outer = nn.ModuleList([Net(), Net()])
    outer.append(outer[0])
    outer.shortcuts = {"first": [outer[0]]}
    fxckpt.rewrite_(outer[0], "nothing", strict=True)
    fxckpt.rewrite_(outer, "nothing")
    twin = copy.deepcopy(outer)
    assert twin[0] is twin[2] is twin.shortcuts["first"][0]
    assert [fxckpt.is_rewritten(m) for m in (twin, *twin)] == [True, True, False, True]


def test_deepcopy_respects_the_memo() -> None:
    model = fxckpt.rewrite_(Net(), "nothing", strict=True)
    weight, memo = model.layer.weight, {}
    memo[id(weight)] = weight  # copy all but the weight
    twin = copy.deepcopy(model, memo)
    assert twin.layer.weight is weight
    assert memo[id(model)] is twin
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    both_copied = copy.deepcopy((model, optimizer))
    assert both_copied[1].param_groups[0]["params"][0] is both_copied[0].layer.weight


def test_chain_of_copies() -> None:
    model = fxckpt.rewrite_(Net(), "nothing", strict=True)
    step(model)
    twins = [model]
    for _ in range(3):
        twins.append(copy.deepcopy(copy.copy(twins[-1])))
        step(twins[-1])
    assert [len(captures(t)) for t in twins] == [1] * 4
    assert len({id(t.layer.weight) for t in twins}) == 4


def test_unpickled_twice_and_rewritten_again() -> None:
    model = fxckpt.rewrite(Net(), "nothing", strict=True)
    seed_all(3)
    expected = steps(fxckpt.restore_(copy.deepcopy(model)))
    again = fxckpt.rewrite(pickled(pickled(model)), "nothing", strict=True)
    seed_all(3)
    assert_same(_record(expected), _record(steps(again)))


def _record(found: Any) -> list[tuple[str, Any]]:
    return [(n, content(t) if isinstance(t, Tensor) else t) for n, t in leaves(found)]


def test_averaged_models() -> None:
    def use(model: nn.Module) -> Any:
        ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for number in range(3):
            optimizer.zero_grad()
            total(model(x(3 + number))).backward()
            optimizer.step()
            ema.update_parameters(model)
        update_bn([x(5), x(6)], ema)
        return list(ema.parameters()), list(ema.buffers()), ema.eval()(x())

    both(Net, use)


# --- wrappers and transformations of torch --------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("called", [True, False])
def test_functional_call(tie: bool, called: bool) -> None:
    def use(model: nn.Module) -> Any:
        seen = [step(model)] if called else []
        leaf, other = torch.randn(4, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)
        for given in (
            {"first.weight": leaf * 2},
            {"first.weight": leaf * 3, "second.bias": torch.ones(4)},
            {"first.weight": leaf.t(), "second.weight": other},
        ):
            tied = tie and "second.weight" not in given
            out = functional_call(model, given, (x(),), tie_weights=tied)
            total(out).backward()
            seen += [out, leaf.grad.clone(), step(model)]
        return seen, other.grad, model.first.weight is model.second.weight

    assert captures(both(Tied, use))


def test_functional_call_with_buffers() -> None:
    def use(model: nn.Module) -> Any:
        state = {k: v.detach().clone() for k, v in model.state_dict().items()}
        weights = {k: v.requires_grad_(v.is_floating_point()) for k, v in state.items()}
        weights = {k: v.detach() if "running" in k else v for k, v in weights.items()}
        out = functional_call(model, weights, (x(),))
        total(out).backward()
        return out, list(weights.values()), [w.grad for w in weights.values()], step(model)

    both(Net, use)


def test_functional_call_with_a_tensor_subclass() -> None:
    """A weight of a class with a mind of its own, in place of one that was captured."""

    class Doubled(Tensor):
        @classmethod
        def __torch_function__(
            cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = super().__torch_function__(func, types, args, kwargs or {})
            return out * 2 if func is F.linear else out

    model = nn.Linear(4, 4)
    new = fxckpt.rewrite(model, "nothing")
    new(x())
    weight = model.weight.detach().clone().as_subclass(Doubled).requires_grad_()
    expected = functional_call(model, {"weight": weight}, (x(),))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        assert torch.equal(functional_call(new, {"weight": weight}, (x(),)), expected)


def test_transforms_of_functions() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    new = fxckpt.rewrite(model, "nothing", strict=True)
    weights = {k: v.detach() for k, v in model.named_parameters()}

    def loss(m: nn.Module) -> Callable[..., Tensor]:
        return lambda w, x: functional_call(m, w, (x,)).square().sum()

    for transform in (
        torch.func.grad,
        lambda f: torch.func.vmap(torch.func.grad(f), (None, 0)),
        torch.func.jacrev,
        torch.func.jacfwd,
        torch.func.hessian,
        lambda f: lambda w, x: torch.func.vjp(f, w, x)[1](torch.ones(())),
        lambda f: lambda w, x: torch.func.jvp(f, (w, x), (w, x)),
    ):
        results = [transform(loss(m))(weights, x()) for m in (model, new)]
        assert_same(*map(_record, results))
    assert captures(new) == []
    step(new)
    results = [torch.func.grad(loss(m))(weights, x()) for m in (model, new)]
    assert_same(*map(_record, results))


def test_forward_mode_differentiation() -> None:
    def use(model: nn.Module) -> Any:
        before = step(model)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x(), torch.ones(3, 4))
            found = torch.autograd.forward_ad.unpack_dual(model(dual))
        double = torch.autograd.functional.jvp(model, x(), torch.ones(3, 4))
        return before, found.primal, found.tangent, double, step(model)

    both(lambda: chain(2, 4), use)


def test_data_parallel_without_devices() -> None:
    def use(model: nn.Module) -> Any:
        return steps(nn.DataParallel(model))

    assert captures(both(Net, use))


def test_replicas_of_data_parallel() -> None:
    """Made as `nn.parallel.replicate` makes them, on one device."""

    def use(model: nn.Module) -> Any:
        seen = [step(model)]
        for scale in (1, 2):
            replica = _replica(model, scale)
            total(replica(x())).backward()
            assert not fxckpt.is_rewritten(replica) or captures(replica) == []
            seen.append({n: p.grad for n, p in model.named_parameters()})
        model.zero_grad()
        return seen, step(model)

    model = both(Net, use, fxckpt.rewrite_)
    assert len(captures(model)) == 1


def _replica(model: nn.Module, scale: float) -> nn.Module:
    """A replica whose parameters are computed from those of the model."""
    made: dict[nn.Module, nn.Module] = {}
    for m in model.modules():
        made[m] = m._replicate_for_data_parallel()
    for m, twin in made.items():
        for name, child in m._modules.items():
            twin._modules[name] = made[child]
        for name, p in m._parameters.items():
            setattr(twin, name, p * scale)
        for name, b in m._buffers.items():
            twin._buffers[name] = b.clone()
    return made[model]


def test_inside_of_wrappers() -> None:
    """As a part of something that is compiled, traced, exported or symbolically traced."""
    new = fxckpt.rewrite(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), "nothing", strict=True)
    outer = nn.Sequential(nn.Linear(4, 4), new)
    expected = outer(x())
    assert len(captures(new)) == 1
    symbolic = torch.fx.symbolic_trace(outer)
    assert torch.equal(symbolic(x()), expected)
    assert {n.target for n in symbolic.graph.nodes if n.op == "call_module"} == {"0", "1.0", "1.1"}
    exported = torch.export.export(outer, (x(),))
    assert torch.equal(exported.module()(x()), expected)
    assert len(captures(new)) == 1


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_traced_by_torchscript() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    new = fxckpt.rewrite(model, "nothing", strict=True)
    for m in (new, nn.Sequential(new)):
        traced = torch.jit.trace(m, (x(),))
        assert torch.equal(traced(x()), model(x()))
    step(new)
    assert torch.equal(torch.jit.trace(new, (x(),))(x()), model(x()))


@pytest.mark.parametrize("fullgraph", [True, False])
def test_compiled_by_dynamo(fullgraph: bool) -> None:
    """Compiled, it is the original; the rewritten one goes on working beside it."""
    torch._dynamo.reset()

    def use(model: nn.Module) -> Any:
        before = step(model)
        compiled = torch.compile(model, backend="eager", fullgraph=fullgraph)
        known = captures(model) if fxckpt.is_rewritten(model) else []
        found = step(compiled)["out"], step(compiled, x(5))["out"]
        assert not fxckpt.is_rewritten(model) or captures(model) == known
        return before, found, step(model)

    assert captures(both(Net, use))
    torch._dynamo.reset()


def test_exported() -> None:
    model, new = Net(), fxckpt.rewrite(Net(), "nothing", strict=True)
    step(new)
    for strict in (True, False):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graphs = [torch.export.export(m, (x(),), strict=strict).graph for m in (model, new)]
        texts = [[str(n.target) for n in g.nodes] for g in graphs]
        assert texts[0] == texts[1]
    assert len(captures(new)) == 1


# --- parametrisations -----------------------------------------------------------------------------


class Symmetric(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w.triu() + w.triu(1).t()

    def right_inverse(self, w: Tensor) -> Tensor:
        return w


REPARAMETRIZED: dict[str, Callable[[nn.Linear], Any]] = {
    "parametrize": lambda m: parametrize.register_parametrization(m, "weight", Symmetric()),
    "weight_norm": nn.utils.parametrizations.weight_norm,
    "spectral_norm": nn.utils.parametrizations.spectral_norm,
    "orthogonal": nn.utils.parametrizations.orthogonal,
    "old weight_norm": nn.utils.weight_norm,
    "old spectral_norm": nn.utils.spectral_norm,
    "prune": lambda m: prune.l1_unstructured(m, "weight", amount=0.5),
    "prune twice": lambda m: prune.random_unstructured(
        prune.l1_unstructured(m, "weight", amount=0.5), "weight", amount=0.25
    ),
}
UNDO: dict[str, Callable[[nn.Linear], Any]] = {
    "old weight_norm": nn.utils.remove_weight_norm,
    "old spectral_norm": nn.utils.remove_spectral_norm,
    "prune": lambda m: prune.remove(m, "weight"),
    "prune twice": lambda m: prune.remove(m, "weight"),
}


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """The old ones say that they are."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*weight_norm.*", FutureWarning)
        yield


@pytest.mark.parametrize("rewritten", ["whole", "layer"])
@pytest.mark.parametrize("when", ["before", "after", "between"])
@pytest.mark.parametrize("kind", REPARAMETRIZED)
def test_reparametrized(kind: str, when: str, rewritten: str) -> None:
    def apply(model: nn.Module) -> None:
        with _quietly():
            REPARAMETRIZED[kind](model if isinstance(model, nn.Linear) else model[0])

    def make() -> nn.Module:
        layer = nn.Linear(4, 4)
        model = layer if rewritten == "layer" else nn.Sequential(layer, nn.Tanh())
        if when == "before":
            apply(model)
        return model

    def use(model: nn.Module) -> Any:
        seen = [step(model)] if when == "between" else []
        if when != "before":
            apply(model)
        return seen, steps(model), model.eval()(x()), steps(model.train())

    assert captures(both(make, use, fxckpt.rewrite_))


@pytest.mark.parametrize("kind", REPARAMETRIZED)
def test_reparametrization_removed(kind: str) -> None:
    def make() -> nn.Module:
        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        with _quietly():
            REPARAMETRIZED[kind](model[0])
        return model

    def use(model: nn.Module) -> Any:
        seen = steps(model)
        if kind in UNDO:
            UNDO[kind](model[0])
        else:
            parametrize.remove_parametrizations(model[0], "weight")
        return seen, steps(model), type(model[0]).__name__

    both(make, use, fxckpt.rewrite_)


def test_parametrized_root_is_restored_or_refused() -> None:
    """torch changes the class of the module on its own: nothing is left half done."""
    model = fxckpt.rewrite_(nn.Linear(4, 4), "nothing", strict=True)
    step(model)
    parametrize.register_parametrization(model, "weight", Symmetric())
    expected = step(copy.deepcopy(model))
    with pytest.raises(FxckptError, match="class of the model was changed"):
        fxckpt.restore_(model)
    assert_same(_record(expected), _record(step(model)))
    assert fxckpt.is_rewritten(model)
    parametrize.remove_parametrizations(model, "weight")
    step(model)
    assert type(fxckpt.restore_(model)) is nn.Linear
    step(model)


def test_rewritten_parametrized_root_is_restored() -> None:
    model = nn.Linear(4, 4)
    parametrize.register_parametrization(model, "weight", Symmetric())
    cls = type(model)
    fxckpt.rewrite_(model, "nothing", strict=True)
    step(model)
    assert type(fxckpt.restore_(model)) is cls
    parametrize.remove_parametrizations(model, "weight")
    assert type(model) is nn.Linear
    step(model)


@pytest.mark.parametrize("called", [True, False])
def test_cached_parametrization(called: bool) -> None:
    """Inside of `parametrize.cached`, a weight is computed once for all readers."""

    def make() -> nn.Module:
        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        parametrize.register_parametrization(model[0], "weight", Symmetric())
        return model

    def use(model: nn.Module) -> Any:
        seen = [step(model)] if called else []
        with parametrize.cached():
            first = model(x())
            weight = model[0].weight
            second = model(x(5))
            same = model[0].weight is weight
        (total((first, second)) + weight.sum()).backward()
        assert type(weight) is Tensor
        return seen, first, second, weight, same, [p.grad for p in model.parameters()]

    both(make, use)


@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
@pytest.mark.parametrize("root", [True, False])
def test_lazy_modules(root: bool) -> None:
    """They get their shapes, and another class, when they are first called."""

    def make() -> nn.Module:
        return nn.LazyLinear(4) if root else nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d())

    def use(model: nn.Module) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FallbackWarning)
            first = step(model)
        assert type(model if root else model[0]).__name__ == "Linear"
        return first, steps(model)

    model = both(make, use, fxckpt.rewrite_, strict=False)
    assert captures(model), "what is lazy at the first call is captured later"
    known = len(captures(model))
    step(model, x(9))
    assert len(captures(model)) == known + 1
    assert type(fxckpt.restore_(model)) is (nn.Linear if root else nn.Sequential)
    step(model)


# --- several rewritten modules --------------------------------------------------------------------


def test_two_rewritten_models_share_a_layer() -> None:
    def make_two() -> list[nn.Module]:
        shared = nn.Linear(4, 4)
        return [nn.Sequential(shared, nn.Tanh()), nn.Sequential(shared, nn.BatchNorm1d(4))]

    results = []
    for rewritten in (False, True):
        seed_all(0)
        models = make_two()
        if rewritten:
            models = [fxckpt.rewrite(m, "nothing", strict=True) for m in models]
        found = []
        for number in range(3):
            (total(models[0](x())) + total(models[1](x(number + 2)))).backward()
            found.append([p.grad.clone() for m in models for p in m.parameters()])
            models[number % 2].train(number == 1)
            found.append([m(x()) for m in models])
            models[0].train()
            models[1].train()
        results.append(_record(found))
    assert_same(*results)
    assert all(captures(m) for m in models)
    fxckpt.restore_(models[0])
    assert fxckpt.is_rewritten(models[1])


@pytest.mark.parametrize("order", ["inner first", "outer first", "outer called first"])
def test_submodule_of_a_rewritten_module(order: str) -> None:
    """Within the outer one, the inner is a part of what is captured; alone, it works as well."""

    def make() -> nn.Module:
        return nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.3)), nn.Linear(4, 4))

    def use(model: nn.Module) -> Any:
        if fxckpt.is_rewritten(model) and order != "inner first":
            if order == "outer called first":
                seed_all(5)
                step(model)
            fxckpt.rewrite_(model[0], "nothing", strict=True)
        seed_all(6)
        seen = [step(model), step(model[0]), step(model), step(model[0], x(5)), step(model)]
        if fxckpt.is_rewritten(model):
            assert captures(model)
            assert captures(model[0])
            fxckpt.restore_(model[0])
            assert fxckpt.is_rewritten(model)
        return seen, step(model), step(model[0])

    def rewrite(model: nn.Module, *args: Any, **options: Any) -> nn.Module:
        if order == "inner first":
            fxckpt.rewrite_(model[0], *args, **options)
        return fxckpt.rewrite_(model, *args, **options)

    both(make, use, rewrite)


def test_calling_the_inner_one_alone_captures_the_outer_one_once() -> None:
    """What an inner rewritten module remembers is no reason to capture the outer one again."""
    model = nn.Sequential(chain(1, 4), nn.Linear(4, 4))
    fxckpt.rewrite_(model[0], "nothing", strict=True)
    fxckpt.rewrite_(model, "nothing", strict=True)
    for rows in (3, 4):
        for _ in range(2):
            step(model, x(rows))
            step(model[0], x(rows))
    assert len(captures(model)) == len(captures(model[0])) == 2


def test_rewriting_many_times() -> None:
    """Each time from scratch, with one layer of subclassing; and back."""
    model = Net()
    before = dict(vars(model))
    for policy in ("nothing", "everything", "dots") * 2:
        fxckpt.rewrite_(model, policy, strict=True)
        assert type(model).__mro__[1] is Net
        step(model)
        assert len(captures(model)) == 1
    new = fxckpt.rewrite(fxckpt.rewrite(model, "nothing"), "nothing", strict=True)
    assert type(new).__mro__[1] is Net
    step(new)
    fxckpt.restore_(model)
    assert vars(model) == before
    assert fxckpt.is_rewritten(new)
    step(new)
    with pytest.raises(FxckptError, match="not rewritten"):
        fxckpt.restore_(model)


# --- exceptions, warnings, print ------------------------------------------------------------------


class Mistake(Exception):
    """With arguments of its own, and no way to make it from its text."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code


def raising(kind: type[BaseException]) -> Function:
    """A module that raises after it has computed something, if its flag is set."""

    def forward(m: Function, x: Tensor) -> Tensor:
        if issubclass(kind, Exception):  # an interrupted capture leaves buffers as they were
            m.seen.add_(1)
        y = x @ m.weight
        if not m.bad:
            return y.tanh()
        try:
            return {}["key"]
        except KeyError as error:
            raise kind("the text", 7) from error

    model = Function(forward)
    model.bad = False
    return model


def _caught(model: nn.Module, *args: Any) -> tuple[Any, ...]:
    with pytest.raises(BaseException) as caught:  # noqa: PT011
        model(*args)
    error = caught.value
    return (
        type(error),
        error.args,
        getattr(error, "code", None),
        type(error.__cause__),
        type(error.__context__),
        error.__suppress_context__,
        traceback.extract_tb(error.__traceback__)[-1].name,
    )


EXCEPTIONS = (
    Mistake,
    StopIteration,
    StopAsyncIteration,
    GeneratorExit,
    KeyboardInterrupt,
    SystemExit,
    AssertionError,
    RecursionError,
    MemoryError,
    NotImplementedError,
)


@pytest.mark.parametrize("when", ["first call", "later call", "another shape"])
@pytest.mark.parametrize("kind", EXCEPTIONS)
def test_exception_comes_out_unchanged(kind: type[BaseException], when: str) -> None:
    """Type, arguments, attributes, cause and place; and the model works afterwards."""

    def use(model: nn.Module) -> Any:
        seen = [] if when == "first call" else [step(model)]
        model.bad = True
        rows = x(5) if when == "another shape" else x()
        seen += [_caught(model, rows), _caught(model, rows)]
        model.bad = False
        return seen, steps(model), list(model.buffers())

    model = both(lambda: raising(kind), use, strict=False)
    assert captures(model)
    assert type(model.weight) is nn.Parameter


@pytest.mark.parametrize("captured", [True, False])
def test_exception_that_is_being_handled_is_left_alone(captured: bool) -> None:
    """A model that is called in an `except` block: the exception keeps its traceback."""

    def fail() -> None:
        local = "a local variable"
        raise Mistake("before the call", len(local))

    def use(model: nn.Module) -> Any:
        try:
            fail()
        except Mistake as error:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FallbackWarning)
                seen = step(model)
            frames = [(frame.f_code.co_name, line) for frame, line in _walk(error)]
            inner = [frame.f_locals for frame, _ in _walk(error)][-1]
            return seen, frames, inner, error.__context__, error.__cause__
        raise AssertionError

    forward = (lambda m, x: x @ m.weight) if captured else (lambda m, x: x * float(x.sum()))
    both(lambda: Function(lambda m, x: forward(m, x) + m.weight.sum()), use, strict=False)


def _walk(error: BaseException) -> Iterator[tuple[types.FrameType, int]]:
    return traceback.walk_tb(error.__traceback__)


@pytest.mark.parametrize("kind", EXCEPTIONS[:2])
def test_exception_with_strict(kind: type[BaseException]) -> None:
    """An error of ours that names the user's, which is its cause."""
    model = fxckpt.rewrite(raising(kind), "nothing", strict=True)
    model.bad = True
    with pytest.raises(CaptureError, match=f"raised {kind.__name__}.*the text") as caught:
        model(x())
    assert isinstance(caught.value.__cause__, kind)
    model.bad = False
    step(model)
    assert captures(model)


def test_exception_of_a_call_with_wrong_arguments() -> None:
    def use(model: nn.Module) -> Any:
        seen = []
        for args, kwargs in (
            ((), {}),
            ((x(), 1.0, 2.0), {}),
            ((x(),), {"other": 1}),
            ((torch.ones(3, 5),), {}),
            (("text",), {}),
            ((None,), {}),
            ((x(1),), {}),  # BatchNorm refuses a single row
        ):
            with pytest.raises((TypeError, RuntimeError, ValueError)) as caught:
                model(*args, **kwargs)
            seen.append((caught.type, str(caught.value)))
        return seen, steps(model)

    assert captures(both(Net, use, strict=False))


def test_module_without_a_forward() -> None:
    class Nothing(nn.Module):
        pass

    def use(model: nn.Module) -> Any:
        with pytest.raises(NotImplementedError, match="missing the required") as caught:
            model(x())
        return str(caught.value)

    both(Nothing, use, strict=False)
    both(lambda: nn.ModuleList([nn.Linear(2, 2)]), use, strict=False)


def test_exception_in_backward_comes_out_unchanged() -> None:
    class Bad(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            raise Mistake("in backward", 3)

    def forward(m: Function, x: Tensor) -> Tensor:
        return Bad.apply(x @ m.weight) if m.bad else (x @ m.weight).tanh()

    def make() -> nn.Module:
        model = Function(forward)
        model.bad = True
        return model

    def use(model: nn.Module) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FallbackWarning)
            out = model(x())
        with pytest.raises(Mistake, match="in backward") as caught:
            total(out).backward()
        grads = [p.grad for p in model.parameters()]
        model.bad = False
        return caught.value.code, grads, steps(model)

    assert captures(both(make, use, strict=False))


@pytest.mark.parametrize("hook", ["result", "parameter", "accumulated"])
def test_exception_in_a_hook_comes_out_unchanged(hook: str) -> None:
    def fail(*_: Any) -> None:
        raise Mistake("in a hook", 4)

    def use(model: nn.Module) -> Any:
        out = model(x())
        if hook == "result":
            handle = out.register_hook(fail)
        elif hook == "parameter":
            handle = model[-2].weight.register_hook(fail)
        else:
            handle = model[-2].weight.register_post_accumulate_grad_hook(fail)
        with pytest.raises(Mistake, match="in a hook") as caught:
            total(out).backward()
        handle.remove()
        model.zero_grad()
        return caught.value.code, steps(model)

    assert captures(both(lambda: chain(2, 4), use))


def test_interrupt_in_the_middle_of_a_capture() -> None:
    """Everything that a capture disguises is as before."""
    from torch.nn.modules import module as nn_module

    model = raising(KeyboardInterrupt)
    new = fxckpt.rewrite(model, "nothing", strict=True)
    members = dict(model._parameters), dict(model._buffers)
    new.bad = True
    with torch.random.fork_rng(devices=[]):
        state = torch.get_rng_state()
        with pytest.raises(KeyboardInterrupt):
            new(x())
        assert torch.equal(torch.get_rng_state(), state)
    assert (dict(model._parameters), dict(model._buffers)) == members
    assert not nn_module._global_forward_hooks
    assert not nn_module._global_forward_pre_hooks
    assert torch.utils._python_dispatch._len_torch_dispatch_stack() == 0
    assert type(torch.ones(1) + 1) is Tensor
    assert torch.is_grad_enabled()


def test_warning_of_forward_is_given_once() -> None:
    """The default filter shows a warning once for each line, so it is shown once in any case."""

    def warn(m: Function, x: Tensor) -> Tensor:
        warnings.warn("from forward", UserWarning, stacklevel=1)
        return (x @ m.weight).tanh()

    def fall_back(m: Function, x: Tensor) -> Tensor:
        warnings.warn("from forward", UserWarning, stacklevel=1)
        return (x @ m.weight) * float(x.sum())

    for forward in (warn, fall_back):
        new = fxckpt.rewrite(Function(forward), "nothing")
        with warnings.catch_warnings(record=True) as caught:
            warnings.resetwarnings()
            warnings.simplefilter("default")
            for _ in range(3):
                step(new)
        ours = [w for w in caught if w.category is FallbackWarning]
        theirs = [w for w in caught if w.category is UserWarning]
        assert len(theirs) == 1
        assert theirs[0].filename == __file__
        assert len(ours) == (forward is fall_back)
        assert all(w.filename == __file__ for w in ours)


def test_warning_turned_into_an_error() -> None:
    def forward(m: Function, x: Tensor) -> Tensor:
        if m.loud:
            warnings.warn("too loud", UserWarning, stacklevel=1)
        return (x @ m.weight).tanh()

    def make() -> nn.Module:
        model = Function(forward)
        model.loud = True
        return model

    def use(model: nn.Module) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            seen = _caught(model, x())
        model.loud = False
        return seen, steps(model)

    assert captures(both(make, use, strict=False))


def test_print_in_forward(capsys) -> None:
    """Printed when a call is new, and by what runs eagerly; no more often than in eager."""

    def forward(m: Function, x: Tensor) -> Tensor:
        print("called", tuple(x.shape))
        return (x @ m.weight).tanh()

    new = fxckpt.rewrite(Function(forward), "nothing", strict=True)
    for rows in (3, 3, 3, 5, 3):
        step(new, x(rows))
    lines = capsys.readouterr().out.splitlines()
    assert set(lines) == {"called (3, 4)", "called (5, 4)"}
    assert lines.count("called (3, 4)") <= 2
    assert lines.count("called (5, 4)") == 1
    with torch.no_grad():
        new(x())
    assert capsys.readouterr().out == "called (3, 4)\n"


def test_call_that_is_captured_in_vain_changes_state_once() -> None:
    """Buffers and generators."""

    def forward(m: Function, x: Tensor) -> Tensor:
        m.seen.add_(1)
        noise = torch.rand(4)
        return (x @ m.weight + noise) * (2 if float(x.sum()) > 0 else 3)

    def use(model: nn.Module) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FallbackWarning)
            return steps(model), list(model.buffers())

    both(lambda: Function(forward), use, strict=False)
