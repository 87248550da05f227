"""Checkpointed functions and rewritten modules under the transforms of `torch.func`."""

import itertools
import sys
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import (
    functional_call,
    functionalize,
    grad,
    grad_and_value,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    vjp,
    vmap,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

import fxckpt
from bench.measure import peak_and_saved
from bench.models import build
from fxckpt import FallbackWarning, checkpoint, decompositions, policies

pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr"),  # by `linearize`
]
WIDTH = 4
Function = Callable[..., Any]


def wide(seed: int, *shape: int) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64)


WEIGHT = wide(7, WIDTH, WIDTH)


# --- functions from (WIDTH,) to a scalar ----------------------------------------------------------


def chain(x: Tensor) -> Tensor:
    """Products and element-wise functions."""
    for _ in range(3):
        x = (WEIGHT @ x.sin()).tanh()
    return x.square().sum()


def normed(x: Tensor) -> Tensor:
    """Operations with several results, and views."""
    y = F.layer_norm(x.view(2, 2), (2,)).flatten() + x.unfold(0, 2, 1).sum()
    return F.log_softmax(F.gelu(torch.cat([y, x])), 0)[1:3].exp().sum()


def in_place(x: Tensor) -> Tensor:
    """Mutations of values, and of views of them."""
    y = torch.zeros_like(x)
    y[1:] = x[:-1]
    z = (x * 2).sin_().add_(y)
    z[0].mul_(3)
    return (z * x).sum()


def looked_up(x: Tensor) -> Tensor:
    """Indices and losses."""
    rows = F.embedding(torch.tensor([0, 2, 2]), x.outer(x))
    return F.cross_entropy(rows @ WEIGHT, torch.tensor([1, 0, 3]))


def joined(x: Tensor) -> Tensor:
    """Attention, and a convolution."""
    q = x.outer(x).sin().view(1, 1, WIDTH, WIDTH)
    scores = (q @ q.mT).softmax(-1) @ q
    return F.conv1d(scores.view(1, WIDTH, WIDTH), WEIGHT.unsqueeze(-1)).cos().sum()


FUNCTIONS = (chain, normed, in_place, looked_up, joined)


X, BATCH = wide(0, WIDTH), wide(1, 3, WIDTH)
TRANSFORMS: dict[str, Callable[[Function], Any]] = {
    "grad": lambda f: grad(f)(X),
    "grad_and_value": lambda f: grad_and_value(f)(X),
    "vjp": lambda f: vjp(f, X)[1](torch.tensor(2.0, dtype=torch.float64)),
    "jvp": lambda f: jvp(f, (X,), (X + 1,)),
    "vmap": lambda f: vmap(f)(BATCH),
    "vmap over the last": lambda f: vmap(f, in_dims=1)(BATCH.T),
    "vmap(grad)": lambda f: vmap(grad(f))(BATCH),
    "vmap(grad), in chunks": lambda f: vmap(grad(f), chunk_size=2)(BATCH),
    "vmap(grad), to the last": lambda f: vmap(grad(f), out_dims=1)(BATCH),
    "grad of sum of vmap": lambda f: grad(lambda x: vmap(f)(x).sum())(BATCH),
    "jacrev": lambda f: jacrev(f)(X),
    "jacfwd": lambda f: jacfwd(f)(X),
    "hessian": lambda f: hessian(f)(X),
    "jacrev(jacrev)": lambda f: jacrev(jacrev(f))(X),
    "jacrev(jacfwd)": lambda f: jacrev(jacfwd(f))(X),
    "jacfwd(jacfwd)": lambda f: jacfwd(jacfwd(f))(X),
    "grad(grad)": lambda f: grad(lambda x: grad(f)(x).sin().sum())(X),
    "vmap(hessian)": lambda f: vmap(hessian(f))(BATCH),
    "vmap(vmap(grad))": lambda f: vmap(vmap(grad(f)))(torch.stack([BATCH, -BATCH])),
    "jvp(grad)": lambda f: jvp(grad(f), (X,), (X + 1,)),
    "vjp(grad)": lambda f: vjp(grad(f), X)[1](X),
    "grad(vmap(grad))": lambda f: grad(lambda x: vmap(grad(f))(x).square().sum())(BATCH),
    "grad(jvp(jvp))": lambda f: grad(OUTER["jvp"](OUTER["jvp"](f)))(X),
    "jvp(grad(jvp))": lambda f: jvp(grad(OUTER["jvp"](f)), (X,), (X + 1,)),
    "functionalize(grad)": lambda f: functionalize(grad(f))(X),
    "autograd.functional": lambda f: torch.autograd.functional.hessian(f, X),
}


def assert_close(expected: Any, found: Any, tolerance: float = 1e-12) -> None:
    leaves, other = pytree.tree_leaves(expected), pytree.tree_leaves(found)
    assert len(leaves) == len(other)
    for a, b in zip(leaves, other, strict=True):
        torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("function", "transform"),
    [
        (function, transform)
        for function in FUNCTIONS
        for transform in TRANSFORMS
        if (function, transform) != (in_place, "jacfwd(jacfwd)")  # torch refuses it
    ],
)
def test_transformed(function: Function, transform: str) -> None:
    run = TRANSFORMS[transform]
    lean = checkpoint(function, strict=True)
    for _ in range(2):
        assert_close(run(function), run(lean))


@pytest.mark.parametrize("transform", ["grad", "vmap(grad)", "jacrev", "hessian", "jvp"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_same_bits_in_the_same_order(function: Function, transform: str) -> None:
    run = TRANSFORMS[transform]
    expected, found = run(function), run(checkpoint(function, strict=True))
    pairs = zip(pytree.tree_leaves(expected), pytree.tree_leaves(found), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    "policy",
    [policies.everything_saveable, policies.dots_saveable, "nothing", "sqrt"],
)
@pytest.mark.parametrize("transform", ["vmap(grad)", "hessian", "jacrev(jacrev)"])
def test_under_any_policy(transform: str, policy: Any) -> None:
    run = TRANSFORMS[transform]
    assert_close(run(chain), run(checkpoint(chain, policy=policy, strict=True)))


def test_linearize() -> None:
    (value, push), (lean_value, lean_push) = linearize(chain, X), linearize(checkpoint(chain), X)
    assert_close((value, push(X + 1)), (lean_value, lean_push(X + 1)))


def test_forward_mode_without_torch_func() -> None:
    from torch.autograd import forward_ad

    def run(f: Function) -> Any:
        with forward_ad.dual_level():
            return tuple(forward_ad.unpack_dual(f(forward_ad.make_dual(X, X + 1))))

    assert_close(run(chain), run(checkpoint(chain, strict=True)))


# --- nests ----------------------------------------------------------------------------------------

OUTER: dict[str, Callable[[Function], Function]] = {
    "grad": lambda f: lambda x: grad(f)(x).sin().sum(),
    "jvp": lambda f: lambda x: jvp(f, (x,), (x.cos(),))[1],
    "vjp": lambda f: lambda x: vjp(f, x)[1](x.sum())[0].sum(),
    "vmap": lambda f: lambda x: vmap(lambda y: f(x * y))(x[:2]).sum(),
    "jacfwd": lambda f: lambda x: jacfwd(f)(x).square().sum(),
    "checkpoint": lambda f: checkpoint(f, strict=True),
    "dots": lambda f: checkpoint(f, policy="dots"),
    "identity": lambda f: f,
}


# Not `normed`: torch's own derivatives of layer_norm are wrong from the third order on, otherwise
# for each nest. Nor `joined`: rounding its argument changes derivatives of this order by 1e-9.
@given(
    st.sampled_from([chain, looked_up]),
    st.lists(st.sampled_from([*OUTER]), min_size=1, max_size=3),
    st.sampled_from(["grad", "vmap(grad)", "jvp", "vmap"]),
)
def test_random_nests(function: Function, names: list[str], transform: str) -> None:
    lean, plain = checkpoint(function, strict=True), function
    for name in names:
        lean = OUTER[name](lean)
        plain = plain if name in ("checkpoint", "dots") else OUTER[name](plain)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        assert_close(TRANSFORMS[transform](plain), TRANSFORMS[transform](lean), 1e-10)


def test_checkpoint_within_checkpoint() -> None:
    inner = checkpoint(lambda x: (WEIGHT @ x).sin(), strict=True)
    outer = checkpoint(lambda x: inner(inner(x)).exp().sum(), strict=True)

    def plain(x: Tensor) -> Tensor:
        return (WEIGHT @ (WEIGHT @ x).sin()).sin().exp().sum()

    for run in (TRANSFORMS[name] for name in ("grad", "vmap(grad)", "hessian")):
        assert_close(run(plain), run(outer))


# --- what functions read from around them ---------------------------------------------------------


@pytest.mark.parametrize("transform", ["grad", "hessian", "vmap(grad)", "jvp"])
def test_differentiates_what_is_around_a_function(transform: str) -> None:
    def around(ck: Callable[[Function], Function]) -> Function:
        def f(x: Tensor) -> Tensor:
            weights = {"w": x.outer(x)}
            return ck(lambda y: (weights["w"] @ y).sin() * x)(x.cos()).sum()

        return f

    run = TRANSFORMS[transform]
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        assert_close(run(around(lambda f: f)), run(around(checkpoint)))


# --- modules --------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["nothing", "dots", "everything"])
def test_rewritten_modules_by_functional_call(policy: str) -> None:
    layers = [nn.Linear(WIDTH, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 1)]
    model = nn.Sequential(*layers).double()
    lean = fxckpt.rewrite(model, policy, strict=True)
    parameters = dict(model.named_parameters())

    def loss(module: nn.Module) -> Function:
        return lambda p, x: functional_call(module, p, (x,)).square().sum()

    for transform in (
        lambda f: grad(f)(parameters, BATCH),
        lambda f: vmap(grad(f), (None, 0))(parameters, BATCH),
        lambda f: jacrev(f)(parameters, X),
        lambda f: hessian(f, argnums=1)(parameters, X),
        lambda f: vmap(grad(f))(
            pytree.tree_map(lambda p: torch.stack([p, -p]), parameters), BATCH[:2]
        ),
    ):
        expected, found = transform(loss(model)), transform(loss(lean))
        pairs = zip(pytree.tree_leaves(expected), pytree.tree_leaves(found), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_rewritten_modules_directly() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1)).double()
    lean = fxckpt.rewrite(model, "nothing", strict=True)
    assert_close(
        vmap(grad(lambda x: model(x).sum()))(BATCH), vmap(grad(lambda x: lean(x).sum()))(BATCH)
    )


@pytest.mark.parametrize(
    "name",
    ["gpt2", "llama", "vit"],  # torch has rules for all they do
)
def test_per_sample_gradients_of_models(name: str) -> None:
    case = build(name, tiny=True)
    case.model.eval()  # no dropout
    lean = fxckpt.rewrite_(case.model, "block")
    plain = build(name, tiny=True).model.eval()
    for module in lean.modules():
        module.training = module is lean
    parameters = {k: p.detach() for k, p in plain.named_parameters()}
    batch = case.batch(0)

    def gradients(model: nn.Module) -> Any:
        def loss(p: Any, sample: Any) -> Tensor:
            alone = {k: v.unsqueeze(0) for k, v in sample.items()}
            return case.loss(functional_call(model, p, (), alone))

        return vmap(grad(loss), (None, 0))(parameters, batch)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of operations without a batching rule
        warnings.simplefilter("error", FallbackWarning)
        expected, found = gradients(plain), gradients(lean)
    for key in expected:
        torch.testing.assert_close(found[key], expected[key])


def test_batch_norm_that_is_trained_is_left_to_torch() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)).double()
    lean = fxckpt.rewrite(model, "nothing")
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())

    def run(module: nn.Module) -> Any:
        def loss(p: Any, b: Any) -> Tensor:
            return functional_call(module, (p, b), (BATCH,)).sin().sum()

        return grad(loss)(parameters, buffers)

    expected = run(model)
    with pytest.warns(FallbackWarning, match=r"under torch\.func"):
        assert_close(expected, run(lean), 0.0)


# --- random numbers -------------------------------------------------------------------------------


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_dropout_draws_as_without_checkpoint(randomness: str) -> None:
    def f(x: Tensor) -> Tensor:
        return (F.dropout(WEIGHT @ x, 0.5).tanh() * F.dropout(x, 0.2)).sum()

    def run(function: Function) -> Any:
        torch.manual_seed(3)
        return vmap(grad(function), randomness=randomness)(BATCH), torch.get_rng_state()

    expected, found = run(f), run(checkpoint(f, strict=True))
    assert all(map(torch.equal, expected, found))


@pytest.mark.parametrize("policy", ["nothing", "dots", "everything"])
@pytest.mark.parametrize("transform", ["jvp(grad)", "hessian", "jacrev(jacrev)", "of an output"])
def test_dropout_is_differentiated_as_it_was_drawn(transform: str, policy: str) -> None:
    def f(x: Tensor) -> tuple[Tensor, Tensor]:
        y = F.dropout(WEIGHT @ x, 0.5).tanh()
        return (y * F.dropout(x.sin(), 0.2)).sum(), (F.dropout(x, 0.3) * y).sin().sum()

    def run(function: Function) -> Any:
        torch.manual_seed(3)
        if transform == "of an output":  # not of the one that the joint graph is made for
            return grad(lambda x: function(x)[1])(X), torch.get_rng_state()
        if transform == "hessian":
            return jacfwd(jacrev(lambda x: sum(function(x))), randomness="same")(X)
        return TRANSFORMS[transform](lambda x: sum(function(x))), torch.get_rng_state()

    assert_close(run(f), run(checkpoint(f, policy=policy, strict=True)))


def test_dropout_in_one_operation() -> None:
    """As on CUDA."""

    def f(x: Tensor) -> Tensor:
        y, _ = torch.native_dropout(WEIGHT @ x.sin(), 0.5, True)
        return y.sin().sum()

    def run(function: Function, transform: str) -> Any:
        torch.manual_seed(3)
        return TRANSFORMS[transform](function), torch.get_rng_state()

    for transform in ("grad", "jvp(grad)", "jacrev(jacrev)"):
        assert_close(run(f, transform), run(checkpoint(f, strict=True), transform))


def test_what_draws_and_computes_in_one_is_left_to_torch() -> None:
    lean = checkpoint(lambda x: F.rrelu(x.sin(), training=True).sum())
    with pytest.warns(FallbackWarning, match="draws random numbers and computes"):
        grad(lean)(X)


def test_randomness_that_vmap_forbids() -> None:
    lean = checkpoint(lambda x: F.dropout(x, 0.5).sum())
    with pytest.raises(RuntimeError, match="called random operation while in randomness error"):
        vmap(grad(lean))(BATCH)


# --- errors and limits ----------------------------------------------------------------------------


def test_operations_without_a_second_derivative_raise_as_without_checkpoint() -> None:
    def f(x: Tensor) -> Tensor:
        y = x.outer(x).view(1, 1, WIDTH, WIDTH)
        return F.scaled_dot_product_attention(y, y, y).sin().sum()

    run = TRANSFORMS["jacrev(jacrev)"]
    messages = []
    for function in (f, checkpoint(f, strict=True)):
        with pytest.raises((RuntimeError, NotImplementedError)) as caught:
            run(function)
        messages.append(str(caught.value))
    assert "_scaled_dot_product_flash_attention_for_cpu_backward" in messages[0]
    assert "_scaled_dot_product_flash_attention_for_cpu_backward" in messages[1]


def attention(x: Tensor) -> Tensor:
    y = x.outer(x).view(1, 1, WIDTH, WIDTH)
    return F.scaled_dot_product_attention(y, y.sin(), y.cos(), is_causal=True).sin().sum()


def in_plain_operations(x: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return attention(x)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_fused_attention_decomposed(transform: str) -> None:
    lean = checkpoint(attention, strict=True, decompose=True)
    assert_close(TRANSFORMS[transform](in_plain_operations), TRANSFORMS[transform](lean))


def test_gradients_of_first_order_are_not_those_of_the_decomposition() -> None:
    lean = checkpoint(attention, strict=True, decompose=True)
    assert torch.equal(grad(lean)(X), grad(attention)(X))


def test_decomposed_without_torch_func() -> None:
    """With `create_graph`, in forward mode, and both; numbers that were drawn stay."""

    def f(x: Tensor) -> Tensor:
        torch.manual_seed(0)
        return lean(x).sum()

    def dropped(x: Tensor) -> Tensor:
        return F.dropout(x, 0.5) * F.hardsigmoid(F.dropout(WEIGHT @ x, 0.5).sin(), inplace=True)

    for function in (attention, dropped):
        lean = checkpoint(function, strict=True, decompose=True)
        x = X.clone().requires_grad_()
        seeded = f if function is dropped else lean
        with torch.random.fork_rng():
            assert torch.autograd.gradgradcheck(seeded, (x,), check_fwd_over_rev=True)
            assert torch.autograd.gradcheck(seeded, (x,), check_forward_ad=True)


def test_fused_attention_of_devices() -> None:
    """The operations themselves cannot be called here, but what is in their places can."""
    q, k, v = wide(0, 3, 1, 2, 4, 8).unbind()
    bias = wide(1, 4, 4)
    aten = torch.ops.aten
    calls = [
        (aten._scaled_dot_product_flash_attention, (q, k, v, 0.0, True), {}, None, True),
        (aten._scaled_dot_product_efficient_attention, (q, k, v, bias, True), {}, bias, False),
        (aten._scaled_dot_product_cudnn_attention, (q, k, v, None, True), {}, None, False),
    ]
    for op, args, kwargs, mask, causal in calls:
        (found,) = decompositions.run(op.default, *args, **kwargs, scale=0.3)
        with sdpa_kernel(SDPBackend.MATH):
            expected = F.scaled_dot_product_attention(q, k, v, mask, 0.0, causal, scale=0.3)
        assert_close(expected, found)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="errors have no notes")
@pytest.mark.parametrize("transform", ["jacrev(jacrev)", "jvp(grad)"])
def test_errors_of_torch_hint_at_decompositions(transform: str) -> None:
    with pytest.raises((RuntimeError, NotImplementedError), match="attention") as caught:
        TRANSFORMS[transform](checkpoint(attention, strict=True))
    assert any("decompose=True" in note for note in caught.value.__notes__)


def test_has_aux() -> None:
    def f(x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        y = (WEIGHT @ x).sin()
        return y.exp().sum(), {"hidden": y}

    expected = vmap(grad_and_value(f, has_aux=True))(BATCH)
    assert_close(expected, vmap(grad_and_value(checkpoint(f, strict=True), has_aux=True))(BATCH))


def test_gradcheck() -> None:
    for function in (chain, normed, in_place):
        lean, x = checkpoint(function, strict=True), X.clone().requires_grad_()
        assert torch.autograd.gradcheck(lean, (x,), check_forward_ad=True)
        assert torch.autograd.gradgradcheck(lean, (x,))


# --- memory ---------------------------------------------------------------------------------------


def deep(x: Tensor) -> Tensor:
    for _ in range(16):
        x = (WEIGHT @ x).sin().exp().tanh()
    return x.sum()


@pytest.mark.parametrize(
    "run",
    [
        lambda f, x: grad(lambda x: vmap(f)(x).sum())(x),
        lambda f, x: vmap(grad(f))(x),
        lambda f, x: vmap(jacrev(f))(x),
    ],
)
def test_less_is_held(run: Callable[[Function, Tensor], Any]) -> None:
    x = wide(0, 4096, WIDTH)
    lean = checkpoint(deep, policy="sqrt", strict=True)
    peaks = []
    for function in (deep, lean):
        run(function, x)
        step = SimpleNamespace(run=lambda _, f=function: run(f, x))
        peaks.append(peak_and_saved(step, "cpu")[0])
    assert peaks[1] < 0.5 * peaks[0]


def test_a_budget_is_that_of_the_batch() -> None:
    """But for what transforms hold besides: here a vector for each sample, and operands."""
    x, budget = wide(0, 4096, WIDTH), 3 * 2**20
    peaks = []
    for function in (deep, checkpoint(deep, budget=budget, strict=True)):
        vmap(grad(function))(x[:4])  # for which nothing has to be recomputed
        vmap(grad(function))(x)
        step = SimpleNamespace(run=lambda _, f=function: vmap(grad(f))(x))
        peaks.append(peak_and_saved(step, "cpu")[0])
    assert peaks[1] <= budget + 4 * x.nbytes < peaks[0]


@pytest.mark.slow
def test_every_pair_of_transforms() -> None:
    lean = checkpoint(chain, strict=True)
    for first, second in itertools.product(OUTER, repeat=2):
        f, g = OUTER[first](OUTER[second](chain)), OUTER[first](OUTER[second](lean))
        assert_close(f(X), g(X))
        assert_close(grad(f)(X), grad(g)(X), 1e-10)


def test_addresses_are_not_those_of_stand_ins() -> None:
    lean = checkpoint(lambda x: (x * (x.data_ptr() != 0)).square().sum(), strict=True)
    with pytest.raises(fxckpt.CaptureError, match="Cannot access data pointer"):
        grad(lean)(X)
