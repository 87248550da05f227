"""Sizes of arguments that may be others at the next call, and numbers that follow from them.

NOTE [Symbolic sizes]

With `dynamic=True` the fakes that stand for arguments have symbols of torch's `ShapeEnv` as sizes.
Whatever Python or ATen ask about these is answered for the call that is captured, and noted: as a
guard, which has to hold where the graph is used again. Sizes 0 and 1 have no symbol, since they
mean something else (nothing, and a broadcast).

    at capture      numbers are `SymInt`; `hint` tells what they are in the call that is captured
    in a joint      numbers are `Size`: the int of one call, which prints as an expression. So what
                    decides, counts bytes and estimates costs reads integers, and the generated code
                    computes them anew from the sizes of each call
    fakes           of a joint have the shapes of that call, and their `Looks` beside them

Strides of arguments follow from sizes as far as they did in the captured call, see `pattern`;
others have symbols of their own. Parameters, buffers and constants have no symbols.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch
from torch._dynamo.source import ConstantSource
from torch.fx import Graph
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StrictMinMaxConstraint
from torch.fx.node import map_aggregate
from torch.utils._sympy.functions import FloatTrueDiv, IntTrueDiv, ToFloat
from torch.utils._sympy.printers import PythonPrinter
from torch.utils._sympy.value_ranges import ValueRanges
from typing_extensions import Self

from fxckpt import invisible
from fxckpt.errors import CaptureError

Sizes = tuple[int, ...]  # what the symbols of a capture are in one call, in order
Pattern = Hashable  # of the strides of a tensor, and of its sizes 0 and 1

SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
_NAMESPACE = {"math": math}


class _Expressed:
    """A number of one call, which prints as the expression for it."""

    source: str

    def __new__(cls, value: Any, source: str) -> Self:
        """A number of one call."""
        new = super().__new__(cls, value)  # type: ignore[call-arg]
        new.source = source
        return new

    def __repr__(self) -> str:
        return self.source

    __str__ = __repr__


class Size(_Expressed, int):
    """A number that follows from sizes."""


class Quotient(_Expressed, float):
    """Likewise a floating-point number, such as a scale."""


@dataclasses.dataclass(frozen=True, slots=True)
class Looks:
    """Geometry of a tensor in terms of symbols: numbers are `Size` where they depend on any."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    bytes: int  # of the storage
    contiguous: bool  # for all sizes, as far as one can see


_LARGEST = (1 << 31) - 1  # of symbols: products of two have no overflow, as ATen can see
_RANGE = StrictMinMaxConstraint(warn_only=False, vr=ValueRanges(2, _LARGEST))


# -- arguments


@functools.lru_cache(maxsize=1 << 14)
def pattern(size: tuple[int, ...], stride: tuple[int, ...]) -> tuple[Pattern, Sizes]:
    """How a tensor is laid out, whatever its sizes are, and its sizes: those that have symbols.

    A stride is 0, 1, or that of another dimension times the size of it, as far as possible; if it
    is not, its value comes after the sizes.
    """
    if 0 in size or max(stride, default=0) > _LARGEST or max(size, default=0) > _LARGEST:
        return (size, stride), ()
    strides: list[Hashable] = []
    free: list[int] = []
    for d, each in enumerate(stride):
        following = [*range(d + 1, len(size)), *range(d)]
        behind = (j for j in following if each == size[j] * stride[j] and stride[j] < each)
        same = (j for j in following if each == stride[j] and size[j] == 1 and j > d)
        source = next((j for j in (*behind, *same)), None)
        if each > 1 and source is None:
            free.append(each)
        strides.append(each if each <= 1 else ("of", source))
    sizes = tuple(n for n in size if n > 1)
    return (tuple(n if n <= 1 else -1 for n in size), tuple(strides)), (*sizes, *free)


def strides_like(pattern: Any, size: Sequence[Any]) -> tuple[Any, ...] | None:
    """The strides that a tensor of some sizes has by a pattern; None if that does not tell."""
    _, strides = pattern
    found: dict[int, Any] = {}

    def of(d: int) -> Any:
        if d not in found:
            each = strides[d]
            if isinstance(each, int):
                found[d] = each
            elif each[1] is None:
                raise LookupError
            else:
                found[d] = size[each[1]] * of(each[1])
        return found[d]

    try:
        return tuple(of(d) for d in range(len(size)))
    except LookupError:
        return None


def has_extent(tensor: torch.Tensor) -> bool:
    """Whether a tensor has a size and strides; those that have not are not captured."""
    nested = tensor.is_nested and tensor.layout == torch.strided
    return not nested and tensor.layout not in _WITHOUT_STRIDES


_WITHOUT_STRIDES = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)


def sizes_of(tensors: Iterable[torch.Tensor]) -> Sizes:
    """What the symbols are in a call with these arguments; one that is passed twice counts once."""
    found: list[int] = []
    for t in {id(t): t for t in tensors}.values():
        found += pattern(t.shape, t.stride())[1]
    return tuple(found)


# -- numbers


def is_symbolic(value: Any) -> bool:
    """Whether a value is a number that follows from symbols."""
    return isinstance(value, SYMBOLIC)


def hint(value: Any) -> Any:
    """A number in the call that is captured; no guard comes of it."""
    return value.node.hint if is_symbolic(value) else value


def hints(values: Iterable[Any]) -> tuple[Any, ...]:
    """The same for several."""
    return tuple(map(hint, values))


def is_static(tensor: torch.Tensor) -> bool:
    """Whether no symbol is in the geometry of a fake."""
    return not any(map(is_symbolic, (*tensor.size(), *tensor.stride(), tensor.storage_offset())))


def at(tree: Any, sizes: Sizes) -> Any:
    """Arguments of an operation, for a call in which the symbols are `sizes`."""
    return map_aggregate(tree, lambda x: _at(x, sizes))


def _at(value: Any, sizes: Sizes) -> Any:
    if isinstance(value, _Expressed):
        return _function(value.source, len(sizes))(*sizes)
    return value


def are_in(graph: Graph) -> bool:
    """Whether a number in a graph follows from symbols."""
    found: list[Any] = []

    def look(value: Any) -> None:
        if isinstance(value, _Expressed):
            found.append(value)

    for node in graph.nodes:
        map_aggregate((node.args, node.kwargs), look)
    return bool(found)


def plainly(tree: Any) -> Any:
    """Arguments with plain numbers: those of the call that they were made for."""

    return map_aggregate(tree, plain)


def plain(value: Any) -> Any:
    """A plain number, if it is one that follows from symbols; else the value."""
    return value + 0 if isinstance(value, (Size, Quotient)) else value


def name_of(number: int) -> str:
    """The name of a symbol in generated code."""
    return f"s{number}"


@functools.lru_cache(maxsize=1 << 14)
def _function(source: str, count: int) -> Callable[..., Any]:
    names = ", ".join(map(name_of, range(count)))
    function: Callable[..., Any] = eval(f"lambda {names}: {source}", dict(_NAMESPACE))
    return function


# -- tensors of a joint


def looks(tensor: torch.Tensor) -> Looks:
    """The geometry of a fake in terms of symbols, if it has any."""
    found: Looks | None = tensor.__dict__.get("_fxckpt_looks")
    if found is not None:
        return found
    return Looks(
        tuple(tensor.size()),
        tensor.stride(),
        int(tensor.storage_offset()),
        tensor.untyped_storage().nbytes(),
        tensor.is_contiguous(),
    )


def look_alike(one: Any, other: Any) -> bool:
    """Whether numbers are the same for all sizes, as far as one can see."""
    return bool(_expressions(one) == _expressions(other))


def _expressions(value: Any) -> Any:
    return map_aggregate(value, lambda x: x.source if isinstance(x, _Expressed) else x)


# -- a capture


def blank(like: torch.Tensor) -> torch.Tensor:
    """A fake of one element, expanded to the size of another one."""
    seen = looks(like)
    size, stride = plainly([*seen.size]), [0] * len(seen.size)
    with like.fake_mode:  # type: ignore[attr-defined]
        made = torch.empty_strided(size, stride, dtype=like.dtype, device=like.device)
    stored = made.untyped_storage().nbytes()
    made.__dict__["_fxckpt_looks"] = Looks(seen.size, tuple(stride), 0, stored, False)
    return made


class Symbols:
    """The symbols of one capture.

    Args:
        dynamic: Whether sizes of arguments have symbols; else there are none.

    Attributes:
        sizes: What they are in the call that is captured.
        environment: What notes guards, if there are symbols.
    """

    def __init__(self, *, dynamic: bool = False) -> None:
        self.sizes: Sizes = ()
        self.environment: Any = None
        if dynamic:
            self.environment = ShapeEnv(
                allow_scalar_outputs=False,
                allow_dynamic_output_shape_ops=False,
                duck_shape=False,
                specialize_zero_one=True,
            )
        self._printer = _Printer()
        self._known: dict[Any, str] = {}
        self._holds: dict[Sizes, tuple[int, bool]] = {}

    def geometry(self, tensor: torch.Tensor) -> tuple[list[Any], list[Any]]:
        """Size and strides of the fake that stands for an argument."""
        shape: Any
        shape, values = pattern(tensor.shape, tensor.stride())
        if self.environment is None or not values:
            return list(tensor.shape), list(tensor.stride())
        sizes, strides = shape
        made = [self._symbol(v) for v in values]
        found = iter(made)
        size = [n if n >= 0 else next(found) for n in sizes]
        free: dict[int, Any] = {}
        for d, each in enumerate(strides):
            if not isinstance(each, int) and each[1] is None:
                free[d] = next(found)

        def stride(d: int) -> Any:
            each = strides[d]
            if isinstance(each, int):
                return each
            return free[d] if d in free else size[each[1]] * stride(each[1])

        return size, [stride(d) for d in range(len(size))]

    def _symbol(self, value: int) -> Any:
        number = len(self.sizes)
        self.sizes = (*self.sizes, value)
        source = ConstantSource(name_of(number))
        symbol = self.environment.create_symbol(
            value, source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=_RANGE
        )
        self._printer.names[symbol] = name_of(number)
        return self.environment.create_symintnode(symbol, hint=value, source=source)

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.sizes)

    @property
    def names(self) -> tuple[str, ...]:
        """Their names in generated code."""
        return tuple(map(name_of, range(self.count)))

    def hold(self, sizes: Sizes) -> bool:
        """Whether what was noted is true in a call with these sizes, too."""
        guards = self._guards()
        known = self._holds.get(sizes)
        if known is not None and known[0] == len(guards):
            return known[1]
        if len(self._holds) >= _MOST_SIZES:
            self._holds.clear()
        held = all(_function(self._source(g.expr), self.count)(*sizes) for g in guards)
        self._holds[sizes] = len(guards), held
        return held

    def _guards(self) -> list[Any]:
        return [] if self.environment is None else self.environment.guards

    def number(self, value: Any, sizes: Sizes) -> Any:
        """A number of the capture as one of a call with these sizes.

        Raises:
            CaptureError: if no plain expression computes it.
        """
        if isinstance(value, _Expressed):
            return type(value)(_at(value, sizes), value.source)
        if not is_symbolic(value):
            return value
        expression = value.node.expr
        if expression.is_number or isinstance(value, torch.SymBool):
            return bool(value) if isinstance(value, torch.SymBool) else _plain(value)
        if isinstance(value, torch.SymFloat) and not _is_one_step(expression):
            return float(value)  # a guard: rounding is that of Python only step by step
        source = self._source(expression)
        made = Quotient if isinstance(value, torch.SymFloat) else Size
        return made(_function(source, self.count)(*sizes), source)

    def numbers(self, tree: Any, sizes: Sizes) -> Any:
        """The same for all numbers in the arguments of an operation."""
        if not self.count:
            return tree
        return map_aggregate(tree, lambda x: self.number(x, sizes))

    def _source(self, expression: Any) -> str:
        if expression not in self._known:
            source = self._printer.doprint(expression)
            fractions = any(a.is_Rational and not a.is_Integer for a in expression.atoms())
            if fractions or "torch." in source:
                raise CaptureError(f"a size is computed in fractions ({expression})")
            self._known[expression] = source
        return self._known[expression]


_MOST_SIZES = 1 << 14


def _plain(value: Any) -> Any:
    return int(value) if isinstance(value, torch.SymInt) else float(value)


def _is_one_step(expression: Any) -> bool:
    """Whether a floating-point number is one quotient of integers or literals, as Python has it."""
    if not isinstance(expression, (IntTrueDiv, FloatTrueDiv)):
        return False
    operands = [a.args[0] if isinstance(a, ToFloat) else a for a in expression.args]
    return all(a.is_integer or a.is_Float or a.is_Integer for a in operands)


class _Printer(PythonPrinter):
    """Prints expressions in the names of generated code."""

    def __init__(self) -> None:
        super().__init__()
        self.names: dict[Any, str] = {}

    def _print_ToFloat(self, expression: Any) -> str:
        return f"float({self._print(expression.args[0])})"

    def _print_OpaqueUnaryFn_sqrt(self, expression: Any) -> str:
        return f"math.sqrt({self._print(expression.args[0])})"

    def _print_Symbol(self, symbol: Any) -> str:
        if symbol not in self.names:
            raise CaptureError("a size depends on the contents of a tensor")
        return self.names[symbol]


def _is_contiguous(fake: torch.Tensor) -> bool:
    extent: Any = 1
    for n, stride in reversed([*zip(fake.size(), fake.stride(), strict=True)]):
        if is_symbolic(n) or n != 1:
            if _expression(stride) != _expression(extent):
                return False
            extent = n * extent
    return True


def _expression(value: Any) -> Any:
    return value.node.expr if is_symbolic(value) else value


class Concrete:
    """The fakes of a capture as they are in a call: with shapes, and `Looks`.

    Args:
        symbols: Of the capture.
        sizes: What they are in the call.
    """

    def __init__(self, symbols: Symbols, sizes: Sizes) -> None:
        self._symbols, self._sizes = symbols, sizes
        self._mode = invisible.fake_mode()
        self._tensors: dict[int, torch.Tensor] = {}
        self._storages: dict[int, torch.Tensor] = {}
        self._given: list[Any] = []  # kept, so that addresses stay unique

    def arguments(self, tree: Any) -> Any:
        """Arguments of an operation."""
        return self._symbols.numbers(tree, self._sizes)

    def value(self, val: Any) -> Any:
        """What a node produces."""
        if isinstance(val, torch.Tensor):
            return self.tensor(val)
        if isinstance(val, (tuple, list)):
            return type(val)(map(self.value, val))
        return self._symbols.number(val, self._sizes)

    def tensor(self, fake: torch.Tensor) -> torch.Tensor:
        """A fake of the call, which shares memory with others as the one of the capture does."""
        if id(fake) not in self._tensors:
            self._given.append(fake)
            self._tensors[id(fake)] = self._made(fake)
        return self._tensors[id(fake)]

    def _made(self, fake: torch.Tensor) -> torch.Tensor:
        number = functools.partial(self._symbols.number, sizes=self._sizes)
        storage = fake.untyped_storage()
        looks = Looks(
            tuple(map(number, fake.size())),
            tuple(map(number, fake.stride())),
            number(fake.storage_offset()),
            number(storage.nbytes()),
            _is_contiguous(fake),
        )
        offset, size, stride = plainly((looks.offset, looks.size, looks.stride))
        base = self._storages.get(storage._cdata)
        with torch.no_grad(), self._mode:
            if base is None and offset == 0:
                made = torch.empty_strided(size, stride, dtype=fake.dtype, device=fake.device)
                if made.untyped_storage().nbytes() == looks.bytes:
                    return self._known_as(made, storage, looks)
            if base is None:
                base = torch.empty(looks.bytes + 0, dtype=torch.uint8, device=fake.device)
                self._storages[storage._cdata] = base
            if base.dtype == fake.dtype:
                made = base.as_strided(size, stride, offset)
            else:
                made = torch.empty(0, dtype=fake.dtype, device=fake.device)
                made.set_(base.untyped_storage(), offset, size, stride)
        made.__dict__["_fxckpt_looks"] = looks
        return made

    def _known_as(self, made: torch.Tensor, storage: Any, looks: Looks) -> torch.Tensor:
        """A fake that has the memory of a storage to itself so far."""
        self._storages[storage._cdata] = made
        made.__dict__["_fxckpt_looks"] = looks
        return made
