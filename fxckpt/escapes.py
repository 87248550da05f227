"""Fake tensors that a captured program left behind, outside of the modules that it runs.

NOTE [Escapes]

A program may keep tensors in places that nobody puts back after a capture: a global dictionary, an
`lru_cache`, a class attribute, a plain object, a closure, a list that it appends to. A fake that
stays there turns up in later calls. So after each capture

- fakes with more references than our own structures and autograd account for are looked for, by
  counting; the garbage collector is asked who holds these few;
- a fake whose value depends on neither arguments, nor parameters, nor random draws gives way to the
  tensor that eager would have kept. The program is captured once more, as later calls will find
  it; if it changes the tensor then, or keeps others, it is refused;
- all else is refused, and the places get back what they held before (`holders.Surroundings`).

A bounded `lru_cache` cannot be written to; it is cleared, and fills again. What is reachable from
autograd alone (contexts of custom functions, closures of hooks) is not an escape.
"""

from __future__ import annotations

import contextlib
import contextvars
import gc
import sys
import threading
import traceback
import types
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

from fxckpt.errors import CaptureError, let_go_of_frames, with_causes
from fxckpt.holders import GONE, LRU, Surroundings, is_namespace, keys, replace

# What refers to these is in no object.
_ROOTS = (types.ModuleType, threading.local, contextvars.Context)
_PACKAGE = __name__.partition(".")[0]
_LEVELS = 10  # of containers in containers, before they count as the program's


class Kept(NamedTuple):
    """A tensor of a capture, an object of the program that refers to it, and where in it."""

    tensor: torch.Tensor
    holder: Any
    places: frozenset[Any]  # comparable with those of another capture


def _kept(tensor: torch.Tensor, holder: Any) -> Kept:
    found = (k if isinstance(k, (str, int)) else id(k) for k in keys(holder, tensor))
    places = frozenset((id(holder), k) for k in found)
    return Kept(tensor, holder, places or frozenset([id(holder)]))


class Escapes:
    """Finds, replaces and removes what a program keeps of one capture.

    Args:
        tensors: Gives all tensors of the capture.
        structures: Gives our own objects that refer to these.
        program: The program.
        before: What its surroundings held before.
    """

    def __init__(
        self,
        tensors: Callable[[], list[torch.Tensor]],
        structures: Callable[[], list[Any]],
        program: Any,
        before: Surroundings,
    ) -> None:
        self._tensors, self._structures = tensors, structures
        self._program, self._before = program, before
        self.found: list[Kept] | None = None

    # -- finding

    def find(self) -> list[Kept]:
        """Where the program keeps tensors of the capture; no frame of it may be alive."""
        suspects = self._suspects()
        self.found = self._kept(suspects) if suspects else []
        return self.found

    def _suspects(self) -> list[torch.Tensor]:
        """Tensors with more references than are accounted for."""
        ours = Counter(map(id, gc.get_referents(*self._structures())))
        objects: list[Any] = [*self._tensors(), object()]  # the last: held by the list alone
        counts = [sys.getrefcount(o) for o in objects]
        alone = counts.pop()
        return [
            t
            for t, n in zip(objects, counts, strict=False)
            if n - alone > ours[id(t)] + (_OF_AUTOGRAD if t._use_count() > 1 else 0)
        ]

    def _kept(self, tensors: list[torch.Tensor]) -> list[Kept]:
        self._ours = {id(o) for o in (*self._structures(), *self._tensors())}
        wanted = {id(t): t for t in tensors}
        return [
            _kept(wanted[key], holder)
            for holder in self._holders(tensors, [wanted])
            for key in {*map(id, gc.get_referents(holder))} & wanted.keys()
        ]

    def _holders(self, objects: list[Any], passing: list[Any] | None = None) -> list[Any]:
        """What refers to one of the objects, and can be reached from the program.

        Goes up from all of them at once, and stops where the program is reached.
        """
        passing = [objects, *(passing or ())]
        holders = self._referrers(objects, passing)
        found: set[int] = set()  # indices of holders
        level, below = holders, {id(h): {i} for i, h in enumerate(holders)}
        passing.append(holders)
        for _ in range(_LEVELS):
            level = [each for each in level if not below[id(each)] <= found]
            found.update(*(below[id(each)] for each in level if self._is_programs(each)))
            further = [each for each in level if not below[id(each)] <= found]
            if not further:
                break
            passing += [level, further]
            level = self._referrers(further, passing)
            for each in level:
                known = [below[id(c)] for c in gc.get_referents(each) if id(c) in below]
                below[id(each)] = below.get(id(each), set()).union(*known)
        else:  # far away, but somewhere
            found.update(*(below[id(each)] for each in level))
        return [holder for i, holder in enumerate(holders) if i in found]

    def _is_programs(self, value: Any) -> bool:
        if issubclass(type(value), _ROOTS) or value is self._program:
            return True
        return self._before.knows(value)

    def _referrers(self, objects: list[Any], passing: list[Any]) -> list[Any]:
        """What refers to one of the objects, but for autograd, us, and lists of the search."""
        lists = {*map(id, passing), id(objects), id(passing)}
        return [
            r
            for r in gc.get_referrers(*objects)
            if id(r) not in self._ours and id(r) not in lists and not _is_passing(r)
        ]

    # -- mending

    def fill(self, values: Mapping[int, torch.Tensor], tensors: list[torch.Tensor]) -> bool:
        """Puts real tensors, by `id`, where fakes are kept; returns whether that was possible."""
        for _ in range(_LEVELS):
            kept = self._kept(tensors)
            for tensor, holder, _ in kept:
                self._fill(holder, tensor, values[id(tensor)])
            if not kept:
                return True
        return False

    def _fill(self, holder: Any, old: Any, new: Any) -> None:
        """A tuple cannot be changed: what holds it gets another one."""
        if not isinstance(holder, (tuple, frozenset)):
            replace(holder, old, new)
            return
        items = [new if x is old else x for x in holder]
        other = type(holder)(*items) if hasattr(holder, "_fields") else type(holder)(items)
        for above in self._holders([holder]):
            self._fill(above, holder, other)

    def remove(self, kept: Iterable[Kept]) -> None:
        """Makes holders hold what they held before, as far as that is known."""
        for tensor, holder, _ in kept:
            if not self._restore(holder, tensor):
                replace(holder, tensor, GONE)

    def _restore(self, holder: Any, new: Any) -> bool:
        """Puts back what was held instead of something new, here or further up."""
        restored, level = False, [(holder, new)]
        passing: list[Any] = []
        for _ in range(_LEVELS):
            unknown = []
            for each, inside in level:
                then = self._before.of(each)
                if then is not None:
                    restored |= _is_new(inside, then) and replace(each, inside, GONE, then)
                elif type(each) is LRU:
                    restored |= replace(each, inside, GONE)
                elif not issubclass(type(each), (*_ROOTS, type)) and not is_namespace(each):
                    unknown.append(each)
            if not unknown:
                break
            passing += [level, unknown]
            above = self._referrers(unknown, passing)
            passing.append(above)
            level = [(r, c) for r in above for c in gc.get_referents(r) if _among(c, unknown)]
        return restored

    @contextlib.contextmanager
    def removed_on_failure(self) -> Iterator[None]:
        """If what it surrounds raises, nothing of the capture stays behind."""
        handled = sys.exc_info()[1]
        try:
            yield
        except BaseException as error:
            for each in with_causes(error, handled):  # frames refer to tensors of the capture
                traceback.clear_frames(each.__traceback__)
            if self.found is None and self._suspects():  # in closures, which frames do not clear
                let_go_of_frames(error, handled)
                gc.collect()
            self.remove(self.find() if self.found is None else self.found)
            raise


@contextlib.contextmanager
def nothing_kept_by_backward(
    functions: list[type], tensors: Callable[[], list[torch.Tensor]], structures: Callable[[], Any]
) -> Iterator[None]:
    """While active, backward is recorded.

    Args:
        functions: The custom functions that it runs.
        tensors: See `Escapes`.
        structures: Likewise.

    Raises:
        CaptureError: if they changed anything but tensors of their own; that is undone.
    """
    if not functions:
        yield
        return
    before = Surroundings(None, functions)
    escapes = Escapes(tensors, structures, functions, before)
    try:
        with escapes.removed_on_failure():
            yield
            if escapes.find():
                raise CaptureError("backward keeps a tensor outside of its modules")
    finally:
        changed, prepared = before.put_back()
    if changed or prepared:
        raise CaptureError("backward changes objects that it finds outside of its tensors")


def _among(value: Any, several: list[Any]) -> bool:
    return any(value is each for each in several)


def _is_new(value: Any, then: Any) -> bool:
    return not _among(value, [*then.values()] if isinstance(then, dict) else then)


def _is_passing(referrer: Any) -> bool:
    """Whether something refers to tensors only while this runs, or belongs to autograd."""
    kind = type(referrer)
    if kind is types.FrameType:
        return str(referrer.f_globals.get("__name__")).startswith(f"{_PACKAGE}.")
    if kind.__module__.startswith((f"{_PACKAGE}.", "torch.fx.")):
        return True
    return issubclass(kind, torch._C._FunctionBase)


def _references_of_autograd() -> int:
    """How many Python references a tensor gets when C++ refers to it as well."""
    tensor = torch.empty(0)
    before = sys.getrefcount(tensor)
    view = tensor.view(0)
    after = sys.getrefcount(tensor)
    del view
    return after - before


_OF_AUTOGRAD = _references_of_autograd()
