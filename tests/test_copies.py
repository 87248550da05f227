"""Copies of rewritten modules: copy, deepcopy, pickle, torch.save."""

import copy
import io
from typing import Any

import pytest
import torch
from helpers import (
    assert_same,
    captures,
    seed_all,
    total,
)
from installing import Net, both, pickled, recorded, step, steps, x
from test_unusual_classes import (
    Data,
    Decorated,
    InRegistry,
    OfType,
    WithGetattr,
    WithMetaclass,
    net_with,
)
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import fxckpt


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
    model = net_with("method")
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
    assert_same(recorded(expected), recorded(steps(again)))


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
