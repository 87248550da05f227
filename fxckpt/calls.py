"""Which calls of which modules a forward operation was computed in.

Capture records for each operation the innermost running module (`path`, `call`) and the classes of
all running ones. What lies between is put together here:

    path "h.3.attn.q", classes (GPT, Block, Attention, Linear)  ->  root, h.3, h.3.attn, h.3.attn.q

`h` is a `ModuleList`, which is never called. A module that is called several times (shared layers)
gets one `Call` each. Where two calls of it follow each other with nothing in between, the border
is where its first operation comes again.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence

from torch import nn
from torch.fx import Node

from fxckpt.joint import Joint


@dataclasses.dataclass(frozen=True, slots=True)
class Call:
    """One call of one module; the root's path is `""`."""

    path: str
    index: int
    cls: type

    @property
    def name(self) -> str:
        """`"h.3.attn"`, or `"h.3.attn (call 2)"` from the second call on."""
        return f"{self.path or '(root)'}" + (f" (call {self.index + 1})" if self.index else "")


Chain = tuple[Call, ...]  # from the root to the innermost call
Modules = list[tuple[str, type]]  # paths and classes, likewise


def call_chains(joint: Joint) -> dict[Node, Chain]:
    """The calls that each forward operation was computed in, from the root to the innermost."""
    nodes = list(joint.forward_nodes())
    called = _called_modules(nodes)
    chains: dict[Node, Chain] = dict.fromkeys(nodes, ())
    _descend(nodes, 0, called, {}, chains)
    return chains


def _descend(
    nodes: Sequence[Node],
    depth: int,
    called: dict[Node, Modules],
    counts: dict[str, int],
    chains: dict[Node, Chain],
) -> None:
    """Appends the calls at `depth` to the chains of `nodes`, which share all calls above it."""
    runs = itertools.groupby(nodes, lambda n: called[n][depth] if depth < len(called[n]) else None)
    for module, run in runs:
        if module is None:
            continue
        for part in _separate_calls(list(run), *module):
            call = Call(module[0], counts.get(module[0], 0), module[1])
            counts[module[0]] = call.index + 1
            for node in part:
                chains[node] = (*chains[node], call)
            _descend(part, depth + 1, called, counts, chains)


def _separate_calls(nodes: list[Node], path: str, cls: type) -> list[list[Node]]:
    """Splits operations that stand below one module into the calls of that module."""
    if not path:
        return [nodes]
    known = [(i, n.meta["call"]) for i, n in enumerate(nodes) if n.meta["path"] == path]
    borders = [0]
    for (before, call), (after, next_call) in itertools.pairwise(known):
        if call != next_call:
            borders.append(_border(nodes, before + 1, after))
    if not known and issubclass(cls, nn.Sequential):  # runs each module once, and nothing itself
        while (border := _border(nodes, borders[-1] + 1, len(nodes))) < len(nodes):
            borders.append(border)
    return [nodes[a:b] for a, b in itertools.pairwise([*borders, len(nodes)])]


def _border(nodes: list[Node], start: int, stop: int) -> int:
    """Where the next call begins between two operations known to be of different calls."""
    entered = {_frame(n) for n in nodes[:start]}
    for i in range(start, stop):
        frame = _frame(nodes[i])
        if frame[0] == nodes[0].meta["path"] and frame not in entered:
            return i
        entered.add(frame)
    return stop


def _frame(node: Node) -> tuple[str, int]:
    return node.meta["path"], node.meta["call"]


def _called_modules(nodes: Sequence[Node]) -> dict[Node, Modules]:
    """The running modules of each operation."""
    known = {n.meta["path"]: n.meta["types"][-1] for n in nodes if n.meta["types"]}
    rooted = _has_root(nodes)

    @functools.cache
    def own(path: str, types: tuple[type, ...]) -> tuple[Modules, int]:
        """The modules that the path tells, and the number of those above that it does not."""
        root, *inner = types if rooted else (object, *types)
        prefixes = list(itertools.accumulate(path.split("."), "{}.{}".format)) if path else []
        hidden = max(len(inner) - len(prefixes), 0)
        told = inner[hidden:]
        return [("", root), *zip(_likely(prefixes, told, known), told, strict=True)], hidden

    found = [own(n.meta["path"], n.meta["types"]) for n in nodes]
    called: dict[Node, Modules] = {}
    for i, (node, (modules, hidden)) in enumerate(zip(nodes, found, strict=True)):
        near = [called[nodes[i - 1]]] if i else []
        near += [m for m, missing in found[i + 1 : i + 2] if not missing]
        above = node.meta["types"] if rooted else (object, *node.meta["types"])
        classes = above[: hidden + 1]
        called[node] = [*_callers(classes, near), *modules[1:]] if hidden else modules
    return called


def _callers(classes: tuple[type, ...], near: Sequence[Modules]) -> Modules:
    """The modules of these classes that call a shared one, which has its path from elsewhere.

    They are those around the operation before or after, if the classes agree.
    """
    for modules in near:
        if tuple(cls for _, cls in modules[: len(classes)]) == classes:
            return modules[: len(classes)]
    return [("", classes[0]), *((cls.__name__, cls) for cls in classes[1:])]


def _has_root(nodes: Sequence[Node]) -> bool:
    """Whether a module was captured: paths in a bare function are made of class names."""

    def of_names(node: Node) -> bool:
        return ".".join(t.__name__ for t in node.meta["types"]) == node.meta["path"]

    return not all(of_names(n) for n in nodes)


def _likely(prefixes: list[str], types: list[type], known: dict[str, type]) -> tuple[str, ...]:
    """The prefixes of a path that were called, given the classes of what was called."""
    if len(prefixes) == len(types):
        return tuple(prefixes)

    def doubt(chosen: tuple[str, ...]) -> int:
        pairs = list(zip(chosen, types, strict=True))
        contradicted = sum(known.get(prefix, cls) is not cls for prefix, cls in pairs)
        return 4 * contradicted + sum(is_list(prefix, cls) for prefix, cls in pairs)

    def is_list(prefix: str, cls: type) -> bool:
        inner = (p[len(prefix) + 1 :] for p in prefixes if p.startswith(f"{prefix}."))
        return not issubclass(cls, nn.Sequential) and any(map(str.isdigit, inner))

    # Lists of modules tend to stand above what is called: of equals, the last combination.
    return min(reversed([*itertools.combinations(prefixes, len(types))]), key=doubt)
