"""Random models under random decisions train to the same bits as eager.

A model is a small program: a list of instructions `(operation, i, j, k)` over a growing list of
values of one shape. `i` and `j` choose operands, counted from the latest value; `k` varies the
operation. So that programs shrink well, every instruction means something whatever stands around
it.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same, decided, joint_of, random_choice, total, train
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn

import fxckpt

Instruction = tuple[str, int, int, int]
Operation = Callable[["Program", Tensor, Tensor, int], Any]

OPERATIONS: dict[str, Operation] = {}


def operation(function: Operation) -> Operation:
    """Registers an operation: (model, x, y, k) to the values that it adds."""
    OPERATIONS[function.__name__] = function
    return function


def simple(**functions: Callable[[Tensor], Tensor]) -> None:
    """Registers operations of one value."""
    for name, function in functions.items():
        OPERATIONS[name] = lambda m, x, y, k, function=function: function(x)


class Program(nn.Module):
    """Runs a list of instructions; owns one layer of every kind, which may be used often."""

    def __init__(self, instructions: list[Instruction], width: int) -> None:
        super().__init__()
        self.instructions = instructions
        self.linears = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.tied = nn.Linear(width, width, bias=False)
        self.tied.weight = self.linears[0].weight
        self.layer_norm, self.batch_norm = nn.LayerNorm(width), nn.BatchNorm1d(width)
        self.conv = nn.Conv1d(1, 2, 3, padding=1)
        self.batch_norm2d = nn.BatchNorm2d(2, momentum=None)
        self.cell, self.embedding = nn.LSTMCell(width, width), nn.Embedding(5, width)
        self.dropouts = nn.ModuleList([nn.Dropout(0.4), nn.Dropout(0.4, inplace=True)])
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.frozen = nn.Parameter(torch.randn(width), requires_grad=False)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("count", torch.tensor(0))
        self.plain = torch.linspace(0.5, 1.5, width)

    def forward(self, x: Tensor, *, ids: Tensor) -> dict[str, Any]:
        self.ids = ids
        try:
            values = [x * 0.5 + 0.1, self.linears[0](x)]
            for name, i, j, k in self.instructions:
                new = OPERATIONS[name](self, values[-1 - i % len(values)], values[-1 - j % 2], k)
                values += new if isinstance(new, (list, tuple)) else [new]
        finally:
            del self.ids
        before = values[-2]
        if before._is_view():  # which the last one reads: see "not bit-identical" in docs/limits.md
            before = before.clone()
        return {"last": values[-1], "before": before, "count": len(values), "first": values[0]}


# --- pointwise, reductions ----------------------------------------------------------------------

simple(
    tanh=torch.tanh,
    gelu=F.gelu,
    gelu_tanh=lambda x: F.gelu(x, approximate="tanh"),
    silu=F.silu,
    relu=F.relu,
    leaky_relu=F.leaky_relu,
    softplus=F.softplus,
    sin=lambda x: x.sin(),
    exp=lambda x: x.clamp(max=2).exp(),
    sqrt=lambda x: (x * x + 0.1).sqrt(),
    reciprocal=lambda x: 1 / (x.abs() + 1),
    negative=lambda x: -x,
    softmax=lambda x: x.softmax(-1),
    log_softmax=lambda x: x.log_softmax(0),
    cumsum=lambda x: x.cumsum(1),
    logsumexp=lambda x: x - x.logsumexp(1, keepdim=True),
    normalize=lambda x: F.normalize(x, dim=-1),
    centre=lambda x: x - x.mean(0),
    double=lambda x: (x.double() * 1.5).float(),
    half=lambda x: (x.clamp(-9, 9).bfloat16() * 1.5).float(),
    literal=lambda x: x * torch.tensor(0.5),
    literal_row=lambda x: x + torch.tensor([0.25, -1.0]).repeat(x.shape[1] // 2),
    literal_index=lambda x: x[torch.tensor([1, 0])[torch.arange(len(x)) % 2]],
    constant=lambda x: x * 3 + True,
    ones=lambda x: x + torch.ones(x.shape[1]) * torch.arange(x.shape[1]),
    fft=lambda x: torch.fft.irfft(torch.fft.rfft(x) * 1j, n=x.shape[1]),
    complex=lambda x: torch.view_as_real(
        torch.view_as_complex(x.reshape(-1, 2)).conj() * 2j
    ).reshape(x.shape),
    loss=lambda x: x * F.mse_loss(x, x.detach() * 0.5),
)


@operation
def add(m, x, y, k):
    return x + y


@operation
def mul(m, x, y, k):
    return x * y.sigmoid()


@operation
def where(m, x, y, k):
    return torch.where(x > y, x, y * 0.5)


@operation
def masked_fill(m, x, y, k):
    return x.masked_fill(y > 0.3, float(k))


@operation
def lerp(m, x, y, k):
    return torch.lerp(x, y, m.scale)


@operation
def cross_entropy(m, x, y, k):
    return y * F.cross_entropy(x, m.ids % x.shape[1])


@operation
def plain_attribute(m, x, y, k):
    return x * m.plain + m.frozen


# --- products and layers ------------------------------------------------------------------------


@operation
def linear(m, x, y, k):
    return m.linears[k % 2](x)


@operation
def tied(m, x, y, k):
    return m.tied(x)


@operation
def transposed_weight(m, x, y, k):
    return F.linear(x, m.linears[k % 2].weight.t(), m.linears[1].bias)


@operation
def matmul(m, x, y, k):
    return x @ (y.t() @ x) * 0.1


@operation
def attention(m, x, y, k):
    q, k_, v = (t.reshape(1, 1, *t.shape) for t in (x, y, x.tanh()))
    return F.scaled_dot_product_attention(q, k_, v, dropout_p=0.3 * (k % 2)).view_as(x)


@operation
def bmm(m, x, y, k):
    return torch.bmm(x.unsqueeze(1), m.linears[k % 2].weight.expand(len(x), -1, -1)).squeeze(1)


@operation
def einsum(m, x, y, k):
    return torch.einsum("bi,bj->bij", x, y).mean(1)


@operation
def layer_norm(m, x, y, k):
    return m.layer_norm(x)


@operation
def batch_norm(m, x, y, k):
    return m.batch_norm(x)


@operation
def conv(m, x, y, k):
    out = m.conv(x.unsqueeze(1))
    if k % 2:
        out = m.batch_norm2d(out.unsqueeze(-1)).squeeze(-1)
    return F.max_pool1d(F.relu(out, inplace=True), 2, stride=1, padding=1)[..., :-1].sum(1)


@operation
def group_norm(m, x, y, k):
    return F.group_norm(x, 2)


@operation
def lstm_cell(m, x, y, k):
    return list(m.cell(x, (y, x.sin())))


@operation
def embedding(m, x, y, k):
    return x + m.embedding(m.ids)


# --- views, indexing ----------------------------------------------------------------------------


@operation
def chunk(m, x, y, k):
    a, b = x.chunk(2, dim=1)
    return torch.cat([b * 2, a], dim=1)


@operation
def split_cat(m, x, y, k):
    first, rest = torch.cat([x, y], dim=1).split([x.shape[1], y.shape[1]], dim=1)
    return [first, rest]


@operation
def halves_of_one(m, x, y, k):
    both = torch.cat([x, y], dim=k % 2)
    size = x.shape[k % 2]
    return [both.narrow(k % 2, 0, size), both.narrow(k % 2, size, size)]


@operation
def stack_unbind(m, x, y, k):
    return list(torch.stack([x, y], dim=k % 3).unbind(k % 3))


@operation
def transpose(m, x, y, k):
    return (x.t() * 2).t()


@operation
def permute(m, x, y, k):
    return x.reshape(len(x), 2, -1).permute(2, 1, 0).contiguous().permute(2, 1, 0).reshape(x.shape)


@operation
def same_view(m, x, y, k):
    return x.view_as(x) if k % 2 else x[:]


@operation
def expand(m, x, y, k):
    return x[:, :1].expand_as(x) * 2


@operation
def expanded_view(m, x, y, k):
    return x.mean(0, keepdim=True).expand(x.shape)


@operation
def strided(m, x, y, k):
    return torch.cat([x[:, ::2], x[:, 1::2].flip(1)], 1)


@operation
def index(m, x, y, k):
    return x[m.ids % len(x)]


@operation
def gather(m, x, y, k):
    return x.gather(1, y.argsort(1))


@operation
def boolean_index(m, x, y, k):
    return x * x[m.ids > 1].sum()


@operation
def pad(m, x, y, k):
    return F.pad(x, (1, 0))[:, :-1]


@operation
def roll(m, x, y, k):
    return x.roll(k, 1)


@operation
def scatter(m, x, y, k):
    return torch.zeros_like(x).scatter_add(0, (m.ids % len(x)).unsqueeze(1).expand_as(x), x)


# --- several results ----------------------------------------------------------------------------


@operation
def max_index(m, x, y, k):
    values, where_ = x.max(dim=1, keepdim=True)
    return y + values * (where_ == k)


@operation
def topk(m, x, y, k):
    values, order = x.topk(2, dim=1)
    return y.gather(1, order).sum(1, keepdim=True) + x * values.sum()


@operation
def sort(m, x, y, k):
    return x.sort(dim=k % 2).values


@operation
def std_mean(m, x, y, k):
    std, mean = torch.std_mean(x, dim=1, keepdim=True)
    return (x - mean) / (std + 0.1) if k % 2 else x * std


@operation
def aminmax(m, x, y, k):
    low, high = torch.aminmax(x)
    return y * low + high


# --- random numbers -----------------------------------------------------------------------------


@operation
def dropout(m, x, y, k):
    return F.dropout(x, 0.3)


@operation
def dropout_module(m, x, y, k):
    return m.dropouts[0](x)


@operation
def dropout_in_place(m, x, y, k):
    return m.dropouts[1](x * 2) if k % 2 else F.dropout(x + 1, 0.2, inplace=True)


@operation
def dropout_of_transposed(m, x, y, k):
    return F.dropout((x.t() * 2).t(), 0.3)


@operation
def noise(m, x, y, k):
    drawn = (torch.rand_like(x), torch.randn(x.shape), x.new_empty(x.shape).uniform_(-1, 1))
    return x * drawn[k % 3]


@operation
def bernoulli(m, x, y, k):
    return x * torch.bernoulli(y.detach().sigmoid())


@operation
def permutation(m, x, y, k):
    return x[torch.randperm(len(x))]


@operation
def rrelu(m, x, y, k):
    return F.rrelu(x, training=True)


@operation
def alpha_dropout(m, x, y, k):
    return F.alpha_dropout(x, 0.2, training=True)


# --- in place -----------------------------------------------------------------------------------


@operation
def add_in_place(m, x, y, k):
    x += 0.5
    return x


@operation
def mul_in_place(m, x, y, k):
    return x.mul_(y.detach()) if k % 2 else x.mul_(0.5)


@operation
def relu_in_place(m, x, y, k):
    return F.relu((x - 0.1), inplace=True)


@operation
def hardtanh_in_place(m, x, y, k):
    return F.relu6(x + 0.2, inplace=True)


@operation
def write_column(m, x, y, k):
    out = x.clone()
    out[:, k % x.shape[1]] = y[:, 0]
    out[:, ::2].mul_(1.5)
    return out


@operation
def write_through_view(m, x, y, k):
    out = x * 1.0
    view = out.t()
    view[0].add_(y[:, 0])
    return [out, view.t()]


@operation
def write_column_of_value(m, x, y, k):
    x[:, k % x.shape[1]].add_(1)
    return x


@operation
def fill_new(m, x, y, k):
    out = x.new_zeros(x.shape)
    out[: len(x) // 2] = x[: len(x) // 2]
    out.masked_fill_(y > 0.5, 0.25)
    return out


@operation
def index_put(m, x, y, k):
    return x.clone().index_put_((m.ids % len(x),), y, accumulate=bool(k % 2))


@operation
def index_add(m, x, y, k):
    return (x * 2).index_add_(0, m.ids % len(x), y)


@operation
def out_argument(m, x, y, k):
    with torch.no_grad():
        kept = torch.empty(0) if k % 2 else torch.empty_like(x)
        if kept.numel():
            torch.add(x, y, out=kept)
    return x * kept.sum()


# --- gradients switched off, custom gradients, buffers ------------------------------------------


@operation
def detach(m, x, y, k):
    return y * x.detach()


@operation
def detached_alias(m, x, y, k):
    return [x.detach(), x * 1.5]


@operation
def no_grad(m, x, y, k):
    with torch.no_grad():
        factor = x.abs().amax(1, keepdim=True).clamp_(min=0.1)
        factor *= 2
    return x / factor


@operation
def straight_through(m, x, y, k):
    return x + (x.round() - x).detach()


@operation
def update_mean(m, x, y, k):
    with torch.no_grad():
        m.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
    m.count += 1
    return x - m.mean


@operation
def read_then_update(m, x, y, k):
    out = (x + m.mean).tanh()
    m.mean.copy_(x.detach().mean(0))
    return out


@operation
def read_count(m, x, y, k):
    m.count.add_(1)
    return x * m.count + m.count.float()


class Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, k):
        ctx.k = k
        ctx.save_for_backward(x, out := x * x * k)
        return out

    @staticmethod
    def backward(ctx, grad):
        x, out = ctx.saved_tensors
        return grad * 2 * x * ctx.k + out * 0.01, None


class Dirty(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


class TwoResults(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(y)
        return x + y, x > 0

    @staticmethod
    def backward(ctx, grad, _):
        (y,) = ctx.saved_tensors
        return grad * 0.5, (grad * y if ctx.needs_input_grad[1] else None)


@operation
def custom(m, x, y, k):
    return Scale.apply(x, 0.1 * (k + 1))


@operation
def custom_in_place(m, x, y, k):
    return Dirty.apply(x + 1)


@operation
def custom_two_results(m, x, y, k):
    out, positive = TwoResults.apply(x, y)
    return out * positive


# --- the test -----------------------------------------------------------------------------------

instructions = st.lists(
    st.tuples(
        st.sampled_from(sorted(OPERATIONS)),
        st.integers(0, 4),
        st.integers(0, 1),
        st.integers(0, 3),
    ),
    min_size=1,
    max_size=12,
)
inputs = st.sampled_from(["plain", "leaf", "non-leaf", "transposed"])


def make_input(kind: str, rows: int, width: int) -> tuple[Tensor, Tensor]:
    """A leaf, and what the model gets."""
    leaf = torch.randn(rows, width)
    if kind == "transposed":
        return leaf, leaf.t().contiguous().t().requires_grad_()
    leaf.requires_grad_(kind != "plain")
    return leaf, leaf * 1.0 if kind == "non-leaf" else leaf


def run(model: nn.Module, kind: str, rows: int, width: int) -> list:
    def step(model: nn.Module, number: int) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(number)
            leaf, x = make_input(kind, rows, width)
            ids = torch.randint(5, (rows,))
        result = model(x, ids=ids)
        return [leaf], result, total({k: v for k, v in result.items() if k != "first"})

    return train(model, step, steps=2, optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9))


def make_program(code: list[Instruction], width: int) -> Program:
    torch.manual_seed(7)
    return Program(code, width)


@given(
    code=instructions,
    rows=st.integers(2, 3),
    width=st.sampled_from([2, 4, 6]),
    kind=inputs,
    seed=st.integers(0, 9),
    share=st.integers(0, 4),
)
@example(code=[(n, 0, 1, 1) for n in ("linear", "add_in_place", "tanh")], rows=2, width=2,
         kind="leaf", seed=0, share=0)  # fmt: skip
def test_random_model_is_exact(
    code: list[Instruction], rows: int, width: int, kind: str, seed: int, share: int
) -> None:
    check(code, rows, width, kind, random_choice(seed, share))


def check(code: list[Instruction], rows: int, width: int, kind: str, decide: Any) -> None:
    """Eager and rewritten agree; if eager raises, then so does the rewritten one."""
    model = decided(make_program(code, width), decide)
    try:
        eager = run(make_program(code, width), kind, rows, width)
    except RuntimeError:
        with pytest.raises((RuntimeError, fxckpt.CaptureError)):
            run(model, kind, rows, width)
        return
    assert_same(eager, run(model, kind, rows, width))
    joint_of(model).verify()


@pytest.mark.parametrize("share", [0, 2])
@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_single_operation_is_exact(name: str, share: int) -> None:
    """Each operation by itself, between operations that need what it reads and returns."""
    code = [("tanh", 0, 0, 0), (name, 0, 1, 1), ("mul", 0, 1, 0), (name, 1, 0, 0), ("sin", 0, 0, 0)]
    check(code, 3, 4, "leaf", random_choice(1, share))


def test_nearly_all_programs_run_eagerly() -> None:
    """Otherwise the tests above would compare errors."""
    for name in OPERATIONS:
        code = [("constant", 0, 0, 0), (name, 0, 1, 1), ("constant", 0, 1, 0)]
        record = run(make_program(code, 4), "leaf", 3, 4)
        assert record
