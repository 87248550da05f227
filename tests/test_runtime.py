"""Autograd cannot tell a rewritten module from the original, however it is used."""

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    Attention,
    Function,
    LiveBytes,
    Stack,
    all_dispatched,
    assert_same,
    assert_same_training,
    captures,
    chain,
    content,
    decided,
    leaves,
    seed_all,
    sgd,
    total,
)
from torch import Tensor, nn
from torch.fx import Node

import fxckpt
from fxckpt import BudgetError
from fxckpt.joint import Joint

POLICIES = ("nothing", "dots", "everything")


def both(
    make: Callable[[], nn.Module], use: Callable[[nn.Module], Any], policy: Any = "nothing"
) -> nn.Module:
    """Asserts that `use(model)` returns the same bits for eager and rewritten; returns the latter.

    `use` also returns what it raises, as text of the type.
    """
    results = []
    for rewritten in (False, True):
        seed_all(0)
        model = make()
        if rewritten:
            model = fxckpt.rewrite(model, policy, strict=True)
        seed_all(1)
        found = use(model)
        record = [
            (name, content(x) if isinstance(x, Tensor) else repr(x)) for name, x in leaves(found)
        ]
        record.append(("random state", content(torch.get_rng_state())))
        results.append(record)
    assert_same(*results)
    return model


def grads(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in model.named_parameters()}


def batch(length: int = 5, width: int = 8) -> Tensor:
    return torch.linspace(-1, 1, 2 * length * width).view(2, length, width).sin()


def normed() -> nn.Sequential:
    """Linear layers with everything that is delicate: BatchNorm, dropout, in-place ReLU."""
    return nn.Sequential(
        nn.Linear(4, 6),
        nn.BatchNorm1d(6),
        nn.ReLU(inplace=True),
        nn.Dropout(0.3),
        nn.Linear(6, 6),
        nn.Tanh(),
        nn.Linear(6, 2),
    )


def rows() -> Tensor:
    return torch.linspace(-1, 2, 12).view(3, 4).cos()


# --- backward, again and in part ----------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("make", [Stack, normed])
def test_retained_graph(make, policy: str) -> None:
    def use(model: nn.Module) -> Any:
        loss = total(model(batch() if make is Stack else rows()))
        loss.backward(retain_graph=True)
        first = {k: g.clone() for k, g in grads(model).items()}
        loss.backward(retain_graph=True)
        second = {k: g.clone() for k, g in grads(model).items()}
        model.zero_grad()
        loss.backward()
        return first, second, grads(model), list(model.buffers())

    both(make, use, policy)


@pytest.mark.parametrize("policy", POLICIES)
def test_second_backward_without_retaining_raises(policy: str) -> None:
    model = fxckpt.rewrite(Stack(), policy, strict=True)
    loss = total(model(batch()))
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("policy", POLICIES)
def test_grad_of_a_subset(policy: str) -> None:
    def use(model: nn.Module) -> Any:
        x = batch().requires_grad_()
        loss = total(model(x))
        last = list(model.parameters())[-1]
        first = next(model.parameters())
        kept = torch.autograd.grad(loss, [first, x], retain_graph=True)
        return kept, torch.autograd.grad(loss, last), grads(model), x.grad

    both(Stack, use, policy)


def test_unused_parameters_get_no_gradient() -> None:
    def make() -> nn.Module:
        model = Function(lambda m, x: (x @ m.weight).tanh())
        model.unused = nn.Parameter(torch.ones(2))
        model.layer = nn.Linear(2, 2)
        return model

    def use(model: nn.Module) -> Any:
        total(model(rows())).backward()
        assert model.unused.grad is None
        assert model.layer.weight.grad is None
        return grads(model)

    both(make, use)


def test_unused_input_gets_no_gradient() -> None:
    def use(model: nn.Module) -> Any:
        x, y = rows().requires_grad_(), rows().requires_grad_()
        total(model(x, y)).backward()
        assert y.grad is None
        with pytest.raises(RuntimeError, match="not have been used"):
            torch.autograd.grad(total(model(x, y)), y)
        return x.grad, torch.autograd.grad(total(model(x, y)), [y, x], allow_unused=True)

    both(lambda: Function(lambda m, x, y: (x @ m.weight).exp()), use)


def test_parameter_that_gets_zeros() -> None:
    """A gradient of zeros is not a missing gradient."""

    def make() -> nn.Module:
        model = Function(lambda m, x: (x @ m.weight).tanh() + m.other * 0)
        model.other = nn.Parameter(torch.ones(4))
        return model

    def use(model: nn.Module) -> Any:
        total(model(rows())).backward()
        assert model.other.grad is not None
        return grads(model)

    both(make, use)


@pytest.mark.parametrize("policy", POLICIES)
def test_non_leaf_input(policy: str) -> None:
    def use(model: nn.Module) -> Any:
        leaf = rows().requires_grad_()
        total(model((leaf * 2).sin())).backward()
        return leaf.grad, grads(model)

    both(normed, use, policy)


def test_same_input_twice() -> None:
    def use(model: nn.Module) -> Any:
        x, y = rows().requires_grad_(), rows().requires_grad_()
        total(model(x, x)).backward()
        first = x.grad.clone()
        total(model(x, y)).backward()
        return first, x.grad, y.grad, grads(model)

    both(lambda: Function(lambda m, x, y: (x @ m.weight).tanh() * y), use)


def test_inputs_that_share_memory() -> None:
    def use(model: nn.Module) -> Any:
        whole = torch.arange(24.0).view(3, 8).sin().requires_grad_()
        total(model(whole[:, :4], whole[:, 2:6])).backward()
        return whole.grad, grads(model)

    both(lambda: Function(lambda m, x, y: (x @ m.weight).tanh() * y), use)


def test_input_is_a_parameter() -> None:
    def use(model: nn.Module) -> Any:
        total(model(model.weight)).backward()
        return grads(model)

    both(lambda: Function(lambda m, x: (x @ m.weight).tanh()), use)


# --- two calls ----------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("policy", POLICIES)
def test_two_forwards_before_a_backward(policy: str, order: tuple[int, int]) -> None:
    def use(model: nn.Module) -> Any:
        losses = [total(model(rows())), total(model(rows() * 2))]
        for i in order:
            losses[i].backward()
        return grads(model), list(model.buffers())

    both(normed, use, policy)


def test_two_forwards_in_one_loss() -> None:
    def use(model: nn.Module) -> Any:
        (total(model(batch())) * total(model(batch() * 2))).backward()
        return grads(model)

    both(Stack, use)


def test_output_fed_back_as_input() -> None:
    def use(model: nn.Module) -> Any:
        x = rows().requires_grad_()
        total(model(model(model(x)))).backward()
        return x.grad, grads(model), list(model.buffers())

    both(lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.2)), use)


@pytest.mark.parametrize("policy", POLICIES)
def test_gradient_accumulation(policy: str) -> None:
    def use(model: nn.Module) -> Any:
        optimizer = sgd(model.parameters())
        for step in range(2):
            optimizer.zero_grad()
            for micro in range(3):
                (total(model(rows() + step + micro)) / 3).backward()
            optimizer.step()
        return list(model.parameters()), list(model.buffers())

    both(normed, use, policy)


def test_gradients_kept_as_zeros() -> None:
    def use(model: nn.Module) -> Any:
        optimizer = torch.optim.Adam(model.parameters())
        for _ in range(3):
            optimizer.zero_grad(set_to_none=False)
            total(model(rows())).backward()
            optimizer.step()
        return grads(model), list(model.parameters())

    both(normed, use)


# --- other gradients of the outputs than expected ------------------------------------------------


class LossAndScores(nn.Module):
    """Returns (loss, scores), as transformers' models do."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = normed(), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.head(self.body(x))
        return F.cross_entropy(scores, torch.arange(len(x)) % 3), scores


PATTERNS: dict[str, Callable[[tuple[Tensor, Tensor]], Tensor]] = {
    "loss": lambda out: out[0],
    "scores": lambda out: out[1].pow(2).sum(),
    "both": lambda out: out[0] + out[1].pow(2).sum(),
    "expanded": lambda out: out[1].sum(),
    "transposed": lambda out: (out[1].t() * torch.arange(3.0).unsqueeze(1)).cos().sum(),
    "part": lambda out: out[1][0, 1:].exp().sum(),
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_pattern_of_gradients(pattern: str, policy: str) -> None:
    """Any pattern, then the loss alone, then the pattern again."""

    def use(model: nn.Module) -> Any:
        seen = []
        for name in (pattern, "loss", pattern, pattern):
            model.zero_grad()
            PATTERNS[name](model(rows())).backward()
            seen.append({k: None if g is None else g.clone() for k, g in grads(model).items()})
        return seen, list(model.buffers())

    model = both(LossAndScores, use, policy)
    assert len(captures(model)) == 1


def test_a_plan_that_fits_stays_if_another_pattern_has_none() -> None:
    """A later step does not fail for a pattern of gradients that was seen in the one before."""
    asked: list[Joint] = []

    def decide(joint: Joint) -> set[Node]:
        asked.append(joint)
        if len(asked) > 1:
            raise BudgetError("no plan fits")
        return set()

    eager = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh())
    ours = decided(copy.deepcopy(eager), decide)
    for _ in range(3):
        for model in (eager, ours):
            model.zero_grad()
            model(torch.ones(2, 4)).sum().backward()  # its gradient is expanded, not dense
        pairs = zip(eager.parameters(), ours.parameters(), strict=True)
        assert all(torch.equal(p.grad, q.grad) for p, q in pairs)
    assert len(asked) == 2


def test_patterns_on_one_graph() -> None:
    """Several different backwards of one forward that is retained."""

    def use(model: nn.Module) -> Any:
        out, p = model(rows()), list(model.parameters())
        return [torch.autograd.grad(PATTERNS[name](out), p, retain_graph=True) for name in PATTERNS]

    for policy in POLICIES:
        both(LossAndScores, use, policy)


def test_gradient_given_by_hand() -> None:
    def use(model: nn.Module) -> Any:
        _, scores = model(rows())
        scores.backward(torch.arange(9.0).view(3, 3).t())
        return grads(model)

    both(LossAndScores, use)


def test_undifferentiated_output_may_be_undifferentiable() -> None:
    """`b` cannot be differentiated, since `a` was changed, but nobody asks."""

    def forward(m: Function, x: Tensor) -> dict[str, Tensor]:
        a = x @ m.weight
        b = a.sin()
        a.add_(1)
        return {"a": a, "b": b}

    def use(model: nn.Module) -> Any:
        total(model(rows())["a"]).backward()
        return grads(model)

    both(lambda: Function(forward), use)


def test_view_in_the_result_is_read_several_times_inside() -> None:
    """Equal up to rounding: docs/limits.md documents it.

    A gradient from outside enters at the base of the view, and is added to the sum of those from
    inside; eager begins with it.
    """

    def forward(m: Function, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = F.linear(x, m.weight, m.bias).view(3, 2, 2)
        return hidden, (hidden.sin() * hidden.tanh() + hidden).exp()

    def make() -> nn.Module:
        model = Function(forward)
        model.bias = nn.Parameter(torch.randn(4))
        return model

    def use(model: nn.Module) -> Any:
        hidden, out = model(rows().double())
        (hidden.pow(2).sum() * 0.3 + out.pow(2).sum() * 0.7).backward()
        return hidden, out, grads(model)

    near(make, use, "nothing")


# --- double backward -----------------------------------------------------------------------------


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


def with_custom_function() -> nn.Module:
    return Function(lambda m, x: F.dropout(Cube.apply(0.1 * x @ m.weight), 0.2))


def near(make: Callable[[], nn.Module], use: Callable[[nn.Module], Any], policy: Any) -> None:
    """Like `both`, up to rounding, in double precision.

    For the cases of docs/limits.md. For example, where one loss reaches the model both directly and
    through a gradient of the model, eager adds up the two at every activation, fxckpt at the
    parameters and inputs.
    """
    results = []
    for rewritten in (False, True):
        seed_all(0)
        model = make().double()
        if rewritten:
            model = fxckpt.rewrite(model, policy, strict=True)
        seed_all(1)
        results.append([*leaves(use(model)), ("random state", torch.get_rng_state())])
    torch.testing.assert_close(*map(dict, reversed(results)), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("make", [normed, with_custom_function, LossAndScores])
def test_gradient_penalty(make, policy: str) -> None:
    def use(model: nn.Module) -> Any:
        optimizer = sgd(model.parameters())
        seen = []
        for _ in range(2):
            optimizer.zero_grad()
            x = rows().double().requires_grad_()
            loss = total(model(x))
            (g,) = torch.autograd.grad(loss, x, create_graph=True)
            (loss + (g.pow(2).sum(1) - 1).pow(2).sum()).backward()
            optimizer.step()
            seen.append((x.grad, {k: v.clone() for k, v in grads(model).items()}))
        return seen, list(model.buffers())

    near(make, use, policy)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("make", [normed, with_custom_function])
def test_gradient_of_a_gradient_is_exact(make, policy: str) -> None:
    """To the bit where the loss reaches the model through its gradient alone."""

    def use(model: nn.Module) -> Any:
        x = rows().requires_grad_()
        (g,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        g.pow(2).sum().backward()
        return g, x.grad, grads(model), list(model.buffers())

    both(make, use, policy)


def test_gradients_of_parameters_differentiated_again() -> None:
    def use(model: nn.Module) -> Any:
        p = list(model.parameters())
        first = torch.autograd.grad(total(model(rows().double())), p, create_graph=True)
        return first, torch.autograd.grad(sum(g.pow(2).sum() for g in first), p)

    near(lambda: chain(2, 4), use, "nothing")


def test_third_derivative() -> None:
    def use(model: nn.Module) -> Any:
        x = rows().double().requires_grad_()
        y = model(x)
        for _ in range(3):
            (y,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return y

    near(lambda: chain(2, 4), use, "nothing")


def test_double_backward_of_a_batch_norm_counts_once() -> None:
    model = fxckpt.rewrite(normed(), "nothing", strict=True)
    x = rows().requires_grad_()
    (g,) = torch.autograd.grad(total(model(x)), x, create_graph=True)
    g.sum().backward()
    assert model[1].num_batches_tracked == 1


# --- changes between forward and backward --------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("what", ["parameter", "input"])
def test_change_in_place_before_backward_raises(what: str, policy: str) -> None:
    raised = []
    for rewritten in (False, True):
        model = chain(2, 4)
        if rewritten:
            model = fxckpt.rewrite(model, policy, strict=True)
        x = rows()
        loss = total(model(x))
        with torch.no_grad():
            (model[2].weight if what == "parameter" else x).add_(1)
        with pytest.raises(RuntimeError) as error:
            loss.backward()
        raised.append(error)
    assert all("modified by an inplace operation" in str(error.value) for error in raised)


def test_change_of_what_backward_does_not_read_is_allowed() -> None:
    def use(model: nn.Module) -> Any:
        loss = total(model(rows()))
        with torch.no_grad():
            model[-1].bias.add_(1)
        loss.backward()
        return grads(model)

    both(normed, use, "everything")


def test_change_of_an_output_in_place() -> None:
    """Of the product: eager's backward does not read it."""

    def use(model: nn.Module) -> Any:
        out = model(rows())
        out.mul_(2)
        out.sin().sum().backward()
        return out, grads(model)

    for policy in POLICIES:
        both(normed, use, policy)


def test_change_of_an_output_that_backward_reads_raises() -> None:
    for rewritten in (False, True):
        model = chain(2, 4)
        if rewritten:
            model = fxckpt.rewrite(model, "everything", strict=True)
        out = model(rows())
        out.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


# --- the model changes between steps --------------------------------------------------------------


def test_new_contents_of_parameters_are_used() -> None:
    other = {k: v * 2 + 1 for k, v in normed().state_dict().items()}

    def use(model: nn.Module) -> Any:
        seen = []
        for options in (None, {}, {"assign": True}):
            if options is not None:
                model.load_state_dict({k: v.clone() for k, v in other.items()}, **options)
            model.zero_grad()
            out = model(rows())
            total(out).backward()
            seen.append((out, grads(model)))
        return seen

    both(normed, use)


def test_new_dtype() -> None:
    def use(model: nn.Module) -> Any:
        total(model(rows())).backward()
        model.to(torch.float64)
        model.zero_grad()
        total(model(rows().double())).backward()
        first = grads(model)
        model.to(torch.float32)
        model.zero_grad()
        total(model(rows())).backward()
        return first, grads(model)

    both(normed, use)


def test_freezing_and_thawing() -> None:
    def use(model: nn.Module) -> Any:
        seen = []
        for frozen in (False, True, False, True):
            model[0].requires_grad_(not frozen)
            model[6].bias.requires_grad_(frozen)
            model.zero_grad()
            total(model(rows())).backward()
            seen.append(grads(model))
        return seen

    model = both(normed, use)
    assert len(captures(model)) == 2


def test_frozen_model_with_an_input_that_wants_a_gradient() -> None:
    def use(model: nn.Module) -> Any:
        model.requires_grad_(False)
        x = rows().requires_grad_()
        total(model(x)).backward()
        return x.grad, model(rows()).requires_grad

    both(normed, use)


def test_tied_weights() -> None:
    def make() -> nn.Module:
        model = chain(3, 4)
        model[4].weight = model[0].weight
        return model

    assert_same_training(make, lambda i: (torch.randn(3, 4),))


def test_tying_and_untying_between_steps() -> None:
    def use(model: nn.Module) -> Any:
        seen = []
        total(model(rows())).backward()
        seen.append(grads(model))
        model.zero_grad()
        kept = model[4].weight
        model[4].weight = model[0].weight
        total(model(rows())).backward()
        seen.append(grads(model))
        model.zero_grad()
        model[4].weight = kept
        total(model(rows())).backward()
        return seen, grads(model)

    both(lambda: chain(3, 4), use)


def test_replaced_layers_and_hyperparameters() -> None:
    def use(model: nn.Module) -> Any:
        seen = [model(rows())]
        model[3].p = 0.7
        seen.append(model(rows()))
        model[5] = nn.ReLU()
        seen.append(model(rows()))
        model[1].momentum = 0.5
        seen.append(model(rows()))
        model[1].eval()
        seen.append(model(rows()))
        model.append(nn.Linear(2, 2))
        seen.append(model(rows()))
        total(seen).backward()
        return seen, grads(model), list(model.buffers())

    both(normed, use)


def test_changing_shapes() -> None:
    def use(model: nn.Module) -> Any:
        seen = [model(batch(length)) for length in (3, 5, 3, 7, 5)]
        total(seen).backward()
        return seen, grads(model)

    model = both(Stack, use)
    assert len(captures(model)) == 3


def test_cache_is_bounded() -> None:
    model = fxckpt.rewrite(chain(1, 4), "nothing", cache_size=3, strict=True)
    for n in range(1, 8):
        model(torch.ones(n, 4)).sum().backward()
    assert len(captures(model)) == 3


def test_least_recently_used_is_dropped() -> None:
    model = fxckpt.rewrite(chain(1, 4), "nothing", cache_size=2, strict=True)
    for n in (1, 2, 1, 3):
        model(torch.ones(n, 4))
    kept = captures(model)
    model(torch.ones(1, 4))
    assert set(captures(model)) == set(kept)


def test_backward_after_its_capture_was_dropped() -> None:
    def use(model: nn.Module) -> Any:
        losses = [total(model(rows()[:n])) for n in (2, 3)]
        sum(losses).backward()
        return grads(model)

    results = []
    for options in ({"cache_size": 1}, {}):
        seed_all(0)
        results.append(use(fxckpt.rewrite(chain(2, 4), "nothing", strict=True, **options)))
    assert_same(*([(k, content(g)) for k, g in r.items()] for r in results))


# --- when the original forward runs ---------------------------------------------------------------


def test_eval_and_no_grad_capture_nothing() -> None:
    model = fxckpt.rewrite(normed(), "nothing", strict=True)
    with torch.no_grad():
        model(rows())
    with torch.inference_mode():
        model(rows())
    model.eval()
    total(model(rows())).backward()
    assert captures(model) == []
    assert all(p.grad is not None for p in model.parameters())


def test_eval_between_training_steps() -> None:
    def use(model: nn.Module) -> Any:
        seen = []
        for _ in range(2):
            model.train()
            total(model(rows())).backward()
            model.eval()
            seen.append(model(rows()))
            with torch.no_grad():
                seen.append(model(rows()))
        return seen, grads(model)

    both(normed, use)


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_loss_dropped_without_backward_frees_everything(policy: str) -> None:
    model = fxckpt.rewrite(Stack(), policy, strict=True)
    total(model(batch())).backward()
    model.zero_grad()
    with all_dispatched(LiveBytes()) as memory:
        loss = total(model(batch()))
        held = memory.live
        del loss
        gc.collect()
    assert held > 0
    assert memory.live == 0


@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_is_held_after_a_step(policy: str) -> None:
    model = fxckpt.rewrite(Stack(), policy, strict=True)
    x = batch()
    loss = total(model(x))
    loss.backward()
    watched = weakref.ref(x)
    del x, loss
    assert watched() is None


def test_the_random_state_at_the_start_is_kept_once() -> None:
    """Replays of dropout and the second run of forward (`create_graph`) need the same one."""

    def states() -> set[int]:
        tensors = [t for t in gc.get_objects() if type(t) is Tensor and t.dtype == torch.uint8]
        size = torch.get_rng_state().numel()
        return {t.untyped_storage().data_ptr() for t in tensors if t.numel() == size}

    model = fxckpt.rewrite(nn.Sequential(nn.Linear(64, 64), nn.Dropout(), nn.Tanh()), "nothing")
    for _ in range(3):
        gc.collect()
        before = states()
        result = model(torch.randn(256, 64))
        assert len(states() - before) == 1
        result.sum().backward()


def test_rewritten_model_is_freed() -> None:
    model = fxckpt.rewrite(Stack(), "nothing", strict=True)
    total(model(batch())).backward()
    watched = [weakref.ref(model), weakref.ref(model.head.weight)]
    del model
    gc.collect()
    assert [w() for w in watched] == [None, None]


# --- results --------------------------------------------------------------------------------------

RESULTS: dict[str, Callable[[Function, Tensor], Any]] = {
    "input": lambda m, x: (x, x @ m.weight),
    "input twice": lambda m, x: [x, x, (x @ m.weight).sin()],
    "view of input": lambda m, x: (x.t(), x[0], x @ m.weight),
    "parameter": lambda m, x: (m.weight, m.weight.t(), x @ m.weight),
    "same tensor twice": lambda m, x: (y := (x @ m.weight).sin(), y),
    "views of one": lambda m, x: (y := (x @ m.weight).sin(), y.t(), y[1:]),
    "chunks": lambda m, x: (x @ m.weight).sin().chunk(2, 1),
    "detached": lambda m, x: (y := (x @ m.weight).sin(), y.detach()),
    "no gradient": lambda m, x: ((x @ m.weight).sin(), x.argmax(1), x > 0),
    "plain values": lambda m, x: {"a": None, "b": 3, "c": "text", "d": (x @ m.weight), "e": 0.5},
    "nested": lambda m, x: {"a": [x @ m.weight, (None, [m.weight.sum()])]},
    "expanded": lambda m, x: (x @ m.weight).mean().expand(3),
    "buffer": lambda m, x: (m.seen, x @ m.weight),
    "new tensors": lambda m, x: (torch.ones(2), torch.arange(3), x @ m.weight),
    "empty": lambda m, x: (x @ m.weight, x[:0] @ m.weight),
    "shape": lambda m, x: (x @ m.weight, x.shape, x.dtype),
}


@pytest.mark.parametrize("wants", [True, False])
@pytest.mark.parametrize("kind", RESULTS)
def test_result(kind: str, wants: bool) -> None:
    def use(model: nn.Module) -> Any:
        x = rows().requires_grad_(wants)
        result = model(x)
        tensors = [t for _, t in leaves(result) if isinstance(t, Tensor)]
        same = [[a is b for b in (*tensors, x, model.weight)] for a in tensors]
        shared = [[_storage(a) == _storage(b) for b in (*tensors, x)] for a in tensors]
        views = [(t._is_view(), t.requires_grad, t.is_leaf) for t in tensors]
        total(result).backward()
        return result, same, shared, views, grads(model), x.grad

    both(lambda: Function(RESULTS[kind]), use)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def test_view_in_the_result_changed_in_place() -> None:
    def use(model: nn.Module) -> Any:
        whole, part = model(rows())
        part.mul_(3)
        total((whole, part)).backward()
        return whole, part, grads(model)

    both(lambda: Function(lambda m, x: (y := x @ m.weight, y[:, 1:])), use)


def test_hooks_on_results_and_parameters() -> None:
    def use(model: nn.Module) -> Any:
        seen: list[Tensor] = []
        handles = [p.register_hook(lambda g: g * 2) for p in model.parameters()]
        handles += [
            p.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
            for p in model.parameters()
        ]
        out = model(rows())
        out.register_hook(lambda g: g.cos())
        out.retain_grad()
        total(out).backward()
        for handle in handles:
            handle.remove()
        return sorted(float(s.sum()) for s in seen), out.grad, grads(model)

    both(normed, use)


def test_saved_tensor_hooks_see_the_residuals() -> None:
    """As those of `torch.autograd.graph.save_on_cpu`."""
    packed: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        packed.append(t)
        return t.clone()

    def use(model: nn.Module) -> Any:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = total(model(rows()))
        loss.backward()
        return grads(model)

    both(normed, use)
    assert packed


def test_anomaly_mode() -> None:
    def use(model: nn.Module) -> Any:
        with pytest.warns(UserWarning, match="Anomaly"), torch.autograd.detect_anomaly():
            total(model(rows())).backward()
        return grads(model)

    both(normed, use)


def test_deep_recursion_of_rewritten_modules() -> None:
    """A rewritten module inside of a rewritten one is captured with it."""

    def make() -> nn.Module:
        model = Stack()
        for block in model.blocks:
            fxckpt.rewrite_(block, "nothing", strict=True)
        return model

    def use(model: nn.Module) -> Any:
        total(model(batch())).backward()
        return grads(model)

    both(make, use)


def test_blocks_as_units() -> None:
    def use(model: nn.Module) -> Any:
        total(model(batch())).backward()
        return grads(model)

    results = []
    for rewritten in (False, True):
        seed_all(0)
        model = Stack()
        if rewritten:
            for block in model.blocks:
                fxckpt.rewrite_(block, "nothing", strict=True)
        seed_all(1)
        results.append([(k, content(g)) for k, g in use(model).items()])
    assert_same(*results)


def test_shared_block() -> None:
    def make() -> nn.Module:
        block = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.3), nn.Tanh())
        return nn.Sequential(block, nn.LayerNorm(4), block, block)

    assert_same_training(make, lambda i: (torch.randn(3, 4),))


def test_threads() -> None:
    """Forward and backward in another thread than capture."""
    from concurrent.futures import ThreadPoolExecutor

    def use(model: nn.Module) -> Any:
        total(model(rows())).backward()
        with ThreadPoolExecutor(1) as pool:
            pool.submit(lambda: total(model(rows())).backward()).result()
        return grads(model)

    both(lambda: chain(2, 4), use)


def test_generator_of_dropout_moves_as_in_eager() -> None:
    """What is drawn after the model, and between two calls, is the same."""

    def use(model: nn.Module) -> Any:
        seen = [torch.rand(1)]
        for _ in range(2):
            loss = total(model(batch()))
            seen.append(torch.rand(1))
            loss.backward()
            seen.append(torch.rand(1))
        return seen, grads(model)

    for policy in POLICIES:
        both(lambda: Stack(dropout=0.5), use, policy)


def test_attention_with_seed_set_between_forward_and_backward() -> None:
    """Recomputation replays the forward's numbers, and leaves the generator alone."""

    def use(model: nn.Module) -> Any:
        loss = total(model(batch()))
        torch.manual_seed(99)
        loss.backward()
        return grads(model), torch.rand(1)

    both(lambda: Attention(8, dropout=0.5), use)


@pytest.mark.cuda
def test_cuda_dropout_is_replayed() -> None:
    def use(model: nn.Module) -> Any:
        model.cuda()
        torch.cuda.manual_seed(0)
        x = rows().cuda()
        total(model(x)).backward()
        found = {k: g.cpu() for k, g in grads(model).items()}
        return found, torch.cuda.get_rng_state()

    for policy in POLICIES:
        both(normed, use, policy)
