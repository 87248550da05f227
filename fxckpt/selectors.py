"""Selectors: say by module path, module class, operation or function which values are meant.

A selector is one of these, or a list of them:

    "transformer.h.*.attn"      modules by path, and all below them: `*` stands for one part of a
                                path, or a piece of it; the beginning of the path may be left out
    "aten.mm", "mm", "relu_"    operations by name, if no module is called so
    nn.LayerNorm                modules by class, subclasses included
    torch.ops.aten.mm           operations
    lambda value: ...           values for which a function is true
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn
from torch._ops import OpOverload, OpOverloadPacket
from torch.fx import Node

from fxckpt.errors import PolicyError
from fxckpt.joint import Value
from fxckpt.places import Call
from fxckpt.regions import Region, Structure

Selector = str | type | OpOverload | OpOverloadPacket | Callable[[Value], bool] | Iterable[Any]


class Selection:
    """What selectors mean for one model: whole module calls, and single values.

    Args:
        structure: The model.
        selectors: One selector or several, see the module's docstring.
        option: `"save"` or `"recompute"`: named in messages.

    Raises:
        PolicyError: if a selector matches nothing; lists what comes near.
    """

    def __init__(self, structure: Structure, selectors: Selector, option: str) -> None:
        self._structure, self._option = structure, option
        self._values = structure.joint.values()
        self.calls: set[Call] = set()
        self.nodes: set[Node] = set()
        for selector in flat(selectors, option):
            self._add(selector)

    def regions(self) -> list[Region]:
        """The selected calls, without those that lie in another one."""
        outermost = self._structure.outermost(self.calls.__contains__)
        return [self._structure.region("selected", call) for call in outermost]

    def all_nodes(self) -> set[Node]:
        """All selected values."""
        scopes = (self._structure.scopes[call].keys() for call in self.calls)
        return self.nodes.union(*scopes) & {v.node for v in self._values}

    def _add(self, selector: Any) -> None:
        calls: list[Call] = []
        nodes: list[Node] = []
        if isinstance(selector, str):
            calls = self._calls_like(selector)
            nodes = [] if calls else self._nodes_where(lambda op: is_operation(op, selector))
        elif isinstance(selector, type):
            calls = [c for c in self._structure.scopes if issubclass(c.cls, selector)]
        elif isinstance(selector, OpOverload | OpOverloadPacket):
            nodes = self._nodes_where(lambda op: is_operation(op, selector))
        else:
            nodes = [v.node for v in self._values if _asked(selector, v, self._option)]
        self.calls |= {call for call in calls if self._has_value(call)}
        self.nodes |= set(nodes)
        is_part = self._structure.joint.position.is_part
        if not nodes and not any(map(self._has_value, calls)) and not is_part:
            raise PolicyError(self._nothing_matches(selector))

    def _has_value(self, call: Call) -> bool:
        scope = self._structure.scopes[call]
        return any(v.node in scope for v in self._values)

    def _nodes_where(self, matches: Callable[[Any], bool]) -> list[Node]:
        return [v.node for v in self._values if matches(v.op)]

    def _calls_like(self, pattern: str) -> list[Call]:
        """The outermost calls at or below the modules whose path matches."""
        return self._structure.outermost(lambda call: is_below(call.path, pattern))

    def _nothing_matches(self, selector: Any) -> str:
        start = f"{self._option}={_shown(selector)} matches nothing that the model computes"
        if not isinstance(selector, str | type | OpOverload | OpOverloadPacket):
            return f"{start}: it is false for all {len(self._values)} values"
        known = self._known_like(selector)
        near = difflib.get_close_matches(_text(selector), known, n=5)
        if near:
            return f"{start}. Did you mean {listed(dict.fromkeys(known[n] for n in near))}?"
        return f"{start}. There are {listed(dict.fromkeys(known.values()))}."

    def _known_like(self, selector: Any) -> dict[str, str]:
        """All that selectors of this kind could name, by the texts that may be near to it."""
        if isinstance(selector, type):
            called = {c.cls.__name__ for c in self._structure.scopes if self._has_value(c)}
            return {name: name for name in sorted(called)}
        packets = {_text(v.op): str(_packet(v.op)) for v in self._values}
        if not isinstance(selector, str):
            return packets
        paths = dict.fromkeys(_general(c.path) for c in self._structure.scopes if c.path)
        ends = {end: path for path in paths for end in _ends(path)}
        return {**{path: path for path in paths}, **packets, **ends}


def flat(selectors: Any, option: str) -> list[Any]:
    """A list of single selectors.

    Raises:
        PolicyError: if something is no selector.
    """
    if selectors is None:
        return []
    single = isinstance(selectors, str | type | OpOverload | OpOverloadPacket)
    if not single and isinstance(selectors, Iterable):
        return [one for each in selectors for one in flat(each, option)]
    if isinstance(selectors, type) and not issubclass(selectors, nn.Module):
        raise PolicyError(f"{option}={selectors.__name__} is a class, but not one of modules")
    if not single and (getattr(selectors, "__module__", None) or "").split(".")[0] == "torch":
        name = getattr(selectors, "__name__", selectors)
        raise PolicyError(
            f"{option}=torch's {name} is a function on tensors; give the operation that it runs, "
            f"such as torch.ops.aten.{name}"
        )
    if not single and not callable(selectors):
        raise PolicyError(
            f"{option}={selectors!r} selects nothing: give a module path such as 'layers.*.mlp', "
            "a module class, an operation such as torch.ops.aten.mm, or a function of a value"
        )
    return [selectors]


def listed(names: Iterable[str], most: int = 12) -> str:
    """`"'a', 'b', 'c'"`, shortened if there are many."""
    quoted = [repr(name) for name in names]
    more = f" and {len(quoted) - most} more" if len(quoted) > most else ""
    return ", ".join(quoted[:most]) + more


def _asked(function: Any, value: Value, option: str) -> bool:
    answer = function(value)
    if not isinstance(answer, bool):
        raise PolicyError(
            f"{option}={_shown(function)} returned {answer!r} for {value!r}; expected True or False"
        )
    return answer


def is_below(path: str, pattern: str) -> bool:
    """Whether a module path is one that a pattern means, or lies below it."""
    parts, wanted = path.split("."), pattern.split(".")
    ends = range(len(wanted), len(parts) + 1)
    return any(_match(parts[end - len(wanted) : end], wanted) for end in ends)


def is_operation(op: Any, selector: Any) -> bool:
    """Whether a selector means an operation."""
    if isinstance(selector, str):
        return _is_called(op, selector)
    return selector in (op, _packet(op))


def _match(parts: list[str], patterns: list[str]) -> bool:
    pairs = zip(parts, patterns, strict=True)
    return all(fnmatch.fnmatchcase(part, pattern) for part, pattern in pairs)


def _packet(op: Any) -> Any:
    return op.overloadpacket if isinstance(op, OpOverload) else op


def _is_called(op: Any, name: str) -> bool:
    """Whether `name` is `"mm"`, `"aten.mm"` or `"aten.mm.default"` of an operation."""
    wanted = name.removeprefix("torch.ops.").replace("::", ".")
    packet = str(_packet(op))
    return wanted in (str(op), packet, packet.rpartition(".")[2])


def _text(selector: Any) -> str:
    """What a selector is compared by with what there is."""
    if isinstance(selector, str):
        return _general(selector)
    return (
        selector.__name__ if isinstance(selector, type) else str(_packet(selector)).split(".")[-1]
    )


def _ends(path: str) -> Iterator[str]:
    """`"a.b.c"`, `"b.c"` and `"c"`, as a pattern may leave out the beginning."""
    parts = path.split(".")
    return (".".join(parts[i:]) for i in range(len(parts)))


def _general(path: str) -> str:
    """A path with `*` for numbers."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", path)


def _shown(selector: Any) -> str:
    if isinstance(selector, str):
        return repr(selector)
    if isinstance(selector, OpOverload | OpOverloadPacket):
        return f"torch.ops.{selector}"
    return str(getattr(selector, "__qualname__", selector))
