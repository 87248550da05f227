"""Callable and example inputs in, `Tape` out; and from the tape a `Joint` per backward.

NOTE [What capture may not do]

The real program must not notice that it was captured, and the captured branch must be the one that
eager takes. So the callable runs once, on fake tensors (no memory, no random numbers), in the modes
(autocast, grad, training) of the call, and

- parameters, buffers and inputs are replaced by fakes without hooks, and put back afterwards;
- the real autograd engine runs on the fakes, so backward is what eager would run;
- no tracing flag is set: `torch.compiler.is_compiling()` is false, and libraries that look for fake
  tensors are told that there are none;
- values that Python reads are computed if they follow from integer or boolean arguments and from
  constants; they become guards. Other reads are refused.

Backward depends on which outputs get a gradient, and on its strides, which is certain only when
backward is called. So a `Tape` keeps the fake autograd graph, and `Tape.joint` runs it once for
each `BackwardKey` that occurs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Graph, Node

from fxckpt import invisible, ops, tree
from fxckpt.errors import CaptureError
from fxckpt.joint import Joint, Primal, reachable
from fxckpt.recorder import Place, Recorder, user_source, user_source_of
from fxckpt.state import held_tensors, substituted
from fxckpt.values import Guard, make_guard, summary


@dataclasses.dataclass(frozen=True, slots=True)
class BackwardKey:
    """All that the backward of a captured forward depends on.

    `cotangents` has, for each output, the strides and dtype of its gradient, or None if none comes;
    `autocast` is the autocast state in which backward is called.
    """

    cotangents: tuple[tuple[tuple[int, ...], torch.dtype] | None, ...]
    autocast: AutocastState = ()


AutocastState = tuple[tuple[str, torch.dtype], ...]  # device types where it is on, and its dtype


@dataclasses.dataclass(frozen=True, slots=True)
class Result:
    """How a tensor in the result of the callable is made from what the graph returns.

    `origin` is the index of a graph output, or the name of the primal that the result is a view of.
    `views` are applied to it one after the other, in grad mode: (operation, arguments after the
    first, keyword arguments, which of several results).
    """

    origin: int | str
    views: tuple[tuple[OpOverload, tuple[Any, ...], dict[str, Any], int | None], ...]


@dataclasses.dataclass(slots=True)
class Tape:
    """A captured forward, from which `joint` derives backward for any `BackwardKey`."""

    recorder: Recorder
    places: _Places
    primals: list[Primal]
    outputs: list[torch.Tensor]  # fakes, one per storage that forward returns
    output_nodes: list[Node]
    results: list[Result]
    spec: tree.Spec  # structure of the result
    guards: list[Guard]

    def expected_backward(self) -> BackwardKey:
        """The likely backward: the loss alone if there is a differentiable scalar, else all."""
        scalars = [t.requires_grad and t.dim() == 0 for t in self.outputs]
        chosen = scalars if any(scalars) else [t.requires_grad for t in self.outputs]
        return BackwardKey(
            tuple(
                (_dense_strides(t), t.dtype) if c else None
                for t, c in zip(self.outputs, chosen, strict=True)
            )
        )

    def joint(self, key: BackwardKey) -> Joint:
        """Forward, and backward for `key`, in one graph.

        Raises:
            CaptureError: if backward does something that a graph cannot reproduce.
        """
        recorder = self.recorder
        recorder.phase = "backward"
        fakes, cotangents = self._cotangents(key)
        outputs = [t for t, c in zip(self.outputs, key.cotangents, strict=True) if c is not None]
        leaves = [(p, leaf) for p in self.primals for leaf in p.leaves if leaf.requires_grad]
        grads: list[torch.Tensor | None] = []
        if outputs and leaves:
            with _reported("backward"), recorder.fake_mode, recorder, autocast_as(key.autocast):
                grads = list(
                    torch.autograd.grad(
                        outputs, [t for _, t in leaves], fakes, retain_graph=True, allow_unused=True
                    )
                )
        by_primal: dict[str, Node | None] = {p.name: None for p in self.primals if p.requires_grad}
        for (primal, _), grad in zip(leaves, grads, strict=bool(grads)):
            if grad is not None:
                if by_primal[primal.name] is not None:
                    raise CaptureError(f"{primal.name} is reached in two ways, one of them hidden")
                by_primal[primal.name] = recorder.node_for(grad)
        return _extract(self, cotangents, by_primal)

    def _cotangents(self, key: BackwardKey) -> tuple[list[torch.Tensor], list[Node]]:
        fakes, nodes = [], []
        for i, (out, c) in enumerate(zip(self.outputs, key.cotangents, strict=True)):
            if c is not None:
                with self.recorder.fake_mode:
                    fake = torch.empty_strided(out.size(), c[0], dtype=c[1], device=out.device)
                fakes.append(fake)
                nodes.append(self.recorder.add_placeholder(fake, f"cotangent_{i}"))
        return fakes, nodes


def capture(
    fn: Callable[..., Any],
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    module: nn.Module | None = None,
) -> Tape:
    """Records what `fn(*args, **kwargs)` does to tensors, without doing it.

    Args:
        fn: Any callable; for a module its original `forward`.
        args: Positional arguments: nested containers of tensors and static values.
        kwargs: Keyword arguments, likewise.
        module: The module whose parameters and buffers `fn` reads.

    Raises:
        CaptureError: if a graph cannot reproduce the call exactly. The program, its random number
            generators and the module are left as they were.
    """
    session = _Session(module, args, dict(kwargs or {}))
    _capturing.active = True
    try:
        return session.run(fn)
    finally:
        _capturing.active = False


_capturing = threading.local()


def is_capturing() -> bool:
    """Whether this thread is running a program on fake tensors in order to capture it."""
    return getattr(_capturing, "active", False)


class _Session:
    """The capture of one call: the primals, the recorder, and what is learned on the way."""

    def __init__(self, module: nn.Module | None, args: Any, kwargs: dict[str, Any]) -> None:
        self.module = module
        self.inputs, self.input_spec = tree.flatten((args, kwargs))
        self.held = held_tensors(module) if module is not None else {}
        everything = [*self.inputs, *(h.tensor for h in self.held.values())]
        for tensor in everything:
            _refuse_exotic(tensor)
        own = next((t.fake_mode for t in everything if isinstance(t, FakeTensor)), None)
        self.fake_mode = own or FakeTensorMode(allow_non_fake_inputs=True)
        self.places = _Places(module)
        self.recorder = Recorder(self.fake_mode, self._adopt, self.places, self._read)
        self.places.recorder = self.recorder
        self.primals: dict[int, Primal] = {}  # by id of the real tensor
        self.real: dict[Node, torch.Tensor] = {}  # placeholders whose values Python may read
        self.guards: list[Guard] = []

    def run(self, fn: Callable[..., Any]) -> Tape:
        for held in self.held.values():
            source = held.slots[0] if held.slots else ((held.tensor,), 0)
            self._add_primal(held.tensor, held.name, held.kind, source)
        labels = _input_names(self.input_spec)
        for i, (tensor, label) in enumerate(zip(self.inputs, labels, strict=True)):
            if id(tensor) not in self.primals:
                self._add_primal(tensor, label, "input", (None, i))
        fakes = [self.primals[id(t)].fake for t in self.inputs]
        args, kwargs = tree.unflatten(self.input_spec, fakes)
        with self._in_disguise():
            result = fn(*args, **kwargs)
        after, spec_after = tree.flatten((args, kwargs))
        same = spec_after == self.input_spec and all(
            a is b for a, b in zip(after, fakes, strict=True)
        )
        if not same:
            raise CaptureError("forward changes an object that was passed as an argument")
        return self._tape(result)

    @contextlib.contextmanager
    def _in_disguise(self) -> Iterator[None]:
        """All that hides the capture from the program, and the program's effects from the rest."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(_reported("forward"))
            stack.enter_context(invisible.unchanged_random_states())
            stack.enter_context(invisible.fresh_autocast_cache())
            if not isinstance(next(iter(self.inputs), None), FakeTensor):
                stack.enter_context(invisible.no_fake_tensors_seen())
            if self.module is not None:
                invisible.refuse_hooks(self.module)
                fakes = {key: p.fake for key, p in self.primals.items()}
                stack.enter_context(substituted(self.module, fakes))
            stack.enter_context(self.places.followed())
            stack.enter_context(self.fake_mode)
            stack.enter_context(self.recorder)
            yield

    # -- primals

    def _add_primal(self, tensor: torch.Tensor, name: str, kind: str, source: Any) -> Primal:
        fake = _fake_like(tensor, self.fake_mode)
        node = self.recorder.add_placeholder(fake, name)
        primal = Primal(name, kind, fake, node, source, [fake])
        self.primals[id(tensor)] = primal
        readable = not tensor.dtype.is_floating_point and not tensor.dtype.is_complex
        if (readable or kind == "literal") and not isinstance(tensor, FakeTensor):
            self.real[node] = tensor
        return primal

    def _adopt(self, tensor: torch.Tensor, *, literal: bool = False) -> tuple[Node, torch.Tensor]:
        """The stand-in of a real tensor that the program got hold of by itself."""
        primal = self.primals.get(id(tensor))
        if primal is None:
            _refuse_exotic(tensor)
            kind = "literal" if literal else "constant"
            primal = self._add_primal(tensor, f"{kind}_{len(self.primals)}", kind, ((tensor,), 0))
            primal.leaves.clear()
        if tensor.requires_grad and not any(leaf is tensor for leaf in primal.leaves):
            primal.leaves.append(tensor)
        return self.recorder.node_for(primal.fake), primal.fake

    # -- values that Python reads

    def _read(self, func: OpOverload, args: Any, kwargs: Any) -> Any:
        """The result of an operation whose result Python, or a shape, depends on."""
        recorder = self.recorder
        if recorder.phase == "backward":
            raise CaptureError(f"backward reads a value ({func})")
        nodes = recorder.nodes(args), recorder.nodes(kwargs)
        primals, compute = make_guard(recorder.graph, func, *nodes, self.real)
        with invisible.outside_of_modes(), torch.no_grad():
            value = compute(*(self.real[p] for p in primals))
        by_node = {p.node: p for p in self.primals.values()}
        if any(by_node[n].kind != "literal" for n in primals):
            names = tuple(by_node[n].name for n in primals)
            self.guards.append(Guard(names, compute, summary(value)))
        if isinstance(value, torch.Tensor):
            return _fake_like(value, self.fake_mode)
        if isinstance(value, (tuple, list)):
            return tuple(_fake_like(v, self.fake_mode) for v in value)
        return value

    # -- the result

    def _tape(self, result: Any) -> Tape:
        recorder = self.recorder
        tensors, spec = tree.flatten(result)
        fakes = {id(p.fake): p for p in self.primals.values()}
        outputs: list[torch.Tensor] = []
        results: dict[int, Result] = {}  # by id of the tensor: the same tensor, the same result
        for tensor in tensors:
            if id(tensor) in results:
                continue
            known = tensor if recorder.knows(tensor) else self._adopt(tensor)[1]
            base, views = _base_and_views(recorder, known)
            if id(base) in fakes:
                results[id(tensor)] = Result(fakes[id(base)].name, views)
                continue
            if not any(o is base for o in outputs):
                outputs.append(base)
            index = next(i for i, o in enumerate(outputs) if o is base)
            results[id(tensor)] = Result(index, views)
        storages = [id(recorder.storage_of(t)) for t in outputs]
        if len(set(storages)) < len(storages):
            raise CaptureError("forward returns two tensors that share memory unknown to autograd")
        self._refuse_unsafe_writes(list(self.primals.values()))
        return Tape(
            recorder,
            self.places,
            list(self.primals.values()),
            outputs,
            [recorder.node_for(t) for t in outputs],
            [results[id(t)] for t in tensors],
            spec,
            self.guards,
        )

    def _refuse_unsafe_writes(self, primals: list[Primal]) -> None:
        for primal in primals:
            if self.recorder.storage_of(primal.fake).version == 0:
                continue
            if primal.fake.requires_grad:
                raise CaptureError(f"forward changes {primal.name} in place under a gradient")
            real = self._real_of(primal)
            if any(_same_storage(real, self._real_of(p)) for p in primals if p is not primal):
                raise CaptureError(
                    f"forward changes {primal.name} in place, which overlaps another"
                )

    def _real_of(self, primal: Primal) -> torch.Tensor:
        container, key = primal.source
        return self.inputs[key] if container is None else container[key]


class _Places:
    """Where in the user's program the recorder is: callable for `Recorder.place`.

    Forward operations get the innermost running module and the user's source line; backward ones
    get those of the forward operation that created the running autograd node, found by the
    sequence number that autograd gives to both.
    """

    def __init__(self, module: nn.Module | None) -> None:
        self.recorder: Recorder
        self._paths: dict[int, str] = {}
        if module is not None:
            for path, m in module.named_modules():
                self._paths.setdefault(id(m), path)
        self._stack = [Place(types=(type(module),) if module is not None else ())]
        self._calls: dict[str, int] = {}
        self._by_sequence: dict[int, Place] = {}

    def __call__(self) -> Place:
        if self.recorder.phase == "backward":
            node = torch._C._current_autograd_node()
            missing = Place()
            return missing if node is None else self._by_sequence.get(node._sequence_nr(), missing)
        place = dataclasses.replace(self._stack[-1], source=user_source())
        self._by_sequence.setdefault(torch.autograd._get_sequence_nr() - 1, place)
        return place

    @contextlib.contextmanager
    def followed(self) -> Iterator[None]:
        """Follows calls of modules of this thread while active."""
        with invisible.module_calls(self._enter, self._leave):
            yield

    def _enter(self, m: nn.Module) -> None:
        above = self._stack[-1]
        path = self._paths.get(id(m)) or f"{above.path}.{type(m).__name__}".lstrip(".")
        self._calls[path] = self._calls.get(path, -1) + 1
        self._stack.append(Place(path, self._calls[path], (*above.types, type(m))))

    def _leave(self) -> None:
        self._stack.pop()


def _extract(tape: Tape, cotangents: list[Node], grads: dict[str, Node | None]) -> Joint:
    """The part of the tape that outputs, writes and these gradients need, as a graph of its own."""
    recorder = tape.recorder
    outputs = tape.output_nodes
    writes = {
        p.name: recorder.storage_of(p.fake).node
        for p in tape.primals
        if recorder.storage_of(p.fake).version
    }
    nodes = recorder.graph.nodes
    random = [
        n
        for n in nodes
        if n.op == "call_function" and n.meta["phase"] == "forward" and ops.node_is_random(n)
    ]
    wanted = [*outputs, *writes.values(), *(g for g in grads.values() if g is not None)]
    needed = reachable([*wanted, *random]) | set(cotangents)
    graph, copies = Graph(), {}

    def copy(node: Node) -> None:
        copies[node] = graph.node_copy(node, copies.__getitem__)
        alias = node.meta.get("alias")
        if alias is not None:
            copies[node].meta["alias"] = copies[alias]

    names = {p.node: p.name for p in tape.primals}
    primals = [n for n in nodes if n in needed and n in names]
    operations = [n for n in nodes if n in needed and n.op == "call_function"]
    for node in (*primals, *cotangents, *operations):
        copy(node)
    graph.output(tuple(copies[n] for n in wanted))
    return Joint(
        graph,
        {names[n]: copies[n] for n in primals},
        [copies[n] for n in cotangents],
        [copies[n] for n in outputs],
        {name: copies[n] for name, n in writes.items()},
        {name: None if n is None else copies[n] for name, n in grads.items()},
    )


def _base_and_views(recorder: Recorder, tensor: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """The tensor that owns the storage in the eyes of autograd, and the way from there.

    A tensor that needs a gradient and is not a view is such a base, even if it was made by detaching
    another one, as autograd does with the results of factory functions.
    """
    steps: list[Any] = []
    base = tensor
    while (recipe := recorder.recipe_of(base)) is not None:
        if base.requires_grad and not base._is_view():
            break
        assert recipe.args[0] is recipe.parent, "views take their base first"
        steps.insert(0, (recipe.func, recipe.args[1:], recipe.kwargs, recipe.index))
        base = recipe.parent
    if base.requires_grad and not tensor.requires_grad:
        steps.insert(0, (torch.ops.aten.detach.default, (), {}, None))
    return base, tuple(steps)


@contextlib.contextmanager
def _reported(phase: str) -> Iterator[None]:
    """Turns whatever goes wrong while recording into a `CaptureError` that says where it was."""
    try:
        yield
    except CaptureError as error:
        if error.source:
            raise
        source = user_source_of(error)
        raise CaptureError(error.reason, path=error.path, source=source, hint=error.hint) from error
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise CaptureError(
            f"{phase} raised {type(error).__name__} while it was captured: {first}",
            source=user_source_of(error),
        ) from error


def _refuse_exotic(tensor: torch.Tensor) -> None:
    plain = type(tensor) in (torch.Tensor, nn.Parameter, FakeTensor) or (
        type(tensor) is nn.Buffer if hasattr(nn, "Buffer") else False
    )
    if not plain and not isinstance(tensor, FakeTensor):
        raise CaptureError(f"a tensor of class {type(tensor).__name__} is used")
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        raise CaptureError("a tensor of a torch.func transform is used")
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
        raise CaptureError(f"a tensor with layout {tensor.layout} is used")
    if tensor.is_conj() or tensor.is_neg():
        raise CaptureError("a tensor with a pending conjugation or negation is used")
    if tensor.device.type == "meta":
        raise CaptureError("a tensor on the meta device is used")
    if tensor.device.type == "cuda" and not torch.cuda._is_compiled():
        # Autograd ends the process if asked for the stream of a device it was built without.
        raise CaptureError(f"a tensor on {tensor.device} is used by a torch without CUDA")


def _fake_like(tensor: torch.Tensor, mode: FakeTensorMode) -> torch.Tensor:
    """A fake with the geometry of `tensor`, on a storage of its own: a leaf without hooks."""
    with mode:
        fake = torch.empty_strided(
            tensor.size(), tensor.stride(), dtype=tensor.dtype, device=tensor.device
        )
    if isinstance(tensor, nn.Parameter):
        fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
        for key, value in tensor.__dict__.items():
            fake.__dict__.setdefault(key, value)
        return fake
    return fake.requires_grad_(tensor.requires_grad)


def _same_storage(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata


def _dense_strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """Strides of a gradient of `tensor` as most operations produce it."""
    return tuple(torch.empty_like(tensor, device="meta").stride())


def _input_names(spec: tree.Spec) -> list[str]:
    """`"x[0]"` for the positional arguments, the bare name for the keyword arguments."""
    positional, keyword = spec.children
    named = zip(keyword.payload, keyword.children, strict=True)
    return [
        *tree.names(positional, "args"),
        *(n for key, child in named for n in tree.names(child, str(key))),
    ]


def autocast_state() -> AutocastState:
    """The device types for which autocast is on, with the dtype it casts to."""
    return tuple(
        (device, torch.get_autocast_dtype(device))
        for device in _AUTOCAST_DEVICES
        if torch.is_autocast_enabled(device)
    )


_AUTOCAST_DEVICES = ("cpu", "cuda")


@contextlib.contextmanager
def autocast_as(state: AutocastState) -> Iterator[None]:
    """Autocast exactly as in `state`, whatever it was."""
    before = autocast_state()
    _set_autocast(state)
    try:
        yield
    finally:
        _set_autocast(before)


def _set_autocast(state: AutocastState) -> None:
    on = dict(state)
    for device in _AUTOCAST_DEVICES:
        torch.set_autocast_enabled(device, device in on)
        if device in on:
            torch.set_autocast_dtype(device, on[device])
