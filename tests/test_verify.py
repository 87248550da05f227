"""`verify` passes exact models, names what differs, and leaves no trace."""

import itertools
import warnings

import pytest
import torch
from helpers import Function, Stack, captures, content, modules_of, random_states, total
from torch import Tensor, nn

import fxckpt
from bench.models import build
from fxckpt import CaptureError, FxckptError, MismatchError


def x() -> Tensor:
    return torch.linspace(-1, 1, 12).view(3, 4).cos()


@pytest.mark.parametrize("policy", ["nothing", "dots", "everything"])
def test_passes_what_is_exact(policy: str) -> None:
    case = build("gpt2", tiny=True)
    fxckpt.verify(case.model, policy=policy, **case.batch(0))
    model = fxckpt.rewrite(case.model, policy)
    fxckpt.verify(model, **case.batch(1))
    assert len(captures(model)) == 1


def test_checks_buffers_and_random_numbers() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    fxckpt.verify(model, x().requires_grad_(), policy="nothing")


@pytest.mark.parametrize("rewritten", [False, True])
def test_leaves_no_trace(rewritten: bool) -> None:
    case = build("resnet", tiny=True)
    model = fxckpt.rewrite(case.model, "nothing") if rewritten else case.model
    case.loss(model(**case.batch(0))).backward()
    batch = case.batch(1)

    def everything() -> list:
        tensors = [*model.parameters(), *model.buffers(), *batch.values()]
        grads = [p.grad for p in model.parameters()]
        return [[*map(content, tensors)], [*map(content, grads)], [*map(id, grads)]]

    before, attributes, states = everything(), modules_of(model), random_states()
    fxckpt.verify(model, policy="nothing", **batch)
    assert everything() == before
    assert random_states() == states
    for then, now in zip(attributes, modules_of(model), strict=True):
        assert then.keys() == now.keys()
        assert all(then[key] is now[key] for key in then)


def test_leaves_no_trace_when_something_differs() -> None:
    model = hidden_state()
    before, states = content(model.weight), random_states()
    with pytest.raises(MismatchError):
        fxckpt.verify(model, x(), policy="nothing")
    assert content(model.weight) == before
    assert model.weight.grad is None
    assert random_states() == states


def hidden_state() -> nn.Module:
    """A model whose result depends on something that no capture can see."""
    calls = itertools.count()

    def forward(m: Function, x: Tensor) -> Tensor:
        return (x @ m.weight).tanh() * (2 if next(calls) > 1 else 1)

    return Function(forward)


def test_hidden_state_is_noticed() -> None:
    model = hidden_state()
    with pytest.raises(MismatchError, match="result"):
        fxckpt.verify(model, x(), policy="nothing")


def tampered(change) -> nn.Module:
    """A rewritten model with another constant in one of its graphs."""
    model = fxckpt.rewrite(
        Function(lambda m, x: (x @ m.weight).tanh() * 3), "everything", strict=True
    )
    total(model(x())).backward()
    change(*fxckpt.graphs(model))
    return model


def _scale(graph: torch.fx.GraphModule, factor: float) -> None:
    (node,) = (n for n in graph.graph.nodes if n.target is torch.ops.aten.mul.Tensor)
    node.args = (node.args[0], node.args[1] * factor)
    graph.recompile()


def test_wrong_forward_is_named() -> None:
    model = tampered(lambda forward, _: _scale(forward, 2))
    with pytest.raises(MismatchError, match=r"result.* differs from eager by up to [0-9.e-]+"):
        fxckpt.verify(model, x())


def test_wrong_backward_is_named() -> None:
    model = tampered(lambda _, backward: _scale(backward, 1 + 2**-20))
    with pytest.raises(MismatchError, match="gradient of weight differs"):
        fxckpt.verify(model, x())


def test_missing_gradient_is_named() -> None:
    def drop(_, backward: torch.fx.GraphModule) -> None:
        output = backward.graph.output_node()
        output.args = (tuple(None for _ in output.args[0]),)
        backward.recompile()

    with pytest.raises(MismatchError, match="gradient of weight is missing"):
        fxckpt.verify(tampered(drop), x())


def test_wrong_buffer_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model = fxckpt.rewrite(model, "nothing", strict=True)
    model(x()).sum().backward()
    forward, _ = fxckpt.graphs(model)
    for node in forward.graph.nodes:
        if "native_batch_norm" in str((node.target, *node.args)):
            node.args = tuple(0.7 if a == 0.1 else a for a in node.args)
    forward.recompile()
    with pytest.raises(MismatchError, match=r"buffer 1.running_mean differs"):
        fxckpt.verify(model, x())


def test_wrong_random_state_is_named() -> None:
    """A graph that draws once more than eager."""
    model = fxckpt.rewrite(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)), "nothing", strict=True)
    model(x()).sum().backward()
    forward, _ = fxckpt.graphs(model)
    with forward.graph.inserting_before(forward.graph.output_node()):
        forward.graph.call_function(torch.ops.aten.rand.default, ([1],))
    forward.recompile()
    with pytest.raises(MismatchError, match="random state of cpu differs"):
        fxckpt.verify(model, x())


def test_models_that_cannot_be_captured_raise() -> None:
    """Comparing eager with eager would prove nothing."""
    model = Function(lambda m, x: x @ m.weight * float(x.sum()))
    with pytest.raises(CaptureError, match="reads a value"):
        fxckpt.verify(model, x(), policy="nothing")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fxckpt.FallbackWarning)
        with pytest.raises(FxckptError, match="reads a value"):
            fxckpt.verify(fxckpt.rewrite(model, "nothing"), x())


def test_mistakes() -> None:
    with pytest.raises(FxckptError, match="expected a rewritten module, or policy="):
        fxckpt.verify(Stack(), torch.ones(1, 2, 8))
    with pytest.raises(FxckptError, match="evaluation mode"):
        fxckpt.verify(Stack().eval(), torch.ones(1, 2, 8), policy="nothing")


def test_works_under_no_grad() -> None:
    with torch.no_grad():
        fxckpt.verify(Stack(), torch.ones(1, 2, 8), policy="nothing")
    model = tampered(lambda _, backward: _scale(backward, 2))
    with torch.no_grad(), pytest.raises(MismatchError, match="gradient of weight"):
        fxckpt.verify(model, x())
