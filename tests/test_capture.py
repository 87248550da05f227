"""Capture: any arguments and results, without a trace, and the branch that eager takes."""

import dataclasses
import enum
import gc
import itertools
import random
import resource
import warnings
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    MODELS,
    Block,
    Function,
    Stack,
    assert_same,
    assert_same_training,
    call,
    captures,
    chain,
    content,
    describe,
    grads_of,
    joint_of,
    leaves,
    modules_of,
    random_states,
    seed_all,
    tensors_in,
    total,
    train,
    versions,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, is_fake
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput
from transformers.utils.import_utils import is_tracing

import fxckpt
from bench.models import build
from fxckpt import CaptureError, FallbackWarning


def rows(n: int = 3) -> Tensor:
    return torch.linspace(-1, 1, 4 * n).view(n, 4).cos()


def both(
    forward: Callable[..., Any], batches: list[Any], *, strict: bool = True, loss: Any = total
) -> nn.Module:
    """Asserts that a module around `forward` does the same to each batch, eager and rewritten."""
    results = []
    for rewritten in (False, True):
        seed_all(0)
        model: nn.Module = Function(forward)
        if rewritten:
            model = fxckpt.rewrite(model, "nothing", strict=strict)
        record = []
        for batch in batches:
            with torch.random.fork_rng(devices=[]):
                made = batch()
            result = call(model, made)
            value = loss(result)
            if value.requires_grad:
                value.backward()
            found = {"result": _plain(result), "batch": _plain(made), "grads": grads_of(model)}
            record += [
                (n, describe(x) if isinstance(x, Tensor) else repr(x)) for n, x in leaves(found)
            ]
            model.zero_grad()
        results.append(record)
    assert_same(*results)
    return model


def _plain(tree: Any) -> Any:
    """Objects as dictionaries of what they hold, with their class."""
    if isinstance(tree, (Tensor, str, bytes, int, float, type(None), type, enum.Enum)):
        return tree
    if isinstance(tree, (list, tuple)):
        return [type(tree).__name__, *map(_plain, tree)]
    if isinstance(tree, dict):
        return {"class": type(tree).__name__, **{str(k): _plain(v) for k, v in tree.items()}}
    if hasattr(tree, "__dict__"):
        return {"class": type(tree).__name__, **{k: _plain(v) for k, v in vars(tree).items()}}
    return repr(tree)


# --- arguments ------------------------------------------------------------------------------------


@dataclasses.dataclass
class Batch:
    x: Tensor
    scale: float = 1.0
    extra: Any = None


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    x: Tensor
    tags: tuple[str, ...] = ("a",)


class Holder:
    """A plain object with tensors in attributes."""

    def __init__(self, x: Tensor) -> None:
        self.parts, self.note = [x, {"y": x * 2}], "note"


class Mode(enum.Enum):
    SIN, COS = "sin", "cos"


Pair = namedtuple("Pair", "left right")

ARGUMENTS: dict[str, tuple[Callable[..., Any], Callable[[], Any]]] = {
    "positional": (lambda m, x, y: x @ m.weight * y, lambda: (rows(), rows().sin())),
    "keyword": (lambda m, *, x, y=None: x @ m.weight, lambda: {"x": rows(), "y": None}),
    "mixed": (lambda m, x, y=2, *z, k, **o: x @ m.weight * y + k, lambda: {"x": rows(), "k": 1.5}),
    "star": (lambda m, *xs: sum(x @ m.weight for x in xs), lambda: (rows(), rows(), rows())),
    "none": (lambda m, x, mask=None: x @ m.weight, lambda: (rows(), None)),
    "int": (lambda m, x, n: (x @ m.weight) ** n, lambda: (rows(), 3)),
    "string": (lambda m, x, name: getattr(torch, name)(x @ m.weight), lambda: (rows(), "sin")),
    "bool": (lambda m, x, on: (x @ m.weight).relu() if on else x, lambda: (rows(), True)),
    "dtype": (lambda m, x, d: (x @ m.weight).to(d), lambda: (rows(), torch.float64)),
    "device": (lambda m, x, d: (x @ m.weight).to(d), lambda: (rows(), torch.device("cpu"))),
    "enum": (
        lambda m, x, mode: getattr(x @ m.weight, mode.value)(),
        lambda: (rows(), Mode.COS),
    ),
    "slice": (lambda m, x, s: (x @ m.weight)[s], lambda: (rows(), slice(0, 2))),
    "size": (lambda m, x, s: (x @ m.weight).view(s), lambda: (rows(), torch.Size([4, 3]))),
    "callable": (lambda m, x, f: f(x @ m.weight), lambda: (rows(), torch.tanh)),
    "numpy": (
        lambda m, x, a: x @ m.weight * torch.tensor(a),
        lambda: (rows(), np.array([1.0, 2, 3, 4], np.float32)),
    ),
    "set": (lambda m, x, s: x @ m.weight * len(s), lambda: (rows(), {1, 2})),
    "list": (lambda m, xs: torch.cat(xs) @ m.weight, lambda: ([rows(), rows().sin()],)),
    "dict": (lambda m, d: d["x"] @ m.weight + d["n"], lambda: ({"x": rows(), "n": 2},)),
    "nested": (
        lambda m, t: t[0]["a"][0] @ m.weight + t[1][0],
        lambda: (({"a": [rows(), None]}, (rows(), "text", ())),),
    ),
    "empty containers": (lambda m, x, a, b: x @ m.weight, lambda: (rows(), [], {})),
    "namedtuple": (lambda m, p: p.left @ m.weight * p.right, lambda: (Pair(rows(), rows()),)),
    "ordered": (lambda m, d: d["x"] @ m.weight, lambda: (OrderedDict(b=1, x=rows()),)),
    "dataclass": (lambda m, b: b.x @ m.weight * b.scale, lambda: (Batch(rows(), 2.0),)),
    "nested dataclass": (
        lambda m, b: b.x @ m.weight * b.extra.x,
        lambda: (Batch(rows(), 2.0, Batch(rows())),),
    ),
    "slots": (lambda m, b: b.x @ m.weight, lambda: (Frozen(rows()),)),
    "model output": (
        lambda m, o: o.last_hidden_state @ m.weight + len(o),
        lambda: (BaseModelOutput(last_hidden_state=rows(), hidden_states=(rows(),)),),
    ),
    "object": (
        lambda m, o: o.parts[0] @ m.weight + o.parts[1]["y"],
        lambda: (Holder(rows()),),
    ),
    "cache": (
        lambda m, x, c: x @ m.weight + c.layers[0].keys.sum() + c.get_seq_length(),
        lambda: (rows(), cache()),
    ),
    "scalar tensor": (lambda m, x, s: x @ m.weight * s, lambda: (rows(), torch.tensor(2.0))),
    "strided": (lambda m, x: x @ m.weight, lambda: (rows(4).t().contiguous().t()[::2],)),
    "expanded": (lambda m, x: x @ m.weight, lambda: (rows(1).expand(3, 4),)),
    "with gradient": (lambda m, x: (x @ m.weight).sin(), lambda: (rows().requires_grad_(),)),
    "integers": (lambda m, i: m.weight[i].sin(), lambda: (torch.tensor([0, 2, 2]),)),
    "booleans": (lambda m, b: m.weight.where(b, 0).sin(), lambda: (rows(4) > 0.9,)),
    "complex": (
        lambda m, z: (z.real @ m.weight) * z.imag,
        lambda: (torch.complex(rows(), rows().sin()),),
    ),
    "no tensors": (lambda m, n: m.weight * n, lambda: (2,)),
    "nothing": (lambda m: m.weight.sin(), lambda: ()),
}


def cache(keys: Tensor | None = None) -> DynamicCache:
    made = DynamicCache()
    keys = torch.ones(1, 2, 3, 4) if keys is None else keys
    made.update(keys, keys.clone(), 0)
    return made


@pytest.mark.parametrize("kind", ARGUMENTS)
def test_arguments(kind: str) -> None:
    forward, batch = ARGUMENTS[kind]
    model = both(forward, [batch, batch])
    assert len(captures(model)) == 1


STATIC: dict[str, tuple[Callable[..., Any], list[Any]]] = {
    "int": (lambda m, x, n: (x @ m.weight) ** n, [2, 3, 2]),
    "int and bool": (lambda m, x, n: x @ m.weight * (3 if n is True else 2), [1, True, 1]),
    "int and float": (lambda m, x, n: x @ m.weight * (3 if type(n) is int else 2), [1, 1.0, 1]),
    "zeros": (lambda m, x, n: torch.copysign(x @ m.weight, torch.tensor(n)), [0.0, -0.0]),
    "nan": (lambda m, x, n: x @ m.weight * (2 if n != n else 3), [float("nan")] * 2),
    "string": (lambda m, x, s: getattr(x @ m.weight, s)(), ["sin", "cos", "sin"]),
    "none or tensor": (
        lambda m, x, y: x @ m.weight if y is None else x @ m.weight * y,
        [None, torch.ones(4), None],
    ),
    "list lengths": (lambda m, x, y: x @ m.weight * sum(y), [[1], [1, 2], [3]]),
    "list or tuple": (lambda m, x, y: x @ m.weight * (2 + isinstance(y, list)), [(1,), [1]]),
    "dict keys": (lambda m, x, d: x @ m.weight * len(d.get("a", "abc")), [{"a": ""}, {"b": ""}]),
    "dict order": (
        lambda m, x, d: x @ m.weight * next(iter(d.values())), [{1: 2, 3: 4}, {3: 4, 1: 2}]
    ),
    "strides": (lambda m, x, y: (x @ m.weight + y.reshape(-1)[1]), [rows(4), rows(4).t()]),
    "dtypes": (lambda m, x, y: x @ m.weight * y, [torch.ones(4), torch.ones(4).double()]),
    "requires grad": (
        lambda m, x, y: x @ m.weight * (2 if y.requires_grad else 3),
        [torch.ones(4), torch.ones(4, requires_grad=True)],
    ),
    "attributes": (
        lambda m, x, o: x @ m.weight * o.scale, [Batch(rows(), 2.0), Batch(rows(), 3.0)]
    ),
    "arrays": (lambda m, x, a: x @ m.weight * float(a[0]), [np.array([1.0]), np.array([2.0])]),
    "sets": (lambda m, x, s: x @ m.weight * sum(s), [{1, 2}, {2, 3}, {2, 1}]),
    "functions": (lambda m, x, f: f(x @ m.weight), [torch.sin, torch.cos]),
}  # fmt: skip


@pytest.mark.parametrize("kind", STATIC)
def test_other_static_argument_is_another_call(kind: str) -> None:
    forward, values = STATIC[kind]
    both(forward, [lambda v=v: (rows(), v) for v in values])


def test_same_tensor_in_two_places() -> None:
    """Whether two arguments are one tensor is part of the signature."""
    one = rows()

    def forward(m: Function, x: Tensor, y: Tensor) -> Tensor:
        return x @ m.weight * (2 if x is y else 3)

    both(forward, [lambda: (one, one), lambda: (one, rows()), lambda: (one, one)])


def test_mutable_object_as_argument() -> None:
    """Changing what an argument holds is a change of the argument."""
    holder = Holder(rows())

    def batch(scale: float) -> Any:
        holder.parts[0] = rows() * scale
        return (holder,)

    both(lambda m, o: o.parts[0] @ m.weight, [lambda: batch(1.0), lambda: batch(2.0)])


def inexact_is_refused(forward: Any, batches: list[Any]) -> None:
    """What a graph cannot do has to be done eagerly, or exactly."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        both(forward, batches, strict=False)


SIDE_EFFECTS: dict[str, tuple[Callable[..., Any], Callable[[], Any]]] = {
    "list argument": (
        lambda m, x, out: (out.append(x @ m.weight), out[0])[1], lambda: (rows(), [])
    ),
    "dict argument": (
        lambda m, x, out: (out.update(y=x @ m.weight), out["y"])[1],
        lambda: (rows(), {}),
    ),
    "list argument with tensors": (
        lambda m, out: (out.append(out[0] @ m.weight), out[-1])[1],
        lambda: ([rows()],),
    ),
    "attribute of an argument": (
        lambda m, o: (setattr(o, "scale", 3.0), o.x @ m.weight)[1],
        lambda: (Batch(rows()),),
    ),
    "tensor attribute of an argument": (
        lambda m, o: (setattr(o, "x", o.x @ m.weight), o.x)[1],
        lambda: (Batch(rows()),),
    ),
    "input in place": (lambda m, x: (x.mul_(2), x @ m.weight)[1], lambda: (rows(),)),
    "view of input in place": (lambda m, x: (x[0].add_(1), x @ m.weight)[1], lambda: (rows(),)),
    "input replaced in place": (
        lambda m, x: x.copy_(rows() @ m.weight.detach()) @ m.weight, lambda: (rows(),)
    ),
    "non-leaf input in place": (
        lambda m, x: (x.mul_(2), x @ m.weight)[1],
        lambda: (rows().requires_grad_() * 1,),
    ),
    "inputs that overlap, in place": (
        lambda m, x, y: (x.mul_(2), y @ m.weight)[1],
        lambda: ((r := rows()), r[:]),
    ),
    "cache": (
        lambda m, x, c: c.update((x @ m.weight)[None, None], x[None, None], 0)[0].sum() * x,
        lambda: (rows(), DynamicCache()),
    ),
    "filled cache": (
        lambda m, x, c: c.update((x @ m.weight)[None, None], x[None, None], 0)[0].sum() * x,
        lambda: (rows(), cache(rows()[None, None])),
    ),
    "module attribute": (
        lambda m, x: (setattr(m, "last", x @ m.weight), m.last.sin())[1],
        lambda: (rows(),),
    ),
    "module counter": (
        lambda m, x: (setattr(m, "calls", getattr(m, "calls", 0) + 1), x @ m.weight * m.calls)[1],
        lambda: (rows(),),
    ),
    "module list": (
        lambda m, x: (m.__dict__.setdefault("log", []).append(1), x @ m.weight * len(m.log))[1],
        lambda: (rows(),),
    ),
    "buffer replaced": (
        lambda m, x: (setattr(m, "seen", m.seen + x.detach().sum(0)), x @ m.weight + m.seen)[1],
        lambda: (rows(),),
    ),
    "buffer in place": (
        lambda m, x: (m.seen.add_(x.detach().sum(0)), x @ m.weight + m.seen)[1],
        lambda: (rows(),),
    ),
    "python random": (lambda m, x: x @ m.weight * random.random(), lambda: (rows(),)),
    "numpy random": (lambda m, x: x @ m.weight * float(np.random.rand()), lambda: (rows(),)),
    "layer drop": (
        lambda m, x: x @ m.weight if torch.rand(1).item() < 0.5 else x * 2,
        lambda: (rows(),),
    ),
    "generator": (
        lambda m, x: x @ m.weight * torch.rand(4, generator=torch.Generator().manual_seed(3)),
        lambda: (rows(),),
    ),
    "float branch": (lambda m, x: x @ m.weight if x.sum() > 0 else x * 2, lambda: (rows(),)),
    "set data": (
        lambda m, x: (setattr(m.seen, "data", m.seen.data + 1), x @ m.weight * m.seen)[1],
        lambda: (rows(),),
    ),
    "requires grad switched": (
        lambda m, x: (y := x.clone().requires_grad_()) @ m.weight + y,
        lambda: (rows(),),
    ),
    "inner gradient": (
        lambda m, x: torch.autograd.grad(
            ((y := x.clone().requires_grad_()) @ m.weight).sin().sum(), y, create_graph=True
        )[0],
        lambda: (rows(),),
    ),
    "inner checkpoint": (
        lambda m, x: torch.utils.checkpoint.checkpoint(
            lambda y: F.dropout((y @ m.weight).sin(), 0.3), x, use_reentrant=False
        ),
        lambda: (rows(),),
    ),
    "to numpy": (
        lambda m, x: x @ m.weight * float(x.detach().numpy().sum()),
        lambda: (rows(),),
    ),
    "tolist": (lambda m, x: x @ m.weight * sum(x.tolist()[0]), lambda: (rows(),)),
    "data pointer": (lambda m, x: x @ m.weight * (x.data_ptr() != 0), lambda: (rows(),)),
}  # fmt: skip


@pytest.mark.parametrize("kind", SIDE_EFFECTS)
def test_side_effects_are_exact_or_run_eagerly(kind: str) -> None:
    forward, batch = SIDE_EFFECTS[kind]
    inexact_is_refused(forward, [batch] * 3)


# --- results --------------------------------------------------------------------------------------

RESULTS: dict[str, Callable[[Function, Tensor], Any]] = {
    "tensor": lambda m, x: x @ m.weight,
    "none": lambda m, x: (x @ m.weight, None)[1],
    "tuple": lambda m, x: (x @ m.weight, 3),
    "list": lambda m, x: [x @ m.weight, "text"],
    "dict": lambda m, x: {"a": x @ m.weight, "b": {"c": None}},
    "namedtuple": lambda m, x: Pair(x @ m.weight, 2.5),
    "dataclass": lambda m, x: Batch(x @ m.weight, 2.5),
    "object": lambda m, x: Holder(x @ m.weight),
    "model output": lambda m, x: CausalLMOutput(loss=(x @ m.weight).sum(), logits=x @ m.weight),
    "cache": lambda m, x: (x @ m.weight, cache()),
    "dtype": lambda m, x: (x @ m.weight, x.dtype, x.shape, x.device),
    "no tensors": lambda m, x: 3,
    "max": lambda m, x: (x @ m.weight).max(1),
}


@pytest.mark.parametrize("kind", RESULTS)
def test_results(kind: str) -> None:
    def loss(result: Any) -> Tensor:
        return total(tensors_in(_plain(result)))

    both(RESULTS[kind], [lambda: (rows(),)] * 2, loss=loss)


def test_results_are_made_anew_at_each_call() -> None:
    model = fxckpt.rewrite(Function(lambda m, x: {"a": [x @ m.weight]}), "nothing", strict=True)
    first, second = model(rows()), model(rows())
    assert first is not second
    assert first["a"] is not second["a"]
    first["a"].append(None)
    assert len(model(rows())["a"]) == 1


# --- where nodes come from ------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_every_node_knows_its_module_and_line(name: str) -> None:
    case = build(name, tiny=True)
    model = fxckpt.rewrite(case.model, "nothing", strict=True)
    case.loss(model(**case.batch(0))).backward()
    joint, paths = joint_of(model), {n for n, _ in case.model.named_modules()}
    for node in [*joint.forward_nodes(), *joint.backward_nodes()]:
        path, calls = node.meta["path"], node.meta["calls"]
        # A module made inside of forward, such as a loss, goes by its class.
        assert path in paths or path.endswith(calls[-1].cls.__name__), node
        file, _, line = node.meta["source"].rpartition(":")
        assert file.endswith(".py"), (node, node.meta["source"])
        assert line.isdigit()
    assert len(list(joint.backward_nodes())) > 10


def test_module_paths_of_gpt2() -> None:
    case = build("gpt2", tiny=True)
    model = fxckpt.rewrite(case.model, "nothing", strict=True, example_inputs=case.batch(0))
    joint = joint_of(model)

    def paths(nodes: Any, op: str) -> set[str]:
        return {n.meta["path"] for n in nodes if str(n.target) == f"aten.{op}.default"}

    products = {
        f"transformer.h.{i}.{part}"
        for i in range(2)
        for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    assert paths(joint.forward_nodes(), "addmm") == products
    assert paths(joint.backward_nodes(), "mm") == {*products, "lm_head"}
    assert paths(joint.backward_nodes(), "embedding_dense_backward") == {
        "transformer.wte",
        "transformer.wpe",
    }
    norms = {f"transformer.h.{i}.ln_{k}" for i in range(2) for k in (1, 2)} | {"transformer.ln_f"}
    assert paths(joint.forward_nodes(), "native_layer_norm") == norms
    assert paths(joint.backward_nodes(), "native_layer_norm_backward") == norms


def test_source_line_is_the_users() -> None:
    model = fxckpt.rewrite(Block(), "nothing", strict=True, example_inputs=(torch.ones(1, 3, 8),))
    (node,) = (n for n in joint_of(model).forward_nodes() if "masked_fill" in str(n.target))
    assert node.meta["source"].startswith("helpers.py:")
    assert node.meta["path"] == "attn"
    assert [c.cls.__name__ for c in node.meta["calls"]] == ["Block", "Attention"]


# --- no trace -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_capture_changes_nothing(name: str) -> None:
    case = build(name, tiny=True)
    batch = case.batch(0)
    model = fxckpt.rewrite(case.model, "nothing", strict=True)
    tensors = [*model.parameters(), *model.buffers(), *batch.values()]
    before = [content(t) for t in tensors], versions(tensors), random_states()
    attributes = modules_of(model)
    fxckpt.rewrite_(model, "nothing", strict=True, example_inputs=batch)
    assert ([content(t) for t in tensors], versions(tensors), random_states()) == before
    assert all(p.grad is None for p in model.parameters())
    for then, now in zip(attributes, modules_of(model), strict=True):
        assert then.keys() == now.keys()
        assert all(then[key] is now[key] for key in then)
    assert len(captures(model)) == 1


@pytest.mark.parametrize("name", MODELS)
def test_no_fake_tensor_is_left(name: str) -> None:
    case = build(name, tiny=True)
    model = fxckpt.rewrite(case.model, "nothing", strict=True)
    result = model(**case.batch(0))
    case.loss(result).backward()
    found = [result, *modules_of(model), *(p.grad for p in model.parameters())]
    assert not any(is_fake(t) for _, t in leaves(found) if isinstance(t, Tensor))


def test_capture_prints_nothing(capfd, caplog) -> None:
    for name in MODELS:
        case = build(name, tiny=True)
        fxckpt.rewrite(case.model, "nothing", strict=True, example_inputs=case.batch(0))
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []


def test_failed_capture_changes_nothing() -> None:
    def forward(m: Function, x: Tensor) -> Tensor:
        m.seen.add_(1)
        F.dropout(x, 0.5)
        return x * float(x.sum())

    model = Function(forward)
    before, attributes = random_states(), modules_of(model)
    with pytest.raises(CaptureError):
        fxckpt.rewrite(model, "nothing", strict=True, example_inputs=(rows(),))
    assert random_states() == before
    assert torch.equal(model.seen, torch.zeros(4))
    assert model.seen._version == 0
    assert all(
        now[k] is then[k]
        for then, now in zip(attributes, modules_of(model), strict=True)
        for k in then
    )
    assert not torch.is_autocast_enabled("cpu")
    assert torch.ones(1).add(1).item() == 2  # no mode is left behind


def test_hooks_of_submodules_do_not_run_twice() -> None:
    seen: list[str] = []

    def make() -> nn.Module:
        model = Stack(1)
        model.head.register_forward_hook(lambda *_: seen.append("forward"))
        model.blocks[0].register_forward_pre_hook(lambda *_: seen.append("pre"))
        model.blocks[0].mlp.register_full_backward_hook(lambda *_: seen.append("backward"))
        return model

    x = torch.ones(1, 3, 8)
    total(make()(x)).backward()
    eager, seen[:] = list(seen), []
    model = fxckpt.rewrite(make(), "nothing")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        total(model(x)).backward()
    assert seen == eager
    with pytest.raises(CaptureError, match="hook"):
        fxckpt.rewrite(make(), "nothing", strict=True, example_inputs=(x,))


def doubled(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return torch.mul(output, 2 if module.training else 3)


def wants_gradient(_: nn.Module, args: Any, output: Tensor) -> None:
    output.requires_grad_(True)


def halved(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor, ...]:
    return tuple(x / 2 for x in args)


def test_hooks_that_only_compute_are_captured() -> None:
    def make() -> nn.Module:
        model = chain(2, 4)
        model[0].requires_grad_(False)
        model[0].register_forward_hook(wants_gradient)
        model[1].register_forward_hook(doubled)
        model[2].register_forward_pre_hook(halved)
        return model

    assert_same_training(make, lambda _: torch.randn(3, 4))


def printing(_: nn.Module, args: Any, output: Tensor) -> None:
    print(output.shape)


def importing(_: nn.Module, args: Any, output: Tensor) -> None:
    import time

    time.sleep(0)


def collecting(_: nn.Module, args: Any, output: Tensor) -> None:
    FORWARDS.append(output.shape)


FORWARDS: list[Any] = []


@pytest.mark.parametrize("hook", [printing, importing, collecting])
def test_hooks_that_do_something_else_are_not(hook: Callable[..., None]) -> None:
    model = chain(2, 4)
    model[1].register_forward_hook(hook)
    with pytest.raises(CaptureError, match=f"a hook is registered \\({hook.__name__}"):
        fxckpt.rewrite(model, "nothing", strict=True)(torch.randn(3, 4))


def test_hooks_of_parameters_and_inputs_do_not_run() -> None:
    seen: list[str] = []
    model = Function(lambda m, x: (x @ m.weight).sin())
    model.weight.register_hook(lambda g: seen.append("parameter"))
    model.weight.register_post_accumulate_grad_hook(lambda p: seen.append("accumulated"))
    x = rows().requires_grad_()
    x.register_hook(lambda g: seen.append("input"))
    new = fxckpt.rewrite(model, "nothing", strict=True, example_inputs=(x,))
    assert seen == []
    new(x).sum().backward()
    assert sorted(seen) == ["accumulated", "input", "parameter"]


def test_hooks_inside_of_forward() -> None:
    """On an intermediate: it is part of backward."""
    seen: list[int] = []

    def forward(m: Function, x: Tensor) -> Tensor:
        y = x @ m.weight
        y.register_hook(lambda g: (seen.append(1), g * 2)[1])
        return y.sin()

    inexact_is_refused(forward, [lambda: (rows(),)] * 2)


def test_the_program_runs_at_the_first_two_calls() -> None:
    """At the first to capture it, at the second to see that it does the same again."""
    runs = itertools.count()
    model = Function(lambda m, x: (next(runs), x @ m.weight)[1])
    new = fxckpt.rewrite(model, "nothing", strict=True)
    for _ in range(4):
        new(rows()).sum().backward()
    assert next(runs) == 2


def test_state_that_changes_at_each_call() -> None:
    """A closure that counts: it runs as often as in eager, and counts the same."""
    seen: list[int] = []

    def make() -> nn.Module:
        seen.clear()
        seed_all(0)
        return Function(lambda m, x: (seen.append(1), x @ m.weight * len(seen))[1])

    def step(model: nn.Module, _: int) -> tuple[list[Tensor], Tensor, Tensor]:
        result = model(rows())
        return [], result, total(result)

    eager = train(make(), step, steps=5)
    with pytest.warns(FallbackWarning, match="changes objects that it finds outside"):
        ours = train(fxckpt.rewrite(make(), "nothing"), step, steps=5)
    assert_same(eager, ours)
    assert len(seen) == 5


def test_capture_allocates_no_activations() -> None:
    """A model of about 4 GB of activations, captured in a process that may not grow by 200 MB."""

    def forward(m: Function, x: Tensor) -> Tensor:
        wide = (x @ m.weight).unsqueeze(2).expand(-1, -1, 65536)  # 1024 x 4 x 65536 x 4 bytes
        for _ in range(4):
            wide = wide.sin()
        return wide.mean()

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fxckpt.rewrite(Function(forward), "nothing", strict=True, example_inputs=(torch.ones(1024, 4),))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 200 * 1024, f"grew by {grown / 1024:.0f} MiB"


def test_inputs_are_not_kept() -> None:
    """Neither by the capture nor by the call."""
    model = fxckpt.rewrite(Function(lambda m, x: (x @ m.weight).sin()), "nothing", strict=True)
    x = torch.ones(64, 4)
    model(x).sum().backward()
    del x
    gc.collect()
    assert not any(
        type(o) is Tensor and not is_fake(o) and o.shape == (64, 4) for o in gc.get_objects()
    )


# --- the branch that eager takes ------------------------------------------------------------------


def test_libraries_do_not_notice() -> None:
    seen: SimpleQueue[Any] = SimpleQueue()  # the like of which is not put back

    def forward(m: Function, x: Tensor) -> Tensor:
        seen.put(
            (
                torch.compiler.is_compiling(),
                torch.compiler.is_dynamo_compiling(),
                torch.jit.is_tracing(),
                torch.jit.is_scripting(),
                is_tracing(x),
                is_tracing(x @ m.weight),
                torch.is_grad_enabled(),
                torch.is_inference_mode_enabled(),
                m.training,
                torch.is_autocast_enabled("cpu"),
                isinstance(m.weight, nn.Parameter),
                x.is_leaf,
                x.requires_grad,
                x._version,
                x.is_contiguous(),
                x.device,
            )
        )
        return x @ m.weight

    model = Function(forward)
    x = rows().requires_grad_()
    model(x)
    fxckpt.rewrite(model, "nothing", strict=True, example_inputs=(x,))
    assert seen.get() == seen.get()
    assert seen.empty()
    assert not is_tracing(x)


GUARDS: dict[str, tuple[Callable[..., Any], list[Tensor]]] = {
    "all": (
        lambda m, x, k: x @ m.weight if k.all() else (x @ m.weight).sin(),
        [torch.tensor([True, True]), torch.tensor([True, False])],
    ),
    "any": (
        lambda m, x, k: (x @ m.weight).sin() if (k == 0).any() else x @ m.weight,
        [torch.tensor([1, 1]), torch.tensor([1, 0])],
    ),
    "item": (
        lambda m, x, k: (x @ m.weight)[:, : k.max().item()],
        [torch.tensor([1, 3]), torch.tensor([2, 1])],
    ),
    "int": (lambda m, x, k: x @ m.weight * int(k[0]), [torch.tensor([2, 3]), torch.tensor([4, 3])]),
    "tolist": (
        lambda m, x, k: torch.cat((x @ m.weight).split(k.tolist(), 1), 0),
        [torch.tensor([2, 2]), torch.tensor([2, 2])],
    ),
    "loop": (
        lambda m, x, k: sum(((x @ m.weight) ** i for i in range(1, 1 + int(k.sum()))), x),
        [torch.tensor([1, 1]), torch.tensor([1, 2])],
    ),
    "nonzero": (
        lambda m, x, k: (x @ m.weight)[:, : len(k.nonzero())],
        [torch.tensor([1, 1]), torch.tensor([1, 0])],
    ),
    "boolean index": (
        lambda m, x, k: (x @ m.weight)[:2][k > 0].sin(),
        [torch.tensor([1, 1]), torch.tensor([1, 0]), torch.tensor([0, 1])],
    ),
    "unique": (
        lambda m, x, k: x @ m.weight * len(k.unique()),
        [torch.tensor([1, 1]), torch.tensor([1, 0])],
    ),
    "repeat interleave": (
        lambda m, x, k: (x @ m.weight)[:2].repeat_interleave(k, 0),
        [torch.tensor([1, 1]), torch.tensor([3, 1])],
    ),
    "bincount": (
        lambda m, x, k: x @ m.weight * torch.bincount(k).max().item(),
        [torch.tensor([1, 1]), torch.tensor([1, 0])],
    ),
    "comparison": (
        lambda m, x, k: x @ m.weight if torch.equal(k, torch.ones_like(k)) else x,
        [torch.tensor([1, 1]), torch.tensor([1, 0])],
    ),
    "constant": (
        lambda m, x, k: x @ m.weight if torch.arange(3).sum() == 3 else x,
        [torch.tensor([1, 1]), torch.tensor([1, 0])],
    ),
    "assert": (
        lambda m, x, k: (x @ m.weight, [None][0 if k.min() >= 0 else 1])[0],
        [torch.tensor([1, 1]), torch.tensor([1, 0])],
    ),
}


@pytest.mark.parametrize("kind", GUARDS)
def test_values_that_python_reads(kind: str) -> None:
    forward, masks = GUARDS[kind]
    seen = [*masks, *masks, masks[0]]
    model = both(forward, [lambda k=k: (rows(), k) for k in seen])
    different = len({tuple(k.tolist()) for k in masks})
    assert 1 <= len(captures(model)) <= different


def test_guards_tell_captures_apart() -> None:
    forward, masks = GUARDS["all"]
    model = both(forward, [lambda k=k: (rows(), k) for k in masks * 2])
    assert len(captures(model)) == 2


def test_guard_on_a_buffer() -> None:
    """That the model itself counts up: another branch every other step."""

    def forward(m: Function, x: Tensor) -> Tensor:
        m.steps += 1
        return x @ m.weight if int(m.steps) % 2 else (x @ m.weight).sin()

    results = []
    for rewritten in (False, True):
        seed_all(0)
        model: nn.Module = Function(forward)
        model.register_buffer("steps", torch.tensor(0))
        if rewritten:
            model = fxckpt.rewrite(model, "nothing")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FallbackWarning)
            outs = [model(rows()) for _ in range(4)]
        results.append([("outs", [content(o) for o in outs]), ("steps", int(model.steps))])
    assert_same(*results)


def test_padding_and_no_padding() -> None:
    """transformers drops a mask that masks nothing."""
    case = build("bert", tiny=True)
    full = case.batch(0)
    masks = [full["attention_mask"], torch.ones_like(full["attention_mask"]), None]
    for mask in masks * 2:
        case.model.zero_grad()
        batch = {**full, "attention_mask": mask}
        fxckpt.verify(case.model, policy="nothing", **batch)
    model = fxckpt.rewrite(case.model, "nothing", strict=True)
    for mask in masks * 2:
        fxckpt.verify(model, **{**full, "attention_mask": mask})
    assert len(captures(model)) == 3


# --- errors ---------------------------------------------------------------------------------------


class Outer(nn.Module):
    """Does something that cannot be captured, two modules deep."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), Function(function)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


ERRORS: dict[str, tuple[Callable[..., Any], str]] = {
    "value": (lambda m, x: x * float(x.sum()), "reads a value"),
    "branch": (lambda m, x: x if x.sum() > 0 else x * 2, "reads a value"),
    "shape": (lambda m, x: x[x > 0], "reads a value"),
    "random": (lambda m, x: x if torch.rand(1) > 2 else x * 2, "random"),
    "generator": (
        lambda m, x: x * torch.rand(4, generator=torch.Generator()),
        "torch.Generator of its own",
    ),
}


@pytest.mark.parametrize("kind", ERRORS)
def test_errors_say_what_where_and_what_to_do(kind: str) -> None:
    function, reason = ERRORS[kind]
    with pytest.raises(CaptureError, match=reason) as caught:
        fxckpt.rewrite(Outer(function), "nothing", strict=True, example_inputs=(rows(),))
    error = caught.value
    assert reason in error.reason
    assert error.path == "layers.1"
    assert error.source.startswith("test_capture.py:")
    assert error.hint
    assert all(part in str(error) for part in (error.reason, error.path, error.source, error.hint))


@pytest.mark.parametrize(
    ("draw", "name"),
    [(lambda: random.random(), "`random`"), (lambda: float(np.random.rand()), "`numpy.random`")],
)
def test_random_numbers_of_python_and_numpy(draw, name: str) -> None:
    with pytest.raises(CaptureError, match=name) as caught:
        fxckpt.rewrite(
            Outer(lambda m, x: x * draw()), "nothing", strict=True, example_inputs=(rows(),)
        )
    assert caught.value.hint


# --- large models ---------------------------------------------------------------------------------


def test_llama_of_seven_billion_parameters() -> None:
    """Under the user's own FakeTensorMode: nothing of it exists."""
    from transformers import LlamaConfig, LlamaForCausalLM

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with FakeTensorMode():
        model = LlamaForCausalLM(LlamaConfig(use_cache=False)).train()
        ids = torch.zeros(1, 2048, dtype=torch.long)
        assert sum(p.numel() for p in model.parameters()) > 6.7e9
        new = fxckpt.rewrite(model, "dots", strict=True, units="model")
        loss = new(input_ids=ids, labels=ids).loss
        loss.backward()
    assert isinstance(loss, FakeTensor)
    joint = joint_of(new)
    joint.verify()
    products = [v for v in joint.values() if "mm" in str(v.op) and v.path.endswith("_proj")]
    assert len(products) == 32 * 7
    assert sum(v.bytes for v in joint.values()) > 40e9
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 2**20, f"grew by {grown / 1024:.0f} MiB"


class Fakes(TorchDispatchMode):
    """Notes operations on fakes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if any(map(is_fake, tensors_in((args, out)))):
            self.seen.add(str(func))
        return out


def test_modes_of_the_caller_do_not_see_captures() -> None:
    """Neither of forward nor of backward; the first three calls capture, compare, and only run."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Softmax(-1))
    model = fxckpt.rewrite(model, "dots", strict=True)
    for _ in range(3):
        with Fakes() as fakes:
            model(torch.ones(3, 4)).sum().backward()
        assert not fakes.seen


class SameNames(nn.Module):
    """Tensors of one name: in a list, and an argument like a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.factors = [torch.full((4,), 2.0), torch.full((4,), 3.0)]

    def forward(self, x: Tensor, *, weight: Tensor) -> Tensor:
        return (x * self.weight * self.factors[0]).sin() * weight * self.factors[1]


@pytest.mark.parametrize("policy", ["nothing", "everything"])
def test_tensors_of_one_name_are_told_apart(policy: str) -> None:
    model = SameNames()
    lean = fxckpt.rewrite(model, policy, strict=True)
    x, weight = torch.randn(3, 4), torch.randn(4, requires_grad=True)
    found = []
    for each in (model, lean):
        out = each(x, weight=weight)
        found.append([out, *torch.autograd.grad(out.sum(), [model.weight, weight])])
    assert all(map(torch.equal, *found))


def clamped(gradient: Tensor) -> Tensor:
    return gradient.clamp(-0.1, 0.1)


def hooked_inside(m: Function, x: Tensor) -> tuple[Tensor, Tensor]:
    """On a result that is returned as well, and on one that is removed again."""
    y = (x @ m.weight).tanh()
    y.register_hook(clamped)
    y.register_hook(lambda gradient: gradient * 2)
    y.register_hook(clamped).remove()
    return y, y.sin() * y


def test_hooks_of_results_that_only_compute_are_captured() -> None:
    assert_same_training(lambda: Function(hooked_inside), lambda _: rows().requires_grad_())


def test_hooks_of_inputs_inside_of_forward_are_refused() -> None:
    def forward(m: Function, x: Tensor) -> Tensor:
        x.register_hook(clamped)
        return (x @ m.weight).sin()

    inexact_is_refused(forward, [lambda: (rows().requires_grad_(),)] * 2)


@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
def test_addresses_of_fakes_are_refused() -> None:
    """By default they are zero, with a warning the first time."""
    model = Function(lambda m, x: x @ m.weight * (x.data_ptr() != 0))
    with FakeTensorMode():
        torch.empty(3).data_ptr()  # now it was warned
    with pytest.raises(CaptureError, match="Cannot access data pointer"):
        fxckpt.rewrite(model, "nothing", strict=True)(rows())
