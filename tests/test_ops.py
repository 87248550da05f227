"""Every differentiable operation of torch's own test-suite, checkpointed, alone.

Each gives the values, gradients and per-sample gradients that it gives without checkpoint. Those in
`FALL_BACK` run as they are, with a warning; those for which torch itself has no gradient, or no
rule for batches, are skipped with torch's message. The summary of the run lists and counts both.
"""

import itertools
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, jvp, vjp, vmap
from torch.testing._internal import common_methods_invocations as db
from torch.utils import _pytree as pytree

from fxckpt import FallbackWarning, checkpoint

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
SAMPLES = 2

# What cannot be captured, and why; under transforms, nor what changes an argument in place.
FALL_BACK = {
    "_batch_norm_with_update": "statistics are changed in place",
    "_native_batch_norm_legit": "statistics are changed in place",
    "as_strided": "it reads memory, not values",
    "as_strided_partial_views": "it reads memory, not values",
    "combinations": "the shape of a result depends on values",
    "index_fill": "backward checks values",
    "index_put": "the shape of a result depends on values",
    "linalg_eig": "backward checks values",
    "linalg_eigvals": "backward checks values",
    "linalg_householder_product": "gradients have other strides while they are recorded",
    "linalg_lstsq": "the shape of a result depends on values",
    "linalg_lstsq_grad_oriented": "the shape of a result depends on values",
    "masked_fill": "backward adds up selected elements",
    "masked_select": "the shape of a result depends on values",
    "native_batch_norm": "statistics are changed in place",
    "nn_functional_batch_norm": "statistics are changed in place",
    "nn_functional_ctc_loss": "backward reads lengths",
    "nn_functional_gaussian_nll_loss": "values of the variance are checked",
    "nn_functional_instance_norm": "statistics are changed in place",
    "ormqr": "gradients have other strides while they are recorded",
    "prod": "backward counts zeros",
    "to_sparse": "a result is sparse",
}
if torch.__version__.startswith("2.11."):
    del FALL_BACK["index_fill"]  # its backward checks nothing there

OPS = {
    op.formatted_name: op
    for op in db.op_db
    if op.supports_autograd and torch.float64 in op.supported_dtypes("cpu")
}


def call(op: Any, sample: Any) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """The sum of an operation's results, as a function of what it differentiates, and that."""
    leaves, spec = pytree.tree_flatten(((sample.input, *sample.args), sample.kwargs))
    places = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.requires_grad]

    def function(*values: Tensor) -> Tensor:
        given = [*leaves]
        for place, value in zip(places, values, strict=True):
            given[place] = value
        args, kwargs = pytree.tree_unflatten(given, spec)
        outs = pytree.tree_leaves(op.op(*args, **kwargs))
        floats = [out for out in outs if out.is_floating_point() or out.is_complex()]
        return sum((out.abs() if out.is_complex() else out).sum() for out in floats)

    return function, [leaves[place].detach() for place in places]


def gradients(function: Callable[..., Tensor], values: list[Tensor]) -> Any:
    torch.manual_seed(0)
    value, pull = vjp(function, *values)
    return value, pull(torch.ones_like(value))


def per_sample(function: Callable[..., Tensor], values: list[Tensor]) -> Any:
    torch.manual_seed(0)
    batch = [torch.stack([value, value * 0.5]) for value in values]
    arguments = tuple(range(len(values)))
    return vmap(grad(function, arguments), randomness="same")(*batch)


def second_derivatives(function: Callable[..., Tensor], values: list[Tensor]) -> Any:
    arguments = tuple(range(len(values)))

    def total(*values: Tensor) -> Tensor:
        grads = grad(function, arguments)(*values)
        return sum((g.abs() if g.is_complex() else g.sin()).sum() for g in grads)

    torch.manual_seed(0)
    return grad(total, arguments)(*values)


def forward_over_reverse(function: Callable[..., Tensor], values: list[Tensor]) -> Any:
    torch.manual_seed(0)
    primals, directions = tuple(values), tuple(value.cos() for value in values)
    return jvp(grad(function, tuple(range(len(values)))), primals, directions)


def assert_alike(expected: Any, found: Any) -> None:
    pairs = zip(pytree.tree_leaves(expected), pytree.tree_leaves(found), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("name", OPS)
def test_operation(
    name: str, monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, str], None]
) -> None:
    if name in FALL_BACK:
        record_property("runs eagerly", f"{name}: {FALL_BACK[name]}")
    # The samples' own wrapper sets the seed around each call, which no model does.
    monkeypatch.setattr(db, "wrapper_set_seed", lambda op, *args, **kwargs: op(*args, **kwargs))
    op = OPS[name]
    samples = op.sample_inputs("cpu", torch.float64, requires_grad=True)
    fell_back: list[str] = []
    for sample in itertools.islice(samples, SAMPLES):
        function, values = call(op, sample)
        if not values:
            continue
        for run in (gradients, per_sample):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    expected = run(function, values)
                except Exception as error:
                    pytest.skip(f"{run.__name__} without checkpoint: {str(error).splitlines()[0]}")
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("ignore")
                warnings.simplefilter("always", FallbackWarning)
                found = run(checkpoint(function), values)
            fell_back += [str(w.message) for w in seen if w.category is FallbackWarning]
            assert_alike(expected, found)
    assert bool(fell_back) == (name in FALL_BACK), fell_back


def autograd(function: Callable[..., Tensor], values: list[Tensor]) -> Any:
    torch.manual_seed(0)
    leaves = [value.clone().requires_grad_() for value in values]
    value = function(*leaves)
    return value, torch.autograd.grad(value, leaves, allow_unused=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in OPS if name not in FALL_BACK])
def test_budget(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To plan, kernels run on operands that are made up, which none of them may mind."""
    monkeypatch.setattr(db, "wrapper_set_seed", lambda op, *args, **kwargs: op(*args, **kwargs))
    samples = OPS[name].sample_inputs("cpu", torch.float64, requires_grad=True)
    for sample in itertools.islice(samples, SAMPLES):
        function, values = call(OPS[name], sample)
        try:
            expected = autograd(function, values)
        except RuntimeError as error:
            pytest.skip(f"without checkpoint: {str(error).splitlines()[0]}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            budget = checkpoint(function, budget=1.0, profile=True)
            assert_alike(expected, autograd(budget, values))


# Those whose backward is another one while it is recorded, or is a constant.
OF_ANOTHER_BACKWARD = [
    *("linalg_solve", "linalg_slogdet", "linalg_inv", "logdet", "logit", "sgn", "quantile"),
    *("nn_functional_silu", "nn_functional_mish", "nn_functional_group_norm", "clone", "norm"),
]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in OF_ANOTHER_BACKWARD else [pytest.mark.slow])
        for name in OPS
        if name not in FALL_BACK
    ],
)
@pytest.mark.parametrize("run", [second_derivatives, forward_over_reverse])
def test_second_derivatives(run: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or torch's own error; some that torch has with an `autograd.Function` do not come."""
    monkeypatch.setattr(db, "wrapper_set_seed", lambda op, *args, **kwargs: op(*args, **kwargs))
    sample = next(iter(OPS[name].sample_inputs("cpu", torch.float64, requires_grad=True)))
    function, values = call(OPS[name], sample)
    try:
        expected = run(function, values)
    except Exception as error:
        if "autograd.Function" not in str(error):
            with pytest.raises(type(error), match=re.escape(str(error).splitlines()[0])):
                run(checkpoint(function), values)
        pytest.skip(f"{run.__name__} without checkpoint: {str(error).splitlines()[0]}")
    assert_alike(expected, run(checkpoint(function), values))


LACKING_RULES = {
    "nn_functional_grid_sample": [forward_over_reverse],
    "nn_functional_hardsigmoid": [second_derivatives, forward_over_reverse],
    "nn_functional_huber_loss": [forward_over_reverse],
    "nn_functional_multi_margin_loss": [second_derivatives, forward_over_reverse],
    "nn_functional_multilabel_margin_loss": [second_derivatives, forward_over_reverse],
    "nn_functional_soft_margin_loss": [forward_over_reverse],
}


@pytest.mark.parametrize(
    ("name", "run"), [(name, run) for name, runs in LACKING_RULES.items() for run in runs]
)
def test_decomposed(name: str, run: Any) -> None:
    """What torch has no rule for is differentiated by way of its decomposition, if asked for."""
    for sample in itertools.islice(
        OPS[name].sample_inputs("cpu", torch.float64, requires_grad=True), SAMPLES
    ):
        function, values = call(OPS[name], sample)
        with pytest.raises((RuntimeError, NotImplementedError), match=r"forward AD|derivative"):
            run(checkpoint(function, strict=True), values)
        lean = checkpoint(function, strict=True, decompose=True)
        assert_alike(gradients(function, values), gradients(lean, values))
        run(lean, values)
        leaves = [value.clone().requires_grad_() for value in values]
        assert torch.autograd.gradgradcheck(lean, leaves)
        assert torch.autograd.gradcheck(lean, leaves, check_forward_ad=True)


def test_what_falls_back_is_known() -> None:
    assert FALL_BACK.keys() <= OPS.keys()
    assert len(FALL_BACK) < 0.05 * len(OPS)
