"""`verify`: proof, on one call, that a rewritten module computes what the original computes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fxckpt import ops, tree
from fxckpt.errors import FxckptError, MismatchError
from fxckpt.installation import original_forward, runner_of
from fxckpt.module import is_rewritten, rewrite
from fxckpt.steps import backward, devices, undone


def verify(model: nn.Module, *args: Any, policy: Any = None, **kwargs: Any) -> None:
    """Runs a training step's forward and backward, eager and rewritten, and compares every bit.

    Compared are all tensors in the result, the buffers, the random state afterwards, and the
    gradients of all parameters and inputs. Model, gradients and random states are left as they
    were. On devices with nondeterministic kernels a value may differ as much as eager differs from
    itself.

    Args:
        model: A rewritten module, or any module if `policy` is given.
        *args: Positional arguments of the model.
        policy: What to rewrite the module with, if it is not rewritten.
        **kwargs: Keyword arguments of the model.

    Raises:
        MismatchError: naming the first value that differs, and by how much.
        CaptureError: if all of the module runs eagerly, as no part of it can be captured.
        FxckptError: if there is nothing to compare.

    Example:
        >>> import torch, fxckpt
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.5))
        >>> fxckpt.verify(model, torch.ones(2, 4), policy="nothing")
    """
    if not is_rewritten(model):
        if policy is None:
            raise FxckptError(
                "verify(model, ...): expected a rewritten module, or policy= to rewrite it with; "
                f"got {type(model).__name__}, which is not rewritten, and no policy"
            )
        model = rewrite(model, policy)
    if not model.training:
        raise FxckptError("verify(model, ...): the model is in evaluation mode; call model.train()")
    original = original_forward(model)
    eager = _observe(model, original, args, kwargs)
    again = _observe(model, original, args, kwargs)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours = _observe(model, model.forward, args, kwargs)
    runner_of(model).require(model, args, kwargs)  # what runs eagerly as a whole proves nothing
    for each in caught:
        warnings.warn(each.message, each.category, stacklevel=2)
    for (name, expected), (_, repeated), (_, got) in zip(eager, again, ours, strict=True):
        _compare(name, expected, repeated, got)


Observation = list[tuple[str, torch.Tensor | None]]


def _observe(model: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Observation:
    """Everything that one step of `forward` leaves behind; the model is as before."""
    with undone(model):
        inputs, spec = tree.flatten((args, kwargs), open_objects=True)
        fresh = [t.detach().clone().requires_grad_(t.requires_grad) for t in inputs]
        call_args, call_kwargs = tree.unflatten(spec, fresh)
        with torch.enable_grad():
            results, result_spec = tree.flatten(forward(*call_args, **call_kwargs))
        found: Observation = [
            (f"result{name}", t.detach().clone())
            for name, t in zip(tree.names(result_spec), results, strict=True)
        ]
        backward(results)
        found += [(f"buffer {name}", b.clone()) for name, b in model.named_buffers()]
        found += [(f"input {i} after the call", t.detach()) for i, t in enumerate(fresh)]
        found += [(f"gradient of {name}", _grad(p)) for name, p in model.named_parameters()]
        found += [(f"gradient of input {i}", _grad(t)) for i, t in enumerate(fresh)]
        found += [(f"random state of {d}", ops.generator(d).get_state()) for d in devices(model)]
        return found


def _grad(tensor: torch.Tensor) -> torch.Tensor | None:
    return None if tensor.grad is None else tensor.grad.clone()


def _compare(
    name: str,
    expected: torch.Tensor | None,
    repeated: torch.Tensor | None,
    got: torch.Tensor | None,
) -> None:
    if expected is None or got is None or repeated is None:
        if expected is not got:
            there = "is missing" if got is None else "is there, but not in eager"
            raise MismatchError(f"verify: {name} {there}")
        return
    if _identical(expected, got):
        return
    spread = _distance(expected, repeated)
    distance = _distance(expected, got)
    if distance > 2 * spread:
        raise MismatchError(
            f"verify: {name} differs from eager by up to {distance:.3g} "
            f"(eager differs from itself by {spread:.3g}); shape {tuple(expected.shape)}, "
            f"dtype {expected.dtype}"
        )


def _identical(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool(((a == b) | ((a != a) & (b != b))).all())


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    if a.shape != b.shape or a.dtype != b.dtype:
        return float("inf")
    if _identical(a, b):
        return 0.0
    return float((a.double() - b.double()).abs().nan_to_num(nan=float("inf")).max())
