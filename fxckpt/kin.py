"""What was captured of a module, for other modules that look the same, such as layers of a stack.

NOTE [Modules that look the same]

A captured graph is valid for one state of its module, of which a `Watch` knows all that forward
reads. If another module has the same description (classes, structure, plain values, geometry of
tensors, and the very same objects elsewhere), under the same modes and for arguments of the same
signature, its forward does the same to its own tensors. So it gets what was captured, with its own
parameters and buffers in their places; nothing is captured, decided or compiled again.

Not shared is what refers to one module: forwards that assign attributes, and tensors that came from
elsewhere.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn

from fxckpt import spread
from fxckpt.arguments import Call
from fxckpt.capture import without_cycle
from fxckpt.installation import original_class, original_forward
from fxckpt.runtime import Captured
from fxckpt.state import Slot, held_tensors
from fxckpt.watch import Alike, Watch


@dataclasses.dataclass(frozen=True, slots=True)
class _Known:
    """What was captured, for modules in which these attributes lead to this description."""

    captured: Captured
    alike: Alike
    description: Hashable
    named: list[Any]  # objects that the description names by their `id`
    places: dict[str, tuple[int, str, str]] | None  # of the primals, if all are members of modules


class Kin:
    """What was captured of some modules, for those among them that look the same.

    Args:
        most: How many signatures are remembered.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._known: OrderedDict[tuple[type, Hashable], list[_Known]] = OrderedDict()

    def add(
        self, captured: Captured, module: nn.Module, watch: Watch, call: Call, signature: Hashable
    ) -> None:
        """Takes note of what was captured.

        Args:
            captured: For this module.
            module: The module.
            watch: Of its state, which is as it was when forward was captured.
            call: The call that was captured.
            signature: Of modes and arguments.
        """
        if _is_bound_to(captured, module, call):
            return
        description, named = watch.described()
        key = original_class(type(module)), signature
        before = [k for k in self._known.pop(key, ()) if _is_valid(k.captured)]
        known = _Known(captured, watch.alike(), description, named, _places(captured, module))
        self._known[key] = [*before, known][-self._most :]
        while len(self._known) > self._most:
            self._known.popitem(last=False)

    def prepare(self, module: nn.Module, watch: Watch) -> None:
        """Lets a module be watched as those of its class are, before its state is looked at."""
        of_class = [
            [k.alike for k in known]
            for (cls, _), known in self._known.items()
            if cls is original_class(type(module))
        ]
        if not any(map(watch.takes_as, dict.fromkeys(chain.from_iterable(of_class)))):
            for alikes in of_class:
                watch.add_as(alikes[-1])

    def find(
        self, module: nn.Module, watch: Watch, call: Call, signature: Hashable
    ) -> Captured | None:
        """What was captured of a module that looks the same, with this module's tensors."""
        candidates = self._known.get((original_class(type(module)), signature), [])
        for known in candidates:
            if not _is_valid(known.captured):
                continue
            watch.add_as(known.alike)
            sources = _sources(known, module, watch, call)
            if sources is None:
                continue
            alike = known.captured.rebound(module, forward_of(module), watch, sources)
            if alike.guards_hold(call):
                return alike
        return None


def forward_of(module: nn.Module) -> Callable[..., Any]:
    """The original forward of a module, which is not kept."""
    owner = weakref.ref(module)

    def forward(*args: Any, **kwargs: Any) -> Any:
        module = owner()
        assert module is not None, "a module that is called exists"
        return original_forward(module)(*args, **kwargs)

    return forward


def _is_valid(captured: Captured) -> bool:
    return captured.standing.is_good


def _is_bound_to(captured: Captured, module: nn.Module, call: Call) -> bool:
    tape = captured.tape
    elsewhere = any(p.kind == "constant" for p in tape.primals)
    held = [h.tensor for h in held_tensors(module).values()]
    return bool(tape.assigned or tape.prepared or elsewhere or _share_memory(held, call))


def _share_memory(held: Sequence[torch.Tensor], call: Call) -> bool:
    """Whether tensors of a module share memory with one another, or with arguments."""
    own = [*map(_memory, held)]
    return len({*own}) < len(own) or any(_memory(t) in own for t in call.inputs)


def _memory(tensor: torch.Tensor) -> int:
    return spread.local(tensor).untyped_storage()._cdata


def _places(captured: Captured, module: nn.Module) -> dict[str, tuple[int, str, str]] | None:
    """Where the primals are in modules that look the same: position, kind of member, name."""
    containers = {
        id(m.__dict__[kind]): (i, kind)
        for i, m in enumerate(module.modules())
        for kind in ("_parameters", "_buffers")
    }
    found = {}
    for held in held_tensors(module).values():
        container, key = held.slots[0]
        if id(container) in containers:
            found[held.name] = *containers[id(container)], key
    names = [p.name for p in captured.tape.primals if p.kind not in _OF_CALLS]
    return {name: found[name] for name in names} if all(n in found for n in names) else None


_OF_CALLS = ("input", "literal")


def _sources(
    known: _Known, module: nn.Module, watch: Watch, call: Call
) -> Mapping[str, Slot] | None:
    """Where the primals are at a call of another module; None if it does not look the same."""
    primals = known.captured.tape.primals
    found = {p.name: p.source for p in primals if p.kind in _OF_CALLS}
    if known.places is not None and watch.is_known_as(known.alike):
        if _share_memory(watch.tensors(), call):
            return None
        modules = [*module.modules()]
        for name, (i, kind, key) in known.places.items():
            found[name] = modules[i].__dict__[kind], key
        return found
    held = held_tensors(module)
    if _share_memory([h.tensor for h in held.values()], call):
        return None
    slots = {h.name: h.slots[0] for h in held.values()}
    for primal in primals:
        if primal.name not in found:
            if primal.name not in slots:
                return None
            container, key = slots[primal.name]
            found[primal.name] = without_cycle(container, module), key
    return found if watch.described()[0] == known.description else None
