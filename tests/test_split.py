"""What runs, what is kept, and what the graphs look like."""

import itertools
from collections import Counter as Multiset

import pytest
import torch
from expecttest import assert_expected_inline
from helpers import (
    MODELS,
    Counter,
    Function,
    LiveBytes,
    Stack,
    all_dispatched,
    chain,
    graph_texts,
    guard_calls,
    joint_of,
    total,
)
from torch import Tensor, nn

import fxckpt
from bench.models import build
from fxckpt import ops
from fxckpt.joint import producer
from fxckpt.schedule import Scheduler

WIDTH = 512
MIB = WIDTH * WIDTH * 4  # bytes of one activation of WIDTH rows: everything below counts these


def rewritten(model: nn.Module, policy, *args, **kwargs) -> nn.Module:
    """A rewritten model that was captured already."""
    example = kwargs or args
    return fxckpt.rewrite(model, policy, strict=True, example_inputs=example)


def count(model: nn.Module, *args, loss=total, **kwargs) -> Counter:
    """What one forward and backward runs."""
    with all_dispatched(Counter()) as counter:
        loss(model(*args, **kwargs)).backward()
    return counter


def literals(model: nn.Module) -> list[str]:
    """A `torch.tensor(...)` in the program becomes a copy of a tensor that capture has made."""
    return ["clone" for name in joint_of(model).primals if name.startswith("literal")]


def without_shapes(calls: list[str]) -> list[str]:
    """Factories that take a tensor for its shape are replaced by others; they cost the same.

    So do element-wise operations that write into the place of an operand, and a blank that is
    copied into, which is a clone.
    """
    blank = {"empty_like", "new_empty", "empty_strided", "empty"}
    filled = {"zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full", "full"}
    filled |= {"zeros", "ones"}
    parts = [part for c in calls for part in (("empty", "copy_") if c == "clone" else (c,))]
    return [
        "blank" if c in blank else "filled" if c in filled else c.removesuffix("_") for c in parts
    ]


def changed_small_draws(model: nn.Module) -> list[str]:
    """A random value no larger than the state of the generator is kept: if it is changed in place
    afterwards, as a dropout mask, a copy of it is changed."""
    return [
        "clone"
        for value in joint_of(model).values()
        if value.random
        and value.bytes <= ops.rng_state_bytes(value.node.meta["val"].device)
        and any(user.target is ops.inplace for user in value.node.users)
    ]


# --- operations that are run ----------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_everything_saved_runs_what_eager_runs(name: str) -> None:
    case = build(name, tiny=True)
    batch = case.batch(0)
    eager = count(case.model, loss=case.loss, **batch)
    case.model.zero_grad()
    model = rewritten(case.model, "everything", **batch)
    case.loss(model(**batch)).backward()  # first runs keep copies of buffers, to take them back
    model.zero_grad()
    ours = count(model, loss=case.loss, **batch)
    allowed = without_shapes([*eager.calls, *guard_calls(model), *literals(model)])
    more = Multiset(without_shapes(ours.calls)) - Multiset(allowed)
    assert not more, f"more than eager: {dict(more)}"
    assert len(ours.calls) > 0.8 * len(eager.calls)


@pytest.mark.parametrize("name", MODELS)
def test_nothing_saved_runs_every_forward_operation_at_most_twice(name: str) -> None:
    case = build(name, tiny=True)
    batch = case.batch(0)
    with all_dispatched(Counter()) as forward:
        loss = case.loss(case.model(**batch))
    with all_dispatched(Counter()) as backward:
        loss.backward()
    case.model.zero_grad()
    model = rewritten(case.model, "nothing", **batch)
    case.loss(model(**batch)).backward()  # first runs keep copies of buffers, to take them back
    model.zero_grad()
    ours = count(model, loss=case.loss, **batch)
    copies = (literals(model) + changed_small_draws(model)) * 2
    allowed = without_shapes(forward.calls * 2 + backward.calls + guard_calls(model) + copies)
    more = Multiset(without_shapes(ours.calls)) - Multiset(allowed)
    assert not more, f"more than twice: {dict(more)}"


@pytest.mark.parametrize(("policy", "products"), [("everything", 3), ("dots", 3), ("nothing", 5)])
def test_last_product_is_never_recomputed(policy: str, products: int) -> None:
    """Nothing needs its result; the first two are needed by the activations."""
    model = nn.Sequential(*chain(3, 4))[:-1]
    assert count(rewritten(model, policy, torch.ones(2, 4)), torch.ones(2, 4))["addmm"] == products


def test_dead_ends_are_not_recomputed() -> None:
    """What only metrics read, and what is not differentiated."""

    def forward(m: Function, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = (x @ m.weight).sin()
        return y.sum(), y.detach().exp().exp2(), (x * 3).log1p()

    model = rewritten(Function(forward), "nothing", torch.ones(2, 4))
    counter = count(model, torch.ones(2, 4), loss=lambda out: out[0])
    found = {name: counter[name] for name in ("sin", "exp", "exp2", "log1p", "mm", "cos")}
    # sin is differentiated by cos(x @ w): the product is computed again, sin is not; the second
    # product of backward is the gradient of the weight.
    assert found == {"sin": 1, "exp": 1, "exp2": 1, "log1p": 1, "mm": 3, "cos": 1}


def test_recomputed_once_for_several_readers() -> None:
    def forward(m: Function, x: Tensor) -> Tensor:
        y = (x @ m.weight).exp()
        return y.sin() * y.tanh() * (y @ m.weight)

    counter = count(rewritten(Function(forward), "nothing", torch.ones(2, 4)), torch.ones(2, 4))
    assert counter["exp"] == 2
    assert counter["sin"] == 2


def test_several_results_are_taken_at_once() -> None:
    """Or what has them all would hold those that nobody reads, until the last is taken."""
    layers = ([nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2), nn.ReLU()] for _ in range(3))
    model, x = nn.Sequential(*itertools.chain(*layers)), torch.randn(2, 2, 12, 12)
    joint = joint_of(rewritten(model, "nothing", x))
    steps = Scheduler(joint).schedule(()).backward
    own = {*joint.forward_nodes()}
    taken = [i for i, step in enumerate(steps) if step in own and producer(step) is not step]
    assert taken
    for i in taken:
        behind = next(step for step in reversed(steps[:i]) if producer(step) is step)
        assert producer(steps[i]) is behind


def test_saved_value_stops_recomputation() -> None:
    """Of six layers, all of them but the last; or those behind the saved one and those before it
    without it."""
    model, x = nn.Sequential(*chain(6, 4))[:-1], torch.ones(2, 4)

    def middle(value: fxckpt.Value) -> object:
        return fxckpt.SAVE if value.path == "5" else fxckpt.RECOMPUTE

    for policy, addmm, tanh in (("nothing", 5, 5), (middle, 4, 4), ("everything", 0, 0)):
        counter = count(rewritten(model, policy, x), x)
        assert (counter["addmm"], counter["tanh"]) == (6 + addmm, 5 + tanh)


@pytest.mark.parametrize("policy", ["nothing", "everything"])
def test_batch_norm_counts_a_batch_once(policy: str) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 2, 3))
    images = torch.linspace(-1, 1, 128).view(2, 1, 8, 8)
    reference = nn.BatchNorm2d(2).train()
    reference(model[0](images))
    new = rewritten(model, policy, images)
    assert model[1].num_batches_tracked == 0
    counter = count(new, images)
    assert model[1].num_batches_tracked == 1
    assert torch.equal(model[1].running_mean, reference.running_mean)
    assert torch.equal(model[1].running_var, reference.running_var)
    assert counter["native_batch_norm"] == (2 if policy == "nothing" else 1)


def test_random_operations_are_replayed_only_where_recomputed() -> None:
    model = nn.Sequential(nn.Linear(4, 32), nn.Dropout(0.5), nn.Linear(32, 32), nn.Dropout(0.5))
    x = torch.ones(64, 4)  # so that a mask is larger than the state of the generator

    def first_mask(value: fxckpt.Value) -> object:
        return fxckpt.RECOMPUTE if value.path == "3" else fxckpt.SAVE

    for policy, replays in (("everything", 0), (first_mask, 1), ("nothing", 2)):
        new = rewritten(model, policy, x)
        forward, backward = graph_texts(new)
        assert forward.count("read_rng_state(") == replays
        assert backward.count("with_rng_state(") == replays
        assert count(new, x)["bernoulli_"] == 2 + replays


@pytest.mark.parametrize("kept", ["rand", "rand_1", "rand_2", "none"])
def test_random_values_around_one_that_is_saved(kept: str) -> None:
    """Backward of one operation needs them all; each is drawn where forward drew it."""

    def forward(m: Function, x: Tensor) -> Tensor:
        factors = [torch.rand(64, 64) for _ in range(3)]  # larger than the generator's state
        return (factors[0] * factors[1] * factors[2]) * (x @ m.weight)

    def policy(value: fxckpt.Value) -> object:
        return fxckpt.SAVE if value.name == kept else fxckpt.RECOMPUTE

    model, x = Function(forward, 64), torch.ones(64, 64)
    found = []
    for each in (model, fxckpt.rewrite(model, policy, strict=True)):
        torch.manual_seed(0)
        each(x).sum().backward()
        found.append((model.weight.grad, torch.get_rng_state()))
        model.weight.grad = None
    assert all(map(torch.equal, *found))


def test_no_copies_of_what_is_changed_in_place() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3),
        nn.BatchNorm2d(2),
        nn.ReLU(inplace=True),
        nn.Conv2d(2, 2, 3),
        nn.Dropout(0.5, inplace=True),
    )
    images = torch.ones(16, 1, 16, 16)
    for policy in ("everything", "nothing"):
        text = "".join(graph_texts(rewritten(model, policy, images)))
        assert "inplace" not in text, text
        assert "clone_exactly" not in text, text
        assert "aten_clone" not in text, text
        # The state of the generator alone is copied, before it is moved on.
        assert text.count("torch.clone(") == text.count("torch.clone(rng_"), text


# --- memory ---------------------------------------------------------------------------------------


def square(layers: int) -> tuple[nn.Sequential, Tensor]:
    """A chain whose activations and weights are one MiB each; its last layer is linear."""
    return chain(layers, WIDTH)[:-1], torch.full((WIDTH, WIDTH), 0.01)


def held_after_forward(model: nn.Module, x: Tensor) -> float:
    with all_dispatched(LiveBytes()) as memory:
        out = model(x)
    assert out.requires_grad
    return memory.live / MIB


def test_forward_keeps_what_was_decided() -> None:
    """In MiB: the output, and the five activations of six layers or none."""
    model, x = square(6)
    assert held_after_forward(rewritten(model, "nothing", x), x) == 1
    assert held_after_forward(rewritten(model, "everything", x), x) == 6
    assert held_after_forward(model, x) == 6


def test_forward_frees_what_is_not_kept() -> None:
    """While it runs: two activations, whatever the depth."""
    peaks = []
    for layers in (4, 8):
        model, x = square(layers)
        model = rewritten(model, "nothing", x)
        with all_dispatched(LiveBytes()) as memory:
            model(x)
        peaks.append(memory.peak / MIB)
    assert peaks == [2, 2]


def backward_trace(model: nn.Module, x: Tensor, *, retain: bool) -> list[float]:
    """MiB alive after each operation of backward, gradients of parameters not counted."""
    for p in model.parameters():
        p.grad = torch.zeros_like(p)  # accumulated into: their memory is there before
    with all_dispatched(LiveBytes()) as memory:
        loss = model(x).sum()
        start = len(memory.trace)
        loss.backward(retain_graph=retain)
    return [live / MIB for _, live in memory.trace[start:]]


def test_residuals_are_freed_while_backward_runs() -> None:
    """Each of eight layers frees an activation and adds the gradient of a weight.

    Those are all returned at the end, so seven activations become seven gradients; three more MiB
    are those at hand. With a retained graph both are there at the end.
    """
    model, x = square(8)
    new = rewritten(model, "everything", x)
    assert round(max(backward_trace(new, x, retain=False))) == 10
    assert round(max(backward_trace(new, x, retain=True))) == 16


def test_backward_of_nothing_saved_starts_small() -> None:
    """It holds what it has recomputed so far, and frees it again."""
    model, x = square(8)
    trace = backward_trace(rewritten(model, "nothing", x), x, retain=False)
    assert trace[0] <= 2
    assert trace[-1] <= 0.1


def test_gradients_die_before_the_end() -> None:
    """With one parameter only, backward holds a constant number of activations."""

    def forward(m: Function, x: Tensor) -> Tensor:
        for _ in range(6):
            x = (x * m.weight).tanh()
        return x

    def peak(policy: str) -> float:
        model = Function(forward, WIDTH)
        x = torch.full((WIDTH, WIDTH), 0.01)
        return max(backward_trace(rewritten(model, policy, x), x, retain=False))

    # x * w keeps x, which is the tanh before: five activations and the output's, and the
    # gradients at hand.
    assert peak("everything") <= 10


def test_parameters_are_references() -> None:
    """Neither graph copies a parameter; what backward reads of them is not a residual."""
    model, x = square(3)
    new = rewritten(model, "nothing", x)
    with all_dispatched(LiveBytes()) as memory:
        loss = new(x).sum()
    assert memory.live < 1.1 * MIB
    loss.backward()


@pytest.mark.cuda
def test_cuda_memory_after_forward() -> None:
    model, x = square(6)
    model, x = model.cuda(), x.cuda()
    held = []
    for policy in ("nothing", "everything"):
        new = rewritten(model, policy, x)
        new(x).sum().backward()
        model.zero_grad()
        before = torch.cuda.memory_allocated()
        out = new(x)
        held.append((torch.cuda.memory_allocated() - before) / MIB)
        del out
    assert held == [1, 6]


# --- the graphs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["everything", "nothing", "dots"])
@pytest.mark.parametrize("name", MODELS)
def test_graphs_are_valid(name: str, policy: str) -> None:
    case = build(name, tiny=True)
    model = rewritten(case.model, policy, **case.batch(0))
    joint_of(model).verify()
    for graph in fxckpt.graphs(model):
        graph.graph.lint()
        compile(graph.code, "graph", "exec")


def test_verify_notices_broken_graphs() -> None:
    def broken(change) -> None:
        joint = joint_of(rewritten(Stack(1), "nothing", torch.ones(1, 3, 8)))
        joint.verify()
        change(joint)
        with pytest.raises((AssertionError, RuntimeError)):
            joint.verify()

    def out_of_order(joint) -> None:
        next(joint.backward_nodes()).meta["phase"] = "forward"
        list(joint.forward_nodes())[-2].meta["phase"] = "backward"

    def mutating(joint) -> None:
        node = next(n for n in joint.forward_nodes() if n.target is torch.ops.aten.add.Tensor)
        node.target = torch.ops.aten.add_.Tensor

    def without_value(joint) -> None:
        del next(joint.backward_nodes()).meta["val"]

    def alias_of_a_stranger(joint) -> None:
        node = next(n for n in joint.forward_nodes() if n.meta.get("alias") is not None)
        node.meta["alias"] = joint.outputs[0]

    for change in (out_of_order, mutating, without_value, alias_of_a_stranger):
        broken(change)


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Dropout(0.5)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def test_printed_forward() -> None:
    forward, _ = graph_texts(rewritten(Tiny(), "dots", torch.ones(3, 2)))
    assert_expected_inline(
        forward,
        """\
def forward(self, args_list):
    args_iter = iter(args_list)
    layers_0_0_weight = next(args_iter)
    layers_0_0_bias = next(args_iter)
    layers_1_0_weight = next(args_iter)
    layers_1_0_bias = next(args_iter)
    args_0_ = next(args_iter)
    args_list.clear()
    # layers.0.0
    t = aten_t_default(layers_0_0_weight);  layers_0_0_weight = None
    addmm = aten_addmm_default(layers_0_0_bias, args_0_, t);  layers_0_0_bias = t = None
    # recomputed in backward: layers.0.1
    tanh = aten_tanh_default(addmm)
    # layers.0.2
    empty_strided = aten_empty_strided_default([3, 2], [2, 1], dtype = torch.float32, device = device(type='cpu'))
    bernoulli_ = aten_bernoulli__float(empty_strided);  empty_strided = None
    # recomputed in backward: layers.0.2
    div_ = fxckpt_ops_inplace(torch.ops.aten.div_.Scalar, ((0, None, True),), bernoulli_, 0.5)
    mul = aten_mul__Tensor(tanh, div_);  tanh = div_ = None
    # recomputed in backward: (root)
    add = aten_add_out(args_0_, mul, out = mul);  args_0_ = mul = None
    # layers.1.0
    t_1 = aten_t_default(layers_1_0_weight);  layers_1_0_weight = None
    addmm_1 = aten_addmm_default(layers_1_0_bias, add, t_1);  layers_1_0_bias = t_1 = None
    # recomputed in backward: layers.1.1
    tanh_1 = aten_tanh_default(addmm_1)
    # layers.1.2
    empty_strided_1 = aten_empty_strided_default([3, 2], [2, 1], dtype = torch.float32, device = device(type='cpu'))
    bernoulli__1 = aten_bernoulli__float(empty_strided_1);  empty_strided_1 = None
    # recomputed in backward: layers.1.2
    div__1 = fxckpt_ops_inplace(torch.ops.aten.div_.Scalar, ((0, None, True),), bernoulli__1, 0.5)
    # layers.1.2
    mul_1 = aten_mul__Tensor(tanh_1, div__1);  tanh_1 = div__1 = None
    # (root)
    add_1 = aten_add__Tensor(add, mul_1);  add = mul_1 = None
    return (add_1, bernoulli__1, addmm_1, addmm, bernoulli_)""",  # noqa: E501
    )


def test_printed_backward() -> None:
    _, backward = graph_texts(rewritten(Tiny(), "dots", torch.ones(3, 2)))
    assert_expected_inline(
        backward,
        """\
def forward(self, args_list):
    args_iter = iter(args_list)
    layers_1_0_weight = next(args_iter)
    args_0_ = next(args_iter)
    bernoulli__1 = next(args_iter)
    addmm_1 = next(args_iter)
    addmm = next(args_iter)
    bernoulli_ = next(args_iter)
    cotangent_0 = next(args_iter)
    args_list.clear()
    # recompute layers.1.2
    div__1 = fxckpt_ops_inplace(torch.ops.aten.div_.Scalar, ((0, None, True),), bernoulli__1, 0.5);  bernoulli__1 = None
    # backward of layers.1.2
    mul_2 = aten_mul_out(cotangent_0, div__1, out = div__1);  div__1 = None
    # recompute layers.1.1
    tanh_1 = aten_tanh_default(addmm_1);  addmm_1 = None
    # backward of layers.1.1
    tanh_backward = aten_tanh_backward_grad_input(mul_2, tanh_1, grad_input = mul_2);  mul_2 = tanh_1 = None
    # recompute layers.1.0
    t_1 = aten_t_default(layers_1_0_weight);  layers_1_0_weight = None
    # backward of layers.1.0
    t_2 = aten_t_default(t_1);  t_1 = None
    mm = aten_mm_default(tanh_backward, t_2);  t_2 = None
    t_3 = aten_t_default(tanh_backward)
    # recompute layers.0.1
    tanh = aten_tanh_default(addmm);  addmm = None
    # recompute layers.0.2
    div_ = fxckpt_ops_inplace(torch.ops.aten.div_.Scalar, ((0, None, True),), bernoulli_, 0.5);  bernoulli_ = None
    mul = aten_mul_Tensor(tanh, div_)
    # recompute (root)
    add = aten_add_out(args_0_, mul, out = mul);  mul = None
    # backward of layers.1.0
    mm_1 = aten_mm_default(t_3, add);  t_3 = add = None
    t_4 = aten_t_default(mm_1);  mm_1 = None
    sum_1 = aten_sum_dim_IntList(tanh_backward, [0], True);  tanh_backward = None
    view = aten_view_default(sum_1, [2]);  sum_1 = None
    add_2 = aten_add_out(cotangent_0, mm, out = mm);  cotangent_0 = mm = None
    t_5 = aten_t_default(t_4);  t_4 = None
    # backward of layers.0.2
    mul_3 = aten_mul__Tensor(add_2, div_);  add_2 = div_ = None
    # backward of layers.0.1
    tanh_backward_1 = aten_tanh_backward_grad_input(mul_3, tanh, grad_input = mul_3);  mul_3 = tanh = None
    # backward of layers.0.0
    t_6 = aten_t_default(tanh_backward_1)
    mm_2 = aten_mm_default(t_6, args_0_);  t_6 = args_0_ = None
    t_7 = aten_t_default(mm_2);  mm_2 = None
    sum_2 = aten_sum_dim_IntList(tanh_backward_1, [0], True);  tanh_backward_1 = None
    view_1 = aten_view_default(sum_2, [2]);  sum_2 = None
    t_8 = aten_t_default(t_7);  t_7 = None
    return (t_8, view_1, t_5, view, None)""",  # noqa: E501
    )


def test_calls_of_a_shared_module_are_told_apart() -> None:
    layer = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    texts = graph_texts(rewritten(nn.Sequential(layer, layer), "nothing", torch.ones(3, 2)))
    assert "# recomputed in backward: 0.1\n" in texts[0]
    assert "0.1 (call 2)" in texts[0]
    assert "# recompute 0.0\n" in texts[1]
    assert "# backward of 0.1 (call 2)\n" in texts[1]
