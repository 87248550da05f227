"""Policies: which forward values backward may keep, and which it has to compute again.

A policy is a function from a `Value` to `SAVE` or `RECOMPUTE`. What backward does not read is never
saved, whatever the policy says.
"""
from __future__ import annotations
import enum
from collections.abc import Callable
from typing import Any
from torch.fx import Node
from fxckpt import ops
from fxckpt.joint import Joint, Value

class Decision(enum.Enum):
    SAVE = "save"
    RECOMPUTE = "recompute"

SAVE, RECOMPUTE = Decision.SAVE, Decision.RECOMPUTE


def resolve(policy: Any, save: Any = (), recompute: Any = ()) -> Callable[[Joint], set[Node]]:
    if policy == "dots":
        policy = lambda v: SAVE if ops.is_matrix_like(v.op) else RECOMPUTE
    elif policy == "everything":
        policy = lambda v: SAVE
    elif policy == "nothing":
        policy = lambda v: RECOMPUTE
    return lambda joint: {v.node for v in joint.values() if policy(v) is SAVE}
