"""What the tests share: training steps recorded bit by bit, and a few models.

The comparison is stricter than `torch.equal`: the same bytes (so a zero has a sign and NaN equals
itself), strides, dtypes, and for results also `requires_grad` and whether they are leaves.
"""

import random
import weakref
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from torch.fx import Node
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.utils import ModelOutput

import fxckpt
from fxckpt.blocks import Blocks, Undecided
from fxckpt.captures import Options
from fxckpt.installation import install, plain
from fxckpt.joint import Joint
from fxckpt.schedule import Choice
from fxckpt.unit import Unit

POLICIES = ("everything", "nothing", "dots", "attention", "mlp", "norm", "block", "sqrt")
MODELS = ("gpt2", "bert", "llama", "t5", "mixtral", "vit", "resnet", "unet", "mlp")

Record = list[tuple[str, Any]]
Step = Callable[[nn.Module], tuple[Any, Tensor]]


# --- bit by bit ---------------------------------------------------------------------------------


def content(tensor: Tensor | None) -> Any:
    """All that can be seen of a tensor without autograd; None stays None."""
    if tensor is None:
        return None
    raw = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return tuple(tensor.shape), tensor.stride(), tensor.dtype, raw


def describe(tensor: Tensor | None) -> Any:
    """`content`, and how the tensor stands to autograd."""
    if tensor is None:
        return None
    return *content(tensor), tensor.requires_grad, tensor.is_leaf


def leaves(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Everything that is not a container, by the path that leads to it."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from leaves(value, f"{name}[{key!r}]")
    elif isinstance(tree, (list, tuple)):
        for i, value in enumerate(tree):
            yield from leaves(value, f"{name}[{i}]")
    else:
        yield name, tree


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors among the `leaves`."""
    return [leaf for _, leaf in leaves(tree) if isinstance(leaf, Tensor)]


def assert_same(eager: Record, ours: Record) -> None:
    """Both records are equal; the message names the first entry that is not."""
    assert [name for name, _ in eager] == [name for name, _ in ours]
    for (name, expected), (_, got) in zip(eager, ours, strict=True):
        if expected != got:
            raise AssertionError(f"{name} differs from eager: {_difference(expected, got)}")


def _difference(expected: Any, got: Any) -> str:
    if not (isinstance(expected, tuple) and isinstance(got, tuple) and len(expected) > 3):
        return f"{_short(expected)} became {_short(got)}"
    if expected[:3] != got[:3] or expected[4:] != got[4:]:
        return f"{expected[:3]} {expected[4:]} became {got[:3]} {got[4:]}"
    arrays = [torch.frombuffer(bytearray(x[3]), dtype=x[2]).double() for x in (expected, got)]
    distance = (arrays[0] - arrays[1]).abs()
    return f"in {int((distance != 0).sum())} of {len(distance)} elements by {distance.max():.3g}"


def _short(value: Any) -> str:
    return repr(value) if len(repr(value)) < 80 else f"{repr(value)[:77]}..."


def grads_of(model: nn.Module) -> dict[str, Tensor | None]:
    """The gradients by parameter name."""
    return {name: p.grad for name, p in model.named_parameters()}


def versions(tensors: Iterable[Tensor]) -> list[int]:
    """How often each tensor was changed in place."""
    return [t._version for t in tensors]


# --- training -----------------------------------------------------------------------------------


def seed_all(seed: int) -> None:
    """Seeds every generator."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def random_states() -> tuple[Any, ...]:
    """The states of every generator, comparable."""
    name, keys, *rest = np.random.get_state()
    return random.getstate(), name, keys.tobytes(), rest, torch.get_rng_state().numpy().tobytes()


def train(
    model: nn.Module,
    step: Callable[[nn.Module, int], Any],
    *,
    steps: int = 3,
    seed: int = 1,
    optimizer: Callable[..., torch.optim.Optimizer] | None = None,
) -> Record:
    """Trains, and records everything that can be seen from outside.

    Args:
        model: what to train, in the mode it is in.
        step: (model, number of the step) to (inputs, result, loss); `backward` is called here.
        steps: how many.
        seed: of all generators.
        optimizer: made from the parameters; None trains without one.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    updater = optimizer(parameters) if optimizer and parameters else None
    seed_all(seed)
    record: Record = []
    for number in range(steps):
        model.zero_grad()
        inputs, result, loss = step(model, number)
        if loss.requires_grad:
            loss.backward()
        seen = [(f"result{name}", _leaf(leaf)) for name, leaf in leaves(result)]
        seen += [(f"gradient of {n}", content(p.grad)) for n, p in model.named_parameters()]
        seen += [(f"gradient of input {i}", content(t.grad)) for i, t in enumerate(inputs)]
        seen += [(f"input {i} afterwards", content(t)) for i, t in enumerate(inputs)]
        if updater is not None:
            updater.step()
        seen += [(f"parameter {name}", content(p)) for name, p in model.named_parameters()]
        seen += [(f"buffer {name}", content(b)) for name, b in model.named_buffers()]
        seen.append(("random states", random_states()))
        record += [(f"step {number}: {name}", value) for name, value in seen]
    return record


def _leaf(leaf: Any) -> Any:
    return describe(leaf) if isinstance(leaf, Tensor) else repr(leaf)


def sgd(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    """Stochastic gradient descent with momentum."""
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def adamw(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    """AdamW with a rate at which three steps change everything."""
    return torch.optim.AdamW(parameters, lr=0.01)


def total(result: Any) -> Tensor:
    """A loss of everything differentiable in a result, each tensor with another weight."""
    parts = [t for t in tensors_in(result) if t.is_floating_point()]
    return sum(((i + 1) * t.float().pow(2).sum() for i, t in enumerate(parts)), torch.zeros(()))


def assert_same_training(
    make_model: Callable[[], nn.Module],
    make_batch: Callable[[int], Any],
    loss: Callable[[Any], Tensor] = total,
    policy: Any = "nothing",
    *,
    steps: int = 3,
    optimizer: Callable[..., torch.optim.Optimizer] | None = adamw,
    rewrite: Callable[..., nn.Module] | None = None,
    **options: Any,
) -> nn.Module:
    """Trains eagerly and rewritten from equal seeds, and asserts that every bit is the same.

    Args:
        make_model: makes equal models when called under equal seeds; they are trained in the mode
            that they are made in.
        make_batch: number of the step to arguments: a dict of keyword, a tuple of positional
            arguments, or one argument. Must be equal for equal numbers.
        loss: result of the model to a scalar.
        policy: of the rewritten one.
        steps: how many optimizer steps.
        optimizer: see `train`.
        rewrite: another way to rewrite than `fxckpt.rewrite(model, policy, strict=True)`.
        **options: of `fxckpt.rewrite`.

    Returns:
        The rewritten model, after training.
    """

    def step(model: nn.Module, number: int) -> tuple[list[Tensor], Any, Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(100 + number)
            batch = make_batch(number)
        inputs = tensors_in(batch)
        result = call(model, batch)
        return inputs, result, loss(result)

    seed_all(0)
    eager = train(make_model(), step, steps=steps, optimizer=optimizer)
    seed_all(0)
    model = make_model()
    if rewrite is not None:
        model = rewrite(model, policy, **options)
    else:
        model = fxckpt.rewrite(model, policy, strict=True, **options)
    ours = train(model, step, steps=steps, optimizer=optimizer)
    assert_same(eager, ours)
    if model.training and any(p.requires_grad for p in model.parameters()):
        assert captures(model), "nothing was captured: eager was compared with eager"
    return model


def call(model: nn.Module, batch: Any) -> Any:
    """Calls a model with a dict of keyword, a tuple of positional arguments, or one argument."""
    if isinstance(batch, dict) and not isinstance(batch, ModelOutput):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple) else model(batch)


def build_step(case: Any) -> Callable[[nn.Module, int], Any]:
    """The `step` of `train` for a case of `bench.models`."""

    def step(model: nn.Module, number: int) -> Any:
        result = model(**case.batch(number))
        return [], result, case.loss(result)

    return step


# --- inside of a rewritten module (the only place that knows how it is built) --------------------


def captures(model: nn.Module) -> list[Any]:
    """Everything that was captured for a rewritten module."""
    runner = model.__dict__["_fxckpt_unit"]
    if isinstance(runner, Undecided):
        return []
    units = [u for _, u in runner.parts.runners()] if isinstance(runner, Blocks) else [runner]
    kept = [several for unit in units for several in unit.captures._known.values()]
    return [captured for several in kept if isinstance(several, list) for captured in several]


def decided(model: nn.Module, decide: Callable[[Joint], Collection[Node]]) -> nn.Module:
    """A rewritten model with a decision that no policy makes."""
    new = plain(model)
    install(new, Unit(new, Options(decide, 32, strict=True)))
    return new


def random_choice(seed: int, share: int) -> Callable[[Joint], Choice]:
    """Saves about `share` quarters of all values and lets half of the others go, as ever.

    Half of these do not stay between their readers either.
    """

    def number(node: Node) -> int:
        return zlib.crc32(f"{seed} {node.name}".encode())

    def decide(joint: Joint) -> Choice:
        values = [value.node for value in joint.values()]
        saved = frozenset(n for n in values if number(n) % 4 < share)
        transient = frozenset(n for n in values if number(n) // 4 % 2)
        return Choice(saved, transient, frozenset(n for n in transient if number(n) // 8 % 2))

    return decide


KINDS = ("saved", "again", "let go", "fleeting")


def choice_of(kinds: Mapping[Node, str]) -> Choice:
    """The decision that does one of `KINDS` with each value."""
    saved, let_go, fleeting = (
        frozenset(v for v, kind in kinds.items() if kind == each)
        for each in ("saved", "let go", "fleeting")
    )
    return Choice(saved, let_go | fleeting, fleeting)


def joint_of(model: nn.Module) -> Joint:
    """The joint graph of the latest capture of a rewritten module."""
    return captures(model)[-1].program.joint


def graph_texts(model: nn.Module) -> tuple[str, str]:
    """What `print` shows of the two graphs."""
    forward, backward = fxckpt.graphs(model)
    return forward.code.strip(), backward.code.strip()


def guard_calls(model: nn.Module) -> list[str]:
    """Operations that check at each call what Python read, named as `Counter` does."""
    modules = [guard.compute for guard in captures(model)[-1].tape.guards]
    nodes = [n for m in modules for n in m.graph.nodes if n.op == "call_function"]
    return [n.target.overloadpacket.__name__ for n in nodes if hasattr(n.target, "overloadpacket")]


# --- counting and watching ----------------------------------------------------------------------


def kept_bytes(forward: Callable[[], Any]) -> int:
    """What autograd keeps for backward besides leaves that get a gradient."""
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        if not (t.is_leaf and t.requires_grad):
            kept[t.untyped_storage()._cdata] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        forward()
    return sum(t.untyped_storage().nbytes() for t in kept.values())


class Counter(TorchDispatchMode):
    """Counts executed operations by name, e.g. `counter["mm"]`; views and fakes do not count."""

    free = frozenset(
        "detach view _unsafe_view t transpose permute expand unsqueeze squeeze select slice alias "
        "as_strided split split_with_sizes unbind lift_fresh is_same_size _reshape_alias".split()
    )

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name not in self.free and not any(map(is_fake, tensors_in(out))):
            self.calls.append(name)
        return out

    def __getitem__(self, name: str) -> int:
        """How often an operation ran, be it in the place of an operand."""
        return self.calls.count(name) + self.calls.count(name + "_")

    @property
    def counts(self) -> dict[str, int]:
        """Count of every operation that ran."""
        return {name: self.calls.count(name) for name in sorted(set(self.calls))}


class LiveBytes(TorchDispatchMode):
    """Bytes of the real storages made while active and still alive, after each operation."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.trace: list[tuple[str, int]] = []
        self._known: set[int] = set()

    @property
    def peak(self) -> int:
        """The most that was alive after any operation."""
        return max((live for _, live in self.trace), default=0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for tensor in tensors_in((args, kwargs or {})):
            self._watch(tensor, counts=False)
        out = func(*args, **(kwargs or {}))
        made = tensors_in(out)
        if not any(map(is_fake, made)):
            for tensor in made:
                self._watch(tensor, counts=True)
            self.trace.append((func.overloadpacket.__name__, self.live))
        return out

    def _watch(self, tensor: Tensor, *, counts: bool) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes() * counts
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


@contextmanager
def all_dispatched(mode: TorchDispatchMode) -> Iterator[Any]:
    """Runs with `mode` on, backward in this thread included."""
    with torch.autograd.set_multithreading_enabled(False), mode:
        yield mode


# --- models -------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Causal self-attention spelled out, with dropout on the weights."""

    def __init__(self, width: int, heads: int = 2, dropout: float = 0.1) -> None:
        super().__init__()
        self.heads, self.dropout = heads, nn.Dropout(dropout)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
        scores = q @ k.transpose(-2, -1) / (width // self.heads) ** 0.5
        mask = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        weights = self.dropout(scores.masked_fill(mask, float("-inf")).softmax(-1))
        return self.out((weights @ v).transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    """A transformer block: attention and a multilayer perceptron, each with norm and residual."""

    def __init__(self, width: int = 8, dropout: float = 0.1) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width, dropout=dropout)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width), nn.Dropout(dropout)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Stack(nn.Module):
    """Equal blocks, then a head."""

    def __init__(self, layers: int = 2, width: int = 8, dropout: float = 0.1) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, dropout) for _ in range(layers))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Function(nn.Module):
    """A module around a function of (module, *args, **kwargs), with a weight and a buffer."""

    def __init__(self, function: Callable[..., Any], width: int = 4) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width))
        self.register_buffer("seen", torch.zeros(width))
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


def chain(layers: int, width: int, activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    """Linear layers, each with an activation."""
    return nn.Sequential(
        *(m for _ in range(layers) for m in (nn.Linear(width, width), activation()))
    )


def modules_of(model: nn.Module) -> Sequence[dict[str, Any]]:
    """Attributes, parameters and buffers of every module, shallow copies."""
    return [
        {**m._parameters, **m._buffers, **{k: v for k, v in vars(m).items() if k != "_fxckpt_unit"}}
        for m in model.modules()
    ]
