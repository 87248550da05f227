"""Policies: which forward values backward may keep, and which it has to compute again.

A policy is a function from a `Value` to `SAVE` or `RECOMPUTE`, or one of the names in `NAMES`. What
backward does not read is never saved, whatever the policy says.

    "everything"    save all, as eager does
    "nothing"       recompute all from the arguments
    "dots"          save products (matrix products, convolutions, attention), recompute the rest
    "attention"     recompute what lies inside attention layers
    "mlp"           recompute what lies inside feed-forward layers, mixtures of experts included
    "norm"          recompute normalisations, their results too
    "block"         recompute what lies inside repeated blocks, and dropout masks outside
    "sqrt"          save what crosses the cuts between about sqrt(n) equal segments, no more

Functions that are policies, those of `jax.checkpoint_policies` among them, are in `predicates`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from typing import Any

from torch._ops import OpOverload, OpOverloadPacket
from torch.fx import Node

from fxckpt import ops
from fxckpt.attention import attentions
from fxckpt.errors import PolicyError
from fxckpt.feedforward import mlps
from fxckpt.joint import Joint
from fxckpt.predicates import (
    RECOMPUTE,
    SAVE,
    Decision,
    Policy,
    answer,
    dots_saveable,
    dots_with_no_batch_dims_saveable,
    everything_saveable,
    nothing_saveable,
    recompute_cheaper_than,
    recompute_modules,
    recompute_ops,
    save_any_names_but_these,
    save_anything_except_these_names,
    save_from_both_policies,
    save_larger_than,
    save_modules,
    save_only_these_names,
    save_ops,
)
from fxckpt.regions import Region, Structure, all_of, norms
from fxckpt.segments import blocks, segment_inputs
from fxckpt.selectors import Selection, Selector, flat, listed

Decide = Callable[[Joint], set[Node]]

__all__ = [
    "NAMES",
    "RECOMPUTE",
    "SAVE",
    "Decide",
    "Decision",
    "Policy",
    "described",
    "dots_saveable",
    "dots_with_no_batch_dims_saveable",
    "everything_saveable",
    "nothing_saveable",
    "recompute_cheaper_than",
    "recompute_modules",
    "recompute_ops",
    "resolve",
    "save_any_names_but_these",
    "save_anything_except_these_names",
    "save_from_both_policies",
    "save_larger_than",
    "save_modules",
    "save_only_these_names",
    "save_ops",
]


def resolve(
    policy: Policy | str | None = None, *, save: Selector = (), recompute: Selector = ()
) -> Decide:
    """Makes one function of a policy and selectors: from a joint graph to the values to save.

    Selectors (see `fxckpt.selectors`) go before the policy, and `save` goes before `recompute`:
    `recompute="layers.*", save="layers.*.attn"` recomputes layers without their attention. Without
    a policy, what no selector matches is saved if there is `recompute`, and recomputed if there is
    only `save`.

    Of modules that `recompute` selects, all is recomputed, except what one of them hands to
    another: so recomputation never goes back further than through one of them.

    Args:
        policy: One of `NAMES`, or a function that returns `SAVE` or `RECOMPUTE` (or True for
            "save", as in JAX) for a `Value`.
        save: What to save.
        recompute: What to recompute.

    Raises:
        PolicyError: if these are no policy or no selectors. The function that is returned raises it
            if a selector matches nothing in the joint graph, or it has no layers of the kind; but
            not for a part of a model, as the rest may have them.

    Example:
        >>> decide = resolve("dots", recompute="lm_head")
    """
    saving, recomputing = flat(save, "save"), flat(recompute, "recompute")
    if policy is None and not saving and not recomputing:
        raise PolicyError(
            "nothing says what to recompute: give a policy "
            f"({listed(NAMES)} or a function), a budget, or save= and recompute= selectors"
        )
    default = _of_policy(policy) if policy is not None else None

    def decide(joint: Joint) -> set[Node]:
        values = {v.node for v in joint.values()}
        if default is not None:
            chosen = default(joint)
        else:
            chosen = values if recomputing else set()
        if not saving and not recomputing:
            return chosen
        structure = Structure(joint)
        dropped = Selection(structure, recomputing, "recompute")
        kept = Selection(structure, saving, "save")
        chosen = chosen - dropped.nodes - all_of(structure, dropped.regions())
        return chosen | kept.all_nodes()

    return decide


def described(
    policy: Policy | str | None = None, *, save: Selector = (), recompute: Selector = ()
) -> str:
    """What `resolve` was called with, as one would write it.

    Example:
        >>> described("dots", recompute="lm_head")
        "policy='dots', recompute='lm_head'"
    """
    name = getattr(policy, "__name__", None) if callable(policy) else None
    given = [
        f"policy={name or repr(policy)}" if policy is not None else "",
        *(f"{key}={one!r}" for key, one in (("save", save), ("recompute", recompute)) if one != ()),
    ]
    return ", ".join(filter(None, given))


def may_tell_apart(policy: Any, save: Selector, recompute: Selector) -> bool:
    """Whether these may decide differently for modules that differ only in their index in a list.

    Functions of the user's may do so, and module paths with something else than `*` for an index.
    """
    selectors = [*flat(save, "save"), *flat(recompute, "recompute")]
    functions = [s for s in (policy, *selectors) if callable(s) and not isinstance(s, type)]
    ours = (*_STOCK, *(s for s in selectors if isinstance(s, OpOverload | OpOverloadPacket)))
    paths = [s for s in selectors if isinstance(s, str)]
    return any(f not in ours for f in functions) or any(re.search(r"[\d\[?]", p) for p in paths)


def _of_policy(policy: Any) -> Decide:
    if isinstance(policy, str):
        if policy not in NAMES:
            near = difflib.get_close_matches(policy, NAMES, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise PolicyError(f"unknown policy {policy!r}: the names are {listed(NAMES)}{hint}")
        return NAMES[policy]
    if isinstance(policy, type) or not callable(policy):
        raise PolicyError(
            f"policy={policy!r} is no policy: expected one of {listed(NAMES)}, or a function from "
            "a value to fxckpt.SAVE or fxckpt.RECOMPUTE. To select modules or operations, use "
            "save= or recompute="
        )
    return lambda joint: {v.node for v in joint.values() if answer(policy, v) is SAVE}


# --- policies by name ---------------------------------------------------------------------------


def _inside(kind: str, find: Callable[[Structure], list[Region]]) -> Decide:
    """Recomputes what is inside regions, and saves their results and all else."""

    def decide(joint: Joint) -> set[Node]:
        structure = Structure(joint)
        inside = (structure.inside(r.nodes) for r in _found(kind, find, structure))
        return {v.node for v in joint.values()}.difference(*inside)

    return decide


def _block(joint: Joint) -> set[Node]:
    """Dropout masks outside of blocks are drawn again too: that takes a state, not a tensor."""
    return _inside("block", blocks)(joint) - _drawn(joint)


def _drawn(joint: Joint) -> set[Node]:
    """The values that follow from random draws, and constants, alone."""
    drawn: set[Node] = set()
    fixed: set[Node] = set()  # constants
    for node in joint.forward_nodes():
        if not all(n in drawn or n in fixed for n in node.all_input_nodes):
            continue
        random = ops.node_is_random(node) or any(n in drawn for n in node.all_input_nodes)
        (drawn if random else fixed).add(node)
    return drawn


def _norm(joint: Joint) -> set[Node]:
    structure = Structure(joint)
    regions = _found("norm", norms, structure)
    return {v.node for v in joint.values()} - all_of(structure, regions)


def _found(
    kind: str, find: Callable[[Structure], list[Region]], structure: Structure
) -> list[Region]:
    regions = find(structure)
    nodes = structure.joint.forward_nodes()
    if regions or structure.joint.position.is_part:
        return regions
    if any(n.meta.get("checkpointed") for n in nodes):  # by the model itself, with nothing left
        return []
    if kind == "block":
        raise PolicyError(
            'policy="block" finds no modules of one class that are called several times and are '
            'worth recomputing; policy="sqrt" needs no modules, recompute= selects some by name'
        )
    raise PolicyError(
        f'policy="{kind}" finds no {kind} layers in this model; select them with recompute=, by '
        "module path or class"
    )


_STOCK = (
    everything_saveable,
    nothing_saveable,
    dots_saveable,
    dots_with_no_batch_dims_saveable,
)

NAMES: dict[str, Decide] = {
    "everything": _of_policy(everything_saveable),
    "nothing": _of_policy(nothing_saveable),
    "dots": _of_policy(dots_saveable),
    "attention": _inside("attention", attentions),
    "mlp": _inside("mlp", mlps),
    "norm": _norm,
    "block": _block,
    "sqrt": lambda joint: segment_inputs(Structure(joint)),
}
