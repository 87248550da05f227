"""The arguments of a captured call, and what forward does to the objects among them.

NOTE [Objects that forward changes]

Forward may put something into an object that it was passed: a layer its keys into a cache, a block
its result into a list. It is captured on copies, whose tensors are fake. What such a copy contains
afterwards is part of the result of the captured graph, and each run puts it into the object of the
call: tensors that forward made are results like others; tensors and objects that it was passed are
those of the call.

That is exact if the object is reached in one way only, and what is put there was made by forward,
or was there before. Other calls are refused.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from fxckpt import objects, tree
from fxckpt.contents import is_plain
from fxckpt.errors import CaptureError
from fxckpt.holders import Surroundings


@dataclasses.dataclass(frozen=True, slots=True)
class Call:
    """The arguments of one call: as they are, and as their tensors and the rest."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: list[torch.Tensor]
    spec: tree.Spec

    @staticmethod
    def of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Takes the arguments apart."""
        return Call(args, kwargs, *tree.flatten((args, kwargs), open_objects=True))

    def parts(self) -> list[Any]:
        """The objects in them in the order of their structure, but for tensors and the like."""
        return _parts(self.args, self.kwargs)


def _parts(args: Any, kwargs: Any) -> list[Any]:
    found: list[Any] = []
    tree.flatten((args, kwargs), open_objects=True, parts=found)
    return found


@dataclasses.dataclass(frozen=True, slots=True)
class Changes:
    """What forward puts into objects that it was passed.

    Attributes:
        numbers: Of the objects, among the parts of the arguments.
        layouts: Of the objects afterwards.
        spec: Of a list of their children.
    """

    numbers: tuple[int, ...] = ()
    layouts: tuple[objects.Layout, ...] = ()
    spec: tree.Spec = dataclasses.field(default_factory=lambda: tree.flatten([])[1])

    def fit(self, there: Sequence[Any]) -> bool:
        """Whether each of the objects occurs once among the parts of a call."""
        count = Counter(map(id, there))
        return all(count[id(there[i])] == 1 for i in self.numbers)

    def make(self, there: Sequence[Any], tensors: Iterable[Any]) -> None:
        """Changes the parts of a call; the tensors are those of `spec`."""
        contents = tree.unflatten(self.spec, tensors, there)
        for number, layout, children in zip(self.numbers, self.layouts, contents, strict=True):
            objects.fill(there[number], layout, children)


class Arguments:
    """The arguments of one call, built anew.

    Args:
        spec: Their structure.
        tensors: The tensors in them.
    """

    def __init__(self, spec: tree.Spec, tensors: Iterable[Any]) -> None:
        self.args, self.kwargs = tree.unflatten(spec, tensors)
        self._parts = _parts(self.args, self.kwargs)
        self._before = [*map(_state, self._parts)]
        self.known: Mapping[int, int] = {id(p): i for i, p in enumerate(self._parts)}

    def shared_with(self, originals: Sequence[Any]) -> Surroundings:
        """What those of the originals hold that were not built anew."""
        shared = tuple(o for o, p in zip(originals, self._parts, strict=True) if o is p)
        return Surroundings(None, shared, with_globals=False)

    def contents(self, numbers: Iterable[int]) -> list[list[Any]]:
        """What is in some of the parts now."""
        return [_inside(self._parts[i])[1] for i in numbers]

    def changes(
        self, originals: Sequence[Any], result: Sequence[Any], outside: Surroundings
    ) -> tuple[list[torch.Tensor], Changes]:
        """What was put into the arguments, and the tensors in it.

        Args:
            originals: The parts of the arguments that these stand for.
            result: The objects in what forward returns otherwise.
            outside: What was elsewhere before.

        Raises:
            CaptureError: if a run of the graph could not do the same.
        """
        states = zip(self._parts, self._before, strict=True)
        numbers = tuple(i for i, (part, before) in enumerate(states) if _state(part) != before)
        layouts = tuple(_inside(self._parts[i])[0] for i in numbers)
        made = [*result]
        tensors, spec = tree.flatten(
            self.contents(numbers),
            open_objects=True,
            parts=made,
            known=self.known,
            is_shared=lambda o: outside.knows(o) and _without_tensors(o),
        )
        changes = Changes(numbers, layouts, spec)
        several = Counter(id(o) for o in made if objects.is_changeable(o))
        shared = any(self._parts[i] is originals[i] or outside.shows(originals[i]) for i in numbers)
        if numbers and (shared or max(several.values()) > 1 or not changes.fit(originals)):
            raise _refusal()
        return tensors, changes


def _refusal() -> CaptureError:
    return CaptureError("forward changes an object that was passed as an argument")


def _inside(part: Any) -> objects.Inside:
    found = objects.inside(part)
    if found is None:
        raise _refusal()
    return found


def _without_tensors(value: Any) -> bool:
    if tree.holds_tensor(value):
        raise _refusal()
    return True


class _Same:
    """Compares as the object that it keeps: by identity."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value


def _state(part: Any) -> Any:
    """What an object contains, comparably; if it is not looked into, what it is."""
    found = objects.inside(part)
    if found is None:
        return tree.static_key(part)
    layout, children = found
    each = [tree.static_key(c) if is_plain(c) else _Same(c) for c in children]
    return tree.layout_key(layout), each
