"""Rewritten modules in the hands of torch: wrappers and transformations."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    assert_same,
    captures,
    chain,
    total,
)
from installing import Net, both, recorded, step, steps, x
from torch import Tensor, nn
from torch.func import functional_call

import fxckpt
from fxckpt import FallbackWarning


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
        assert_same(*map(recorded, results))
    assert captures(new)
    step(new)
    results = [torch.func.grad(loss(m))(weights, x()) for m in (model, new)]
    assert_same(*map(recorded, results))


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


def test_data_parallel_inside_of_a_model() -> None:
    model = fxckpt.rewrite(nn.Sequential(nn.DataParallel(Net())), "nothing", strict=True)
    with pytest.raises(fxckpt.CaptureError, match="DataParallel synchronises what the module in"):
        step(model)


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


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
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
    """The rewritten one goes on working beside the compiled one, with the same captures."""
    torch._dynamo.reset()

    def use(model: nn.Module) -> Any:
        before = step(model)
        compiled = torch.compile(model, backend="eager", fullgraph=fullgraph)
        known = captures(model) if fxckpt.is_rewritten(model) else []
        found = step(compiled)["out"], step(compiled, x(5))["out"]
        assert not fxckpt.is_rewritten(model) or captures(model)[: len(known)] == known
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
