"""Finds the feed-forward layers of a model, mixtures of experts included.

See the note on how layers are found in `attention.py`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

from torch.fx import Node

from fxckpt.attention import attentions, is_attention
from fxckpt.places import Call
from fxckpt.regions import (
    DENSE,
    NONLINEAR,
    SOFTMAX,
    Region,
    Structure,
    argument_behind,
    between,
    first_products,
    inline,
    inputs,
    is_made_of,
    is_product,
    numel,
    operands,
    operation_name,
    users,
)

_CLASS = re.compile(
    r"(?i:(mlp|ffn|feed_?forward(network)?|moe|experts?|swiglu|geglu|dense(relu|act|gatedact)dense)"
    r"(block|layer|module|net)?\d*$)|FF(Layer)?$"
)
_ATTRIBUTE = re.compile(
    r"(^|_)(mlp|ffn?|ffwd|feed_?forward|moe|experts?|denserelu?dense)(_\w+)?\d*$", re.IGNORECASE
)


@dataclasses.dataclass(frozen=True, slots=True)
class _Layers:
    """The products of a perceptron: those before a nonlinearity and those after one."""

    first: set[Node]
    last: set[Node]

    @property
    def all(self) -> set[Node]:
        return self.first | self.last


def mlps(structure: Structure) -> list[Region]:
    """The feed-forward layers of a model, mixtures of experts included."""
    attention = set().union(*(r.nodes for r in attentions(structure)))

    def named(call: Call) -> bool:
        scope = structure.scopes[call]
        return (
            call.path != ""
            and _is_mlp(call)
            and structure.has_product(call)
            and any(operation_name(n) in NONLINEAR for n in scope)
            and attention.isdisjoint(scope)
        )

    found = [structure.region("mlp", call) for call in structure.outermost(named)]
    covered = attention.union(*(r.nodes for r in found))
    unnamed = (_mlp(structure, p) for p in _perceptrons(structure) if covered.isdisjoint(p.all))
    return [*found, *(region for region in unnamed if region is not None)]


def _is_mlp(call: Call) -> bool:
    attribute = call.path.rpartition(".")[2]
    if is_attention(call):
        return False
    return bool(_CLASS.search(call.cls.__name__) or _ATTRIBUTE.search(attribute))


def _perceptrons(structure: Structure) -> list[_Layers]:
    """Products with nonlinearities between them that lead back to the width they start from."""
    found: list[_Layers] = []
    for node in structure.chains:
        if operation_name(node) not in NONLINEAR:
            continue
        layers = _around(node)
        if not layers.first or not layers.last or not all(map(_weight, layers.all)):
            continue
        for other in [f for f in found if f.all & layers.all]:
            found.remove(other)
            layers = _Layers(other.first | layers.first, other.last | layers.last)
        found.append(layers)
    return [layers for layers in found if _is_sound(layers)]


def _around(nonlinear: Node) -> _Layers:
    """The products after a nonlinearity, and those before them: the gate's too, if there is one.

    Between them lie operations on tensors of about the same size, in one branch.
    """
    size = numel(nonlinear)

    def passes(node: Node) -> bool:
        part = numel(node) == 0 and node.meta.get("alias") is not None  # a split
        near = size / 2 <= numel(node) <= 2 * size
        return (near or part) and operation_name(node) not in SOFTMAX

    def in_branch(node: Node) -> bool:
        return passes(node) and not _joins_branches(node, passes)

    last = first_products([nonlinear], in_branch, users)
    entering = {n for p in last for n in inputs(p) if in_branch(n)}
    return _Layers(first_products([*entering, nonlinear], in_branch, inputs), last)


def _joins_branches(node: Node, passes: Callable[[Node], bool]) -> bool:
    """Whether a node adds what comes from different products: `x + f(x)`, unlike `x + x ** 3`."""
    if operation_name(node) != "add":
        return False
    terms = [n for n in node.all_input_nodes if numel(n) == numel(node)]  # a bias is smaller
    origins = [first_products([n], passes, inputs) for n in terms]
    return any(origin != origins[0] for origin in origins)


def _is_sound(layers: _Layers) -> bool:
    """Whether the layers keep the width, and none is applied twice (a recurrent network).

    More than three in a row are a network of their own, which is not worth recomputing as one.
    """
    if len(layers.first & layers.last) > 1:
        return False
    heads, tails = layers.first - layers.last, layers.last - layers.first
    weights = [_weight(p) for p in layers.all]
    widths_in = {operands(p)[0].meta["val"].shape[-1] for p in heads}
    widths_out = {p.meta["val"].shape[-1] for p in tails}
    return len(widths_in) == 1 and widths_in == widths_out and len({*weights}) == len(weights)


def _weight(product: Node) -> Node | None:
    """The argument of the callable that a dense product multiplies with, if it is one."""
    dense = operation_name(product) in DENSE
    return argument_behind(operands(product)[1]) if dense else None


def _mlp(structure: Structure, layers: _Layers) -> Region | None:
    """The region of a perceptron: the innermost call around it, or what belongs to it inline.

    None if something else is computed in between, as in a state space model with a gate.
    """
    chain = structure.common_calls(layers.all)
    home = chain[-1]
    if home.path and is_made_of(structure, home, layers.all):
        for parent in chain[-2:0:-1]:
            if not (_is_mlp(parent) and is_made_of(structure, parent, layers.all)):
                break
            home = parent
        return structure.region("mlp", home)
    nodes = between(layers.first, layers.last, structure.scopes[home])
    if set(filter(is_product, nodes)) != layers.all:
        return None
    return inline(structure, "mlp", home, nodes)
