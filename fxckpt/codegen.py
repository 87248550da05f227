"""Code generation for the two graphs: boxed arguments, and comments that name the regions."""

from __future__ import annotations

import linecache
import math
import re
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule
from torch.fx.graph import PythonCode, _BoxedCodeGen
from torch.fx.graph_module import _loader

_OPERATION = re.compile(r"torch\.ops\.(\w+)\.(\w+)\.(\w+)(?=\()")
_ASSIGNMENT = re.compile(r"\s+(\w+)\s*(?::[^=]+)?=\s")


class AnnotatedCodeGen(_BoxedCodeGen):
    """Generates a function of one list, which it empties so that nothing outlives its last use.

    A node with `meta["region"]` starts a run of lines under that text as a comment.

    Args:
        symbols: Names in the arguments of operations; a tuple of what they stand for is the last
            element of the list.
    """

    def __init__(self, symbols: Sequence[str] = ()) -> None:
        super().__init__()
        self._symbols = symbols

    def gen_fn_def(self, *args: Any, **kwargs: Any) -> str:
        """The beginning of the function, as torch has it, with symbols."""
        definition: str = super().gen_fn_def(*args, **kwargs)
        if not self._symbols:
            return definition
        signature, *rest = definition.split("\n")
        return "\n".join([signature, f"    ({', '.join(self._symbols)},) = args_list.pop()", *rest])

    def _gen_python_code(self, nodes: Any, *args: Any, **kwargs: Any) -> PythonCode:
        regions = {node.name: node.meta.get("region", "") for node in nodes}
        code = super()._gen_python_code(nodes, *args, **kwargs)
        lines, current = [], ""
        for line in code.src.split("\n"):
            match = _ASSIGNMENT.match(line)
            region = regions.get(match[1], current) if match else current
            if region != current and region:
                lines.append(f"    # {region}")
            current = region
            lines.append(line)
        code.src, code._lineno_map = "\n".join(lines), None
        _bind_operations(code)
        code.globals["math"] = math
        return code


def _bind_operations(code: PythonCode) -> None:
    """Calls operations by a global name of their own, without the lookups and the Python frame.

    That is worth 5 % of the step of a small model.
    """

    def bound(match: re.Match[str]) -> str:
        namespace, packet, overload = match.groups()
        operation = getattr(getattr(getattr(torch.ops, namespace), packet), overload)
        name = f"{namespace}_{packet}_{overload}"
        code.globals[name] = operation._op
        return name

    code.src = _OPERATION.sub(bound, code.src)


def graph_module(graph: Graph, name: str, symbols: Sequence[str] = ()) -> GraphModule:
    """A module that runs `graph` with boxed arguments, see `AnnotatedCodeGen`."""
    graph.set_codegen(AnnotatedCodeGen(symbols))
    module = GraphModule({}, graph, class_name=name)
    weakref.finalize(module, _forget_source, module.forward.__code__.co_filename)
    return module


def _forget_source(filename: str) -> None:
    """Drops the source text that fx keeps for ever, for tracebacks."""
    for cache in (_loader.eval_cache, linecache.cache):
        cache.pop(filename, None)
