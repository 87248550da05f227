"""The graph of a call that nobody has made, for plans and reports."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fxckpt import tree
from fxckpt.capture import capture
from fxckpt.errors import CaptureError
from fxckpt.holders import Surroundings
from fxckpt.installation import original_forward
from fxckpt.joint import Joint
from fxckpt.state import restored
from fxckpt.steps import undone


def foreseen(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Joint:
    """Forward and backward of a call of a model, which is left as it is.

    A model that prepares something at its first call, such as hooks which collect what it returns,
    would do so whenever it is captured. Then it is called once before, without gradients, and put
    back afterwards.

    Args:
        model: Rewritten or not.
        args: Of the call.
        kwargs: Likewise.

    Raises:
        CaptureError: if the call cannot be captured exactly.
    """
    try:
        return _captured(model, args, kwargs)
    except CaptureError as error:
        if not error.may_pass:
            raise
    forward = original_forward(model)
    around = Surroundings(model, forward)
    inputs, spec = tree.flatten((args, kwargs), open_objects=True)
    first_args, first_kwargs = tree.unflatten(spec, [t.detach().clone() for t in inputs])
    with restored(model), undone(model):
        try:
            with torch.no_grad():
                forward(*first_args, **first_kwargs)
            return _captured(model, args, kwargs)
        finally:
            around.put_back()


def _captured(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Joint:
    with torch.enable_grad():
        tape = capture(original_forward(model), args, kwargs, module=model)
    return tape.joint(tape.expected_backward())
