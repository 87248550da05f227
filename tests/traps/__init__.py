"""Traps: situations in which a captured graph could go wrong without a word.

Each `Trap` names a situation, runs it on an eager and on a rewritten model, and knows how to take
out what protects the library from it: then the run has to fail, or the protection is not tested.
"""

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from helpers import (
    Function,
    Record,
    assert_same,
    content,
    describe,
    leaves,
    random_states,
    seed_all,
    total,
)
from torch import Tensor, nn

import fxckpt
from fxckpt import FallbackWarning, signature, watch
from fxckpt.runtime import Captured

Guard = Callable[[pytest.MonkeyPatch], None]
Make = Callable[[], nn.Module]
Play = Callable[["Stage"], Any]
EITHER = "captured exactly, or eager with a warning"


@dataclasses.dataclass(frozen=True)
class Trap:
    """A situation, and how to take out what protects against it; None: PyTorch itself does."""

    name: str
    run: Callable[[], None]
    guard: Guard | None = None


class Stage:
    """A model, eager or rewritten, and the record of what happens to it."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.record: Record = []
        self.steps = 0

    def note(self, name: str, value: Any) -> None:
        """Records tensors bit by bit, anything else as it is printed."""
        for path, leaf in leaves(value, f"{self.steps}: {name}"):
            self.record.append((path, _seen(leaf)))

    def step(self, *args: Any, loss: Callable[[Any], Tensor] = total, **kwargs: Any) -> Any:
        """Trains one step, and records everything that comes of it."""
        self.steps += 1
        result = self.model(*args, **kwargs)
        self.note("result", result)
        value = loss(result)
        if value.requires_grad:
            value.backward()
        inputs = [t for _, t in leaves((args, kwargs)) if isinstance(t, Tensor)]
        self.note("inputs", [(t, t.grad if t.is_leaf else None) for t in inputs])
        self.update()
        return result

    def update(self) -> None:
        """Records gradients, updates parameters, records these and all other state."""
        for name, p in self.model.named_parameters():
            self.note(f"gradient of {name}", p.grad)
            if p.grad is not None:
                with torch.no_grad():
                    p.sub_(p.grad, alpha=0.01)
                p.grad = None
            self.note(name, content(p))
        self.note("buffers", dict(self.model.named_buffers()))
        self.record.append((f"{self.steps}: random states", random_states()))

    def again(self) -> None:
        """Rewrites once more, as the documentation asks after changes that are not watched."""
        if fxckpt.is_rewritten(self.model):
            fxckpt.rewrite_(self.model, "nothing")


def _seen(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return repr(leaf)
    assert not isinstance(leaf, torch._subclasses.FakeTensor), "a fake tensor came out"
    flags = leaf.is_conj(), leaf.is_neg()
    return *describe(leaf.resolve_conj().resolve_neg() if any(flags) else leaf), *flags


def same(
    make: Make, play: Play, *, warns: str = "", graph: int | None = None, policy: Any = "nothing"
) -> None:
    """Plays with an eager and with a rewritten model, and asserts that every bit is the same.

    Args:
        make: Makes equal models when called under equal seeds.
        play: What happens to the model of a stage.
        warns: Text of the one `FallbackWarning` that is expected; empty: there is none; EITHER.
        graph: How many calls run a captured graph at least, if none falls back; None: all steps.
        policy: Of the rewritten one.
    """
    records = []
    for rewritten in (False, True):
        seed_all(0)
        model = fxckpt.rewrite_(make(), policy) if rewritten else make()
        stage = Stage(model)
        with warnings.catch_warnings(record=True) as caught, counted() as calls:
            warnings.simplefilter("always")
            play(stage)
        records.append(stage.record)
    assert_same(*records)
    said = [str(w.message) for w in caught if w.category is FallbackWarning]
    expected = stage.steps if graph is None else graph
    if warns == EITHER:
        assert said or calls
    elif warns:
        assert len(said) == 1, said
        assert warns in said[0], said
    else:
        assert not said, said
        assert len(calls) >= expected, f"{len(calls)} calls of graphs, not {expected}"


@contextlib.contextmanager
def counted() -> Iterator[list[Captured]]:
    """The captured graphs that are called meanwhile, in order."""
    calls: list[Captured] = []
    real = Captured.__call__

    def call(self: Captured, *args: Any) -> Any:
        calls.append(self)
        return real(self, *args)

    with mock.patch.object(Captured, "__call__", call):
        yield calls


def rows(n: int = 3, width: int = 4) -> Tensor:
    """A batch: different numbers, none of them round."""
    return torch.linspace(-1, 1, width * n, dtype=torch.float32).view(n, width).cos()


def wanted(n: int = 3) -> Tensor:
    """A batch that wants a gradient."""
    return rows(n).requires_grad_()


def function(forward: Callable[..., Any], **attributes: Any) -> Make:
    """Makes models around a function of (model, *args); callable attributes are made anew."""

    def make() -> nn.Module:
        model = Function(forward)
        for name, value in attributes.items():
            setattr(model, name, value())
        return model

    return make


# --- taking out what protects ---------------------------------------------------------------------


def constant(owner: Any, name: str, value: Any = None) -> Guard:
    """A function or method that returns the same whatever happens."""
    return lambda patch: patch.setattr(owner, name, lambda *_, **__: value)


def all_of(*guards: Guard) -> Guard:
    """Several protections at once."""

    def take_out(patch: pytest.MonkeyPatch) -> None:
        for guard in guards:
            guard(patch)

    return take_out


def _argument(position: int) -> Guard:
    """The signature of an argument without one of its parts."""

    def take_out(patch: pytest.MonkeyPatch) -> None:
        real = signature.of_arguments

        def of_arguments(*args: Any, **options: Any) -> Any:
            spec, tensors = real(*args, **options)
            parts = [(kind, *geometry, *rest) for kind, geometry, *rest in tensors]
            return spec, tuple((*t[:position], "", *t[position:][1:]) for t in parts)

        patch.setattr(signature, "of_arguments", of_arguments)

    return take_out


def STRUCTURE(patch: pytest.MonkeyPatch) -> None:
    """Structure and static leaves of the arguments are not part of the signature."""
    real = signature.of_arguments
    patch.setattr(
        signature, "of_arguments", lambda spec, *args, **options: real(None, *args, **options)
    )


def forgetful(patch: pytest.MonkeyPatch) -> None:
    """Rewriting again keeps what was captured."""
    real = fxckpt.rewrite_
    patch.setattr(
        fxckpt,
        "rewrite_",
        lambda model, *args: model if fxckpt.is_rewritten(model) else real(model, *args),
    )


SHAPE, STRIDES, DTYPE, DEVICE, REQUIRES_GRAD, LEAF, TAGS, IDENTITY = map(_argument, range(1, 9))
ARGUMENTS = constant(signature, "of_arguments", ())
MODES = constant(signature, "of_modes", ())
STATE = constant(watch.Watch, "state", 0)
CONTENTS = all_of(  # what modules hold, and what lies beyond
    constant(watch.Watch, "_conditions", ()), constant(watch, "conditions_beyond", ())
)
HOOKS_AND_CHILDREN = constant(watch, "same_objects", True)
