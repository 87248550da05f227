"""Fallback by parts: what cannot be captured as a whole loses little, and nothing of exactness."""

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    adamw,
    assert_same,
    assert_same_training,
    content,
    grads_of,
    leaves,
    seed_all,
    total,
    train,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers import CLIPVisionConfig, CLIPVisionModel

import fxckpt
from fxckpt import CaptureError, FallbackWarning, PolicyError

WIDTH = 8


class Layer(nn.Module):
    """A feed-forward layer with dropout and a normalisation."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.norm, self.drop = nn.LayerNorm(WIDTH), nn.Dropout(dropout)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.down(F.gelu(self.up(self.norm(x)))))


class Net(nn.Module):
    """Layers, and something `odd` that is done with them and what they compute."""

    def __init__(self, odd: Callable[["Net", Tensor], Tensor], layers: int = 3) -> None:
        super().__init__()
        self.odd = odd
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.odd(self, x))


def all_layers(net: Net, x: Tensor) -> Tensor:
    for layer in net.layers:
        x = layer(x)
    return x


def layer_drop(net: Net, x: Tensor) -> Tensor:
    for layer in net.layers:
        if torch.rand(()) < 0.7:
            x = layer(x)
    return x


def data_dependent(net: Net, x: Tensor) -> Tensor:
    x = all_layers(net, x)
    return x if x.mean() > 0 else -x


def masked(net: Net, x: Tensor) -> Tensor:
    x = all_layers(net, x)
    return x[x[:, 0] > 0].sum(0, keepdim=True) + x


def item(net: Net, x: Tensor) -> Tensor:
    return all_layers(net, x) * float(x.detach().norm())


def sparse(net: Net, x: Tensor) -> Tensor:
    return torch.sparse.mm(x.to_sparse(), torch.eye(WIDTH)) + all_layers(net, x)


def hooked(net: Net, x: Tensor) -> Tensor:
    x = all_layers(net, x)
    if x.requires_grad:
        factor = [2]
        x.register_hook(lambda g: g * factor[0])
    return x


def redrawing(net: Net, x: Tensor) -> Tensor:
    x = checkpoint(net.layers[0], x, use_reentrant=False, preserve_rng_state=False)
    return net.layers[2](net.layers[1](x))


def checkpointed_reentrant(net: Net, x: Tensor) -> Tensor:
    x = checkpoint(net.layers[0], x, use_reentrant=True)
    return net.layers[2](net.layers[1](x))


ODD = {f.__name__: f for f in (layer_drop, data_dependent, masked, item, sparse, hooked, redrawing)}


def batch(number: int) -> Tensor:
    return torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(number))


def step(model: nn.Module, number: int) -> tuple[list[Tensor], Any, Tensor]:
    x = batch(number).requires_grad_()
    result = model(x)
    return [x], result, total(result)


def train_both(make: Callable[[], nn.Module], policy: Any = "nothing", **options: Any) -> Any:
    """Trains eager and rewritten, asserts that all is the same; the model and its warnings."""
    seed_all(0)
    eager = train(make(), step, optimizer=adamw)
    seed_all(0)
    model = fxckpt.rewrite(make(), policy, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours = train(model, step, optimizer=adamw)
    assert_same(eager, ours)
    found = [str(w.message) for w in caught if issubclass(w.category, FallbackWarning)]
    return model, found


def saved_bytes(model: nn.Module) -> int:
    """Bytes that one forward keeps for its backward, besides parameters."""
    known = {p.untyped_storage()._cdata for p in model.parameters()}
    sizes: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in known:
            sizes[storage._cdata] = storage.nbytes()
        return t

    kept = []
    with saved_tensors_hooks(pack, lambda t: t):
        kept.append(model(batch(0).requires_grad_()))
    return sum(sizes.values())


@pytest.mark.parametrize("name", ODD)
def test_parts_train_as_in_eager(name: str) -> None:
    _, found = train_both(lambda: Net(ODD[name]))
    assert len(found) == 1
    assert found[0].startswith("Net runs eagerly, but for ")
    assert "(layers.*)" in found[0]
    assert "test_parts.py:" in found[0]


@pytest.mark.parametrize("name", ["data_dependent", "masked", "item", "hooked"])
@pytest.mark.parametrize("policy", ["nothing", "dots", "mlp", "block", "norm"])
def test_parts_save_nearly_what_the_whole_saves(name: str, policy: str) -> None:
    """The share of the whole's saving that is kept: at least 70 %."""
    eager, whole = (
        saved_bytes(m) for m in (Net(all_layers), fxckpt.rewrite(Net(all_layers), policy))
    )
    with pytest.warns(FallbackWarning):
        parts = saved_bytes(fxckpt.rewrite(Net(ODD[name]), policy))
    odd = saved_bytes(Net(ODD[name]))
    assert odd - parts >= 0.7 * (eager - whole) > 0


def test_strict_raises_instead() -> None:
    model = fxckpt.rewrite(Net(data_dependent), "nothing", strict=True)
    with pytest.raises(CaptureError, match="reads a value"):
        model(batch(0))


def test_the_original_is_left_as_it_was() -> None:
    net = Net(data_dependent)
    before = [(type(m), dict(vars(m))) for m in net.modules()]
    model = fxckpt.rewrite(net, "nothing")
    with pytest.warns(FallbackWarning):
        total(model(batch(0))).backward()
    for m, (cls, attributes) in zip(net.modules(), before, strict=True):
        assert type(m) is cls
        assert vars(m).keys() == attributes.keys()
        assert all(vars(m)[k] is v for k, v in attributes.items())


def test_inside_of_a_forward_that_raises() -> None:
    """The parts are as before afterwards, and the error is the user's."""

    def raising(net: Net, x: Tensor) -> Tensor:
        if all_layers(net, x).sum() > -1e9:
            raise KeyError("mine")
        return x

    model = fxckpt.rewrite(Net(raising), "nothing")
    for _ in range(2):
        with pytest.raises(KeyError, match="mine"):
            model(batch(0))
        assert {type(layer) for layer in model.layers} == {Layer}


def test_largest_parts_are_captured() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Net(all_layers)

        def forward(self, x: Tensor) -> Tensor:
            y = self.inner(x)
            return y if y.sum() > 0 else -y

    _, found = train_both(Outer)
    assert "but for 1 of its parts (inner)" in found[0]


def test_two_causes_are_two_warnings() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = Net(data_dependent), Net(item)
            self.back = nn.Linear(3, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.back(self.one(x)))

    _, found = train_both(Outer)
    assert len(found) == 2
    assert sum("of its parts (one.layers.*, two.layers.*)" in text for text in found) == 1
    assert sum(text.startswith("Net runs eagerly: ") for text in found) == 1


def test_a_frozen_part_in_evaluation_mode_saves_too() -> None:
    """Of a model in training; as without parts, where the mode of the model decides."""
    model = Net(data_dependent)
    model.layers.eval()
    eager = saved_bytes(model)
    with pytest.warns(FallbackWarning, match="layers"):
        assert saved_bytes(fxckpt.rewrite(model, "nothing")) < eager


def test_parts_of_a_model_in_evaluation_mode_run_eagerly() -> None:
    model = fxckpt.rewrite(Net(data_dependent), "nothing").eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert saved_bytes(model) == saved_bytes(Net(data_dependent).eval())


def test_a_rewritten_part_keeps_its_policy() -> None:
    def make() -> nn.Module:
        model = Net(data_dependent)
        fxckpt.rewrite_(model.layers[0], "everything")
        return model

    model, found = train_both(make)
    assert "but for 2 of its parts" in found[0]
    assert fxckpt.is_rewritten(model.layers[0])


def test_reentrant_checkpoint_inside() -> None:
    train_both(lambda: Net(checkpointed_reentrant))


def test_second_order_through_parts() -> None:
    """First order is exact; in a backward through all parts, sums may be rounded otherwise."""

    def gradients(model: nn.Module) -> list[Tensor]:
        seed_all(1)
        x = batch(0).requires_grad_()
        (first,) = torch.autograd.grad(total(model(x)), x, create_graph=True)
        return [first, *torch.autograd.grad(first.pow(2).sum(), list(model.parameters()))]

    model = Net(data_dependent)
    expected = gradients(model)
    with pytest.warns(FallbackWarning):
        got = gradients(fxckpt.rewrite(model, "nothing"))
    assert torch.equal(expected[0], got[0])
    for a, b in zip(expected[1:], got[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def pickled(m: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(m))


@pytest.mark.parametrize("again", [copy.deepcopy, copy.copy, pickled])
def test_copies_made_inside_of_forward(again: Callable[[Any], Any]) -> None:
    """A copy of a part that is made while the parts are in place is a module of its own."""

    def copying(net: Net, x: Tensor) -> Tensor:
        twin = again(net.layers[0])
        assert type(twin) is Layer
        with torch.no_grad():
            twin.up.weight = nn.Parameter(twin.up.weight * 2)
        return twin(all_layers(net, x)) * (1 if x.sum() > 0 else 2)

    train_both(lambda: Net(copying))


def test_replaced_parts() -> None:
    class Swapping(Net):
        pass

    def run(rewrite: Callable[[nn.Module], nn.Module]) -> Any:
        seed_all(0)
        model = rewrite(Swapping(data_dependent))
        record = train(model, step, steps=2)
        seed_all(3)
        model.layers[1] = nn.Sequential(Layer(), nn.Tanh())
        return record + train(model, step, steps=2)

    with pytest.warns(FallbackWarning):
        ours = run(lambda m: fxckpt.rewrite(m, "nothing"))
    assert_same(run(lambda m: m), ours)


def test_a_kind_that_no_part_has() -> None:
    """The rest of the model may have it: no error, but the warning says that nothing is saved."""
    model = fxckpt.rewrite(Net(data_dependent), "attention")
    with pytest.warns(FallbackWarning, match="without saving memory"):
        model(batch(0))
    with pytest.raises(PolicyError):
        fxckpt.rewrite(Net(all_layers), "attention")(batch(0))


def test_selectors_go_by_the_path_in_the_whole() -> None:
    with pytest.warns(FallbackWarning, match=r"1 of its parts \(layers\.\*\)"):
        fxckpt.rewrite(Net(data_dependent), recompute="layers.1")(batch(0))
    with pytest.warns(FallbackWarning, match="without saving memory"):
        fxckpt.rewrite(Net(data_dependent), recompute="layers.7")(batch(0))


def test_policies_see_paths_of_the_whole() -> None:
    seen = set()

    def policy(value: fxckpt.Value) -> bool:
        seen.add(value.path)
        return False

    with pytest.warns(FallbackWarning):
        fxckpt.rewrite(Net(data_dependent), policy)(batch(0))
    assert {"layers.0", "layers.2.up"} <= seen


def test_verify_by_parts() -> None:
    with pytest.warns(FallbackWarning):
        fxckpt.verify(Net(data_dependent), batch(0), policy="nothing")


@pytest.mark.slow
@settings(max_examples=20)
@given(
    first=st.sampled_from(sorted(ODD)),
    second=st.sampled_from(sorted(ODD)),
    policy=st.sampled_from(["nothing", "dots", "block", "mlp"]),
    layers=st.integers(3, 4),
)
def test_nests_of_what_cannot_be_captured(
    first: str, second: str, policy: str, layers: int
) -> None:
    def make() -> nn.Module:
        inner = Net(ODD[second], layers)
        inner.head = nn.Linear(WIDTH, WIDTH)
        outer = Net(ODD[first], layers)
        outer.layers[1] = inner
        return outer

    train_both(make, policy)


class Tower(nn.Module):
    """Reads hidden states that hooks of transformers collect below it, as llava does."""

    def __init__(self) -> None:
        super().__init__()
        config = CLIPVisionConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
            image_size=8, patch_size=4,
        )  # fmt: skip
        self.tower, self.last = CLIPVisionModel(config), nn.Linear(16, 4)

    def forward(self, images: Tensor) -> Tensor:
        states = self.tower(images, output_hidden_states=True).hidden_states
        return self.last(states[-2])


def test_hidden_states_are_collected_below() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the first call prepares hooks: nothing is worth telling
        assert_same_training(
            Tower,
            lambda number: torch.full((2, 3, 8, 8), 1.0 / (number + 1)),
            rewrite=lambda m, _: fxckpt.rewrite(m, "nothing"),
        )


class Ties(nn.Module):
    """Ties a weight of its part to its own, later on."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.steps = nn.Linear(WIDTH, WIDTH), 0
        self.part = nn.Sequential(nn.GELU(), nn.Linear(WIDTH, WIDTH), nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1  # so that the whole is not captured
        with torch.autocast("cpu", torch.bfloat16):
            return self.part(self.first(x))


def test_weights_tied_between_steps_are_cast_as_in_eager() -> None:
    """Autocast casts a weight once: the gradients of its uses are added up before they are cast."""

    def tie(model: nn.Module, number: int) -> Tensor:
        if number == 3:
            model.part[1].weight = model.first.weight
        return total([model(torch.randn(5, WIDTH)) for _ in range(3)])

    records = []
    for rewritten in (False, True):
        seed_all(0)
        model: nn.Module = Ties()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FallbackWarning)
            model = fxckpt.rewrite(model, "nothing") if rewritten else model
            for number in range(6):
                tie(model, number).backward()
        records.append(leaves(grads_of(model)))
    assert_same(*([(n, content(g)) for n, g in r] for r in records))
