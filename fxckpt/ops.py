"""Facts about ATen operations, and the one operation that we add: `inplace`.

Everything that the library knows about a particular operation stands here, in tables. Whether an
operation returns a view is not in a table: `capture` sees it from the storages.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from operator import getitem
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Node

aten = torch.ops.aten

# Operations that change an argument without saying so in their schema: the running statistics
# (positions) are updated if the argument at `training` is true. Without them the operation returns
# the same values, which is how it is recomputed without counting a batch twice.
_HIDDEN_STATISTICS: dict[str, tuple[tuple[int, ...], int]] = {
    "aten::native_batch_norm": ((3, 4), 5),
    "aten::cudnn_batch_norm": ((3, 4), 5),
    "aten::miopen_batch_norm": ((3, 4), 5),
}

# Backward operations that take the running statistics but do not read them if the argument at the
# second position (None: always) is true. Left out, they need not be kept for backward.
_UNREAD_STATISTICS: dict[str, tuple[tuple[int, ...], int | None]] = {
    "aten::native_batch_norm_backward": ((3, 4), 7),
    "aten::cudnn_batch_norm_backward": ((3, 4), None),
    "aten::miopen_batch_norm_backward": ((3, 4), None),
}

# Backward operations that read an operand for its shape alone (its position); and those that do so
# on the CPU, while kernels of other devices copy it if it is not contiguous.
_READ_FOR_SHAPE = {
    "aten::nll_loss_backward": 1,
    "aten::nll_loss2d_backward": 1,
    "aten::reflection_pad1d_backward": 1,
    "aten::reflection_pad2d_backward": 1,
    "aten::replication_pad1d_backward": 1,
    "aten::replication_pad2d_backward": 1,
}
_READ_FOR_SHAPE_ON_CPU = {
    "aten::max_pool2d_with_indices_backward": 1,
    "aten::avg_pool2d_backward": 1,
    "aten::_adaptive_avg_pool2d_backward": 1,
    "aten::adaptive_max_pool2d_backward": 1,
}

# Factories that take a tensor for its shape alone: without contents, and with a constant (the
# position of the argument that gives it, or the constant as text).
_BLANKS = frozenset(("aten::empty_like", "aten::new_empty", "aten::new_empty_strided"))
_FILLED: dict[str, int | str] = {
    "aten::zeros_like": "0",
    "aten::new_zeros": "0",
    "aten::ones_like": "1",
    "aten::new_ones": "1",
    "aten::full_like": 1,
    "aten::new_full": 2,
}

# Tagged random in torch, but random only if this argument (position, name) is greater than zero.
_DROPOUT_ARGUMENT: dict[str, tuple[int, str]] = {
    "aten::_scaled_dot_product_flash_attention": (3, "dropout_p"),
    "aten::_scaled_dot_product_flash_attention_for_cpu": (3, "dropout_p"),
    "aten::_scaled_dot_product_efficient_attention": (5, "dropout_p"),
    "aten::_scaled_dot_product_cudnn_attention": (5, "dropout_p"),
    "aten::_scaled_dot_product_fused_attention_overrideable": (4, "dropout_p"),
    "aten::_flash_attention_forward": (7, "dropout_p"),
    "aten::_efficient_attention_forward": (8, "dropout_p"),
    "aten::_scaled_dot_product_attention_math": (4, "dropout_p"),
    "aten::native_dropout": (1, "p"),
    "aten::_cudnn_rnn": (10, "dropout"),
    "aten::miopen_rnn": (10, "dropout"),
}

# Where ATen asks whether a tensor is "subclass-like", as all are while a dispatch mode is on, the
# backward that is recorded is not the one that eager runs. These are the operations for which the
# results differ, or eager looks at values: what eager does, and the dtypes ("complex" or "all") and
# argument (None: any) whose gradient that concerns.
_BACKWARD_OF_EAGER: dict[str, tuple[str, str, int | None]] = {
    "aten::prod": ("it counts the zeros in the input", "all", None),
    "aten::cumprod": ("it looks for zeros in the input", "complex", None),
    "aten::cumprod_": ("it looks for zeros in the input", "complex", None),
    "aten::masked_fill": ("it adds up selected elements", "all", 2),
    "aten::masked_fill_": ("it adds up selected elements", "all", 2),
    "aten::ormqr": ("its gradients have other strides", "all", None),
    "aten::linalg_householder_product": ("its gradients have other strides", "all", None),
    "aten::linalg_eig": ("it checks the gradient", "all", None),
    "aten::_linalg_eigh": ("it checks the gradient", "complex", None),
    "aten::_linalg_svd": ("it checks the gradient", "complex", None),
}

# Likewise, but eager's way can be recorded: see `spread`.
_SPREADING = frozenset(("MaxBackward1", "MinBackward1", "MedianBackward0", "NanmedianBackward0"))

# Element-wise, as torch does not say of them.
_UNTAGGED_ELEMENTWISE = frozenset(
    f"aten::{name}_backward" for name in ("hardtanh", "leaky_relu", "elu")
)

# Not element-wise, but their kernels for the CPU finish reading a row before they write to it; what
# others do is not known.
_WRITING_BEHIND_ON_CPU = frozenset(
    f"aten::{name}"
    for name in "_log_softmax _log_softmax_backward_data _softmax _softmax_backward_data".split()
)

# The variant in place that runs the same kernel, where that of the same name does not: `mul_` with
# a scalar swaps the operands, and then a scalar is rounded to half precision.
_IN_PLACE = {aten.mul.Scalar: aten.mul_.Tensor}

# What JAX calls dots, plus what is built from them: the operations whose cost grows faster than
# their output, so that saving them is usually the best use of memory.
_MATRIX_LIKE = frozenset(
    f"aten::{name}"
    for name in (
        "mm addmm bmm baddbmm addbmm mv addmv dot vdot matmul linear bilinear _trilinear einsum "
        "convolution _convolution convolution_overrideable cudnn_convolution "
        "mkldnn_convolution cudnn_convolution_transpose _grouped_mm _scaled_mm "
        "_scaled_grouped_mm mkldnn_rnn_layer _cudnn_rnn _thnn_fused_lstm_cell "
        "_scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_for_cpu "
        "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention "
        "_scaled_dot_product_fused_attention_overrideable _scaled_dot_product_attention_math "
        "_flash_attention_forward _efficient_attention_forward _native_multi_head_attention"
    ).split()
)

_ATTENTION = frozenset(
    name for name in _MATRIX_LIKE if "attention" in name and "multi_head" not in name
)

_COLLECTIVE = frozenset(
    ("c10d", "c10d_functional", "_c10d_functional", "_c10d_functional_autograd", "symm_mem")
)
_NORMS = frozenset(
    f"aten::{name}"
    for name in (
        "native_layer_norm native_group_norm native_batch_norm cudnn_batch_norm "
        "miopen_batch_norm _batch_norm_with_update _native_batch_norm_legit rms_norm "
        "_fused_rms_norm"
    ).split()
)


def schema_name(target: Any) -> str:
    """`"aten::mm"` for `aten.mm.default`; the empty string for anything else."""
    return target._schema.name if isinstance(target, OpOverload) else ""


def operation(node: Node) -> Any:
    """The operation that a node runs: the mutating one if the node is an `inplace`."""
    return node.args[0] if node.target is inplace else node.target


def op_arguments(node: Node) -> tuple[Any, ...]:
    """The positional arguments of `operation(node)`."""
    return node.args[2:] if node.target is inplace else node.args


def is_matrix_like(target: Any) -> bool:
    """Whether an operation is a matrix product, convolution, recurrent layer or attention."""
    return schema_name(target) in _MATRIX_LIKE


def is_attention(target: Any) -> bool:
    """Whether an operation is a whole attention product (softmax included)."""
    return schema_name(target) in _ATTENTION


def is_norm(target: Any) -> bool:
    """Whether an operation is a normalisation layer in one piece."""
    return schema_name(target) in _NORMS


def is_collective(target: OpOverload) -> bool:
    """Whether an operation is done together with other processes: each time it is run, by all."""
    return target.namespace in _COLLECTIVE


def is_functional_collective(target: OpOverload) -> bool:
    """Whether a collective makes new tensors, or waits for them, and does nothing besides."""
    return target.namespace == "_c10d_functional" and not target._schema.is_mutable


def node_is_collective(node: Node) -> bool:
    """Whether a graph node is done together with other processes."""
    op = operation(node)
    return isinstance(op, OpOverload) and is_collective(op)


def is_random(target: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether a call draws from a random generator, for these arguments."""
    if not isinstance(target, OpOverload) or torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    where = _DROPOUT_ARGUMENT.get(schema_name(target))
    if where is None:
        return True
    probability = _argument(target, where, args, kwargs)
    trained = _argument(target, (2, "train"), args, kwargs) if where == (1, "p") else True
    return bool(probability) and trained is not False


def always_runs(node: Node) -> bool:
    """Whether an operation has an effect besides its result.

    Random numbers, an error, or what other processes get.
    """
    op = operation(node)
    returns = not isinstance(op, OpOverload) or op._schema.returns or op._schema.is_mutable
    return not returns or node_is_random(node) or node_is_collective(node)


def node_is_random(node: Node) -> bool:
    """Whether a graph node draws from a random generator."""
    return is_random(operation(node), op_arguments(node), node.kwargs)


def node_device(node: Node) -> torch.device:
    """The device that a graph node computes on."""
    val = node.meta["val"]
    results = (val,) if isinstance(val, torch.Tensor) else val
    return next(result.device for result in results if result is not None)


def _argument(
    target: OpOverload, where: tuple[int, str], args: Sequence[Any], kwargs: dict[str, Any]
) -> Any:
    position, name = where
    if position < len(args):
        return args[position]
    default = next((a.default_value for a in target._schema.arguments if a.name == name), None)
    return kwargs.get(name, default)


def mutated_arguments(
    target: OpOverload, args: Sequence[Any], kwargs: dict[str, Any]
) -> Iterator[int | str]:
    """Positions and names of the arguments that a call writes to."""
    hidden = _HIDDEN_STATISTICS.get(target._schema.name)
    if hidden is not None and args[hidden[1]]:
        yield from (i for i in hidden[0] if args[i] is not None)
    if not target._schema.is_mutable:
        return
    for i, argument in enumerate(target._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            if i < len(args):
                yield i
            elif argument.name in kwargs:
                yield argument.name


def without_unread(
    target: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
) -> tuple[OpOverload, tuple[Any, ...], dict[str, Any]]:
    """A call with the same result that does not take tensors which it would not read.

    Such an argument would be kept, or recomputed, for nothing: a dropout mask is filled into
    `empty_like(x)`, for example, and needs the shape of x alone.

    Args:
        target: The operation.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        out: Its (fake) result.
    """
    name = target._schema.name
    if name in _BLANKS or (name in _FILLED and out.is_contiguous()):
        geometry: dict[str, Any] = {"dtype": out.dtype, "device": out.device}
        if name in _BLANKS:
            return aten.empty_strided.default, (list(out.shape), list(out.stride())), geometry
        value = _FILLED[name]
        fill = args[value] if isinstance(value, int) else float(value)
        return aten.full.default, (list(out.shape), fill), geometry
    positions, flag = _UNREAD_STATISTICS.get(name, ((), None))
    if flag is not None and not args[flag]:
        return target, args, kwargs
    return target, tuple(None if i in positions else a for i, a in enumerate(args)), kwargs


def why_not_differentiable(target: OpOverload, args: Sequence[Any]) -> str:
    """Why the backward that is recorded of a call is not what eager runs; empty if it is."""
    why, dtypes, position = _BACKWARD_OF_EAGER.get(target._schema.name, ("", "", None))
    taken = args if position is None else args[position : position + 1]
    tensors = [t for t in taken if isinstance(t, torch.Tensor) and t.requires_grad]
    concerned = tensors and torch.is_grad_enabled()
    return why if concerned and (dtypes == "all" or tensors[0].is_complex()) else ""


def is_spread(target: Any, args: Sequence[Any]) -> bool:
    """Whether backward gives the gradient of an extremum of a whole tensor to where it was found.

    While a dispatch mode is on, by a product; in eager mode on the CPU, where zero times a negative
    or infinite gradient would show, as `spread` does.
    """
    node = torch._C._current_autograd_node()
    if node is None or node.name() not in _SPREADING or target is not aten.mul.Tensor:
        return False
    return args[0].dtype == torch.bool and args[0].device.type == "cpu"


def spread(mask: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """`gradient` where the mask is true, zero elsewhere."""
    return gradient.new_zeros(mask.shape).masked_fill(mask, gradient)


@functools.cache
def writing_into(target: Any, position: int, device: str = "cpu") -> tuple[OpOverload, str] | None:
    """The variant of an element-wise operation that writes its result into one of its arguments.

    Only those that run the same kernel: variants which torch generates compute elsewhere and copy.

    Args:
        target: The operation.
        position: Of the argument.
        device: Type of the device.

    Returns:
        The variant, and the keyword for the memory to write to: none if that is implied. None if
        there is no such variant.
    """
    if not isinstance(target, OpOverload) or not _is_elementwise(target, device):
        return None
    packet, name = target.overloadpacket, target._overloadname
    in_place = getattr(aten, packet.__name__ + "_", None)
    if position == 0 and target in _IN_PLACE:
        return _IN_PLACE[target], ""
    if position == 0 and name in getattr(in_place, "overloads", list)():
        return getattr(in_place, name), ""
    for each in packet.overloads():
        variant = getattr(packet, each)
        if _is_written(variant) and _declared(variant)[:-1] == _declared(target):
            return variant, variant._schema.arguments[-1].name
    return None


def _declared(target: OpOverload) -> list[tuple[str, str]]:
    return [(a.name, str(a.type)) for a in target._schema.arguments]


def _is_elementwise(target: OpOverload, device: str) -> bool:
    random, name = torch.Tag.nondeterministic_seeded in target.tags, target._schema.name
    known = torch.Tag.pointwise in target.tags or name in _UNTAGGED_ELEMENTWISE
    known |= device == "cpu" and name in _WRITING_BEHIND_ON_CPU
    return known and not random and not target._schema.is_mutable


def _is_written(variant: OpOverload) -> bool:
    """Whether a variant computes right into its last argument."""
    info = variant._schema.arguments[-1].alias_info if variant._schema.arguments else None
    written = info is not None and info.is_write
    return written and torch.Tag.generated not in variant.tags


def read_for_shape(node: Node) -> tuple[int, ...]:
    """The positions of the operands that a backward operation reads for their shape alone."""
    name = schema_name(node.target)
    if name == "aten::convolution_backward":
        mask: Any = node.args[-1]
        return (1,) if mask[0] and not mask[1] else ()
    position = _READ_FOR_SHAPE.get(name)
    if position is None and node_device(node).type == "cpu":
        position = _READ_FOR_SHAPE_ON_CPU.get(name)
    return () if position is None else (position,)


def is_blank(node: Node) -> bool:
    """Whether a value is memory without contents."""
    return schema_name(node.target) in ("aten::empty_strided", "aten::empty")


def is_new_statistic(node: Node) -> bool:
    """Whether a value is an updated running statistic, which is computed once, in forward."""
    if node.target is not getitem:
        return False
    parent: Any
    index: Any
    parent, index = node.args
    return without_statistics(parent) is not None and index >= _fresh_count(parent)


def without_statistics(node: Node) -> tuple[Any, tuple[Any, ...], dict[str, Any]] | None:
    """Target and arguments of an operation without its running statistics, if it updates any."""
    op = operation(node)
    if node.target is not inplace or op._schema.name not in _HIDDEN_STATISTICS:
        return None
    positions, _ = _HIDDEN_STATISTICS[op._schema.name]
    args = tuple(None if i in positions else a for i, a in enumerate(op_arguments(node)))
    return op, args, dict(node.kwargs)


def _fresh_count(node: Node) -> int:
    """How many results of an `inplace` node stand before the new contents of its arguments."""
    plan: Any = node.args[1]
    return len(node.meta["val"]) - len(plan)


def clone_exactly(x: torch.Tensor) -> torch.Tensor:
    """A copy with the same strides, holes included, so that kernels take the same path on it."""
    extent = sum((n - 1) * s for n, s in zip(x.size(), x.stride(), strict=True)) + 1
    new = torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=x.device)
    if x.numel():
        torch.as_strided(new, (extent,), (1,)).copy_(torch.as_strided(x, (extent,), (1,)))
    return new


View = tuple[tuple[int, ...], tuple[int, ...], int]  # size, stride, offset within the base
# The mutated arguments of an `inplace`: position or name, the view that is written (None: all of
# it), and whether the operation works on a copy.
Plan = Sequence[tuple[int | str, View | None, bool]]


def inplace(op: OpOverload, plan: Plan, /, *args: Any, **kwargs: Any) -> Any:
    """A mutating operation as a pure function: runs `op` on copies, returns them.

    Using the very kernel of the model on the very strides is what keeps results bit-identical; a
    functional twin (`add` for `add_`) may fill memory in another order. `reinplace` drops the copy
    where the old contents are not needed any more.

    Returns:
        What `op` returns apart from its mutated arguments, followed by the new contents of each
        mutated argument; a bare tensor if that is only one.
    """
    call_args, call_kwargs, bases = list(args), dict(kwargs), []
    for where, view, copy in plan:
        holder: Any = call_args if isinstance(where, int) else call_kwargs
        base = clone_exactly(holder[where]) if copy else holder[where]
        bases.append(base)
        if view is not None:
            size, stride, offset = view
            base = torch.as_strided(base, size, stride, base.storage_offset() + offset)
        holder[where] = base
    returned = op(*call_args, **call_kwargs)
    results = (*fresh_results(op, returned), *bases)
    return results[0] if len(results) == 1 else results


def inplace_with_rng_state(
    state: torch.Tensor, device: torch.device, op: OpOverload, plan: Plan, /, *args: Any, **kw: Any
) -> Any:
    """`inplace` for a random operation that is replayed: see `with_rng_state`."""
    return with_rng_state(state, device, inplace, op, plan, *args, **kw)


def fresh_results(op: OpOverload, returned: Any) -> tuple[Any, ...]:
    """The results of a call that are not one of its mutated arguments."""
    outs = returned if isinstance(returned, (tuple, list)) else (returned,)
    return tuple(
        out
        for out, declared in zip(outs, op._schema.returns, strict=False)
        if out is not None and declared.alias_info is None
    )


def rng_state_bytes(device: torch.device) -> int:
    """Size of what `read_rng_state` returns."""
    return 5056 if device.type == "cpu" else 16


def read_rng_state(device: torch.device) -> torch.Tensor:
    """The state of a device's default generator, to be replayed by `with_rng_state`.

    On fake tensors there is nothing to replay; the state is empty.
    """
    if under_fake_mode():
        return torch.empty(0, dtype=torch.uint8)
    return generator(device).get_state()


def with_rng_state(
    state: torch.Tensor, device: torch.device, op: Any, /, *args: Any, **kwargs: Any
) -> Any:
    """Runs `op` as it ran when `state` was read, and leaves the generator as it was.

    Afterwards `state` is the one that the next random operation of forward found.
    """
    with rng_state_as(state, device):
        result = op(*args, **kwargs)
        if not under_fake_mode():
            state.copy_(generator(device).get_state())
        return result


@contextlib.contextmanager
def rng_state_as(state: torch.Tensor, device: torch.device) -> Iterator[None]:
    """The default generator of a device in a state of before; afterwards it is as it was."""
    if under_fake_mode():
        yield
        return
    source = generator(device)
    now = source.get_state()
    source.set_state(state)
    try:
        yield
    finally:
        source.set_state(now)


def under_fake_mode() -> bool:
    """Whether operations compute shapes only."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


def generator(device: torch.device) -> torch.Generator:
    """The default generator of a device."""
    if device.type == "cpu":
        return torch.default_generator
    backend = torch.get_device_module(device)
    index = backend.current_device() if device.index is None else device.index
    return backend.default_generators[index]
