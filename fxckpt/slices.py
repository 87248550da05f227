"""Parts of a gradient that are read long after the others get memory of their own.

The gradient of a concatenation is one tensor, of which each operand gets a view. In a U-Net, one of
them is read by the next operation, and the other one, that of a skip connection, when backward has
been through all levels below: until then, the whole tensor waits. A copy of what waits, made when
nobody else reads the tensor any more, holds half as much or less.

The copy takes time. So these are graphs of their own, which plans take where that pays.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import torch
from torch.fx import Node

from fxckpt.joint import Joint, memory_of, owner_of, storage_bytes

aten = torch.ops.aten

_LONG = 8  # operations
_MOST = 0.75  # of a tensor, that is worth a copy


def copy_what_waits(joint: Joint) -> None:
    """Adds the copies to a joint graph."""
    for views, after in [*what_waits(joint)]:
        for view in views:
            _copy(view, after)


def what_waits(joint: Joint) -> Iterator[tuple[list[Node], Node]]:
    """Views to be copied, and the operation after which they are the last of their tensor."""
    nodes = [*joint.backward_nodes()]
    place = {node: i for i, node in enumerate(nodes)}
    views: dict[Node, list[Node]] = defaultdict(list)
    for node in nodes:
        if memory_of(node) is not None and owner_of(node) in place:
            views[owner_of(node)].append(node)
    for whole, several in views.items():
        waiting, last = _waiting(whole, several, place)
        if waiting and sum(map(_bytes, waiting)) <= _MOST * storage_bytes(whole.meta["val"]):
            yield waiting, nodes[last]


def _waiting(whole: Node, views: list[Node], place: dict[Node, int]) -> tuple[list[Node], int]:
    """The views that are read long after all others, and where these are read for the last time."""
    known = {*views}
    reads = {
        node: [place[user] for user in node.users if user in place and user not in known]
        for node in (whole, *views)
    }
    waiting = [view for view in views if _is_added(view)]
    last = max((t for node in reads if node not in waiting for t in reads[node]), default=-1)
    while soon := [view for view in waiting if min(reads[view]) <= last + _LONG]:
        last = max(last, *(t for view in soon for t in reads[view]))
        waiting = [view for view in waiting if view not in soon]
    return waiting if last >= 0 else [], last


def _is_added(view: Node) -> bool:
    """Whether a view is only added to others, and a copy of it would give the same layout."""
    return bool(view.users) and all(_takes_a_copy(user, view) for user in view.users)


def _takes_a_copy(sum_: Node, view: Node) -> bool:
    if sum_.target is not aten.add.Tensor or sum_.kwargs:
        return False
    nodes = [x for x in sum_.args if isinstance(x, Node)]  # the same one twice, perhaps
    if len(nodes) < len(sum_.args):
        return False
    copied = _imitation(view).clone()
    made = torch.add(*(copied if x is view else _imitation(x) for x in nodes))
    look = made.shape, made.dtype, made.stride()
    return look == (copied.shape, copied.dtype, copied.stride()) and (
        made.stride() == sum_.meta["val"].stride()
    )


def _imitation(node: Node) -> torch.Tensor:
    val = node.meta["val"]
    return torch.empty_strided(val.shape, val.stride(), dtype=val.dtype, device="meta")


def _bytes(node: Node) -> int:
    val: torch.Tensor = node.meta["val"]
    return val.numel() * val.element_size()


def _copy(view: Node, after: Node) -> None:
    """Gives the readers of a view a copy that is made after an operation."""
    val = next(iter(view.users)).meta["val"]  # of the same layout
    with view.graph.inserting_after(after):
        made = view.graph.call_function(aten.clone.default, (view,))
    made.meta = {**view.meta, "val": val, "alias": None}
    view.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)
