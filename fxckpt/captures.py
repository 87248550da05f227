"""What was captured of the calls of one module, by signature."""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter, OrderedDict
from collections.abc import Hashable
from typing import Any, NoReturn

import torch
from torch import nn

from fxckpt import signature, tree
from fxckpt.arguments import Call
from fxckpt.capture import capture
from fxckpt.errors import CaptureError, let_go_of_frames
from fxckpt.first_run import Misfit
from fxckpt.holders import prepare
from fxckpt.installation import original_forward
from fxckpt.kin import Kin, forward_of
from fxckpt.levels import Twins, outside_of_transforms, samples
from fxckpt.locks import LOCK
from fxckpt.modes import compiles_halves
from fxckpt.places import Position
from fxckpt.programs import Decide
from fxckpt.reads import Reads
from fxckpt.runtime import Captured
from fxckpt.state import exchanged, held_tensors
from fxckpt.symbols import sizes_of
from fxckpt.tape import Tape, reported
from fxckpt.watch import Watch

_MOST_MISFITS = 8  # then a call runs eagerly
_MOST_SHARED = 8  # captures with symbols for calls of one kind; then each size has its own
_MOST_IN_VAIN = 8  # captures for calls of one kind, none of which was used again


@dataclasses.dataclass(frozen=True, slots=True)
class Options:
    """What `rewrite` was called with.

    `nests` says whether it also decides inside of something else that is captured, `by_index`
    whether it may decide differently for modules that differ in nothing but their index in a list.
    `dynamic` says whether what is captured shall serve other sizes, too. `told` is what reports say
    of all this.
    """

    decide: Decide
    cache_size: int
    strict: bool
    nests: bool = True
    by_index: bool = True
    decompose: bool = False
    compile: bool = False
    dynamic: bool = False
    told: str = ""


class _OfOneSize(Exception):
    """No capture can serve other sizes than those of its own call.

    Args:
        reason: Why.
    """

    def __init__(self, reason: CaptureError) -> None:
        super().__init__(str(reason))
        self.reason = reason


Key = tuple[int | None, Hashable]  # state of the module; modes and arguments


class Captures:
    """Finds what was captured for a call, and captures what was not.

    Args:
        module: The module.
        options: What `rewrite` was called with.
        position: Where the module stands in the model that was rewritten.
        kin: What was captured of modules that may look the same.
    """

    def __init__(
        self, module: nn.Module, options: Options, position: Position, kin: Kin | None = None
    ) -> None:
        self._options, self._position, self._kin = options, position, kin
        # By signature; the error where the graph cannot be captured. Several per signature if
        # Python read values of the arguments: then their guards decide.
        self._known: OrderedDict[Key, list[Captured] | CaptureError] = OrderedDict()
        self._watch = self._fresh_watch(module)
        self._misfits: Counter[Key] = Counter()
        self._in_vain: Counter[Hashable] = Counter()  # captures since the last use
        self.of_one_size: dict[Hashable, str] = {}  # kinds of calls that symbols cannot serve: why
        self.count = 0  # of captures
        self._twins = Twins(forward=options.decompose)
        self._passed = False  # whether an error that may pass was ignored
        self.generation = 0  # how often the structure of the module changed

    @property
    def tried(self) -> bool:
        """Whether any call was looked up."""
        return bool(self._known)

    def find(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        transformed: bool = False,
    ) -> tuple[Captured | CaptureError | None, Call | None]:
        """What was captured for this call, captured now if it is the first of its kind.

        Args:
            module: The module.
            args: The positional arguments.
            kwargs: The keyword arguments.
            transformed: Whether it is to run under transforms of `torch.func`, and so has the sizes
                of this call.

        Returns:
            Why it cannot be captured, if it cannot; None if there is nothing to differentiate. And
            the arguments taken apart, unless that failed.

        Raises:
            CaptureError: instead of returning it, if the option `strict` is set.
        """
        handled, call = sys.exc_info()[1], None
        with LOCK:
            try:
                call = Call.of(args, kwargs)
                found = self._found(module, call, shared=self._options.dynamic and not transformed)
            except CaptureError as error:
                if self._options.strict:
                    raise
                let_go_of_frames(error, handled)
                return error.at(error.path, error.source), call
            if found is not None and found.tape.prepared:
                prepare(found.tape.prepared)
                self._watch.latest = None  # which is of the module as it was before that
        usable = found is not None and found.differentiable
        return found if usable else None, call

    def run_transformed(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Runs a call under transforms of `torch.func`; see `transforms`.

        Raises:
            CaptureError: if that is not possible; nothing has happened then.
        """
        call, held = Call.of(args, kwargs), held_tensors(module).values()
        twins = self._twins.of([*((h.name, h.tensor) for h in held), *enumerate(call.inputs)])
        fakes = tree.unflatten(call.spec, [twins.get(id(t), t) for t in call.inputs])
        with LOCK, outside_of_transforms(), torch.enable_grad(), exchanged(held, twins):
            found, _ = self.find(module, *fakes, transformed=True)
        if isinstance(found, CaptureError):
            raise found
        if found is None:  # nothing is differentiated, so nothing is kept
            return original_forward(module)(*args, **kwargs)
        return found.run_transformed(call)

    def signature(self, module: nn.Module, call: Call, *, dynamic: bool = False) -> Key:
        """All that what is captured of a call depends on; captures of another structure go.

        Args:
            module: The module.
            call: The call.
            dynamic: Whether sizes shall be left out.
        """
        state = self._watch.state()
        if state is None:  # the structure of the module changed
            self._known.clear()
            self._watch, self.generation = self._fresh_watch(module), self.generation + 1
            state = self._watch.state()
        count = 1 if self._options.nests else samples()  # of which a plan has to know
        arguments = signature.of_arguments(call.spec, call.inputs, dynamic=dynamic)
        return state, (signature.of_modes(), arguments, count)

    def _found(self, module: nn.Module, call: Call, *, shared: bool) -> Captured | None:
        """None if there is nothing to capture yet.

        Raises:
            CaptureError: if the call cannot be captured.
        """
        if self._kin and not self._known:
            self._kin.prepare(module, self._watch)
        if shared:
            key = self.signature(module, call, dynamic=True)
            if key[1] not in self.of_one_size:
                try:
                    return self._found_for(key, module, call, shared=True)
                except _OfOneSize as error:
                    self._known.pop(key, None)
                    self.of_one_size[key[1]] = str(error.reason)
        return self._found_for(self.signature(module, call), module, call, shared=False)

    def _found_for(
        self, key: Key, module: nn.Module, call: Call, *, shared: bool
    ) -> Captured | None:
        """See `_found`.

        Raises:
            _OfOneSize: if it was to be shared among sizes, and cannot be.
        """
        if self._watch.is_lazy():
            return None
        known = self._latest(key)
        found = next((c for c in known if c.guards_hold(call)), None)
        if found is not None and not found.standing.is_good:
            if shared:
                raise _OfOneSize(
                    CaptureError("its results look different from what their fakes say")
                )
            known.remove(found)
            if found.standing.misfit is not None:
                self._count_misfit(key, found.standing.misfit)
            found = None
        if found is None:
            return self._capture(module, call, key, shared=shared)
        self._in_vain.pop(key[1], None)
        if not found.confirmed:
            found.confirmed = True
            return self._confirmed(found, module, call, key, shared=shared)
        return found

    def _latest(self, key: Key) -> list[Captured]:
        """What is known for a signature, which is the latest used from now on."""
        known = self._known.setdefault(key, [])
        self._known.move_to_end(key)
        while len(self._known) > self._options.cache_size:
            old, _ = self._known.popitem(last=False)
            self._misfits.pop(old, None)
        if len(self._in_vain) > self._options.cache_size:
            self._in_vain.clear()
        if isinstance(known, CaptureError):
            raise known.at(known.path, known.source)
        return known

    def _capture(self, module: nn.Module, call: Call, key: Key, *, shared: bool) -> Captured:
        """Captures a call; what it read of the module is part of its signature."""
        alike = self._kin.find(module, self._watch, call, key[1]) if self._kin else None
        if alike is not None:
            return self._added(alike, module, call, key, shared=shared)
        if shared and len(self._latest(key)) >= _MOST_SHARED:
            raise _OfOneSize(CaptureError("forward treats too many sizes as cases of their own"))
        self._require_hope(key)
        reads: Reads = set()
        error, captured = None, None
        try:
            tape = self._tape(module, call, reads)
            if shared and sizes_of(call.inputs):
                tape = self._generalised(tape, module, call, reads)
            captured = self._captured(tape, module, call)
        except CaptureError as failure:
            error = failure
        self._watch.add(reads)
        if captured is None:
            assert error is not None
            self._refuse(self.signature(module, call, dynamic=shared), error)
        self.count += 1
        if self._kin:
            self._kin.add(captured, module, self._watch, call, key[1])
        return self._added(captured, module, call, key, shared=shared)

    def _generalised(self, tape: Tape, module: nn.Module, call: Call, reads: Reads) -> Tape:
        """A tape of the same call that serves other sizes, too.

        It is compared with the one that knows this size alone: what Python does with a symbol may
        be something else than what it does with a number.

        Raises:
            _OfOneSize: if there is none.
        """
        try:
            with reported("forward"):
                general = self._tape(module, call, reads, dynamic=True)
                numbers = general.symbols
                if general.is_like(tape) and numbers.hold(numbers.sizes):
                    return general
        except CaptureError as error:
            raise _OfOneSize(error) from error
        raise _OfOneSize(CaptureError("forward does something else with symbols than with numbers"))

    def _added(
        self, captured: Captured, module: nn.Module, call: Call, key: Key, *, shared: bool
    ) -> Captured:
        if self._watch.latest != key[0]:  # more is watched than before
            key = self.signature(module, call, dynamic=shared)
        self._latest(key).append(captured)
        return captured

    def _require_hope(self, key: Key) -> None:
        """Raises a `CaptureError` if capturing did not help often enough."""
        values = len(self._latest(key))
        if values >= self._options.cache_size:
            error = CaptureError(
                f"forward reads a value that differed {values} times",
                hint="Keep decisions that change at each call outside of the model.",
            )
            self._refuse(key, error)
        if self._in_vain[key[1]] >= _MOST_IN_VAIN:
            raise CaptureError(
                "forward reads state that is another one at each call",
                hint="Keep what changes at each call in a buffer, or out of the model.",
            )
        self._in_vain[key[1]] += 1

    def _count_misfit(self, key: Key, misfit: Misfit) -> None:
        """Raises a `CaptureError` if there is no point in capturing a call of this kind again."""
        self._misfits[key] += 1
        if not misfit.learned or self._misfits[key] > _MOST_MISFITS:
            error = CaptureError(
                f"what {misfit.op} returns has another shape, dtype or layout than it says in "
                "advance",
                hint="If this is a custom operation, correct its fake kernel.",
            )
            self._refuse(key, error)

    def _captured(self, tape: Tape, module: nn.Module, call: Call) -> Captured:
        forward, state, options = forward_of(module), self._watch, self._options
        return Captured(
            tape,
            options.decide,
            forward,
            call.spec,
            module,
            state,
            compile=options.compile or compiles_halves(),
            decompose=options.decompose,
        )

    def _confirmed(
        self, found: Captured, module: nn.Module, call: Call, key: Key, *, shared: bool
    ) -> Captured:
        """At the second call, runs the Python of forward again: it has to do the same.

        If it did something else, this is what is run now, once, as in eager; from the next call on,
        calls of this kind run eagerly.

        Raises:
            CaptureError: if it cannot be captured any more.
        """
        try:
            again = self._tape(module, call, set())
        except CaptureError as error:
            if shared:
                raise _OfOneSize(error) from error
            self._refuse(key, error)
        if again.fingerprint() != found.tape.fingerprint(found.sizes_of(call.inputs)):
            found.standing.withdrawn = True
            if shared:
                raise _OfOneSize(CaptureError("forward does something else with other sizes"))
            self._known[key] = CaptureError(
                "forward does something else when it is called again",
                hint="Decide on the time, files, counters and the like outside of the model.",
            )
            if self._options.strict:
                self._latest(key)  # raises
            return self._captured(again, module, call)
        return found

    def _refuse(self, key: Key, error: CaptureError) -> NoReturn:
        """Raises an error for all calls of this kind; the first that may pass is forgotten."""
        may_pass = error.may_pass and not self._passed
        self._passed |= may_pass
        if not may_pass and not self._options.strict:
            self._known[key] = error.at(error.path, error.source)
        error.may_pass = may_pass
        raise error

    def _tape(self, module: nn.Module, call: Call, reads: Reads, *, dynamic: bool = False) -> Tape:
        return capture(
            forward_of(module),
            call.args,
            call.kwargs,
            module=module,
            position=self._position,
            reads=reads,
            dynamic=dynamic,
        )

    def _fresh_watch(self, module: nn.Module) -> Watch:
        return Watch(module, self._options.cache_size)
