"""What tracing needs to know of a call of a rewritten module: a `Description`."""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple
from unittest import mock

import torch
from torch import nn

from fxckpt import tree
from fxckpt.arguments import Call
from fxckpt.capture import capture
from fxckpt.errors import CaptureError
from fxckpt.installation import original_forward
from fxckpt.invisible import fake_mode, outside_of_modes
from fxckpt.levels import outside_of_transforms
from fxckpt.locks import LOCK
from fxckpt.modes import autocast_as, autocast_state
from fxckpt.state import Slot, held_tensors
from fxckpt.tape import Tape


class Look(NamedTuple):
    """What a tensor looks like."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool

    @staticmethod
    def of(tensor: torch.Tensor) -> Look:
        """That of a tensor; where sizes are symbols, Dynamo traces again for others."""
        size, stride = (tuple(map(int, n)) for n in (tensor.size(), tensor.stride()))
        return Look(size, stride, tensor.dtype, tensor.device, tensor.requires_grad)

    @property
    def dense(self) -> tuple[int, ...]:
        """The strides of a gradient."""
        like = torch.empty_strided(self.size, self.stride, device="meta")
        return tuple(torch.empty_like(like).stride())

    def empty(self) -> torch.Tensor:
        """A tensor that looks like it and has no history."""
        return torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=self.device)


class Description:
    """All that tracing needs to know of a call of a module.

    Args:
        module: The module; only a weak reference is kept.
        tape: Its forward, captured for the call.
        held: The parameters and buffers, as they look.
        call: The arguments.

    Attributes:
        number: Stands for it in graphs.
        takes: What the operation takes: parameters, buffers, arguments.
        same: For each of these, the first that is the same tensor.
        returns: What the graph returns.
        written: Which of what it takes are buffers that forward changes.
        by_inductor: Whether Inductor compiles what is around.

    Raises:
        CaptureError: if forward has effects that an operation cannot have.
    """

    def __init__(self, module: nn.Module, tape: Tape, held: Sequence[torch.Tensor], call: Call):
        self.number = next(_numbers)
        self.tape, self.spec, self.autocast = tape, call.spec, autocast_state()
        self.by_inductor = False
        self._module = weakref.ref(module)
        self.slots = _slots(module)
        tensors = [*held, *call.inputs]
        self.takes = [*map(Look.of, tensors)]
        first: dict[int, int] = {}
        self.same = [first.setdefault(id(t), i) for i, t in enumerate(tensors)]
        places: dict[Slot, int] = {
            (None, i): self.same[len(held) + i] for i in range(len(call.inputs))
        }
        places |= {_place(slot): i for i, slots in enumerate(self.slots) for slot in slots}
        sources = {p.name: _place(p.source) for p in tape.primals}
        self.taken = {name: places[at] for name, at in sources.items() if at in places}
        self.returns = [*map(Look.of, tape.outputs)]
        joint = tape.joint(tape.expected_backward())
        self.written = [self._written(name) for name in joint.writes]
        self._refuse_effects()

    def _written(self, name: str) -> int:
        at = self.taken.get(name, -1)
        if not 0 <= at < len(self.slots) or self.takes[at].requires_grad:
            raise CaptureError(
                f"forward changes {name}, which is no buffer, inside of torch.compile"
            )
        return at

    def _refuse_effects(self) -> None:
        if self.tape.assigned:
            raise CaptureError(
                "forward assigns tensors to attributes of modules inside of torch.compile"
            )
        if self.tape.changes.numbers or tree.mentions_known(self.tape.spec):
            raise CaptureError(
                "forward changes or returns an object that was passed to it inside of torch.compile"
            )
        for kind in _strangers(self.tape.spec):
            raise CaptureError(
                f"forward returns a {kind.__name__} inside of torch.compile",
                hint="If that is a key/value cache, pass use_cache=False.",
            )
        for primal in self.tape.primals:
            if primal.requires_grad and primal.name not in self.taken:
                raise CaptureError(
                    f"forward reads {primal.name}, neither a parameter nor an argument, which "
                    "wants a gradient inside of torch.compile"
                )

    @property
    def module(self) -> nn.Module:
        """The module."""
        module = self._module()
        assert module is not None, "what holds its parameters is called"
        return module

    @property
    def own(self) -> list[torch.Tensor]:
        """The parameters and buffers that are in the module now."""
        return [container[key] for ((container, key), *_) in self.slots]

    def gradients(self, outputs: Sequence[int]) -> list[int]:
        """Which of the tensors get a gradient if these outputs do."""
        with outside_of_compilers():
            grads = self.tape.joint(self.tape.dense_key(outputs)).grads
        return sorted(self.taken[name] for name, found in grads.items() if found)


_numbers = itertools.count()
_by_number: weakref.WeakValueDictionary[int, Description] = weakref.WeakValueDictionary()
_Known = dict[Hashable, list[Description]]
_by_module: weakref.WeakKeyDictionary[nn.Module, _Known] = weakref.WeakKeyDictionary()


def description(number: int) -> Description:
    """The description that a number stands for."""
    return _by_number[number]


_PLAIN = (type(None), bool, int, float, str)


def _strangers(spec: tree.Spec) -> Iterator[type]:
    """The types of what Dynamo does not take out of a call."""
    if spec.kind == "object" or (spec.kind == "static" and spec.type not in _PLAIN):
        assert spec.type is not None, "of anything but tensors"
        yield spec.type
    for child in spec.children:
        yield from _strangers(child)


def _slots(module: nn.Module) -> list[list[Slot]]:
    """All places where a module holds its parameters, and then its buffers."""
    held = held_tensors(module)
    return [held[id(t)].slots for t in (*module.parameters(), *module.buffers())]


def _place(slot: Slot) -> Slot:
    container, key = slot
    return (None if container is None else id(container)), key


def describe(module: nn.Module, held: Sequence[torch.Tensor], call: Call) -> Description:
    """Describes a call anew.

    Args:
        module: The module.
        held: What stands for its parameters, and then its buffers.
        call: The arguments; what stands for them.

    Raises:
        CaptureError: if that is not possible.
    """
    autocast = autocast_state()
    with LOCK, outside_of_compilers(), autocast_as(autocast), torch.enable_grad():
        args, kwargs = tree.unflatten(call.spec, _fakes(module, held, call))
        tape = capture(original_forward(module), args, kwargs, module=module)
        new = Description(module, tape, held, call)
    known = _by_module.setdefault(module, defaultdict(list))[_key(held, call)]
    for old in known:
        if old.tape.fingerprint() == tape.fingerprint() and old.same == new.same:
            known.remove(old)
            new = old
            break
    known.append(new)
    _by_number[new.number] = new
    return new


def described(module: nn.Module, held: Sequence[torch.Tensor], call: Call) -> Description | None:
    """The latest description of such a call."""
    known = _by_module.get(module, {}).get(_key(held, call))
    return known[-1] if known else None


def _key(held: Sequence[torch.Tensor], call: Call) -> Hashable:
    looks = tuple(map(Look.of, (*held, *call.inputs)))
    return looks, call.spec, autocast_state()


def _fakes(module: nn.Module, held: Sequence[torch.Tensor], call: Call) -> list[torch.Tensor]:
    """What forward is captured on: fakes; parameters, where these are arguments."""
    own = (*module.parameters(), *module.buffers())
    fakes = {id(t): p for t, p in zip(held, own, strict=True)}
    mode = fake_mode()
    for tensor in call.inputs:
        if id(tensor) not in fakes:
            look = Look.of(tensor)
            with mode:
                fakes[id(tensor)] = look.empty().requires_grad_(look.requires_grad)
    return [fakes[id(t)] for t in call.inputs]


@contextlib.contextmanager
def outside_of_compilers() -> Iterator[None]:
    """Nothing is being compiled, as far as programs and fake tensors can tell."""
    with (
        outside_of_modes(),
        outside_of_transforms(),
        torch._guards.tracing(None),
        mock.patch.object(torch.compiler, "_is_compiling_flag", False),
    ):
        yield
