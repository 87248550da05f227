"""Callable and example inputs in, `Tape` out.

NOTE [What capture may not do]

The real program must not notice that it was captured, and the captured branch must be the one that
eager takes. So the callable runs once, on fake tensors (no memory, no random numbers), in the modes
(autocast, grad, training) of the call, and

- parameters, buffers and inputs are replaced by fakes without hooks, and put back afterwards;
- the real autograd engine runs on the fakes, so backward is what eager would run;
- no tracing flag is set: `torch.compiler.is_compiling()` is false, and libraries that look for fake
  tensors are told that there are none;
- values that Python reads are computed if they follow from arguments, buffers and constants in a
  few operations; they become guards (see `values`). Other reads are refused.
- fakes that the program leaves in places of its own are found and removed (see `escapes`).
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Node

from fxckpt import checkpoints, invisible, spread, tree
from fxckpt.arguments import Arguments, Call
from fxckpt.errors import CaptureError
from fxckpt.holders import Surroundings
from fxckpt.joint import Primal, root
from fxckpt.keeping import without_escapes
from fxckpt.locks import LOCK
from fxckpt.places import ROOT, Places, Position
from fxckpt.reads import Reads, attributes_read
from fxckpt.recorder import Recorder
from fxckpt.state import Assignment, Held, held_tensors, substituted
from fxckpt.symbols import SYMBOLIC, Symbols, are_in, hints
from fxckpt.tape import Result, Tape, base_of, reported
from fxckpt.values import Guard, evaluate, is_readable, make_guard, summary


def capture(
    fn: Callable[..., Any],
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    module: nn.Module | None = None,
    position: Position = ROOT,
    reads: Reads | None = None,
    dynamic: bool = False,
) -> Tape:
    """Records what `fn(*args, **kwargs)` does to tensors, without doing it.

    Args:
        fn: Any callable; for a module its original `forward`.
        args: Positional arguments: nested containers of tensors and static values.
        kwargs: Keyword arguments, likewise.
        module: The module whose parameters and buffers `fn` reads.
        position: Where it stands in the model that was rewritten.
        reads: Gets the attributes of modules that `fn` reads.
        dynamic: Whether sizes of arguments are symbols, see `symbols`.

    Raises:
        CaptureError: if a graph cannot reproduce the call exactly. The program, its random number
            generators and the module are left as they were.
    """
    with LOCK, invisible.outside_of_modes():  # modes of the caller see the operations that run
        before = Surroundings(module, fn)
        reads = set() if reads is None else reads

        def session(left: Mapping[int, torch.Tensor]) -> _Session:
            call = Call.of(args, dict(kwargs or {}))
            return _Session(module, position, call, reads, left, before, Symbols(dynamic=dynamic))

        _capturing.active = True
        try:
            tape = without_escapes(fn, session, before)
        finally:
            _capturing.active = False
            changed, prepared = before.put_back()
        if changed:
            raise CaptureError(
                "forward changes objects that it finds outside of its tensors",
                hint="Keep what changes at each step in a buffer, or out of the model.",
                may_pass=True,
            )
        tape.prepared = prepared
        return tape


def _new_mode(symbols: Symbols) -> FakeTensorMode:
    mode = invisible.fake_mode(symbols.environment)
    _modes.add(mode)
    return mode


_modes: weakref.WeakSet[FakeTensorMode] = weakref.WeakSet()  # of captures
_capturing = threading.local()


def is_capturing() -> bool:
    """Whether this thread is running a program on fake tensors in order to capture it."""
    return getattr(_capturing, "active", False)


class _Session:
    """The capture of one call: the primals, the recorder, and what is learned on the way."""

    def __init__(
        self,
        module: nn.Module | None,
        position: Position,
        call: Call,
        reads: Reads,
        left: Mapping[int, torch.Tensor],
        outside: Surroundings,
        symbols: Symbols,
    ) -> None:
        self.module, self.reads, self.left = module, reads, left
        self.symbols = symbols
        self.inputs, self.input_spec = call.inputs, call.spec
        self.parts, self.outside = call.parts(), weakref.proxy(outside)
        self.held = _held(module) if module is not None else {}
        everything = [*self.inputs, *(h.tensor for h in self.held.values())]
        for tensor in everything:
            _refuse_exotic(tensor)
        self.own = next((t.fake_mode for t in everything if isinstance(t, FakeTensor)), None)
        if self.own in _modes:
            raise CaptureError("forward reads a tensor that was left by another capture")
        if self.own is not None and symbols.environment is not None:
            raise CaptureError("the arguments are fake tensors, which have sizes of their own")
        self.fake_mode = self.own or _new_mode(symbols)
        self.places = Places(module, position)
        me = weakref.proxy(self)  # no cycle: the tape keeps both
        self.recorder = Recorder(
            self.fake_mode,
            lambda tensor, **options: me._adopt(tensor, **options),
            self.places,
            lambda func, args, kwargs: me._read(func, args, kwargs),
            symbols,
        )
        self.primals: dict[int, Primal] = {}  # by id of the real tensor
        self.names: set[str] = set()  # of primals
        self.real: dict[Node, torch.Tensor] = {}  # placeholders whose values Python may read
        self.guards: list[Guard] = []
        self.attributes: dict[int, set[str]] = {}  # names of those of primals, by id of the fake
        self.outputs: list[torch.Tensor] = []
        self._told: dict[int, Result] = {}  # by id of what it is made from

    def run(self, fn: Callable[..., Any]) -> Tape:
        for held in self.held.values():
            container, key = held.slots[0]
            slot = (without_cycle(container, self.module), key)
            self._add_primal(held.tensor, held.name, held.kind, slot)
        labels = _input_names(self.input_spec)
        for i, (tensor, label) in enumerate(zip(self.inputs, labels, strict=True)):
            if id(tensor) not in self.primals:
                self._add_primal(tensor, label, "input", (None, i))
        fakes = [self.primals[id(t)].stand_in for t in self.inputs]
        arguments = Arguments(self.input_spec, fakes)
        shared = arguments.shared_with(self.parts)
        try:
            with self._in_disguise() as assignments:
                result = fn(*arguments.args, **arguments.kwargs)
            tape = self._tape(result, assignments, arguments)
        finally:
            changes = shared.put_back()
        if any(changes):
            raise CaptureError("forward changes an object that was passed as an argument")
        return tape

    def finished(self, tape: Tape) -> Tape:
        """Lets go of the arguments of the call: the tape lives on, and needs their fakes alone."""
        for tensor in self.inputs:
            primal = self.primals.get(id(tensor))
            if primal is not None and primal.kind == "input":
                del self.primals[id(tensor)]
        self.module, self.inputs, self.held, self.real = None, [], {}, {}
        self.parts = []
        return tape

    def structures(self) -> list[Any]:
        """Our own objects that refer to fakes, each once."""
        primals = self.primals.values()
        ours = [*primals, *(p.leaves for p in primals), self.outputs]
        return [*self.recorder.structures(), *ours]

    def real_of(self, primal: Primal) -> torch.Tensor:
        """The tensor that a primal stands for."""
        container, key = primal.source
        return self.inputs[key] if container is None else container[key]

    @contextlib.contextmanager
    def _in_disguise(self) -> Iterator[list[Assignment]]:
        """All that hides the capture from the program, and the program's effects from the rest.

        Yields:
            A list that holds, afterwards, what the program assigned to modules.
        """
        assignments: list[Assignment] = []
        with contextlib.ExitStack() as stack:
            stack.enter_context(reported("forward"))
            stack.enter_context(invisible.unchanged_random_states())
            stack.enter_context(invisible.fresh_autocast_cache())
            stack.enter_context(invisible.no_saved_tensor_hooks())
            stack.enter_context(invisible.side_effects_refused())
            stack.enter_context(checkpoints.followed(self.recorder))
            stack.enter_context(invisible.literals_read())
            stack.enter_context(invisible.other_branches_refused())
            stack.enter_context(invisible.leaves_as(self._argument_behind))
            stack.enter_context(torch.autograd.set_detect_anomaly(False))
            stack.enter_context(spread.placements_found_outside())
            if not isinstance(next(iter(self.inputs), None), FakeTensor):
                stack.enter_context(invisible.no_fake_tensors_seen())
            if self.module is not None:
                invisible.refuse_hooks(self.module)
                fakes = {key: p.stand_in for key, p in self.primals.items()}
                assignments = stack.enter_context(substituted(self.module, fakes))
            stack.enter_context(self.places.followed())
            stack.enter_context(self.fake_mode)
            stack.enter_context(self.recorder)
            stack.enter_context(attributes_read(self.reads))
            yield assignments

    # -- primals

    def _add_primal(self, tensor: torch.Tensor, name: str, kind: str, source: Any) -> Primal:
        if isinstance(tensor, FakeTensor) and tensor.fake_mode is not self.own:
            raise CaptureError("forward reads a tensor that was left by another capture")
        local, layout = spread.local(tensor), spread.layout(tensor)
        size: Any = local.size()
        stride: Any = local.stride()
        if layout is not None and self.symbols.environment is not None and kind == "input":
            raise CaptureError("an argument whose sizes may change is a DTensor")
        if kind == "input":
            size, stride = self.symbols.geometry(local)
        if layout is None:
            fake = stand_in = _fake_like(tensor, self.fake_mode, size, stride)
        else:
            fake = _fake_like(local, self.fake_mode, size, stride)
            stand_in = layout.around(fake, requires_grad=tensor.requires_grad)
            stand_in.__dict__.update(tensor.__dict__)
        if name in self.names:  # of a list, or of an argument that is called like a parameter
            name = next(n for i in itertools.count(1) if (n := f"{name}_{i}") not in self.names)
        self.names.add(name)
        node = self.recorder.add_placeholder(fake, name)
        node.meta["kind"] = kind
        primal = Primal(name, kind, fake, node, source, stand_in, [stand_in])
        self.attributes[id(fake)] = _attributes(stand_in)
        self.primals[id(tensor)] = primal
        if layout is None and is_readable(primal, tensor) and not isinstance(tensor, FakeTensor):
            self.real[node] = tensor
        return primal

    def _adopt(self, tensor: torch.Tensor, *, literal: bool = False) -> tuple[Node, torch.Tensor]:
        """The stand-in of a real tensor that the program got hold of by itself."""
        tensor = self.left.get(id(tensor), tensor)
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
        primals, compute = make_guard(recorder.graph, func, *nodes, self.real, self.symbols)
        value = evaluate(compute, (self.real[p] for p in primals), self.symbols.sizes)
        by_node = {p.node: p for p in self.primals.values()}
        if any(by_node[n].kind != "literal" for n in primals) or are_in(compute.graph):
            names = tuple(by_node[n].name for n in primals)
            self.guards.append(Guard(names, compute, summary(value)))
        if isinstance(value, torch.Tensor):
            return _fake_like(value, self.fake_mode, value.size(), value.stride())
        if isinstance(value, (tuple, list)):
            return tuple(_fake_like(v, self.fake_mode, v.size(), v.stride()) for v in value)
        return value

    # -- the result

    def _tape(self, result: Any, assignments: list[Assignment], arguments: Arguments) -> Tape:
        recorder = self.recorder
        made: list[Any] = []
        values = [a.value for a in assignments]
        tensors, spec = tree.flatten((result, values), parts=made, known=arguments.known)
        put, changes = arguments.changes(self.parts, made, self.outside)
        tensors += put
        _refuse_symbols(spec, changes.spec)
        results = self._results(tensors)
        if any(t.requires_grad and results[id(t)].views for t in put):
            # Its gradient would enter at the base, in another order than in eager mode.
            raise CaptureError("forward puts a view into an object that was passed as an argument")
        outputs = self.outputs
        storages = [id(recorder.storage_of(spread.local(t))) for t in outputs]
        if len(set(storages)) < len(storages):
            raise CaptureError("forward returns two tensors that share memory unknown to autograd")
        self._refuse_unsafe_writes(list(self.primals.values()))
        for primal in self.primals.values():
            recorder.node_for(primal.fake)  # raises if its memory was replaced
            self._require_unchanged(primal)
        if any(t.requires_grad and t.is_leaf for t in outputs):
            raise CaptureError("forward returns a tensor that it made and that wants a gradient")
        return Tape(
            self,
            recorder,
            self.places,
            list(self.primals.values()),
            outputs,
            [recorder.node_for(spread.local(t)) for t in outputs],
            [self._in_numbers(results[id(t)]) for t in tensors],
            spec,
            [(without_cycle(a.slot[0], self.module), a.slot[1]) for a in assignments],
            changes,
            self.guards,
            self.symbols,
        )

    def _in_numbers(self, result: Result) -> Result:
        """A result whose views are told in numbers that follow from the sizes of a call."""
        if not self.symbols.count:
            return result
        key = id(result)
        if key not in self._told:
            views = [
                (func, *self.symbols.numbers((args, kwargs), self.symbols.sizes), index, grad)
                for func, args, kwargs, index, grad in result.views
            ]
            self._told[key] = Result(result.origin, tuple(views))
        return self._told[key]

    def _results(self, tensors: list[torch.Tensor]) -> dict[int, Result]:
        """How each tensor is made, by `id`: the same tensor, the same result."""
        recorder, outputs = self.recorder, self.outputs
        fakes = {id(p.stand_in): p for p in self.primals.values()}
        results: dict[int, Result] = {}
        for tensor in tensors:
            if id(tensor) in results:
                continue
            if spread.is_spread(tensor):
                base, views = self._spread_result(tensor, fakes), ()
            else:
                known = tensor if recorder.knows(tensor) else self._adopt(tensor)[1]
                base, views = _base_and_views(recorder, known)
            if id(base) in fakes:
                results[id(tensor)] = Result(fakes[id(base)].name, views)
                continue
            if not any(o is base for o in outputs):
                outputs.append(base)
            index = next(i for i, o in enumerate(outputs) if o is base)
            results[id(tensor)] = Result(index, views)
        return results

    def _spread_result(self, tensor: torch.Tensor, primals: Mapping[int, Primal]) -> torch.Tensor:
        """A result that is spread over processes: an output as it is, or one of the primals.

        Raises:
            CaptureError: if it shares memory with a primal.
        """
        if id(tensor) in primals:
            return tensor
        local = spread.local(tensor)
        if not self.recorder.knows(local):
            raise CaptureError("forward returns a DTensor that it did not make")
        if root(self.recorder.node_for(local)).op == "placeholder":
            raise CaptureError("forward returns a view of a DTensor that it was given")
        return tensor

    def _argument_behind(self, tensor: torch.Tensor) -> torch.Tensor:
        """The argument that a tensor of forward stands for; else the tensor."""
        for real in self.inputs:
            if self.primals[id(real)].stand_in is tensor:
                return real
        return tensor

    def _require_unchanged(self, primal: Primal) -> None:
        """Refuses what happens to a tensor besides its contents."""
        real, fake = self.real_of(primal), primal.stand_in
        if not (
            hints(fake.shape) == real.shape
            and hints(fake.stride()) == real.stride()
            and fake.requires_grad == real.requires_grad
            and fake.grad_fn is None
            and fake.grad is None
            and _attributes(fake) == self.attributes[id(primal.fake)]
        ):
            raise CaptureError(f"forward changes the shape, flags or attributes of {primal.name}")

    def _refuse_unsafe_writes(self, primals: list[Primal]) -> None:
        for primal in primals:
            if self.recorder.storage_of(primal.fake).version == 0:
                continue
            if primal.fake.requires_grad:
                raise CaptureError(f"forward changes {primal.name} in place under a gradient")
            real = self.real_of(primal)
            if spread.is_spread(real):
                raise CaptureError(f"forward changes {primal.name}, a DTensor, in place")
            if any(_same_storage(real, self.real_of(p)) for p in primals if p is not primal):
                raise CaptureError(
                    f"forward changes {primal.name} in place, which overlaps another"
                )


def _refuse_symbols(*specs: tree.Spec) -> None:
    """Raises if a result holds a size that is no tensor's: the next call has another."""
    for spec in specs:
        if tree.holds(spec.payload, SYMBOLIC):
            raise CaptureError("forward returns or keeps a size of its arguments")
        _refuse_symbols(*spec.children)


def _base_and_views(recorder: Recorder, tensor: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """The tensor that owns the storage in the eyes of autograd, and the way from there.

    A tensor that needs a gradient and is not a view is such a base, even if it was made by
    detaching another one, as autograd does with the results of factory functions.
    """
    steps: list[Any] = []
    base = tensor
    while (recipe := recorder.recipe_of(base)) is not None:
        if base.requires_grad and base_of(base) is base:
            break
        assert recipe.args[0] is recipe.parent, "views take their base first"
        grad = base.grad_fn is not None or not base.requires_grad
        steps.insert(0, (recipe.func, recipe.args[1:], recipe.kwargs, recipe.index, grad))
        base = recipe.parent
    if base.requires_grad and not tensor.requires_grad:
        steps.insert(0, (torch.ops.aten.detach.default, (), {}, None, True))
    return base, tuple(steps)


class _AttributesOf:
    """The attributes of a module, without keeping the module: it is what keeps its captures."""

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)

    def _there(self) -> dict[str, Any]:
        module = self._module()
        assert module is not None, "a module that is called exists"
        return module.__dict__

    def __getitem__(self, key: str) -> Any:
        return self._there()[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._there()[key] = value


def without_cycle(container: Any, root: nn.Module | None) -> Any:
    """A container of the root's as a captured forward may keep it, which the root keeps."""
    own = root is not None and container is root.__dict__
    return _AttributesOf(root) if own and root is not None else container


def _held(module: nn.Module) -> dict[int, Held]:
    """The tensors of a module; of mere attributes those that can be captured, if they are used."""

    def usable(held: Held) -> bool:
        with contextlib.suppress(CaptureError):
            _refuse_exotic(held.tensor)
            return True
        return held.kind != "attribute"

    return {key: held for key, held in held_tensors(module).items() if usable(held)}


def _refuse_exotic(tensor: torch.Tensor) -> None:
    if spread.is_spread(tensor) or spread.is_under_way(tensor):
        tensor = spread.local(tensor)
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


def _fake_like(tensor: torch.Tensor, mode: FakeTensorMode, size: Any, stride: Any) -> torch.Tensor:
    """A fake of some geometry that stands for `tensor`, on a storage of its own: without hooks."""
    with mode:
        fake = torch.empty_strided(size, stride, dtype=tensor.dtype, device=tensor.device)
    if isinstance(tensor, nn.Parameter):
        fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
    for key, value in tensor.__dict__.items():
        fake.__dict__.setdefault(key, value)
    return fake.requires_grad_(tensor.requires_grad)


def _attributes(tensor: torch.Tensor) -> set[str]:
    """Names of what is attached to a tensor; torch puts its symbols there at the first look."""
    return {name for name in tensor.__dict__ if "_capsule" not in name}


def _same_storage(a: torch.Tensor, b: torch.Tensor) -> bool:
    a, b = spread.local(a), spread.local(b)
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata


def _input_names(spec: tree.Spec) -> list[str]:
    """`"x[0]"` for the positional arguments, the bare name for the keyword arguments."""
    positional, keyword = spec.children
    named = zip(keyword.payload, keyword.children, strict=True)
    return [
        *tree.names(positional, "args"),
        *(n for key, child in named for n in tree.names(child, str(key))),
    ]
