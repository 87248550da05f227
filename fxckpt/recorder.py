"""A dispatch mode that writes what a program does to tensors into a `torch.fx` graph.

NOTE [Recording in single assignment form]

The program mutates tensors through views; the graph must not. So the recorder keeps, for each
storage, the node that holds its *current* contents, and for each tensor how it was made from
another (its recipe). Reading a tensor after its storage was mutated through some other tensor
rebuilds the view on the current contents:

    y = x * 2               mul = mul(x, 2)             storage of y: mul
    v = y[0]                select = select(mul, 0, 0)  v = select of y
    y.add_(1)               add_ = inplace(add_, mul)   storage of y: add_
    v + v                   select_1 = select(add_, 0, 0); add = add(select_1, select_1)

Mutation of a view produces new contents of the whole storage, with the mutated view in the
arguments of `ops.inplace`. Storages are told apart by identity of the fake storages, which the
recorder keeps alive; so no table of view operations is needed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import operator
from collections.abc import Callable, Iterator
from operator import getitem
from typing import Any, Protocol

import torch
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.fx import Graph, Node
from torch.fx.node import map_aggregate
from torch.utils import _python_dispatch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fxckpt import ops, shapes, spread
from fxckpt.errors import CaptureError
from fxckpt.joint import root
from fxckpt.places import Place
from fxckpt.symbols import Symbols, is_symbolic

aten = torch.ops.aten
_INDEX_PUT = (
    aten.index_put.default,
    aten.index_put_.default,
    aten._unsafe_index_put.default,
    aten._index_put_impl_.default,
)
_REPLACES_MEMORY = (
    aten.set_.source_Tensor,
    aten.set_.source_Storage_storage_offset,
    aten.resize_.default,
    aten.resize_as_.default,
)


@dataclasses.dataclass(slots=True)
class _Storage:
    """Current contents of one storage. `root` is the tensor that covers it."""

    root: torch.Tensor
    node: Node
    owner: Any  # the untyped storage, kept alive so that its address stays unique
    phase: str
    version: int = 0


@dataclasses.dataclass(slots=True)
class Recipe:
    """How a tensor was made from another that shares its storage."""

    parent: torch.Tensor
    func: OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    index: int | None  # which of several results


@dataclasses.dataclass(slots=True)
class _Entry:
    """What is known of one tensor; `node` is valid while the storage is at `version`."""

    tensor: torch.Tensor
    storage: _Storage
    node: Node
    version: int
    recipe: Recipe | None


class Adopt(Protocol):
    """See `Recorder`."""

    def __call__(
        self, tensor: torch.Tensor, *, literal: bool = False
    ) -> tuple[Node, torch.Tensor]: ...


class Recorder(TorchDispatchMode):
    """Records into `graph` while it is active; see the note on single assignment form.

    Args:
        fake_mode: The mode that computes shapes; must be entered before the recorder.
        adopt: Called with a real tensor that the program met, and whether it is a literal that the
            program made anew; returns the placeholder and the fake tensor that stand for it.
        place: Called for each operation; says where in the program it is.
        read: Called with an operation and its arguments when Python reads values (`item`), or
            when a shape depends on values (`nonzero`); returns the result or raises.
        symbols: Of the sizes of arguments.
    """

    supports_higher_order_operators = True  # they reach us, to be refused

    def __init__(
        self,
        fake_mode: FakeTensorMode,
        adopt: Adopt,
        place: Callable[[], Place],
        read: Callable[[OpOverload, Any, Any], Any],
        symbols: Symbols,
    ) -> None:
        super().__init__()
        self.graph = Graph()
        self.fake_mode, self._adopt, self._place, self._read = fake_mode, adopt, place, read
        self.symbols = symbols
        self.phase = "forward"
        self.nest: tuple[Any, ...] = ()  # the checkpoints that are running, see `nests`
        self.checkpoints = 0  # those of torch
        self._storages: dict[int, _Storage] = {}
        self._entries: dict[int, _Entry] = {}
        self._nonzero: dict[Node, torch.Tensor] = {}  # of masks, by their contents
        self._draws: list[Node] = []  # random operations of forward
        self._draws_again: Iterator[int] = iter(())  # which of them backward does again

    # -- what the program's tensors are in the graph

    def add_placeholder(self, fake: torch.Tensor, name: str) -> Node:
        """A new placeholder for a fake tensor with a storage of its own."""
        with self.graph.inserting_before(self._first_operation()):
            node = self.graph.placeholder(name)
        node.target = node.name  # the name made a valid identifier
        node.meta = {"val": fake}
        self._track(fake, node, None)
        return node

    def node_for(self, tensor: torch.Tensor) -> Node:
        """The node that holds the current contents of a tensor."""
        entry = self._entries[id(tensor)]
        if _address(tensor) != entry.storage.owner._cdata:
            raise CaptureError("forward replaces the memory of a tensor (`tensor.data = ...`)")
        if entry.version != entry.storage.version:
            if entry.recipe is None:
                entry.node = entry.storage.node
            else:
                entry.node = self._replay(entry.recipe, tensor)
            entry.version = entry.storage.version
        return entry.node

    def knows(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor was made while recording, or stands for an argument."""
        return id(tensor) in self._entries

    def storage_of(self, tensor: torch.Tensor) -> _Storage:
        """The storage record of a known tensor."""
        return self._entries[id(tensor)].storage

    def recipe_of(self, tensor: torch.Tensor) -> Recipe | None:
        """How a known tensor was made from another one on the same storage, if it was."""
        return self._entries[id(tensor)].recipe

    def tensors(self) -> list[torch.Tensor]:
        """All tensors that are known."""
        return [entry.tensor for entry in self._entries.values()]

    def structures(self) -> list[Any]:
        """Our own objects that refer to known tensors, each once."""
        entries = self._entries.values()
        recipes = [e.recipe for e in entries if e.recipe is not None]
        metas = [n.meta for n in self.graph.nodes]
        found: list[Any] = [*entries, *(e.storage for e in entries), *self._storages.values()]
        found += [*recipes, *metas]
        stack: list[Any] = [*(r.args for r in recipes), *(r.kwargs for r in recipes)]
        stack += [v for v in (m.get("val") for m in metas) if isinstance(v, (tuple, list))]
        for container in stack:  # which grows meanwhile
            inner = container.values() if isinstance(container, dict) else container
            stack += [x for x in inner if isinstance(x, (tuple, list, dict))]
        return [*{id(o): o for o in (*found, *stack)}.values()]

    @property
    def draws(self) -> int:
        """How many random operations forward did."""
        return len(self._draws)

    @contextlib.contextmanager
    def drawing_again(self, draws: range) -> Iterator[None]:
        """While active, random operations of backward are some of forward, once more."""
        before, self._draws_again = self._draws_again, iter(draws)
        try:
            yield
        finally:
            self._draws_again = before

    # -- recording

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        try:
            if spread.is_taken_apart(types):
                return self._pass(func, args, kwargs)
            return self._dispatch(func, args, kwargs)
        except CaptureError as error:
            if error.path:
                raise
            place = self._place()
            raise error.at(place.path, place.source) from error

    def _pass(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Lets the classes of arguments make operations on plain tensors of one."""

        def faked(x: Any) -> Any:
            layout = spread.layout(x) if isinstance(x, torch.Tensor) else None
            if layout is None or self.knows(spread.local(x)):
                return x
            return layout.around(self._adopt(x)[1])

        tensors = _tensors((args, kwargs))
        args, kwargs = map_aggregate(args, faked), map_aggregate(kwargs, faked)
        if all(map(operator.is_, tensors, _tensors((args, kwargs)))):
            return NotImplemented
        with self:
            return func(*args, **kwargs)

    def _dispatch(self, func: Any, args: Any, kwargs: Any) -> Any:
        if not isinstance(func, OpOverload):
            raise CaptureError(f"the higher-order operation {func} cannot be recorded")
        if func.namespace == "profiler":  # names what runs, for who measures
            return func(*args, **kwargs)
        if ops.is_collective(func) and not ops.is_functional_collective(func):
            raise CaptureError(
                f"{self.phase} communicates with other processes ({func})",
                hint="Keep that part eager; its submodules and its neighbours are captured.",
            )
        if func is aten.lift_fresh.default:
            return self._constant(args[0])
        args, kwargs = self._faked(args), self._faked(kwargs)
        if torch.Tag.data_dependent_output in func.tags or func is aten.is_nonzero.default:
            return self._read(func, args, kwargs)
        if func is aten.index.Tensor or (func in _INDEX_PUT and args[2].requires_grad):
            args = (args[0], self._integer_indices(args[1]), *args[2:])
        if self.phase == "backward" and ops.is_spread(func, args):
            with self:
                return ops.spread(*args)
        if func is aten.slice.Tensor:
            _note_whole(*args)
        self._require_eager_way(func, args)
        out = self._run(func, args, kwargs)
        self._record(func, args, kwargs, out)
        return out

    def _require_eager_way(self, func: OpOverload, args: Any) -> None:
        """Raises if eager does something else than what would be recorded."""
        if self.phase == "forward" and (why := ops.why_not_differentiable(func, args)):
            raise CaptureError(f"the backward of {func} cannot be recorded: in eager mode {why}")
        if func is aten.view.default and (args[0].is_conj() or args[0].is_neg()):
            # `reshape` is `_reshape_alias` in eager mode, which computes it first
            raise CaptureError("a tensor with a pending conjugation or negation is reshaped")

    def _run(self, func: OpOverload, args: Any, kwargs: Any) -> Any:
        """The fake result of an operation."""
        if torch.Tag.inplace_view in func.tags:
            self._keep_geometry(args[0])
        kernel = shapes.OWN.get(func, func)
        if func in shapes.SIZED_BY:
            sized, position = shapes.SIZED_BY[func]
            with self:
                kernel = functools.partial(sized, int(args[position].max()))
        try:
            out = kernel(*args, **kwargs)
        except DynamicOutputShapeException:
            return self._read(func, args, kwargs)
        except RuntimeError:  # a kernel that asks for plain numbers
            decomposed = shapes.decomposed(func) if self.symbols.count else None
            if decomposed is None:
                raise
            out = decomposed(*args, **kwargs)
        return shapes.corrected(func, args, kwargs, out)

    def _keep_geometry(self, tensor: torch.Tensor) -> None:
        """Lets nodes keep the geometry of a tensor that is about to be given another."""
        alias = aten.detach.default(tensor)
        for node in self.graph.nodes:
            val = node.meta.get("val")
            if val is tensor:
                node.meta["val"] = alias
            elif isinstance(val, tuple):
                node.meta["val"] = tuple(alias if v is tensor else v for v in val)

    def _integer_indices(self, indices: Any) -> list[Any]:
        """Boolean masks among indices as what the kernel makes of them.

        So the shape of the result depends on the masks alone, which may be known. What forward
        knew serves backward too.
        """
        found: list[Any] = []
        with self:
            for index in indices:
                if index is None or index.dtype not in (torch.bool, torch.uint8):
                    found.append(index)
                    continue
                mask = self.node_for(index)
                if mask not in self._nonzero:
                    self._nonzero[mask] = aten.nonzero.default(index)
                found.extend(self._nonzero[mask].unbind(1))
        return found

    def _record(self, func: OpOverload, args: Any, kwargs: Any, out: Any) -> None:
        if not _has_tensor(out) and not func._schema.is_mutable:
            if not func._schema.returns:  # raises, if at all
                self._emit(func, self.nodes(args), self.nodes(kwargs), None)
            return  # else a question about metadata; the answer is part of the signature
        if any(isinstance(a, torch.Generator) for a in (*args, *kwargs.values())):
            raise CaptureError(
                f"{func} draws from a torch.Generator of its own",
                hint="Draw from the default generator, or draw outside of the model.",
            )
        if torch.Tag.inplace_view in func.tags:
            self._record_new_geometry(func, args[0])
            return
        mutated = list(ops.mutated_arguments(func, args, kwargs))
        if mutated:
            self._record_mutation(func, args, kwargs, mutated, out)
        elif func is aten.detach.default:
            self._entries[id(out)] = self._alias_entry(
                out, self.node_for(args[0]), Recipe(args[0], func, (args[0],), {}, None)
            )
        else:
            target, read, options = ops.without_unread(func, tuple(args), kwargs, out)
            node = self._emit(target, self.nodes(read), self.nodes(options), out)
            if target is not func:
                node.meta["like"] = self.node_for(args[0])
            self._bind(out, node, func, args, kwargs)

    def _bind(self, out: Any, node: Node, func: OpOverload, args: Any, kwargs: Any) -> None:
        """Connects the results of an operation with its node."""
        if isinstance(out, torch.Tensor):
            self._bind_one(out, node, func, args, kwargs, None)
            return
        for i, each in enumerate(out):
            if isinstance(each, torch.Tensor):
                item = self._emit(getitem, (node, i), {}, each)
                self._bind_one(each, item, func, args, kwargs, i)

    def _bind_one(
        self, out: torch.Tensor, node: Node, func: OpOverload, args: Any, kwargs: Any, i: int | None
    ) -> None:
        if out.layout != torch.strided:
            raise CaptureError(f"a tensor with layout {out.layout} is used")
        self._resume(_tensors((args, kwargs)))
        storage = self._storages.get(_address(out))
        if storage is None or func is aten._unsafe_view.default:
            # `_unsafe_view` reshapes a tensor that nobody else sees: the result replaces it, and
            # unlike a view it has a version counter of its own.
            self._track(out, node, None)
            return
        args_on_it = [t for t in _tensors((args, kwargs)) if self.storage_of(t) is storage]
        if not args_on_it:
            self._bind_twin(out, storage, func)
            return
        parent = args_on_it[0]
        node.meta["alias"] = self.node_for(parent)
        if i is not None:  # one view of several: a view of the list of views
            views: Any = node.args[0]
            views.meta["alias"], node.meta["alias"] = node.meta["alias"], views
        if out is not parent:
            recipe = Recipe(parent, func, args, kwargs, i)
            self._entries[id(out)] = self._alias_entry(out, node, recipe)

    def _resume(self, tensors: list[torch.Tensor]) -> None:
        """Tensors that `_unsafe_view` replaced are in use still, as after `torch.kron`."""
        for tensor in tensors:
            storage, latest = self.storage_of(tensor), self._storages[_address(tensor)]
            if latest is not storage and not latest.version and not storage.version:
                self._storages[_address(tensor)] = storage

    def _bind_twin(self, out: torch.Tensor, storage: _Storage, func: OpOverload) -> None:
        """A result that is another result of the same operation once more."""
        if _view_within(out, storage.root) is not None:
            raise CaptureError(f"results of {func} overlap")
        recipe = Recipe(storage.root, aten.detach.default, (storage.root,), {}, None)
        self._entries[id(out)] = self._alias_entry(out, storage.node, recipe)

    def _record_new_geometry(self, func: OpOverload, tensor: torch.Tensor) -> None:
        """An operation such as `unsqueeze_`: the tensor is another view of its storage.

        On a view, autograd's history of a fake tensor misses the change (2.13), and a mutation that
        follows gets a wrong gradient; and views of the tensor would not fit it any more. So only a
        tensor without views may change.
        """
        storage = self.storage_of(tensor)
        alone = not any(
            e.storage is storage and e.tensor is not tensor for e in self._entries.values()
        )
        if tensor is not storage.root or not alone or func in _REPLACES_MEMORY:
            raise CaptureError(f"{func} changes the shape of a tensor in place")
        before = self.node_for(tensor)
        geometry = (list(tensor.size()), list(tensor.stride()), tensor.storage_offset())
        node = self._emit(aten.as_strided.default, (before, *geometry), {}, tensor)
        node.meta["alias"] = before
        self._entries[id(tensor)].node = storage.node = node

    def _record_mutation(
        self, func: OpOverload, args: Any, kwargs: Any, where: list[Any], out: Any
    ) -> None:
        call_args, call_kwargs = list(self.nodes(args)), dict(self.nodes(kwargs))
        storages, plan = [], []
        for key in where:
            target = args[key] if isinstance(key, int) else kwargs[key]
            if not isinstance(target, torch.Tensor):
                raise CaptureError(f"{func} mutates a list of tensors")
            storage = self.storage_of(target)
            if self.phase == "backward" and storage.phase == "forward":
                raise CaptureError(f"backward changes a tensor of forward ({func})")
            holder: Any = call_args if isinstance(key, int) else call_kwargs
            holder[key] = storage.node
            storages.append(storage)
            plan.append((key, _view_within(target, storage.root), True))
        fresh = ops.fresh_results(func, out)
        results = (*fresh, *(s.root for s in storages))
        val = results[0] if len(results) == 1 else results
        node = self._emit(ops.inplace, (func, tuple(plan), *call_args), call_kwargs, val)
        items = [node]
        if len(results) > 1:
            items = [self._emit(getitem, (node, i), {}, r) for i, r in enumerate(results)]
        for tensor, item in zip(fresh, items, strict=False):
            self._track(tensor, item, None)
        for storage, item in zip(storages, items[len(fresh) :], strict=True):
            storage.node, storage.version = item, storage.version + 1

    def _replay(self, recipe: Recipe, tensor: torch.Tensor) -> Node:
        """The view `tensor` of the current contents of its storage."""
        parent = self.node_for(recipe.parent)
        if recipe.func is aten.detach.default:
            return parent
        index = recipe.index
        val = tensor if index is None else recipe.func(*recipe.args, **recipe.kwargs)
        node = self._emit(recipe.func, self.nodes(recipe.args), self.nodes(recipe.kwargs), val)
        node.meta["alias"] = parent
        if index is None:
            return node
        item = self._emit(getitem, (node, index), {}, tensor)
        item.meta["alias"] = node
        return item

    def _constant(self, tensor: torch.Tensor) -> torch.Tensor:
        """A literal such as `torch.tensor([1, 2])`: a copy of it is made at each run."""
        node, fake = self._adopt(tensor, literal=True)
        out = aten.clone.default(fake)
        self._track(out, self._emit(aten.clone.default, (node,), {}, out), None)
        return out

    def run_within(self, checkpoint: Any, forward: Callable[[], Any]) -> Any:
        """Runs what belongs to a checkpoint inside of the captured one; its results do not."""
        outer, self.nest = self.nest, (*self.nest, checkpoint)
        try:
            result = forward()
        finally:
            inner, self.nest = self.nest, outer
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and self.knows(spread.local(tensor)):
                meta = root(self.node_for(spread.local(tensor))).meta
                if meta.get("nest") == inner:
                    meta["nest"] = outer
        return result

    def _emit(self, target: Any, args: Any, kwargs: Any, val: Any) -> Node:
        op = args[0] if target is ops.inplace else target
        if target is getitem and args[0].meta["phase"] == "forward" != self.phase:
            return next(n for n in args[0].users if n.args == args)  # of `_drawn_before`
        name = op.overloadpacket.__name__ if isinstance(op, OpOverload) else None
        args, kwargs = self.symbols.numbers((tuple(args), kwargs), self.symbols.sizes)
        node = self.graph.create_node("call_function", target, args, kwargs, name)
        place = self._place()
        node.meta = {
            "val": val,
            "phase": self.phase,
            "path": place.path,
            "calls": place.calls,
            "source": place.source,
        }
        if (running := torch._C._current_autograd_node()) is not None:
            node.meta["task"] = running._sequence_nr()
        if self.nest and self.phase == "forward":
            node.meta["nest"] = self.nest
        if self.checkpoints:
            node.meta["checkpointed"] = True
        if not ops.node_is_random(node):
            return node
        if self.phase == "forward":
            self._draws.append(node)
            return node
        self.graph.erase_node(node)
        return self._drawn_before(node)

    def _drawn_before(self, node: Node) -> Node:
        """The node of forward that holds the random numbers which backward draws once more."""
        number = next(self._draws_again, None)
        known = None if number is None else self._draws[number]
        if known is None or _drawn(known) != _drawn(node):
            raise CaptureError(
                f"backward draws random numbers ({ops.operation(node)})",
                hint="If this is torch.utils.checkpoint inside the model, switch it off.",
            )
        return known

    # -- small helpers

    def _faked(self, tree: Any) -> Any:
        def fake(x: Any) -> Any:
            if not isinstance(x, torch.Tensor) or id(x) in self._entries:
                return x
            return self._adopt(x)[1]

        return map_aggregate(tree, fake)

    def nodes(self, tree: Any) -> Any:
        """`tree` with the node of each tensor in place of it."""
        return map_aggregate(tree, lambda x: self.node_for(x) if isinstance(x, torch.Tensor) else x)

    def _track(self, tensor: torch.Tensor, node: Node, recipe: Recipe | None) -> None:
        owner = tensor.untyped_storage()
        storage = _Storage(tensor, node, owner, self.phase)
        self._storages[owner._cdata] = storage
        self._entries[id(tensor)] = _Entry(tensor, storage, node, 0, recipe)

    def _alias_entry(self, tensor: torch.Tensor, node: Node, recipe: Recipe) -> _Entry:
        storage = self._storages[_address(tensor)]
        return _Entry(tensor, storage, node, storage.version, recipe)

    def _first_operation(self) -> Node:
        return next((n for n in self.graph.nodes if n.op != "placeholder"), self.graph._root)


def _note_whole(
    tensor: torch.Tensor,
    dim: int = 0,
    start: Any = None,
    end: Any = None,
    step: Any = 1,
) -> None:
    """Lets symbols know whether a slice is all of a tensor, which eager does not take at all."""
    if end is not None and any(map(is_symbolic, (tensor.size(dim), start, end))):
        bool(tensor.size(dim) <= end)


def _drawn(node: Node) -> Any:
    """What random numbers depend on, besides the state of the generator."""
    vals = node.meta["val"]
    vals = vals if isinstance(vals, (tuple, list)) else (vals,)
    geometry = [(v.size(), v.stride(), v.dtype, v.device) for v in vals]
    return node.target, ops.operation(node), geometry


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _view_within(tensor: torch.Tensor, base: torch.Tensor) -> ops.View | None:
    """The view of `base` that a mutated tensor on its storage is; None if it is all of it."""
    same = tensor is base or (
        tensor.size() == base.size()
        and tensor.stride() == base.stride()
        and tensor.storage_offset() == base.storage_offset()
        and tensor.dtype == base.dtype
    )
    if same:
        return None
    if tensor.dtype != base.dtype:
        raise CaptureError("forward mutates a view of another element type")
    offset: Any = tensor.storage_offset() - base.storage_offset()
    return tuple(tensor.size()), tuple(tensor.stride()), offset


def _tensors(tree: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    map_aggregate(tree, lambda x: found.append(x) if isinstance(x, torch.Tensor) else None)
    return found


def _has_tensor(tree: Any) -> bool:
    return isinstance(tree, torch.Tensor) or (
        isinstance(tree, (tuple, list)) and any(isinstance(t, torch.Tensor) for t in tree)
    )


def current_recorder() -> Recorder | None:
    """The recorder of the capture that is running in this thread, if there is one."""
    modes = _python_dispatch._get_current_dispatch_mode_stack()
    return next((m for m in reversed(modes) if isinstance(m, Recorder)), None)
