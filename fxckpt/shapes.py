"""The geometry (shape, strides, dtype) of results, where a fake kernel does not tell it right.

NOTE [Right geometry]

Later operations branch on strides (`view`, `reshape`, `contiguous`, kernels that round in another
order), so a fake result must be laid out as the real one will be. The fake kernels of many
element-wise operations are Python decompositions: if operands are laid out differently, one
contiguous and one transposed, say, they guess. Three sources know better, in this order:

    LEARNED     what a real run returned where the fake kernel was wrong (see `first_run`), or is
                known to be: then the real one runs once on operands of these sizes
    OWN         our own kernels, where the fake kernel refuses what the real one accepts, or makes
                one of two results
    a trial     the real kernel runs once on a miniature of its operands

A miniature has the same order of strides, the same broadcast, dense and size-1 dimensions, but each
size is a small one; equal sizes stay equal, larger ones stay larger. Element-wise kernels choose
the order of dimensions of their results by these alone. A trial is made only if an operand is not
contiguous, and once per operation and pattern.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch._decomp import decomposition_table
from torch._ops import OpOverload
from torch.fx.node import map_aggregate

from fxckpt import ops, symbols
from fxckpt.errors import CaptureError
from fxckpt.invisible import outside_of_modes, stands_for_real

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True, slots=True)
class Geometry:
    """All about a tensor but its contents."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(tensor: torch.Tensor) -> Geometry:
        """That of a real or fake tensor, in the call that is captured."""
        size, stride = symbols.hints(tensor.size()), symbols.hints(tensor.stride())
        return Geometry(size, stride, tensor.dtype, tensor.device)

    @staticmethod
    def seen(fake: torch.Tensor, sizes: symbols.Sizes) -> Geometry:
        """That which a fake of a joint graph foresees for a call with these sizes."""
        if not sizes:
            return Geometry.of(fake)
        looks = symbols.looks(fake)
        size, stride = symbols.at((looks.size, looks.stride), sizes)
        return Geometry(size, stride, fake.dtype, fake.device)

    def empty(self) -> torch.Tensor:
        """A tensor of this geometry: a fake one under the fake mode."""
        return aten.empty_strided.default(
            self.size, self.stride, dtype=self.dtype, device=self.device
        )


# By `key_of` a call: the results that are not mutated arguments, None for one that is None.
LEARNED: dict[Hashable, tuple[Geometry | None, ...]] = {}


def corrected(func: OpOverload, args: Any, kwargs: Any, out: Any) -> Any:
    """The fake result of an operation, laid out as the real one; see the note.

    Args:
        func: The operation.
        args: Its positional arguments, with fake tensors.
        kwargs: Its keyword arguments.
        out: What its fake kernel returned.
    """
    if func in _AT_FULL_SIZE:
        _learn_at_full_size(func, args, kwargs, out)
    if LEARNED and isinstance(out, (torch.Tensor, tuple, list)):
        known = _learned(func, args, kwargs, out)
        if known is not None:
            if not all(map(symbols.is_static, _tensors((*args, *kwargs.values())))):
                raise CaptureError(f"the shape or layout of {func} is known for one size alone")
            return _replaced(func, out, known)
    if not _can_be_tried(func):
        return out
    tensors = _tensors((*args, *kwargs.values()))
    if all(t.is_contiguous() for t in tensors):
        return out
    return _tried(func, args, kwargs, out, tensors)


def alike(a: Geometry, b: torch.Tensor) -> bool:
    """Whether a tensor has some geometry, strides of dimensions without extent aside."""
    if a.size != b.size() or a.dtype != b.dtype:
        return False
    if a.stride == b.stride() or 0 in a.size:
        return True
    return all(s == t for n, s, t in zip(a.size, a.stride, b.stride(), strict=True) if n > 1)


def key_of(func: OpOverload, args: Any, kwargs: Any) -> Hashable:
    """All that the geometry of a result depends on; arguments may be tensors or `Geometry`."""
    return func, _frozen(args), _frozen(kwargs)


def _frozen(value: Any) -> Hashable:
    if isinstance(value, torch.Tensor):
        return Geometry.of(value)
    if isinstance(value, Geometry):
        return value
    if isinstance(value, (tuple, list)):
        return tuple(map(_frozen, value))
    if symbols.is_symbolic(value):
        return _frozen(symbols.hint(value))
    if isinstance(value, dict):
        return tuple((k, _frozen(v)) for k, v in sorted(value.items()))
    return type(value), value


# -- what a real run showed


def learn(func: OpOverload, args: Any, kwargs: Any, found: tuple[Geometry | None, ...]) -> bool:
    """Remembers the results of a call; false if they were others the last time."""
    return LEARNED.setdefault(key_of(func, args, kwargs), found) == found


# Those whose fake kernels do not know the size of a result: here, that of the workspace.
_AT_FULL_SIZE = {aten.mkldnn_rnn_layer.default}


def _learn_at_full_size(func: OpOverload, args: Any, kwargs: Any, out: Any) -> None:
    """Learns from the real kernel, if the operands stand for real ones."""
    func, args, kwargs = ops.without_unread(func, tuple(args), kwargs, out)
    tensors = _tensors((*args, *kwargs.values()))
    if not all(symbols.is_static(t) and stands_for_real(t) for t in tensors):
        return
    if key_of(func, args, kwargs) in LEARNED:
        return
    returned = _returned(func, *map_aggregate((list(args), kwargs), _geometry))
    if returned is not None:
        learn(func, args, kwargs, tuple(map(Geometry.of, returned)))


def _geometry(value: Any) -> Any:
    return Geometry.of(value) if isinstance(value, torch.Tensor) else value


def _learned(func: OpOverload, args: Any, kwargs: Any, out: Any) -> Any:
    target, read, options = ops.without_unread(func, tuple(args), kwargs, out)
    return LEARNED.get(key_of(target, read, options))


def fresh(func: OpOverload, returned: Any) -> list[int]:
    """Which of the results of a call (one tensor counts as a list of one) are not arguments."""
    outs = returned if isinstance(returned, (tuple, list)) else (returned,)
    if not func._schema.is_mutable:
        return list(range(len(outs)))
    declared = [r.alias_info is None for r in func._schema.returns]
    given = zip(outs, declared, strict=False)
    return [i for i, (o, new) in enumerate(given) if new and o is not None]


def _replaced(func: OpOverload, out: Any, known: Sequence[Geometry | None]) -> Any:
    outs = list(out) if isinstance(out, (tuple, list)) else [out]
    positions = fresh(func, out)
    if len(positions) != len(known):
        return out
    for i, geometry in zip(positions, known, strict=True):
        if geometry is None:
            outs[i] = None
        elif outs[i] is None or Geometry.of(outs[i]) != geometry:
            outs[i] = geometry.empty()
    return type(out)(outs) if isinstance(out, (tuple, list)) else outs[0]


# -- trials

_Order = tuple[tuple[int, ...], tuple[int, ...]]  # size of a small result, dimensions inside out

# By `key_of` a small call: what is known of each result. Empty if the kernel refuses the call.
_TRIALS: dict[Hashable, list[_Order | None]] = {}
_MAX_TRIALS = 1 << 14


# Besides those that torch tags as pointwise: the sizes of all operands and results are the same, or
# sizes of the same dimensions, so a kernel cannot be led astray by small ones.
_LIKE_POINTWISE = frozenset(
    "elu_backward hardsigmoid_backward hardswish_backward hardtanh_backward leaky_relu_backward "
    "log_sigmoid_forward log_sigmoid_backward mish_backward rrelu_with_noise_backward "
    "softplus_backward softshrink_backward hardshrink_backward _prelu_kernel "
    "_prelu_kernel_backward binary_cross_entropy binary_cross_entropy_backward "
    "binary_cross_entropy_with_logits mse_loss mse_loss_backward smooth_l1_loss "
    "smooth_l1_loss_backward huber_loss huber_loss_backward soft_margin_loss "
    "soft_margin_loss_backward complex polar floor_divide native_dropout _fused_dropout bernoulli "
    "binomial normal poisson _standard_gamma _standard_gamma_grad rand_like randn_like "
    "randint_like empty_like full_like zeros_like ones_like _softmax _safe_softmax "
    "_softmax_backward_data _log_softmax _log_softmax_backward_data cumsum cumprod logcumsumexp "
    "native_layer_norm native_layer_norm_backward native_batch_norm native_batch_norm_backward "
    "batch_norm_backward _weight_norm_interface _weight_norm_interface_backward _to_copy".split()
)


@functools.cache
def _can_be_tried(func: OpOverload) -> bool:
    """Whether an operation is element-wise, or nearly so, and computes new tensors."""
    pointwise = torch.Tag.pointwise in func.tags
    return (
        func.namespace == "aten"
        and (pointwise or func._schema.name.removeprefix("aten::") in _LIKE_POINTWISE)
        and not func._schema.is_mutable
        and all(r.alias_info is None for r in func._schema.returns)
    )


def _tried(
    func: OpOverload, args: Any, kwargs: Any, out: Any, tensors: Sequence[torch.Tensor]
) -> Any:
    sizes = _small_sizes(tensors)
    outs = list(out) if isinstance(out, (tuple, list)) else [out]
    try:
        small = [_small(a, n, sizes) for a, n in zip(args, _names(func), strict=False)]
        options = {k: _small(v, k, sizes) for k, v in kwargs.items()}
    except LookupError:
        return out
    key = key_of(func, small, options)
    if key not in _TRIALS:
        if len(_TRIALS) >= _MAX_TRIALS:
            _TRIALS.clear()
        _TRIALS[key] = _try(func, small, options)
    found = zip(outs, _TRIALS[key], strict=False)
    laid_out = [o if known is None else _laid_out(o, known, sizes, tensors) for o, known in found]
    if len(laid_out) < len(outs):
        return out
    return type(out)(laid_out) if isinstance(out, (tuple, list)) else laid_out[0]


def _laid_out(
    out: Any, known: _Order, sizes: dict[int, int], operands: Sequence[torch.Tensor]
) -> Any:
    """A fake result in the order of its small counterpart."""
    if not isinstance(out, torch.Tensor):
        return out
    small, order = known
    if tuple(sizes.get(symbols.hint(n)) for n in out.size()) != small:
        return out
    stride = _dense(out.size(), order)
    as_known = symbols.hints(stride) == symbols.hints(out.stride())
    if as_known or any(_share_memory(out, t) for t in operands):
        return out
    return Geometry(tuple(out.size()), stride, out.dtype, out.device).empty()


def _try(func: OpOverload, args: Any, kwargs: Any) -> list[_Order | None]:
    """How what the real kernel returns for operands of these geometries is laid out."""
    returned = _returned(func, args, kwargs) or ()
    return [_order(o) if isinstance(o, torch.Tensor) else None for o in returned]


def _returned(func: OpOverload, args: Any, kwargs: Any) -> Sequence[Any] | None:
    """What the real kernel returns for such operands; None if that cannot be tried."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(outside_of_modes())
        stack.enter_context(torch._C._AutoDispatchBelowAutograd())
        stack.enter_context(torch._C._DisableAutocast())
        stack.enter_context(torch.enable_grad())  # as in programs, see `programs`
        try:
            stand_ins = _stand_in(args), _stand_in(kwargs)
            if torch.Tag.nondeterministic_seeded in func.tags:
                for device in {t.device for t in _tensors((*stand_ins[0], *stand_ins[1].values()))}:
                    stack.enter_context(ops.rng_state_as(ops.read_rng_state(device), device))
            returned = func(*stand_ins[0], **stand_ins[1])
        except Exception:  # the fake kernel's answer stays
            return None
    return returned if isinstance(returned, (tuple, list)) else (returned,)


def _order(tensor: torch.Tensor) -> _Order | None:
    """The order of the dimensions of a dense tensor."""
    size, stride = tuple(tensor.size()), tensor.stride()
    order = tuple(sorted(range(len(size)), key=lambda d: (stride[d], size[d])))
    return (size, order) if _dense(size, order) == stride else None


def _dense(size: Sequence[int], order: Sequence[int]) -> tuple[int, ...]:
    """Strides without gaps, the first dimension in `order` innermost."""
    stride, extent = [0] * len(size), 1
    for d in order:
        stride[d] = extent
        extent *= size[d] if symbols.is_symbolic(size[d]) else max(size[d], 1)
    return tuple(stride)


# -- miniatures


@functools.cache
def _names(func: OpOverload) -> list[str]:
    return [a.name for a in func._schema.arguments]


def _small_sizes(tensors: Sequence[torch.Tensor]) -> dict[int, int]:
    """A small size for each size that occurs."""
    sizes = sorted({n for t in tensors for n in symbols.hints(t.size()) if n > 1})
    return {0: 0, 1: 1, **{n: i for i, n in enumerate(sizes, 2)}}


def _small(value: Any, name: str, sizes: dict[int, int]) -> Any:
    """An argument of the small call, a `Geometry` in place of a tensor.

    Raises:
        LookupError: if there is none.
    """
    if isinstance(value, torch.Tensor):
        whole = Geometry.of(value)
        size = tuple(sizes[n] for n in whole.size)
        stride = _small_stride(whole.size, whole.stride, sizes)
        return Geometry(size, stride, value.dtype, value.device)
    if isinstance(value, torch.Generator):
        raise LookupError("its state would advance")
    if name == "normalized_shape":
        return [sizes[n] for n in symbols.hints(value)]
    if isinstance(value, (tuple, list)):
        return [_small(v, "", sizes) for v in value]
    return symbols.hint(value)


def _small_stride(
    size: Sequence[int], stride: Sequence[int], sizes: dict[int, int]
) -> tuple[int, ...]:
    small, extent, small_extent = {0: 0}, 1, 1
    for each in sorted({*stride} - {0}):
        wide = [n for n, s in zip(size, stride, strict=True) if s == each and n > 1]
        if each < extent or len(wide) > 1:
            raise LookupError("elements overlap")
        small[each] = small_extent if each == extent else 2 * small_extent
        for n in wide:
            extent, small_extent = each * n, small[each] * sizes[n]
    return tuple(small[s] for s in stride)


def _stand_in(value: Any) -> Any:
    """`value` with real tensors, full of ones, in place of geometries."""
    if isinstance(value, Geometry):
        extent = 1 + sum((n - 1) * s for n, s in zip(value.size, value.stride, strict=True))
        flat = torch.ones(max(extent, 0), dtype=value.dtype, device=value.device)
        return flat.as_strided(value.size, value.stride)
    if isinstance(value, list):
        return [_stand_in(v) for v in value]
    if isinstance(value, dict):
        return {k: _stand_in(v) for k, v in value.items()}
    return value


def _tensors(values: Sequence[Any]) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            found += (v for v in value if isinstance(v, torch.Tensor))
    return found


def _share_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata


# -- fake kernels of our own


def grouped_mm(
    a: torch.Tensor,
    b: torch.Tensor,
    offs: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """`torch._grouped_mm` for any floating dtype; its fake kernel knows only bfloat16 (2.13).

    Rows of the result are padded to a multiple of 16 bytes, as the real kernel does.
    """
    dtype = out_dtype or a.dtype
    columns = b.size(-1)
    aligned = 16 // dtype.itemsize
    padded = (columns + aligned - 1) // aligned * aligned
    rows = a.size(-2)
    if (a.dim() == 2) != (b.dim() == 2):
        return torch.empty_strided((rows, columns), (padded, 1), dtype=dtype, device=a.device)
    groups = a.size(0) if a.dim() == 3 or offs is None else offs.size(0)
    return torch.empty_strided(
        (groups, rows, columns), (rows * padded, padded, 1), dtype=dtype, device=a.device
    )


def ctc_loss(
    longest: int, log_probs: torch.Tensor, *_: Any, **__: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """`torch._ctc_loss`, whose table has two rows for each label of the longest target."""
    steps, batch, _labels = log_probs.size()
    return log_probs.new_empty(batch), log_probs.new_empty(batch, steps, 2 * longest + 1)


def padded(x: torch.Tensor, pad: Sequence[int], value: float = 0) -> torch.Tensor:
    """`constant_pad_nd`, whose fake kernel takes symbols for the numbers of one call (2.13).

    The real kernel clones what is left if nothing is added on any side; the decomposition only if
    something is taken away from each.
    """
    if symbols.is_static(x) and not any(map(symbols.is_symbolic, pad)):
        return aten.constant_pad_nd.default(x, pad, value)
    if not all(n <= 0 for n in pad):
        return decomposition_table[aten.constant_pad_nd.default](x, pad, value)
    for dim, (before, after) in enumerate(zip(pad[::2], pad[1::2], strict=True), 1):
        x = x.narrow(-dim, -before, x.size(-dim) + before + after)
    return x.clone()


def rnn_layer_backward(*args: Any) -> tuple[torch.Tensor, ...]:
    """`mkldnn_rnn_layer_backward`, whose fake kernel has one gradient for both biases (2.13)."""
    *before, bias, _, hx, cx = aten.mkldnn_rnn_layer_backward.default(*args)
    return *before, bias, torch.empty_like(bias), hx, cx


def decomposed(func: OpOverload) -> Callable[..., Any] | None:
    """An operation as torch decomposes it, if it does, which tells the shape of the result."""
    return decomposition_table.get(func)


OWN: dict[OpOverload, Callable[..., Any]] = {
    torch.ops.aten._grouped_mm.default: grouped_mm,
    torch.ops.aten.constant_pad_nd.default: padded,
    torch.ops.aten.mkldnn_rnn_layer_backward.default: rnn_layer_backward,
}
if torch.distributed.is_available():  # the real one returns its argument
    OWN[torch.ops._c10d_functional.wait_tensor.default] = torch.ops.aten.alias.default

# Those that also get, first, the largest element of one of their arguments; its position.
SIZED_BY: dict[OpOverload, tuple[Callable[..., Any], int]] = {
    torch.ops.aten._ctc_loss.Tensor: (ctc_loss, 3),
}
