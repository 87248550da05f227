"""Selectors: say by module path, module class, operation or function which values are meant.

    "transformer.h.*.attn"      modules by path: `*` stands for one part of a path, or for a piece of
                                one; the pattern may leave out the beginning of the path
    "aten.mm", "mm", "relu_"    operations by name, if no module is called so
    nn.LayerNorm                modules by class, subclasses included
    torch.ops.aten.mm           operations
    lambda value: ...           values for which a function is true
    ["h.0", nn.Linear]          anything of these
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch._ops import OpOverload, OpOverloadPacket
from torch.fx import Node

from fxckpt import ops
from fxckpt.calls import Call
from fxckpt.errors import PolicyError
from fxckpt.joint import Value, producer
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
            nodes = [] if calls else self._nodes_where(lambda op: _is_called(op, selector))
        elif isinstance(selector, type):
            calls = [c for c in self._structure.scopes if issubclass(c.cls, selector)]
        elif isinstance(selector, OpOverload | OpOverloadPacket):
            nodes = self._nodes_where(lambda op: selector in (op, _packet(op)))
        else:
            nodes = [v.node for v in self._values if _asked(selector, v, self._option)]
        self.calls |= {call for call in calls if self._has_value(call)}
        self.nodes |= set(nodes)
        if not nodes and not any(map(self._has_value, calls)):
            raise PolicyError(self._nothing_matches(selector))

    def _has_value(self, call: Call) -> bool:
        scope = self._structure.scopes[call]
        return any(v.node in scope for v in self._values)

    def _nodes_where(self, matches: Callable[[Any], bool]) -> list[Node]:
        return [v.node for v in self._values if matches(v.op)]

    def _calls_like(self, pattern: str) -> list[Call]:
        """The outermost calls at or below the modules whose path matches."""
        wanted = pattern.split(".")

        def matches(call: Call) -> bool:
            parts = call.path.split(".")
            ends = range(len(wanted), len(parts) + 1)
            return any(_match(parts[end - len(wanted) : end], wanted) for end in ends)

        return self._structure.outermost(matches)

    def _nothing_matches(self, selector: Any) -> str:
        start = f"{self._option}={_shown(selector)} matches nothing that the model computes"
        if callable(selector) and not isinstance(selector, type | OpOverload | OpOverloadPacket):
            return f"{start}: it is false for all {len(self._values)} values"
        wanted, known = self._known_like(selector)
        near = _near(wanted, known)
        return f"{start}. {'Did you mean' if near else 'There are'} {_listed(near or known)}?"

    def _known_like(self, selector: Any) -> tuple[str, list[str]]:
        """The selector as text, and all that selectors of its kind could name."""
        paths = list(dict.fromkeys(_general(c.path) for c in self._structure.scopes if c.path))
        packets = dict.fromkeys(ops.short_name(v.op) for v in self._values)
        if isinstance(selector, type):
            return selector.__name__, sorted({c.cls.__name__ for c in self._structure.scopes})
        if isinstance(selector, str):
            return selector, [*paths, *packets]
        return ops.short_name(selector), list(packets)
