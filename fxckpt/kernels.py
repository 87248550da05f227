"""Runs single operations of a graph on random operands, to time them or see what they allocate.

NOTE [Workspaces]

Between its operands and its results a kernel may take memory of its own: copies of operands in a
layout that it prefers, partial sums, a sorted order. No schema tells of it, and it depends on
shapes, layouts, dtypes and the number of threads. So on the CPU each distinct operation is run once
on operands of that geometry, and what the allocator hands out meanwhile is added up, by the events
of torch's profiler. No step can do without the memory that this takes: operands and results live
together while the operation runs, whatever is saved.

What only reads and writes element by element, and products of dense matrices, need nothing.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Hashable, Iterator, Sequence
from operator import getitem
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Node
from torch.fx.node import map_aggregate, map_arg

from fxckpt import ops
from fxckpt.invisible import outside_of_modes, stands_for_real
from fxckpt.symbols import plain

aten = torch.ops.aten
_autograd: Any = torch._C._autograd  # not all of it is declared
_profiler: Any = torch._C._profiler


def signature(node: Node) -> str:
    """What an operation does: equal for nodes that do the same work."""
    return str((ops.operation(node), _described((ops.op_arguments(node), node.kwargs))))


def tensors_in(tree: Any) -> Iterator[torch.Tensor]:
    """The tensors in tuples and lists."""
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for each in tree:
            yield from tensors_in(each)


def values(tree: Any) -> Any:
    """Arguments with the fake tensors of nodes in their places."""
    return map_arg(tree, lambda node: node.meta["val"])


def call_of(node: Node) -> Callable[[], Any]:
    """Runs the operation of a node, each time on the same random operands.

    May raise whatever operations raise: what they compute on has to fit together.
    """
    operands: Any = map_arg((node.args, node.kwargs), _operand)
    args, kwargs = operands
    if node.target is ops.inplace:
        op, plan, *rest = args
        args = (op, [(key, view, False) for key, view, _ in plan], *rest)
    function: Any = node.target
    return lambda: function(*args, **kwargs)


@contextlib.contextmanager
def by_themselves(device: torch.device) -> Iterator[None]:
    """Single operations leave no trace: modes of the program do not see them, nor generators."""
    with (
        outside_of_modes(),
        torch.enable_grad(),  # as in programs, see `programs`
        torch.autocast(device.type, enabled=False),
        ops.rng_state_as(ops.read_rng_state(device), device),
    ):
        yield


def workspace(node: Node) -> int | None:
    """Bytes that the kernel of an operation takes while it runs, besides its results.

    Returns:
        None if that cannot be measured: the graph is that of a model on fake tensors or on another
        device, the operation does not run on random operands, or the program itself is profiling.
    """
    involved = [*tensors_in(([n.meta["val"] for n in node.all_input_nodes], node.meta["val"]))]
    if not involved or not all(t.device.type == "cpu" and stands_for_real(t) for t in involved):
        return None
    if ops.node_is_collective(node):  # which is not run for this, as other processes would wait
        return 0
    if _needs_nothing(ops.operation(node), involved):
        return 0
    key = signature(node), torch.get_num_threads()
    if key not in _known:
        if _autograd._profiler_enabled():
            return None
        if len(_known) >= _MOST_KNOWN:
            _known.clear()
        _known[key] = _measured(node)
    return _known[key]


_known: dict[Hashable, int | None] = {}
_MOST_KNOWN = 10_000


def _needs_nothing(op: Any, involved: Sequence[torch.Tensor]) -> bool:
    if not isinstance(op, OpOverload):
        return False
    alike = len({t.dtype for t in involved}) == 1 and all(map(_is_dense, involved))
    if op in _PRODUCTS:
        return alike and involved[0].dtype in (torch.float32, torch.float64)
    return alike and torch.Tag.pointwise in op.tags and op not in _NOT_ELEMENT_BY_ELEMENT


_PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default}
_NOT_ELEMENT_BY_ELEMENT = {
    aten.isinf.default,
    aten.mvlgamma.default,
    aten.native_dropout_backward.default,
}


def _measured(node: Node) -> int | None:
    if not hasattr(_autograd, "_enable_profiler_legacy"):  # of which another torch may have none
        return None
    with by_themselves(torch.device("cpu")), contextlib.suppress(*MISFITS):
        call = call_of(node)
        with _allocations() as sizes:
            results = call()
        live = [*itertools.accumulate(sizes, initial=0)]
        del results  # which are what lives at the end
        return max(live) - live[-1]
    return None


# What operations raise if random operands do not fit together.
MISFITS = (RuntimeError, IndexError, TypeError, ValueError)


@contextlib.contextmanager
def _allocations() -> Iterator[list[int]]:
    """The bytes that this thread allocates (positive) and frees (negative), in order."""
    sizes: list[int] = []
    options = False, True, False, False, False  # only memory, of these
    state = _profiler.ProfilerState.CPU
    _autograd._enable_profiler_legacy(
        _profiler.ProfilerConfig(state, *options, _profiler._ExperimentalConfig())
    )
    try:
        yield sizes
    finally:
        threads = _autograd._disable_profiler_legacy()
    events = [event for events in threads for event in events]
    sizes += [e.cpu_memory_usage() for e in events if e.kind() == "memory_alloc"]


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether a tensor fills its memory, in whatever order, each element once."""
    filled = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != filled:
            return False
        filled *= size
    return True


def _described(tree: Any) -> Any:
    def describe(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return plain(value)
        return tuple(value.shape), value.stride(), value.dtype, value.device

    return map_aggregate(values(tree), describe)


def _operand(node: Node) -> Any:
    """Something that an operation can be run on in place of a value.

    Bytes that another operation hands it, such as the workspace of `mkldnn_rnn_layer`, are
    computed: nobody else knows what has to be in them.
    """
    val = node.meta["val"]
    if node.target is getitem and isinstance(val, torch.Tensor) and val.dtype == torch.uint8:
        parent, index = node.args
        return call_of(parent)()[index]  # type: ignore[arg-type]
    return map_aggregate(val, _random_like)


def _random_like(value: Any) -> Any:
    """Real contents for a fake tensor: integers are zero, which is an index into anything."""
    if not isinstance(value, torch.Tensor):
        return value
    reach = [(n - 1) * stride for n, stride in zip(value.shape, value.stride(), strict=True)]
    memory = torch.zeros(
        1 + sum(reach) if value.numel() else 0, dtype=value.dtype, device=value.device
    )
    if memory.is_floating_point():
        memory.uniform_()
    return memory.as_strided(value.shape, value.stride())
