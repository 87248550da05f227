"""A captured forward, and the joint graphs that follow from it.

Backward depends on which outputs get a gradient, and on its strides, which is certain only when
backward is called. So a `Tape` keeps the fake autograd graph, and `Tape.joint` runs it once for
each `BackwardKey` that occurs.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Graph, Node

from fxckpt import invisible, ops, spread, tree
from fxckpt.arguments import Changes
from fxckpt.errors import CaptureError
from fxckpt.escapes import nothing_kept_by_backward
from fxckpt.holders import Prepared
from fxckpt.joint import MAX_CONTRIBUTIONS, Joint, Primal, reachable
from fxckpt.locks import LOCK
from fxckpt.modes import AutocastState, autocast_as
from fxckpt.places import Places, user_source_of
from fxckpt.recorder import Recorder
from fxckpt.state import Slot
from fxckpt.symbols import Concrete, Pattern, Sizes, Symbols, at, pattern, plainly, strides_like
from fxckpt.values import Guard


@dataclasses.dataclass(frozen=True, slots=True)
class BackwardKey:
    """All that the backward of a captured forward depends on.

    `cotangents` has, for each output, the strides and dtype of its gradient, or None if none comes
    (if sizes are symbols, the `Pattern` of its strides), and how it is spread over processes;
    `autocast` is the autocast state in which backward is called; `recorded` says whether it is
    differentiated in turn (`create_graph`), for which autograd may compute something else.
    """

    cotangents: tuple[tuple[Pattern, torch.dtype, spread.Layout | None] | None, ...]
    autocast: AutocastState = ()
    recorded: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Result:
    """How a tensor in the result of the callable is made from what the graph returns.

    `origin` is the index of a graph output, or the name of the primal that the result is a view of.
    `views` are applied to it one after the other: (operation, arguments after the first, keyword
    arguments, which of several results, grad mode).
    """

    origin: int | str
    views: tuple[tuple[OpOverload, tuple[Any, ...], dict[str, Any], int | None, bool], ...]

    def taken_from(self, tensor: torch.Tensor, sizes: Sizes) -> torch.Tensor:
        """The tensor in the result of a call, from the one that it is a view of."""
        for func, args, kwargs, index, grad in at(self.views, sizes) if sizes else self.views:
            with torch.set_grad_enabled(grad):
                viewed = func(tensor, *args, **kwargs)
            tensor = viewed if index is None else viewed[index]
        return tensor


def base_of(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor that owns the storage of another in the eyes of autograd.

    A custom function may return a view of memory whose gradient is its own.
    """
    base = tensor._base
    return base if base is not None and base.requires_grad else tensor


@dataclasses.dataclass(slots=True)
class Tape:
    """A captured forward, from which `joint` derives backward for any `BackwardKey`."""

    session: Any  # serves the recorder
    recorder: Recorder
    places: Places
    primals: list[Primal]
    outputs: list[torch.Tensor]  # fakes, one per storage that forward returns
    output_nodes: list[Node]
    results: list[Result]
    spec: tree.Spec  # structure of (the result, the values assigned to modules)
    assigned: list[Slot]  # where these values belong
    changes: Changes  # of objects that were passed; the last of `results` belong to them
    guards: list[Guard]
    symbols: Symbols
    prepared: list[Prepared] = dataclasses.field(default_factory=list)  # that forward assigns once
    _forward: list[Node] = dataclasses.field(init=False)  # all that was recorded of it
    _recorded: dict[BackwardKey, tuple[_Recorded, Joint]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self._forward = [*self.recorder.graph.nodes]

    def fingerprint(self, sizes: Sizes = ()) -> int:
        """Of what forward did, if it did this in a call with these sizes."""
        operations = tuple(_told(n, self.symbols, sizes) for n in self._forward)
        results = [(r.origin, str(plainly(at(r.views, sizes)))) for r in self.results]
        changes = self.changes.numbers, str(self.changes.layouts), self.changes.spec
        return hash((operations, tuple(results), self.spec, changes))

    def is_like(self, other: Tape) -> bool:
        """Whether a tape of the same call, with symbols or without, does the same.

        Forward, and the backward that is expected.
        """
        if self.fingerprint(self.symbols.sizes) != other.fingerprint(other.symbols.sizes):
            return False
        one, another = (
            [_told(n, tape.symbols, tape.symbols.sizes) for n in joint.graph.nodes]
            for tape in (self, other)
            for joint in [tape.joint(tape.expected_backward())]
        )
        return one == another

    def expected_backward(self) -> BackwardKey:
        """The likely backward: of the loss if a scalar can be differentiated, else of all outputs.

        Outputs that cannot be differentiated (because a tensor was changed in place) are left out,
        and what is merely put into arguments, as into a cache, if there are others.

        Raises:
            CaptureError: if no output can be differentiated.
        """
        candidates = [i for i, t in enumerate(self.outputs) if t.requires_grad]
        put = len(tree.names(self.changes.spec))
        returned = {r.origin for r in self.results[: len(self.results) - put]}
        candidates = [i for i in candidates if i in returned] or candidates
        scalars = [i for i in candidates if self.outputs[i].dim() == 0]
        key = self.dense_key(scalars or candidates)
        try:
            self.joint(key)
        except CaptureError:
            able = [i for i in candidates if self._differentiable_alone(i)]
            if not able:
                raise
            key = self.dense_key([i for i in scalars if i in able] or able)
        return key

    def _differentiable_alone(self, output: int) -> bool:
        try:
            self.joint(self.dense_key([output]))
        except CaptureError:
            return False
        return True

    def dense_key(self, outputs: Collection[int]) -> BackwardKey:
        """Dense gradients for these outputs."""
        return BackwardKey(
            tuple(
                (self._expected_strides(spread.local(t)), t.dtype, spread.layout_of_gradient(t))
                if i in outputs
                else None
                for i, t in enumerate(self.outputs)
            )
        )

    def _expected_strides(self, output: torch.Tensor) -> Pattern:
        if not self.symbols.count:
            return _dense_strides(output)
        like = Concrete(self.symbols, self.symbols.sizes).tensor(output)
        return pattern(like.shape, _dense_strides(like))[0]

    def joint(self, key: BackwardKey, sizes: Sizes | None = None) -> Joint:
        """Forward, and backward for `key`, in one graph.

        Args:
            key: What backward depends on.
            sizes: Of the call whose shapes it has; by default the one that was captured.

        Raises:
            CaptureError: if backward does something that a graph cannot reproduce.
        """
        with LOCK, invisible.outside_of_modes():  # of the caller, see `capture`
            if key not in self._recorded:
                recorded = self._differentiate(key)
                self._recorded[key] = recorded, _extract(self, recorded, self.symbols.sizes)
            recorded, joint = self._recorded[key]
            if sizes is None or sizes == self.symbols.sizes:
                return joint
            return _extract(self, recorded, sizes)

    def _differentiate(self, key: BackwardKey) -> _Recorded:
        recorder = self.recorder
        recorder.phase = self.places.phase = "backward"
        fakes, cotangents = self._cotangents(key)
        last = next(iter(reversed(recorder.graph.nodes)))
        outputs = [t for t, c in zip(self.outputs, key.cotangents, strict=True) if c is not None]
        leaves = [leaf for p in self.primals for leaf in p.leaves if leaf.requires_grad]
        found: dict[int, list[torch.Tensor]] = {}
        if outputs and leaves:
            ours: list[Any] = [fakes, outputs, leaves]
            with (
                self._nothing_kept(outputs, ours),
                reported("backward"),
                torch.autograd.set_detect_anomaly(False),
                spread.placements_found_outside(),
                recorder.fake_mode,
                recorder,
                autocast_as(key.autocast),
            ):
                found = _gradients(outputs, leaves, fakes, recorded=key.recorded)
                ours.extend(found.values())
        by_primal, layouts = {}, {}
        for primal in self.primals:
            grads = [found[id(leaf)] for leaf in primal.leaves if id(leaf) in found]
            if len(grads) > 1:
                raise CaptureError(f"{primal.name} is reached in two ways, one of them hidden")
            contributions = [g for each in grads for g in each]
            by_primal[primal.name] = tuple(self._node_of(g) for g in contributions)
            if (layout := spread.common_layout(contributions)) is not None:
                layouts[primal.name] = layout
        return _Recorded(cotangents, by_primal, layouts, _nodes_after(last))

    def layouts(self, key: BackwardKey) -> dict[str, spread.Layout]:
        """How the gradients of primals are spread over processes, of those that are."""
        return self._recorded[key][0].layouts

    def _node_of(self, gradient: torch.Tensor) -> Node:
        with self.recorder.fake_mode, self.recorder:  # which see it arrive
            return self.recorder.node_for(spread.local(gradient))

    def _nothing_kept(
        self, outputs: list[torch.Tensor], ours: list[Any]
    ) -> contextlib.AbstractContextManager[None]:
        """Watches over custom functions, `ours` being further lists of tensors."""

        def structures() -> list[Any]:
            mine = [*self.primals, *(p.leaves for p in self.primals), self.outputs]
            return [*self.recorder.structures(), *mine, *ours]

        custom = {type(n)._forward_cls: None for n in _autograd_nodes(outputs) if _is_custom(n)}
        return nothing_kept_by_backward([*custom], self.recorder.tensors, structures)

    def _cotangents(self, key: BackwardKey) -> tuple[list[torch.Tensor], list[Node]]:
        fakes, nodes = [], []
        for i, (out, c) in enumerate(zip(self.outputs, key.cotangents, strict=True)):
            if c is not None:
                strides: Any = c[0]
                size = out.size() if c[2] is None else c[2].shape
                if self.symbols.count:
                    strides = strides_like(strides, size)
                if strides is None:
                    raise CaptureError("a gradient has strides that do not follow from sizes")
                with self.recorder.fake_mode:
                    options: Any = {"dtype": c[1], "device": out.device}
                    options["requires_grad"] = key.recorded and c[2] is None
                    fake = torch.empty_strided(size, strides, **options)
                fakes.append(fake if c[2] is None else c[2].around(fake))
                nodes.append(self.recorder.add_placeholder(fake, f"cotangent_{i}"))
        return fakes, nodes


@dataclasses.dataclass(frozen=True, slots=True)
class _Recorded:
    """What was recorded of a backward; `ran` is all of it."""

    cotangents: list[Node]
    grads: dict[str, tuple[Node, ...]]
    layouts: dict[str, spread.Layout]
    ran: set[Node]


def _nodes_after(last: Node) -> set[Node]:
    found = set()
    while (last := last.next).op != "root":
        found.add(last)
    return found


def _gradients(
    outputs: list[torch.Tensor],
    leaves: list[torch.Tensor],
    cotangents: list[torch.Tensor],
    *,
    recorded: bool,
) -> dict[int, list[torch.Tensor]]:
    """Runs autograd; returns the contributions to the gradient of each leaf, by `id`, in order.

    See the note on contributions in `joint`.
    """
    contributions: dict[int, list[torch.Tensor]] = {}
    handles = [
        node.register_hook(_contribution_hook(places, contributions))
        for node, places in _edges_to(leaves, outputs)
    ]
    grads = torch.autograd.grad(
        outputs, leaves, cotangents, retain_graph=True, create_graph=recorded, allow_unused=True
    )
    for handle in handles:
        handle.remove()
    return {
        id(leaf): several
        if 1 < len(several := contributions.get(id(leaf), [])) <= MAX_CONTRIBUTIONS
        else [grad]
        for leaf, grad in zip(leaves, grads, strict=True)
        if grad is not None
    }


def _edges_to(
    leaves: list[torch.Tensor], outputs: list[torch.Tensor]
) -> Iterator[tuple[Any, dict[int, int]]]:
    """The autograd nodes that contribute to leaves, with {position of the gradient: id of leaf}."""
    wanted = {id(leaf) for leaf in leaves}
    for node in _autograd_nodes(outputs):
        targets = [following for following, _ in node.next_functions]
        variables = [getattr(t, "variable", None) for t in targets]  # of AccumulateGrad nodes
        places = {i: id(v) for i, v in enumerate(variables) if v is not None}
        places = {i: leaf for i, leaf in places.items() if leaf in wanted}
        if places:
            yield node, places


def _autograd_nodes(outputs: list[torch.Tensor]) -> Iterator[Any]:
    seen: set[Any] = set()
    stack = [t.grad_fn for t in outputs]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        stack.extend(following for following, _ in node.next_functions)


def _is_custom(node: Any) -> bool:
    """Whether an autograd node runs Python of the program."""
    custom = isinstance(node, torch._C._FunctionBase)
    return custom and not type(node)._forward_cls.__module__.startswith("torch.")


def _contribution_hook(
    places: dict[int, int], contributions: dict[int, list[torch.Tensor]]
) -> Callable[[Any, Any], None]:
    def hook(grads: Any, _: Any) -> None:
        for position, leaf in places.items():
            if grads[position] is not None:
                contributions.setdefault(leaf, []).append(grads[position])

    return hook


@contextlib.contextmanager
def reported(phase: str) -> Iterator[None]:
    """Turns whatever goes wrong while recording into a `CaptureError` that says where it was."""
    try:
        with invisible.errors_not_logged():
            yield
    except CaptureError as error:
        if error.source:
            raise
        raise error.at(error.path, user_source_of(error)) from error
    except Exception as error:
        first = str(error).strip().split("\n")[0].rstrip(".")
        raise CaptureError(
            f"{phase} raised {type(error).__name__} while it was captured: {first}",
            source=user_source_of(error),
        ) from error


def _extract(tape: Tape, recorded: _Recorded, sizes: Sizes) -> Joint:
    """The part of the tape that outputs, writes and some gradients need, as a graph of its own.

    Of other operations of backward, only those that ran for these cotangents belong to it.
    """
    recorder, concrete = tape.recorder, Concrete(tape.symbols, sizes)
    cotangents, grads, ran = recorded.cotangents, recorded.grads, recorded.ran
    outputs = tape.output_nodes
    writes = {
        p.name: recorder.storage_of(p.fake).node
        for p in tape.primals
        if recorder.storage_of(p.fake).version
    }
    nodes = recorder.graph.nodes
    effects = [
        n
        for n in nodes
        if n.op == "call_function"
        and ops.always_runs(n)
        and (n.meta["phase"] == "forward" or n in ran)
    ]
    wanted = [*outputs, *writes.values(), *(g for each in grads.values() for g in each)]
    needed = reachable([*wanted, *effects]) | set(cotangents)
    graph = Graph()
    copies: dict[Node, Node] = {}

    def copy(node: Node) -> None:
        copies[node] = made = graph.node_copy(node, copies.__getitem__)
        for key in ("alias", "like"):
            if (other := made.meta.pop(key, None)) in copies:
                made.meta[key] = copies[other]
        if tape.symbols.count:
            made.args, made.kwargs = concrete.arguments((made.args, made.kwargs))
            made.meta["val"] = concrete.value(made.meta["val"])

    names = {p.node: p.name for p in tape.primals}
    primals = [n for n in nodes if n in needed and n in names]
    operations = [n for n in nodes if n in needed and n.op == "call_function"]
    for node in (*primals, *cotangents, *operations):
        copy(node)
    graph.output(tuple(copies[n] for n in wanted))
    _require_free(tape.symbols.names, graph)
    return Joint(
        graph,
        {names[n]: copies[n] for n in primals},
        [copies[n] for n in cotangents],
        [copies[n] for n in outputs],
        {name: copies[n] for name, n in writes.items()},
        {name: tuple(copies[n] for n in each) for name, each in grads.items()},
        tape.places.position,
        tape.symbols.names,
        sizes,
    )


def _require_free(names: Collection[str], graph: Graph) -> None:
    """Raises if a variable of the generated code is called as a size is."""
    if any(node.name in names for node in graph.nodes):
        raise CaptureError("an argument is called as sizes are in graphs (s0, s1, ...)")


def _told(node: Node, symbols: Symbols, sizes: Sizes) -> tuple[str, str, str]:
    """What a node does, in a call with these sizes."""
    arguments = plainly(symbols.numbers((node.args, node.kwargs), sizes))
    return node.name, str(node.target), str(arguments)


def _dense_strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """Strides of a gradient of `tensor` as most operations produce it."""
    with invisible.outside_of_modes():
        return tuple(torch.empty_like(tensor, device="meta").stride())
