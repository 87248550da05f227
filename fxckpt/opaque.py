"""The two operations that stand for a rewritten module in a compiled graph.

NOTE [Tickets]

When the first operation runs, it calls the module as if nothing were compiled: captures by
signature, first runs, parts and warnings are those of eager, so nothing that was traced can become
stale unnoticed. What this keeps for backward is behind a *ticket*, a tensor of one number, and
nowhere else. The memory of the ticket belongs to the object that keeps it: whatever drops the
ticket, such as a graph that is never used, frees what is kept; and backward frees each residual at
its last use, which the arguments of an operation would outlive.

The compiler knows only what operations take and return, and writes into memory that it believes
free. So an operation works on copies of its arguments, which it may keep, and what it returns
shares memory with nothing; parameters and buffers are inputs of the graph, which stay as they are.
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from fxckpt import ops, tree
from fxckpt.described import Description, Look, description
from fxckpt.errors import FxckptError
from fxckpt.installation import runner_of
from fxckpt.modes import autocast_as, halves_compiled

_TAGS = (
    torch.Tag.nondeterministic_seeded,  # is neither left out nor merged with another call
    torch.Tag.needs_exact_strides,
    torch.Tag.cudagraph_unsafe,  # runs Python
)
_library = torch.library.Library("fxckpt", "DEF")
_library.define("forward(Tensor[] tensors, int number) -> Tensor[]", tags=_TAGS)
_library.define(
    "backward(Tensor ticket, Tensor[] cotangents, int number, int[] outputs, int[] wanted)"
    " -> Tensor[]",
    tags=_TAGS,
)


forward, backward = torch.ops.fxckpt.forward.default, torch.ops.fxckpt.backward.default


@torch.library.register_fake("fxckpt::forward", lib=_library)
def _fake_forward(tensors: list[torch.Tensor], number: int) -> list[torch.Tensor]:
    about = description(number)
    changed = [about.takes[i] for i in about.written]
    ticket = torch.empty(1, dtype=torch.int64)
    return [*(g.empty() for g in (*about.returns, *changed)), ticket]


@torch.library.register_fake("fxckpt::backward", lib=_library)
def _fake_backward(
    ticket: torch.Tensor, cotangents: Any, number: int, outputs: Any, wanted: list[int]
) -> list[torch.Tensor]:
    takes = description(number).takes
    return [takes[i]._replace(stride=takes[i].dense).empty() for i in wanted]


class _Kept(bytearray):
    """What a forward keeps, and the memory of its ticket."""

    outputs: dict[int, GradientEdge]  # by position
    takes: dict[int, GradientEdge]


_tickets = itertools.count()
_kept: weakref.WeakValueDictionary[int, _Kept] = weakref.WeakValueDictionary()


class _Run:
    """One run of forward, as in eager, on tensors of a compiled graph.

    Attributes:
        there: What takes the places of the module's parameters and buffers.
        edges: Where the gradients of the tensors come out, by position.
    """

    def __init__(self, about: Description, tensors: Sequence[torch.Tensor]) -> None:
        self._about, self._own = about, about.own
        self.there = [*map(self._stand_in, range(len(self._own)), tensors)]
        held = len(self.there)
        new = [i for i in range(held, len(tensors)) if about.same[i] == i]
        wanted = [about.takes[i].requires_grad for i in new]
        copies = _Entry.apply(torch.ones(1, requires_grad=True), [tensors[i] for i in new], wanted)
        entered = dict(enumerate(self.there)) | dict(zip(new, copies, strict=True))
        self._inputs = [entered[i] for i in about.same[held:]]
        self.edges = {i: get_gradient_edge(t) for i, t in entered.items() if t.requires_grad}

    def _stand_in(self, i: int, tensor: torch.Tensor) -> torch.Tensor:
        own, wanted = self._own[i], self._about.takes[i].requires_grad
        if i in self._about.written:
            return tensor.clone()
        if _storage(tensor) != _storage(own):  # the compiled graph has changed it before
            return _like(own, tensor.clone(), wanted)
        # The hooks of a parameter run where the gradient arrives in the end.
        return _like(own, own.detach(), wanted) if own._backward_hooks else own

    def outputs(self) -> list[torch.Tensor]:
        """What the captured graph returns, in the results of the module.

        Raises:
            FxckptError: if that looks other than foreseen.
        """
        about, module = self._about, self._about.module
        args, kwargs = tree.unflatten(about.spec, self._inputs)
        with self._in_place():
            result = runner_of(module)(module, args, kwargs)
        tensors, spec = tree.flatten((result, []))
        if spec != about.tape.spec:
            raise _stale("returns something else")
        found: dict[int | str, torch.Tensor] = {}
        for made, tensor in zip(about.tape.results, tensors, strict=True):
            if made.origin not in found or tensor.requires_grad:
                found[made.origin] = tensor if tensor._base is None else tensor._base
        outputs = [found[i] for i in range(len(about.returns))]
        if [*map(Look.of, outputs)] != about.returns:
            raise _stale("returns other shapes, dtypes or strides")
        return outputs

    @contextlib.contextmanager
    def _in_place(self) -> Iterator[None]:
        pairs = zip(self._about.slots, self._own, self.there, strict=True)
        changed = [(slots, own, new) for slots, own, new in pairs if own is not new]
        try:
            for slots, _, new in changed:
                for container, key in slots:
                    container[key] = new
            yield
        finally:
            for slots, own, _ in changed:
                for container, key in slots:
                    container[key] = own


class _Entry(torch.autograd.Function):
    """Copies of arguments, with an edge where their gradients come out.

    Unlike a leaf, this edge keeps no contents.
    """

    @staticmethod
    def forward(ctx: Any, _: Any, tensors: Sequence[torch.Tensor], wanted: Sequence[bool]) -> Any:
        copies = [*map(ops.clone_exactly, tensors)]
        ctx.mark_non_differentiable(*(t for t, w in zip(copies, wanted, strict=True) if not w))
        return tuple(copies)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise AssertionError("gradients are taken at its outputs")


def _like(own: torch.Tensor, tensor: torch.Tensor, wanted: bool) -> torch.Tensor:
    """A tensor as a leaf of the kind that `own` is."""
    if isinstance(own, nn.Parameter):
        return nn.Parameter(tensor, wanted)
    return tensor.requires_grad_(wanted)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


@contextlib.contextmanager
def _as_eager() -> Iterator[None]:
    """Operations are dispatched as in a program, not as inside of an operation."""
    with torch._C._ForceDispatchKeyGuard(*_OUTSIDE):
        yield


_OUTSIDE = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()


@torch.library.impl(_library, "forward", "CompositeExplicitAutograd")
def _forward(tensors: list[torch.Tensor], number: int) -> list[torch.Tensor]:
    about = description(number)
    with (
        _as_eager(),
        autocast_as(about.autocast),
        halves_compiled(about.by_inductor),
        torch.enable_grad(),
    ):
        run = _Run(about, tensors)
        outputs = run.outputs()
        edges = {i: get_gradient_edge(t) for i, t in enumerate(outputs) if t.requires_grad}
    ticket = next(_tickets)
    kept = _Kept(ticket.to_bytes(8, "little"))
    kept.outputs, kept.takes = edges, run.edges
    _kept[ticket] = kept
    results = [t.detach() for t in (*outputs, *(run.there[i] for i in about.written))]
    del run, outputs
    return [*map(_released, results), torch.frombuffer(kept, dtype=torch.int64)]


def _released(result: torch.Tensor) -> torch.Tensor:
    """A result whose memory nobody else knows: the compiled graph may write into it."""
    return result if _references(result) == _ALONE else result.clone()


def _references(tensor: torch.Tensor) -> int:
    count: int = torch._C._storage_Use_Count(_storage(tensor))
    return count


_ALONE = _references(torch.empty(0))


@torch.library.impl(_library, "backward", "CompositeExplicitAutograd")
def _backward(
    ticket: torch.Tensor,
    cotangents: list[torch.Tensor],
    number: int,
    outputs: list[int],
    wanted: list[int],
) -> list[torch.Tensor]:
    kept, takes = _kept.get(int(ticket.item())), description(number).takes
    if kept is None or not kept.outputs:
        raise RuntimeError(
            "Trying to backward through the graph a second time, or from a copy of what forward "
            "saved. Specify retain_graph=True if you need to backward a second time"
        )
    keeps = torch._C._autograd._get_current_graph_task_keep_graph()
    starts, ends = [kept.outputs[i] for i in outputs], kept.takes
    if not keeps:
        kept.outputs, kept.takes = {}, {}
    with _as_eager(), torch.no_grad():
        found = torch.autograd.grad(
            starts, [*ends.values()], cotangents, retain_graph=keeps, allow_unused=True
        )
    del starts
    grads = {i: g for i, g in zip(ends, found, strict=True) if g is not None}
    if sorted(grads) != wanted:
        raise _stale("gives gradients for other tensors")
    taken = {*map(_storage, cotangents)}
    return [_laid_out(grads.pop(i), takes[i], taken) for i in wanted]


def _laid_out(grad: torch.Tensor, like: Look, taken: set[int]) -> torch.Tensor:
    """A gradient with the strides that were foreseen, in memory that is not taken yet."""
    storage = _storage(grad)
    if grad.stride() == like.dense and storage not in taken:
        taken.add(storage)
        return grad
    size, dtype = like.size, like.dtype
    return torch.empty_strided(size, like.dense, dtype=dtype, device=like.device).copy_(grad)


def _stale(what: str) -> FxckptError:
    return FxckptError(
        f"inside of torch.compile, a rewritten module {what} than when it was traced, since it was "
        "changed in between. Call torch.compiler.reset() after such a change"
    )
