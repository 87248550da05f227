"""What a captured program keeps of its tensors outside of its modules: whether that can be exact.

See the note in `escapes`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch.fx import Node

from fxckpt import ops
from fxckpt.errors import CaptureError
from fxckpt.escapes import Escapes, Kept
from fxckpt.holders import Surroundings
from fxckpt.joint import Primal, reachable
from fxckpt.recorder import Recorder
from fxckpt.symbols import Symbols
from fxckpt.tape import Tape
from fxckpt.values import evaluated

Left = Mapping[int, torch.Tensor]  # by id of a fake: the real tensor that takes its place


class Session(Protocol):
    """The capture of one call; `left` stands for fakes that the program keeps of an earlier one."""

    recorder: Recorder
    primals: dict[int, Primal]
    left: Left
    own: Any
    symbols: Symbols

    def run(self, fn: Callable[..., Any]) -> Tape:
        """Captures."""

    def finished(self, tape: Tape) -> Tape:
        """Lets go of the arguments."""

    def structures(self) -> list[Any]:
        """Our own objects that refer to fakes."""

    def real_of(self, primal: Primal) -> torch.Tensor:
        """The tensor that a primal stands for."""


def without_escapes(
    fn: Callable[..., Any], session: Callable[[Left], Session], before: Surroundings
) -> Tape:
    """Captures, and leaves no fake behind.

    Args:
        fn: The program.
        session: Makes a session.
        before: What the surroundings of the program hold.

    Raises:
        CaptureError: if the program keeps what is another tensor at the next call.
    """
    first = session({})
    if first.own is not None:  # all is fake, and stays so
        return first.finished(first.run(fn))
    escapes = Escapes(first.recorder.tensors, first.structures, fn, before)
    with escapes.removed_on_failure():
        tape = first.run(fn)
        kept = escapes.find()
        if not kept:
            return first.finished(tape)
        second = session(_values(first, kept))
        again = Escapes(second.recorder.tensors, second.structures, fn, before)
        escapes.found = None  # they may be in other places from now on
        with again.removed_on_failure():
            tape = second.run(fn)
            kept_again = again.find()
            _require_same(first, second, kept, kept_again)
            values = _values(second, kept_again)
            _fill(escapes, kept, second.left)
            _fill(again, kept_again, values)
    return second.finished(tape)


def _fill(escapes: Escapes, kept: list[Kept], values: Left) -> None:
    fakes = [*{id(k.tensor): k.tensor for k in kept}.values()]
    if fakes and not escapes.fill(values, fakes):
        raise CaptureError("forward keeps a tensor in an object that cannot be changed")


def _require_same(
    first: Session, second: Session, kept: list[Kept], kept_again: list[Kept]
) -> None:
    """Raises if the program treats what it finds there as something that changes."""
    places = {place for k in kept for place in k.places}
    made = {id(t) for t in second.left.values()} - first.primals.keys()
    changed = any(key in made and _written(second, p) for key, p in second.primals.items())
    if changed or any(k.places - places for k in kept_again):
        raise CaptureError("forward changes what it keeps outside of its modules", may_pass=True)


def _values(session: Session, kept: list[Kept]) -> dict[int, torch.Tensor]:
    """The real tensors that eager would keep, by `id` of the fakes.

    Raises:
        CaptureError: if one of them is another at the next call, or has a gradient.
    """
    if session.symbols.count:
        raise CaptureError("forward keeps a tensor outside of its modules")  # that of one size
    fakes = {id(p.fake): p for p in session.primals.values()}
    values: dict[int, torch.Tensor] = {}
    wanted: dict[int, Node] = {}
    for tensor in (k.tensor for k in kept):
        primal = fakes.get(id(tensor))
        if primal is not None and primal.kind != "input":
            values[id(tensor)] = session.real_of(primal)
            continue
        node = session.recorder.node_for(tensor)
        if primal is not None or tensor.requires_grad or not _is_settled(session, node):
            raise CaptureError(
                "forward keeps a tensor outside of its modules",
                path=node.meta.get("path", ""),
                source=node.meta.get("source", ""),
                hint="Keep it in an attribute or a buffer of a module, or return it.",
                may_pass=True,
            )
        wanted[id(tensor)] = node
    real = {p.node: session.real_of(p) for p in session.primals.values()}
    return values | evaluated(session.recorder.graph, wanted, real, session.symbols)


def _is_settled(session: Session, node: Node) -> bool:
    """Whether a value follows from what does not change, or if it changes, is kept for good."""
    kinds = {"literal"} if session.left else {"literal", "constant", "buffer", "attribute"}
    by_node = {p.node: p for p in session.primals.values()}
    needed = reachable([node])
    primals = [by_node[n] for n in needed if n.op == "placeholder"]
    if any(ops.node_is_random(n) for n in needed if n.op != "placeholder"):
        return False
    return not any(p.kind not in kinds or p.requires_grad or _written(session, p) for p in primals)


def _written(session: Session, primal: Primal) -> bool:
    """Whether forward changes a primal in place."""
    return session.recorder.storage_of(primal.fake).version > 0
