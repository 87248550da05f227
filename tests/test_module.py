"""A rewritten module is the module that it was made from, except for its forward."""

import copy
import inspect
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
from helpers import Function, Stack, assert_same, captures, content, leaves, seed_all, total
from torch import Tensor, nn

import fxckpt
from bench.models import build
from fxckpt import CaptureError, FallbackWarning, FxckptError


class Net(nn.Module):
    """Doc of Net."""

    kind = "net"

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(width, width), nn.BatchNorm1d(width)
        self.note = ["a list"]

    def forward(self, x: Tensor, scale: float = 1.0, *, shift: Tensor | None = None) -> Tensor:
        """Doc of forward."""
        out = self.helper(self.norm(self.layer(x))) * scale
        return out if shift is None else out + shift

    def helper(self, x: Tensor) -> Tensor:
        return x.tanh()


class Child(Net):
    def forward(self, x: Tensor, scale: float = 1.0, *, shift: Tensor | None = None) -> Tensor:
        return super().forward(x, scale, shift=shift).sin()


def x() -> Tensor:
    return torch.linspace(-1, 1, 12).view(3, 4).cos()


def step(model: nn.Module, *args: Any, **kwargs: Any) -> list[tuple[str, Any]]:
    """One forward and backward, everything that comes of it; leaves the model's gradients."""
    seed_all(3)
    model.zero_grad()
    out = model(x(), *args, **kwargs)
    total(out).backward()
    found = {"out": out, "grads": [p.grad for p in model.parameters()]}
    return [(n, None if t is None else content(t)) for n, t in leaves(found)]


# --- identity ------------------------------------------------------------------------------------


def test_class_and_attributes() -> None:
    model = Net()
    new = fxckpt.rewrite(model, "nothing")
    assert isinstance(new, Net)
    assert type(new).__name__ == type(new).__qualname__ == "Net"
    assert type(new).__module__ == Net.__module__
    assert type(new).__doc__ == "Doc of Net."
    assert new.kind == "net"
    assert new.note is model.note
    assert new.layer is model.layer
    assert new.layer.weight is model.layer.weight
    assert new.norm.running_mean is model.norm.running_mean
    assert repr(new) == repr(model)
    assert dir(new) == dir(model) or set(dir(model)) <= set(dir(new))
    assert torch.equal(new.helper(x()), x().tanh())


def test_signature_of_forward() -> None:
    new = fxckpt.rewrite(Net(), "nothing")
    assert inspect.signature(new.forward) == inspect.signature(Net().forward)
    assert next(iter(inspect.signature(type(new).forward).parameters)) == "self"
    assert new.forward.__doc__ == "Doc of forward."


def test_signature_of_a_transformers_model() -> None:
    """`Trainer` and `generate` look at it."""
    model = build("gpt2", tiny=True).model
    new = fxckpt.rewrite(model, "nothing")
    assert inspect.signature(new.forward) == inspect.signature(model.forward)
    assert new.config is model.config
    assert new.can_generate()
    ids = torch.tensor([[1, 2, 3]])
    model.eval()
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    expected = model.generate(ids, attention_mask=mask, **options)
    assert torch.equal(new.generate(ids, attention_mask=mask, **options), expected)


def test_super_forward() -> None:
    seed_all(0)
    eager = step(Child())
    seed_all(0)
    new = fxckpt.rewrite(Child(), "nothing", strict=True)
    assert_same(eager, step(new))
    assert isinstance(new, Net)
    assert len(captures(new)) == 1


def test_the_original_is_left_as_it_was() -> None:
    model = Net()
    before = dict(vars(model))
    new = fxckpt.rewrite(model, "nothing", strict=True)
    step(new)
    assert type(model) is Net
    assert vars(model) == before
    assert not fxckpt.is_rewritten(model)
    assert fxckpt.is_rewritten(new)


def test_original_and_rewritten_compare() -> None:
    model = Net()
    new = fxckpt.rewrite(model, "nothing", strict=True)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    eager = step(model)
    model.load_state_dict(state)
    assert_same(eager, step(new))


def test_rewriting_in_place_and_back() -> None:
    model = Net()
    before, state = dict(vars(model)), {k: v.clone() for k, v in model.state_dict().items()}
    eager = step(model)
    model.load_state_dict(state)
    assert fxckpt.rewrite_(model, "nothing", strict=True) is model
    assert fxckpt.is_rewritten(model)
    assert_same(eager, step(model))
    assert len(captures(model)) == 1
    assert fxckpt.restore_(model) is model
    assert type(model) is Net
    assert vars(model) == before
    assert not fxckpt.is_rewritten(model)
    model.load_state_dict(state)
    assert_same(eager, step(model))


def test_rewriting_again_replaces_the_policy() -> None:
    model = fxckpt.rewrite_(Net(), "everything", strict=True)
    step(model)
    saved = len(_residuals(model))
    fxckpt.rewrite_(model, "nothing", strict=True)
    assert captures(model) == []
    step(model)
    assert len(_residuals(model)) < saved
    assert type(fxckpt.restore_(model)) is Net


def test_rewriting_a_rewritten_module_makes_another() -> None:
    first = fxckpt.rewrite(Net(), "everything", strict=True)
    step(first)
    second = fxckpt.rewrite(first, "nothing", strict=True)
    step(second)
    assert first is not second
    assert len(_residuals(second)) < len(_residuals(first))
    assert type(fxckpt.restore_(second)) is Net
    assert fxckpt.is_rewritten(first)


def _residuals(model: nn.Module) -> list[str]:
    forward, _ = fxckpt.graphs(model)
    return list(forward.graph.output_node().args[0])


def test_forward_of_the_instance_is_kept() -> None:
    """As wrappers of training libraries set it."""
    model = Net()
    original = model.forward
    model.forward = lambda *args, **kwargs: original(*args, **kwargs) * 2
    wrapped = model.forward
    eager = step(model)
    seed_all(0)
    model.norm.reset_running_stats()
    fxckpt.rewrite_(model, "nothing", strict=True)
    assert_same(eager, step(model))
    assert len(captures(model)) == 1
    fxckpt.restore_(model)
    assert model.forward is wrapped


def test_forward_called_directly() -> None:
    seed_all(0)
    model = Net()
    eager = model.forward(x())
    model.norm.reset_running_stats()
    new = fxckpt.rewrite(model, "nothing", strict=True)
    out = new.forward(x())
    assert torch.equal(eager, out)
    assert len(captures(new)) == 1


def test_hooks_of_the_module_itself_run_at_each_call() -> None:
    new = fxckpt.rewrite(Net(), "nothing", strict=True)
    seen: list[str] = []
    new.register_forward_pre_hook(lambda m, args: seen.append("pre"))
    new.register_forward_hook(lambda m, args, out: seen.append("post"))
    new.register_full_backward_hook(lambda m, gi, go: seen.append("backward"))
    for _ in range(2):
        new(x().requires_grad_()).sum().backward()
    assert seen == ["pre", "post", "backward"] * 2


def test_train_and_eval() -> None:
    model = Net()
    new = fxckpt.rewrite(model, "nothing", strict=True)
    assert new.eval() is new
    assert not new.training
    assert not new.norm.training
    assert not model.norm.training  # shared
    before = new.norm.running_mean.clone()
    new(x())
    assert torch.equal(before, new.norm.running_mean)
    assert new.train().training
    new(x())
    assert not torch.equal(before, new.norm.running_mean)
    assert len(captures(new)) == 1


def test_submodules_of_a_rewritten_module_are_plain() -> None:
    new = fxckpt.rewrite(Stack(), "nothing")
    assert not any(fxckpt.is_rewritten(m) for m in new.children())


def test_modules_can_be_found_by_the_original_class() -> None:
    outer = nn.Sequential(Net(), Net())
    fxckpt.rewrite_(outer[0], "nothing", strict=True)
    assert [type(m).__name__ for m in outer.modules() if isinstance(m, Net)] == ["Net", "Net"]
    seed_all(0)
    total(outer(x())).backward()
    assert len(captures(outer[0])) == 1


# --- copies and files -----------------------------------------------------------------------------


@pytest.mark.parametrize("called", [False, True])
def test_deepcopy_has_its_own_parameters(called: bool) -> None:
    model = fxckpt.rewrite(Net(), "nothing", strict=True)
    if called:
        step(model)
    twin = copy.deepcopy(model)
    assert fxckpt.is_rewritten(twin)
    assert twin.layer is not model.layer
    eager = step(copy.deepcopy(fxckpt.restore_(copy.deepcopy(model))))
    with torch.no_grad():
        model.layer.weight.add_(100)
    assert_same(eager, step(twin))
    assert len(captures(twin)) == 1
    assert set(map(id, captures(twin))).isdisjoint(map(id, captures(model)))
    assert type(fxckpt.restore_(twin)) is Net


def test_deepcopy_inside_of_a_tree() -> None:
    outer = nn.ModuleDict({"a": Net()})
    outer["b"] = outer["a"]
    fxckpt.rewrite_(outer["a"], "nothing", strict=True)
    twin = copy.deepcopy(outer)
    assert twin["a"] is twin["b"]
    assert fxckpt.is_rewritten(twin["a"])
    assert step(twin["a"]) == step(outer["a"])


def test_copy_shares_parameters() -> None:
    model = fxckpt.rewrite(Net(), "nothing", strict=True)
    step(model)
    twin = copy.copy(model)
    assert fxckpt.is_rewritten(twin)
    assert twin.layer is model.layer
    step(twin)
    assert len(captures(twin)) == len(captures(model)) == 1
    fxckpt.restore_(twin)
    assert fxckpt.is_rewritten(model)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_pickle_holds_the_original_class(protocol: int) -> None:
    model = fxckpt.rewrite(Net(), "nothing", strict=True)
    step(model)
    data = pickle.dumps(model, protocol)
    assert b"fxckpt" not in data
    loaded = pickle.loads(data)
    assert type(loaded) is Net
    assert not fxckpt.is_rewritten(loaded)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    loaded(x())


def test_torch_save() -> None:
    model = fxckpt.rewrite(Net(), "nothing", strict=True)
    step(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert type(loaded) is Net
    assert torch.equal(loaded.layer.weight, model.layer.weight)


def test_state_dict_both_ways() -> None:
    model, other = Net(), Net()
    new = fxckpt.rewrite(model, "nothing", strict=True)
    assert list(new.state_dict()) == list(model.state_dict())
    other.load_state_dict(new.state_dict())
    new.load_state_dict(Net().state_dict())
    new.load_state_dict(other.state_dict())
    assert_same(step(other), step(new))
    assert [n for n, _ in new.named_parameters()] == [n for n, _ in other.named_parameters()]
    assert [n for n, _ in new.named_modules()] == [n for n, _ in other.named_modules()]


def test_save_pretrained(tmp_path) -> None:
    case = build("gpt2", tiny=True)
    new = fxckpt.rewrite(case.model, "nothing", strict=True)
    case.loss(new(**case.batch(0))).backward()
    new.save_pretrained(tmp_path)
    loaded = type(case.model).from_pretrained(tmp_path)
    assert type(loaded) is type(case.model)
    for a, b in zip(loaded.parameters(), case.model.parameters(), strict=True):
        assert torch.equal(a, b)


# --- capturing at once, graphs --------------------------------------------------------------------


@pytest.mark.parametrize("example", [(x(),), {"x": x(), "scale": 2.0}])
def test_example_inputs_capture_at_once(example: Any) -> None:
    new = fxckpt.rewrite(Net(), "nothing", example_inputs=example, strict=True)
    assert len(captures(new)) == 1
    assert all(isinstance(g, torch.fx.GraphModule) for g in fxckpt.graphs(new))
    new(*example) if isinstance(example, tuple) else new(**example)
    assert len(captures(new)) == 1


def test_example_inputs_work_under_no_grad() -> None:
    with torch.no_grad():
        new = fxckpt.rewrite(Net(), "nothing", example_inputs=(x(),), strict=True)
    new(x()).sum().backward()
    assert len(captures(new)) == 1


def test_graphs_are_those_of_the_latest_call() -> None:
    new = fxckpt.rewrite(Net(), "nothing", strict=True)
    seen = []
    for rows in (3, 2, 3):
        new(torch.ones(rows, 4)).sum().backward()
        seen.append(fxckpt.graphs(new)[0])
    assert seen[0] is seen[2] is not seen[1]


def test_graphs_can_be_run() -> None:
    new = fxckpt.rewrite(Function(lambda m, x: (x @ m.weight).tanh()), "nothing", strict=True)
    out = new(x())
    forward, _ = fxckpt.graphs(new)
    arguments = {"weight": new.weight.detach(), "seen": new.seen}
    inputs = [arguments.get(n.name, x()) for n in forward.graph.nodes if n.op == "placeholder"]
    assert torch.equal(forward.forward(list(inputs))[0], out)


# --- mistakes of the user -------------------------------------------------------------------------


@pytest.mark.parametrize("call", [fxckpt.rewrite, fxckpt.rewrite_])
@pytest.mark.parametrize("what", [lambda x: x, torch.ones(1), None, Net])
def test_not_a_module(call, what) -> None:
    with pytest.raises(FxckptError, match=rf"{call.__name__}\(model, ...\): expected .*Module"):
        call(what, "nothing")


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_compiled_modules_are_refused() -> None:
    for compiled in (torch.jit.script(nn.Linear(2, 2)), torch.compile(nn.Linear(2, 2))):
        with pytest.raises(FxckptError, match="compiled already"):
            fxckpt.rewrite(compiled, "nothing")


@pytest.mark.parametrize("example", [x(), [x()], "x", 3])
def test_bad_example_inputs(example: Any) -> None:
    with pytest.raises(FxckptError, match=r"example_inputs.*expected a tuple"):
        fxckpt.rewrite(Net(), "nothing", example_inputs=example)


def test_example_inputs_in_evaluation_mode() -> None:
    with pytest.raises(FxckptError, match="evaluation mode"):
        fxckpt.rewrite(Net().eval(), "nothing", example_inputs=(x(),))


def test_example_inputs_that_forward_refuses() -> None:
    with pytest.raises((TypeError, CaptureError), match="unexpected keyword argument"):
        fxckpt.rewrite(Net(), "nothing", example_inputs={"x": x(), "y": 1}, strict=True)


@pytest.mark.parametrize("call", [fxckpt.restore_, fxckpt.graphs])
@pytest.mark.parametrize("model", [Net(), 3], ids=["module", "int"])
def test_not_rewritten(call, model: Any) -> None:
    with pytest.raises(FxckptError, match=rf"{call.__name__}\(model\).*not rewritten"):
        call(model)


def test_is_rewritten_answers_for_anything() -> None:
    assert not any(map(fxckpt.is_rewritten, (Net(), None, 3, fxckpt)))


def test_graphs_before_the_first_call() -> None:
    with pytest.raises(FxckptError, match="nothing was captured yet"):
        fxckpt.graphs(fxckpt.rewrite(Net(), "nothing"))


def test_failed_rewriting_leaves_the_module_alone() -> None:
    model = Net()
    with pytest.raises(FxckptError):
        fxckpt.rewrite_(model, "no such policy")
    assert type(model) is Net
    with pytest.raises(CaptureError):
        fxckpt.rewrite_(model, "nothing", strict=True, example_inputs={"unknown": 1})
    assert type(model) is Net
    assert not fxckpt.is_rewritten(model)


def test_errors_of_forward_are_the_users_own() -> None:
    """A mistake in the call raises what eager raises, not something about capturing."""
    new = fxckpt.rewrite(Net(), "nothing")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
            new(torch.ones(3, 5))
        with pytest.raises(TypeError, match="unexpected keyword argument"):
            new(x(), y=1)
    new(x()).sum().backward()
    assert len(captures(new)) == 1


def test_fallback_warns_once_and_is_exact() -> None:
    def forward(m: Function, x: Tensor) -> Tensor:
        return (x @ m.weight).tanh() if float(x.sum()) > 0 else x @ m.weight

    seed_all(0)
    model = Function(forward)
    eager = step(model)
    new = fxckpt.rewrite(model, "nothing")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert_same(eager, step(new))
        step(new)
        new(torch.ones(2, 4))
    assert len(caught) == 1
    assert caught[0].category is FallbackWarning
    assert "runs eagerly" in str(caught[0].message)
    assert caught[0].filename == __file__


def test_strict_raises_instead() -> None:
    new = fxckpt.rewrite(Function(lambda m, x: x * float(x.sum())), "nothing", strict=True)
    with pytest.raises(CaptureError, match="reads a value"):
        new(x())


def test_wrapped_in_data_parallel_and_the_like() -> None:
    """Wrappers that hold the module as a submodule."""
    new = fxckpt.rewrite(Net(), "nothing", strict=True)
    outer = nn.Sequential(new, nn.Linear(4, 1))
    assert "0.layer.weight" in outer.state_dict()
    total(outer(x())).backward()
    assert len(captures(new)) == 1
    averaged = torch.optim.swa_utils.AveragedModel(new)
    averaged.update_parameters(new)
    assert fxckpt.is_rewritten(averaged.module)
    averaged.train()
    averaged(x()).sum().backward()


def test_parametrization_added_after_rewriting() -> None:
    seed_all(0)
    new = fxckpt.rewrite(Net(), "nothing", strict=True)
    step(new)
    nn.utils.parametrizations.weight_norm(new.layer)
    twin = copy.deepcopy(new)
    assert_same(step(fxckpt.restore_(twin)), step(new))
