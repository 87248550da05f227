"""What tells where gradients pass: something smaller, or something that is there anyway.

    masks of what is    What ReLU gave to max-pooling is differentiated by the pooled values, which
    pooled              are smaller: the elements that were not the largest get no gradient anyway.
    sides of limits     ReLU6 and its like are differentiated by which side of a limit their operand
                        is on. Their result is on the same, and is there anyway where a convolution
                        reads it; in place, eager keeps a copy of the operand for nothing else.

Kernels compute the same bits then, NaN and values next to a limit included.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from fxckpt import ops
from fxckpt.joint import Joint, producer
from fxckpt.symbols import looks

aten = torch.ops.aten


def tell_otherwise(joint: Joint) -> None:
    """Changes what backward reads to know where gradients pass."""
    for node in [*joint.backward_nodes()]:
        if (pooling := _pooled_alone(joint, node)) is not None:
            _mask_before_pooling(node, *pooling)
    for node in [*joint.backward_nodes()]:
        if (result := _of_the_same_side(node)) is not None:
            _read_instead(node, result)


# --- masks of what is pooled ----------------------------------------------------------------------

_MAX_POOLING = (  # backward: of the gradient, the operand, ..., the indices
    aten.max_pool2d_with_indices_backward.default,
    aten.adaptive_max_pool2d_backward.default,
)


def _pooled_alone(joint: Joint, node: Node) -> tuple[Node, Node] | None:
    """If a node differentiates a ReLU whose result only a max-pooling reads: its backward, result.

    Every element that an output of the pooling came from has its value, so the threshold finds both
    on the same side, NaN included. Where windows overlap, sums have the same terms, or only zeros.
    """
    gradient: Any
    if node.target is not aten.threshold_backward.default:
        return None
    gradient, x, _ = node.args
    if gradient.target not in _MAX_POOLING or gradient.args[1] is not x:
        return None
    indices: Any = gradient.args[-1]
    pooled = next((n for n in producer(indices).users if n.args[1] == 0), None)
    if pooled is None or 1 not in ops.read_for_shape(gradient):
        return None
    readers = {n for n in x.users if n.meta.get("phase") == "backward"}
    wanted = {g for each in joint.grads.values() for g in each}
    alike = ((gradient.args[0], pooled), (gradient, node))
    same = all(_geometry(one) == _geometry(other) for one, other in alike)
    alone = {*gradient.users} == {node} and readers == {gradient, node} and node not in wanted
    return (gradient, pooled) if same and alone else None


def _geometry(node: Node) -> tuple[Any, ...]:
    look = looks(node.meta["val"])
    return look.size, look.stride


def _mask_before_pooling(node: Node, gradient: Node, pooled: Node) -> None:
    """Lets a threshold work on the gradient of what was pooled, before it is spread out."""
    before: Any = gradient.args[0]
    with node.graph.inserting_before(gradient):
        args = (before, pooled, node.args[2])
        made = node.graph.create_node("call_function", node.target, args, {}, node.name + "_pooled")
    made.meta = {**node.meta, "val": pooled.meta["val"]}
    gradient.update_arg(0, made)
    node.replace_all_uses_with(gradient)
    node.graph.erase_node(node)


# --- sides of limits -----------------------------------------------------------------------------

# Backward, of the gradient, the operand and constants: forward, of the operand and constants.
_BY_SIDE: dict[Any, tuple[Any, ...]] = {
    aten.hardtanh_backward.default: (aten.hardtanh.default, aten.hardtanh_.default),
    aten.leaky_relu_backward.default: (aten.leaky_relu.default, aten.leaky_relu_.default),
}


def _of_the_same_side(node: Node) -> Node | None:
    """The result of what a node differentiates, if backward may read it in the operand's place."""
    makers = _BY_SIDE.get(node.target)
    if makers is None or not _keeps_sides(node):
        return None
    x: Any = node.args[1]
    copied: Any = x.args[0] if x.target is aten.clone.default else x
    for result in dict.fromkeys((*x.users, *copied.users)):
        made_of_it = ops.operation(result) in makers and ops.op_arguments(result)[0] in (x, copied)
        whole = result.target is not ops.inplace or result.args[1][0][1] is None
        if made_of_it and whole and _is_differentiated(result, node, x):
            others = {n for n in result.users if n.meta.get("phase") == "backward"}
            return result if others or x is not copied else None
    return None


def _is_differentiated(result: Node, node: Node, x: Node) -> bool:
    """Whether a node differentiates what makes a result, and not another one of its operand."""
    op = ops.operation(result)
    given = dict(
        zip((a.name for a in op._schema.arguments), ops.op_arguments(result), strict=False)
    )
    given |= result.kwargs
    constants = [given.get(a.name, a.default_value) for a in op._schema.arguments[1:]]
    same = constants == [*node.args[2 : 2 + len(constants)]]
    return same and _geometry(result) == _geometry(x)


def _keeps_sides(node: Node) -> bool:
    """Whether no rounding takes a result across a limit; NaN stays NaN."""
    limits: list[Any] = [*node.args[2:4]]
    if any(isinstance(limit, Node) for limit in limits):
        return False
    if node.target is aten.leaky_relu_backward.default:
        return bool(limits[0] >= 0)
    exact = torch.tensor(limits, dtype=torch.float64)
    dtype = node.meta["val"].dtype
    return limits[0] < limits[1] and torch.equal(exact.to(dtype).to(torch.float64), exact)


def _read_instead(node: Node, result: Node) -> None:
    """Gives an operation a result instead of the operand, and ends what was kept for it alone."""
    x: Any = node.args[1]
    node.update_arg(1, result)
    if x.target is aten.clone.default and not x.users:
        node.graph.erase_node(x)
