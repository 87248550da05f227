"""What a step whose units are blocks holds, by running it once; the model is left as it was.

NOTE [Measuring a step]

The step runs on the real tensors, with every block at its least: nothing is kept but what comes in.
Marks tell when a block runs its forward and its backward, and what is allocated between them is
measured (see `meter`). So what lies outside of the blocks counts with all that it allocates, be it
Python that no graph can hold. What a block needs while it runs is known better, from replays.

The program is not to notice: parameters have stand-ins on the same memory, so that gradients and
hooks of theirs stay as they are; contents of buffers and arguments, random states, and what is
assigned to modules or put into lists of theirs, is put back. What cannot be put back is what
forward does elsewhere: that happens several times.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._ops import OpOverload
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from fxckpt import ops, tree
from fxckpt.arguments import Call
from fxckpt.composition import BACKWARD, FORWARD, OUTSIDE, Moment
from fxckpt.errors import BudgetError, CaptureError
from fxckpt.first_run import Misfit
from fxckpt.ledger import rounded
from fxckpt.meter import Meter, Span, is_busy, metered
from fxckpt.runtime import Captured
from fxckpt.state import exchanged, held_tensors, restored
from fxckpt.steps import backward, same_random_states

_START, _END = "start", "end"
_RUNS = 5  # until two in a row do the same


@dataclasses.dataclass(eq=False)
class Called:
    """A call of a block in the step.

    Attributes:
        path: Of the block.
        number: Which call of it this is.
        captured: What ran.
        made: Bytes of outputs that are new.
        outputs: These.
        gone: The span at whose start nothing else held them any more; None if something does.
    """

    path: str
    number: int
    captured: Captured
    made: int = 0
    gone: int | None = None
    outputs: list[StorageWeakRef] = dataclasses.field(default_factory=list)

    def key(self) -> tuple[Any, ...]:
        """What tells calls apart that are planned in different ways."""
        return self.path, self.number, id(self.captured.tape), id(self.captured.given)


class Own(NamedTuple):
    """What a call of a block needed when it was measured, see `replay.Needs`."""

    kept: int
    forward: int
    backward: int


@dataclasses.dataclass(frozen=True)
class Timeline:
    """A step.

    Attributes:
        calls: Of blocks, in the order of forward.
        own: What each needed.
        moments: The step without what its blocks need.
    """

    calls: list[Called]
    own: list[Own]
    moments: list[Moment]


class Observer:
    """Takes note of the calls of blocks.

    Args:
        meter: What measures.
    """

    def __init__(self, meter: Meter) -> None:
        self.calls: list[Called] = []
        self.failed = False  # whether something has to be captured anew
        self._meter, self._counts, self._marks = meter, Counter[str](), 0

    def run(self, path: str, found: Captured, call: Call) -> Any:
        """Runs a call of a block."""
        called = Called(path, self._counts[path], found)
        number = len(self.calls)
        self._counts[path] += 1
        self.calls.append(called)
        self._mark((FORWARD, _START, number))
        try:
            result = found(call, on_node=lambda node: self._follow(node, number))
        except Misfit:
            self.failed = True
            raise
        self._note_outputs(called, call, result)
        self._mark((FORWARD, _END, number))
        return result

    def _follow(self, node: torch.autograd.graph.Node, number: int) -> None:
        node.register_prehook(lambda _: self._mark((BACKWARD, _START, number)))
        node.register_hook(lambda *_: self._mark((BACKWARD, _END, number)))

    def _mark(self, label: tuple[str, str, int]) -> None:
        self._marks += 1
        for called in self.calls:
            if called.gone is None and any(output.expired() for output in called.outputs):
                called.gone = self._marks
        self._meter.mark(label)

    @staticmethod
    def _note_outputs(called: Called, call: Call, result: Any) -> None:
        known = {t.untyped_storage()._cdata for t in call.inputs}
        for t in tree.flatten(result)[0]:
            storage = t.untyped_storage()
            if storage._cdata not in known:
                known.add(storage._cdata)
                called.outputs.append(StorageWeakRef(storage))
                called.made += rounded(storage.nbytes(), t.device)


Run = Callable[[Observer, tuple[Any, ...], dict[str, Any]], Any]


def timeline(
    module: nn.Module, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Timeline:
    """Measures a step.

    Args:
        module: The model.
        run: Runs its forward with an observer of its blocks.
        args: Of the call.
        kwargs: Likewise.

    Raises:
        BudgetError: if the step cannot be measured.
    """
    device = _device(module, (args, kwargs))
    before: list[Any] | None = None
    for number in range(_RUNS):
        alone = contextlib.nullcontext() if number else _Alone()  # the first run counts for nothing
        with _apart(module, args, kwargs) as (fresh_args, fresh_kwargs):
            with metered(device) as meter, torch.enable_grad(), alone:
                observer = Observer(meter)
                results = tree.flatten(run(observer, fresh_args, fresh_kwargs))[0]
                backward(results)
            del results
        keys = [called.key() for called in observer.calls]
        if keys == before and not observer.failed:  # what runs for the first time keeps more
            return _timeline(observer.calls, meter.spans)
        before = None if observer.failed else keys
    raise BudgetError(
        "the step cannot be measured, as forward does something else at each call: other blocks "
        "run, or they are called in another way. Give a policy instead of a budget"
    )


class _Alone(TorchDispatchMode):
    """Refuses to communicate: other processes do not measure at the same time.

    What is sent by a step that is measured would be taken for what their own steps wait for.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if isinstance(func, OpOverload) and ops.is_collective(func):
            raise BudgetError(
                f"a budget with blocks as units is for steps of one process alone, which are "
                f"measured by running them, and here processes communicate ({func}). Give a policy"
            )
        return func(*args, **(kwargs or {}))


def _timeline(calls: list[Called], spans: list[Span]) -> Timeline:
    """Takes what blocks need out of what was measured."""
    moments: list[Moment] = []
    kept, forward, back = ([0] * len(calls) for _ in range(3))
    waiting: list[int] = []
    for i, (span, before) in enumerate(zip(spans, [spans[0], *spans], strict=False)):
        phase, edge, call = span.label or (OUTSIDE, _END, -1)
        if edge == _START and phase == BACKWARD:
            back[call] = span.peak - span.live + kept[call]
        elif edge == _START:
            forward[call] = span.peak - span.live
        elif phase == FORWARD:
            kept[call] = span.live - before.live - calls[call].made
            waiting.append(call)
        there = span.live if edge == _START else span.peak
        outside = there - sum(kept[c] for c in waiting)
        if edge == _START and phase == BACKWARD:
            waiting.remove(call)
        runs = (phase, call) if edge == _START else (OUTSIDE, -1)
        until = i if edge == _START else i + 1  # outside, outputs may go before the most is there
        alone = [c for c in {*waiting, runs[1]} - {-1} if _is_gone(calls[c], until)]
        moments.append(Moment(*runs, outside, tuple(waiting), tuple(alone), span.operation))
    return Timeline(calls, [*map(Own, kept, forward, back)], moments)


def _is_gone(called: Called, span: int) -> bool:
    return called.gone is not None and called.gone <= span


# --- leaving the model as it was ------------------------------------------------------------------


@contextlib.contextmanager
def _apart(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """The arguments for a step that is not to be noticed; see the note.

    Raises:
        BudgetError: if it cannot be hidden.
    """
    try:
        inputs, spec = tree.flatten((args, kwargs), open_objects=True)
        held = [*held_tensors(module).values()]
        known = {id(t): _alias(t) for t in inputs}
        fresh = tree.unflatten(spec, [known[id(t)] for t in inputs])
        stand_ins = {id(h.tensor): _alias(h.tensor) for h in held if h.tensor.requires_grad}
        with (
            restored(module),
            same_random_states(module),
            _same_contents([*inputs, *(h.tensor for h in held if h.kind != "parameter")]),
            exchanged(held, stand_ins),
        ):
            yield fresh
        for new in (*known.values(), *stand_ins.values()):  # which those who watch may still know
            new.grad = None
    except CaptureError as error:
        raise BudgetError(f"the step cannot be measured: {error}") from error


def _alias(t: torch.Tensor) -> torch.Tensor:
    """A tensor on the same memory that looks the same, without hooks and gradient."""
    if isinstance(t, nn.Parameter):
        new: torch.Tensor = nn.Parameter(t.detach(), requires_grad=t.requires_grad)
    else:
        new = t.detach().requires_grad_(t.requires_grad)
    new.__dict__.update(t.__dict__)
    return new if t.is_leaf else new.view_as(new)


@contextlib.contextmanager
def _same_contents(tensors: list[torch.Tensor]) -> Iterator[None]:
    """Puts back what is written into tensors."""
    before = [(t, t.detach().clone()) for t in {id(t): t for t in tensors}.values()]
    try:
        yield
    finally:
        with torch.no_grad():
            for t, contents in before:
                if not torch.equal(t, contents):  # captured graphs change them without a version
                    t.copy_(contents)


def _device(module: nn.Module, args: Any) -> torch.device:
    """The device that everything is on.

    Raises:
        BudgetError: if what is there cannot be measured.
    """
    held = [h.tensor for h in held_tensors(module).values() if h.kind != "attribute"]
    plain = (torch.Tensor, nn.Parameter, nn.Buffer)
    for t in (*held, *tree.flatten(args)[0]):
        if type(t) not in plain:
            raise BudgetError(
                f"a budget with blocks as units is for plain tensors, and here is one of class "
                f"{type(t).__name__} (spread over processes, or without memory): the step is "
                "measured by running it, which this process does not do alone. Give a policy"
            )
    devices = {t.device for t in held}
    if len(devices) > 1:
        raise BudgetError(
            "a budget with blocks as units is for a model on one device, and this one is on "
            f"{', '.join(sorted(map(str, devices)))}. Give a policy"
        )
    device = next(iter(devices), torch.device("cpu"))
    if is_busy(device):
        raise BudgetError(
            "the step is measured by torch's profiler, which is running already. Call the model "
            "once before"
        )
    return device
