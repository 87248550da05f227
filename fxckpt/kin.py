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
from typing import Any

import torch
from torch import nn

from fxckpt import spread
from fxckpt.arguments import Call
from fxckpt.capture import without_cycle
from fxckpt.installation import original_class, original_forward
from fxckpt.runtime import Captured
from fxckpt.state import Held, Slot, held_tensors
from fxckpt.watch import Alike, Watch


@dataclasses.dataclass(frozen=True, slots=True)
class _Known:
    """What was captured, for modules in which these attributes lead to this description."""

    captured: Captured
    alike: Alike
    description: Hashable
    named: list[Any]  # objects that the description names by their `id`


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
        known = _Known(captured, watch.alike(), description, named)
        self._known[key] = [*before, known][-self._most :]
        while len(self._known) > self._most:
            self._known.popitem(last=False)

    def prepare(self, module: nn.Module, watch: Watch) -> None:
        """Lets a module be watched as those of its class are, before its state is looked at."""
        for (cls, _), known in self._known.items():
            if cls is original_class(type(module)):
                watch.add_as(known[-1].alike)

    def find(
        self, module: nn.Module, watch: Watch, call: Call, signature: Hashable
    ) -> Captured | None:
        """What was captured of a module that looks the same, with this module's tensors."""
        candidates = self._known.get((original_class(type(module)), signature), [])
        candidates = [k for k in candidates if _is_valid(k.captured)]
        held = [*held_tensors(module).values()] if candidates else []
        if not candidates or _share_memory(held, call):
            return None
        for known in candidates:
            watch.add_as(known.alike)
            sources = _sources(known.captured, module, held)
            if sources is None or watch.described()[0] != known.description:
                continue
            alike = known.captured.rebound(module, forward_of(module), watch.state, sources)
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
    held = [*held_tensors(module).values()]
    return bool(tape.assigned or tape.prepared or elsewhere or _share_memory(held, call))


def _share_memory(held: Sequence[Held], call: Call) -> bool:
    """Whether tensors of a module share memory with one another, or with arguments."""
    own = [_memory(h.tensor) for h in held]
    return len({*own}) < len(own) or any(_memory(t) in own for t in call.inputs)


def _memory(tensor: torch.Tensor) -> int:
    return spread.local(tensor).untyped_storage()._cdata


def _sources(
    captured: Captured, module: nn.Module, tensors: Sequence[Held]
) -> Mapping[str, Slot] | None:
    """Where the primals are at a call of another module; None if it has none of that name."""
    held = {h.name: h.slots[0] for h in tensors}
    found: dict[str, Slot] = {}
    for primal in captured.tape.primals:
        if primal.kind in ("input", "literal"):
            found[primal.name] = primal.source
        elif primal.name in held:
            container, key = held[primal.name]
            found[primal.name] = without_cycle(container, module), key
        else:
            return None
    return found
