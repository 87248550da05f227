"""Results in the place of operands: the same bits by the same kernels, and nobody sees it."""

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import Function, all_dispatched, content, decided, joint_of, total
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Graph, Node
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import fxckpt
from fxckpt import ops, reinplace
from fxckpt.installation import plain
from fxckpt.memory import Memory

aten = torch.ops.aten

UNARY = "abs ceil cos erf exp expm1 floor log1p neg reciprocal rsqrt sigmoid sin sqrt tanh relu"
BINARY = "add sub mul div maximum minimum atan2 hypot fmod"
CALLS: dict[str, Callable[..., Any]] = {
    **{name: getattr(torch, name) for name in UNARY.split()},
    **{name: getattr(torch, name) for name in BINARY.split()},
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": functools.partial(torch.nn.functional.gelu, approximate="tanh"),
    "hardtanh": torch.nn.functional.hardtanh,
    "leaky_relu": torch.nn.functional.leaky_relu,
    "elu": torch.nn.functional.elu,
    "softplus": torch.nn.functional.softplus,
    "pow": lambda x: x**2.0,
    "pow3": lambda x: x**3.0,
    "scalar": lambda x: (x * 0.7 + 0.1) / 3.0 - 2.0,
    "rsub": lambda x: 1.0 - x,
    "addcmul": lambda x, y: torch.addcmul(x, x, y, value=0.3),
    "where": lambda x, y: torch.where(x > 0, x, y),
    "masked_fill": lambda x: x.masked_fill(x > 0, -1.0),
    "softmax": lambda x: x.softmax(-1),
    "log_softmax": lambda x: x.log_softmax(0),
    "clamp": lambda x: x.clamp(-0.5, 0.5),
    "lerp": lambda x, y: torch.lerp(x, y, 0.3),
}
BINARIES = {*BINARY.split(), "addcmul", "where", "lerp"}


class Calls(TorchDispatchMode):
    """The operations that run inside, with what they were called with and returned."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[OpOverload, Any, Any, Tensor]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, args)
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and not func._schema.is_mutable:
            self.calls.append((func, before, kwargs or {}, out.clone()))
        return out


def recorded(name: str, dtype: torch.dtype, shape: tuple[int, ...], layout: str) -> Calls:
    """Forward and backward of a function, on operands that are laid out in one way."""
    torch.manual_seed(1)
    operands = []
    for _ in range(1 + (name in BINARIES)):
        x = torch.randn(shape, dtype=torch.float32).to(dtype)
        x = x.transpose(0, -1).contiguous().transpose(0, -1) if layout == "transposed" else x
        operands.append(x.requires_grad_())
    with all_dispatched(Calls()) as calls:
        CALLS[name](*operands).abs().sum().backward()
    return calls


def variants(calls: Calls) -> Iterator[tuple[Any, int, Any, Any, Tensor]]:
    """All ways in which one of the calls could write into one of its operands."""
    for op, args, kwargs, out in calls.calls:
        for i, operand in enumerate(args):
            found = ops.writing_into(op, i) if isinstance(operand, Tensor) else None
            if found is not None and reinplace._looks_like(operand, out):
                yield found, i, args, kwargs, out


def assert_same_in_place(found: Any, i: int, args: Any, kwargs: Any, out: Tensor) -> None:
    op, keyword = found
    args = [x.clone() if isinstance(x, Tensor) else x for x in args]
    address = args[i].data_ptr()
    result = op(*args, **kwargs, **({keyword: args[i]} if keyword else {}))
    assert result.data_ptr() == address
    assert content(result) == content(out), f"{op} into argument {i}"


@pytest.mark.parametrize("shape", [(3, 50257), (300, 50), (8, 1025), (2, 70, 9, 5), (16, 2, 128)])
@pytest.mark.parametrize("name", ["_softmax", "_log_softmax"])
def test_softmax_gives_the_same_bits_in_place(name: str, shape: tuple[int, ...]) -> None:
    """Along each dimension, rows of one or of several chunks."""
    for dim in range(len(shape)):
        x, gradient = torch.randn(shape), torch.randn(shape)
        y = getattr(aten, name)(x, dim, False)
        backward = getattr(aten, name + "_backward_data").default
        for op, args in (
            (getattr(aten, name).default, (x, dim, False)),
            (backward, (gradient, y, dim, torch.float32)),
        ):
            for i in range(1 + (op is backward)):
                assert_same_in_place(ops.writing_into(op, i), i, args, {}, op(*args))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CALLS)
def test_kernels_give_the_same_bits_in_place(name: str, dtype: torch.dtype) -> None:
    """Sizes of whole vectors and beside them, large enough for several threads."""
    tried = 0
    for shape in ((7,), (64, 33), (3, 5, 17), (130, 512)):
        for layout in ("plain", "transposed"):
            for variant in variants(recorded(name, dtype, shape, layout)):
                assert_same_in_place(*variant)
                tried += 1
    assert tried


def test_variants_compute_right_there() -> None:
    """Those that torch generates from the plain operation compute elsewhere, and copy."""
    assert ops.writing_into(aten.mul.Tensor, 0) == (aten.mul_.Tensor, "")
    assert ops.writing_into(aten.mul.Tensor, 1) == (aten.mul.out, "out")
    assert ops.writing_into(aten.div.Scalar, 0) == (aten.div_.Scalar, "")
    assert ops.writing_into(aten.tanh_backward.default, 1) == (
        aten.tanh_backward.grad_input,
        "grad_input",
    )
    assert ops.writing_into(aten.native_dropout_backward.default, 0) is None
    assert ops.writing_into(aten.mm.default, 0) is None
    assert ops.writing_into(aten._softmax.default, 0, "cpu") == (aten._softmax.out, "out")
    assert ops.writing_into(aten._softmax.default, 0, "cuda") is None
    assert ops.writing_into(aten.bernoulli.default, 0) is None
    assert ops.writing_into(aten.mul_.Tensor, 0) is None


# --- who may see it -------------------------------------------------------------------------------


def run_in_place(forward: Callable[..., Any], saved: str = "") -> tuple[list[str], list[str]]:
    """Names of the operations of forward and backward that take the place of an operand."""

    def decide(joint: Any) -> set[Node]:
        return {v.node for v in joint.values() if v.name in saved.split()}

    model = decided(Function(forward, 8), decide)
    total(model(torch.ones(8, 8))).backward()
    return tuple(replacing(graph.graph) for graph in fxckpt.graphs(model))


def replacing(graph: Graph) -> list[str]:
    calls = [n for n in graph.nodes if isinstance(n.target, OpOverload)]
    return [n.name for n in calls if n.target._schema.is_mutable]


def test_what_dies_is_replaced() -> None:
    forward, backward = run_in_place(lambda m, x: ((x @ m.weight).sin() * 2).cos())
    assert forward == ["sin", "mul", "cos"]
    assert "mul" in backward
    assert "sin" not in backward  # its operand is read by cos


def test_what_is_kept_is_not_replaced() -> None:
    forward, _ = run_in_place(lambda m, x: ((x @ m.weight).sin() * 2).cos(), saved="mm mul")
    assert forward == ["mul"]


def test_outputs_arguments_and_what_is_read_later_are_not_replaced() -> None:
    def forward(m: Function, x: Tensor) -> tuple[Tensor, ...]:
        y = x @ m.weight
        z = y.exp()
        return x.sin() + 1, y, z * 2, z.t() @ y.t().sigmoid()

    assert run_in_place(forward)[0] == ["add"]


def test_buffers_are_not_replaced() -> None:
    def forward(m: Function, x: Tensor) -> Tensor:
        m.seen.mul_(2).add_(1)
        return x @ m.weight * (m.seen * 3 + 1)

    model = decided(Function(forward, 8), lambda joint: ())
    twin = copy.deepcopy(plain(model))
    for _ in range(3):
        total(model(torch.ones(8, 8))).backward()
        total(twin(torch.ones(8, 8))).backward()
    assert torch.equal(model.seen, twin.seen)
    assert torch.equal(model.weight.grad, twin.weight.grad)


def test_other_strides_and_dtypes_are_not_replaced() -> None:
    def forward(m: Function, x: Tensor) -> Tensor:
        y = x @ m.weight
        return (y.t() + y.exp().double()).float().sum(0) + (y > 0)[0]

    assert run_in_place(forward)[0] == ["add_1"]


def test_part_of_a_larger_memory_is_not_replaced() -> None:
    """It would keep the rest of it."""
    assert run_in_place(lambda m, x: (x @ m.weight)[:4].sin().cos())[0] == ["cos"]


def test_retained_graphs_find_their_residuals() -> None:
    def forward(m: Function, x: Tensor) -> Tensor:
        return ((x @ m.weight).exp().tanh() * 3).sigmoid().sum()

    model = decided(Function(forward, 8), lambda joint: {v.node for v in joint.values()})
    loss = model(torch.ones(8, 8))
    grads = [torch.autograd.grad(loss, model.weight, retain_graph=True)[0] for _ in range(3)]
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], grads[2])


@given(st.lists(st.sampled_from(["sin", "add", "mul", "mm", "view", "t", "max"]), max_size=8))
def test_memory_is_no_more_than_that_of_eager(names: list[str]) -> None:
    def forward(m: Function, x: Tensor) -> Tensor:
        values = [x @ m.weight, x.exp()]
        steps = {
            "sin": lambda a, b: a.sin(),
            "add": lambda a, b: a + b,
            "mul": lambda a, b: a * 3,
            "mm": lambda a, b: a @ b,
            "view": lambda a, b: a[None][0],
            "t": lambda a, b: a.t(),
            "max": lambda a, b: torch.maximum(a, b),
        }
        for name in names:
            values.append(steps[name](values[-1], values[-2]))
        return values[-1].sum() + values[0].sum()

    model = decided(Function(forward, 8), lambda joint: ())
    total(model(torch.ones(8, 8))).backward()
    joint = joint_of(model)
    ours, eager = Memory(joint), Memory(joint, eager=True)
    for saved in ((), ours.values, ours.values[::2]):
        assert ours.replay(saved).peak <= eager.replay(saved).peak
