"""Rewritten modules of all kinds of classes."""

import abc
import contextlib
import copy
import dataclasses
import functools
import inspect
import types
import typing
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    assert_same_training,
    captures,
    seed_all,
    total,
)
from installing import Net, batch, both, pickled, step, steps, x
from torch import Tensor, nn

import fxckpt
from fxckpt import FxckptError

T = TypeVar("T")


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


def net_with(kind: str) -> nn.Module:
    model = Net()
    forward = INSTANCE_FORWARDS[kind](model)
    if isinstance(forward, nn.Module):  # registered as a submodule, which is found too late
        return nn.Sequential(forward)
    model.forward = forward
    return model


@pytest.mark.parametrize("kind", INSTANCE_FORWARDS)
def test_forward_of_the_instance(kind: str) -> None:
    """As accelerate, peft and others set it."""
    model = both(lambda: net_with(kind), steps, fxckpt.rewrite_)
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


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "rows": lambda: torch.eye(4).to_sparse_csr(),
    "columns": lambda: torch.eye(4).to_sparse_csc(),
    "coordinates": lambda: torch.eye(4).to_sparse(),
    "nested": lambda: torch.nested.nested_tensor([torch.eye(4)[:1], torch.eye(4)]),
    "jagged": lambda: torch.nested.nested_tensor(
        [torch.eye(4)[:1], torch.eye(4)], layout=torch.jagged
    ),
}


class Graph(nn.Module):
    """Reads a tensor of some layout, given or held."""

    def __init__(self, held: Tensor | None) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("held", held)

    def forward(self, x: Tensor, given: Tensor | None = None) -> Tensor:
        """The sum of a product, or of one for each part."""
        read = self.held if given is None else given
        parts = read.unbind() if read.is_nested else [read]
        return sum((part @ self.linear(x).tanh()).sum() for part in parts)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_layouts_without_strides_run_eagerly(layout: str, held: bool, dynamic: bool) -> None:
    unusual = LAYOUTS[layout]()
    model, x = Graph(unusual if held else None), torch.randn(4, 4)
    new = fxckpt.rewrite(model, "nothing", dynamic=dynamic)
    arguments = (x,) if held else (x, unusual)
    with pytest.warns(fxckpt.FallbackWarning, match="a tensor (with layout|of class)"):
        new(*arguments)
    for _ in range(2):
        grads = []
        for each in (model, new):
            each.zero_grad()
            each(*arguments).backward()
            grads.append(each.linear.weight.grad.clone())
        assert torch.equal(*grads)
