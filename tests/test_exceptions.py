"""Exceptions, warnings and printing of rewritten modules."""

import traceback
import types
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import (
    Function,
    captures,
    chain,
    total,
)
from installing import Net, both, step, steps, x
from torch import Tensor, nn

import fxckpt
from fxckpt import CaptureError, FallbackWarning


class Mistake(Exception):
    """With arguments of its own, and no way to make it from its text."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code


def raising(kind: type[BaseException]) -> Function:
    """A module that raises after it has computed something, if its flag is set."""

    def forward(m: Function, x: Tensor) -> Tensor:
        if issubclass(kind, Exception):  # an interrupted capture leaves buffers as they were
            m.seen.add_(1)
        y = x @ m.weight
        if not m.bad:
            return y.tanh()
        try:
            return {}["key"]
        except KeyError as error:
            raise kind("the text", 7) from error

    model = Function(forward)
    model.bad = False
    return model


def _caught(model: nn.Module, *args: Any) -> tuple[Any, ...]:
    with pytest.raises(BaseException) as caught:  # noqa: PT011
        model(*args)
    error = caught.value
    return (
        type(error),
        error.args,
        getattr(error, "code", None),
        type(error.__cause__),
        type(error.__context__),
        error.__suppress_context__,
        traceback.extract_tb(error.__traceback__)[-1].name,
    )


EXCEPTIONS = (
    Mistake,
    StopIteration,
    StopAsyncIteration,
    GeneratorExit,
    KeyboardInterrupt,
    SystemExit,
    AssertionError,
    RecursionError,
    MemoryError,
    NotImplementedError,
)


@pytest.mark.parametrize("when", ["first call", "later call", "another shape"])
@pytest.mark.parametrize("kind", EXCEPTIONS)
def test_exception_comes_out_unchanged(kind: type[BaseException], when: str) -> None:
    """Type, arguments, attributes, cause and place; and the model works afterwards."""

    def use(model: nn.Module) -> Any:
        seen = [] if when == "first call" else [step(model)]
        model.bad = True
        rows = x(5) if when == "another shape" else x()
        seen += [_caught(model, rows), _caught(model, rows)]
        model.bad = False
        return seen, steps(model), list(model.buffers())

    model = both(lambda: raising(kind), use, strict=False)
    assert captures(model)
    assert type(model.weight) is nn.Parameter


@pytest.mark.parametrize("captured", [True, False])
def test_exception_that_is_being_handled_is_left_alone(captured: bool) -> None:
    """A model that is called in an `except` block: the exception keeps its traceback."""

    def fail() -> None:
        local = "a local variable"
        raise Mistake("before the call", len(local))

    def use(model: nn.Module) -> Any:
        try:
            fail()
        except Mistake as error:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FallbackWarning)
                seen = step(model)
            frames = [(frame.f_code.co_name, line) for frame, line in _walk(error)]
            inner = [frame.f_locals for frame, _ in _walk(error)][-1]
            return seen, frames, inner, error.__context__, error.__cause__
        raise AssertionError

    forward = (lambda m, x: x @ m.weight) if captured else (lambda m, x: x * float(x.sum()))
    both(lambda: Function(lambda m, x: forward(m, x) + m.weight.sum()), use, strict=False)


def _walk(error: BaseException) -> Iterator[tuple[types.FrameType, int]]:
    return traceback.walk_tb(error.__traceback__)


@pytest.mark.parametrize("kind", EXCEPTIONS[:2])
def test_exception_with_strict(kind: type[BaseException]) -> None:
    """An error of ours that names the user's, which is its cause."""
    model = fxckpt.rewrite(raising(kind), "nothing", strict=True)
    model.bad = True
    with pytest.raises(CaptureError, match=f"raised {kind.__name__}.*the text") as caught:
        model(x())
    assert isinstance(caught.value.__cause__, kind)
    model.bad = False
    step(model)
    assert captures(model)


def test_exception_of_a_call_with_wrong_arguments() -> None:
    def use(model: nn.Module) -> Any:
        seen = []
        for args, kwargs in (
            ((), {}),
            ((x(), 1.0, 2.0), {}),
            ((x(),), {"other": 1}),
            ((torch.ones(3, 5),), {}),
            (("text",), {}),
            ((None,), {}),
            ((x(1),), {}),  # BatchNorm refuses a single row
        ):
            with pytest.raises((TypeError, RuntimeError, ValueError)) as caught:
                model(*args, **kwargs)
            seen.append((caught.type, str(caught.value)))
        return seen, steps(model)

    assert captures(both(Net, use, strict=False))


def test_module_without_a_forward() -> None:
    class Nothing(nn.Module):
        pass

    def use(model: nn.Module) -> Any:
        with pytest.raises(NotImplementedError, match="missing the required") as caught:
            model(x())
        return str(caught.value)

    both(Nothing, use, strict=False)
    both(lambda: nn.ModuleList([nn.Linear(2, 2)]), use, strict=False)


def test_exception_in_backward_comes_out_unchanged() -> None:
    class Bad(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            raise Mistake("in backward", 3)

    def forward(m: Function, x: Tensor) -> Tensor:
        return Bad.apply(x @ m.weight) if m.bad else (x @ m.weight).tanh()

    def make() -> nn.Module:
        model = Function(forward)
        model.bad = True
        return model

    def use(model: nn.Module) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FallbackWarning)
            out = model(x())
        with pytest.raises(Mistake, match="in backward") as caught:
            total(out).backward()
        grads = [p.grad for p in model.parameters()]
        model.bad = False
        return caught.value.code, grads, steps(model)

    assert captures(both(make, use, strict=False))


@pytest.mark.parametrize("hook", ["result", "parameter", "accumulated"])
def test_exception_in_a_hook_comes_out_unchanged(hook: str) -> None:
    def fail(*_: Any) -> None:
        raise Mistake("in a hook", 4)

    def use(model: nn.Module) -> Any:
        out = model(x())
        if hook == "result":
            handle = out.register_hook(fail)
        elif hook == "parameter":
            handle = model[-2].weight.register_hook(fail)
        else:
            handle = model[-2].weight.register_post_accumulate_grad_hook(fail)
        with pytest.raises(Mistake, match="in a hook") as caught:
            total(out).backward()
        handle.remove()
        model.zero_grad()
        return caught.value.code, steps(model)

    assert captures(both(lambda: chain(2, 4), use))


def test_interrupt_in_the_middle_of_a_capture() -> None:
    """Everything that a capture disguises is as before."""
    from torch.nn.modules import module as nn_module

    model = raising(KeyboardInterrupt)
    new = fxckpt.rewrite(model, "nothing", strict=True)
    members = dict(model._parameters), dict(model._buffers)
    new.bad = True
    with torch.random.fork_rng(devices=[]):
        state = torch.get_rng_state()
        with pytest.raises(KeyboardInterrupt):
            new(x())
        assert torch.equal(torch.get_rng_state(), state)
    assert (dict(model._parameters), dict(model._buffers)) == members
    assert not nn_module._global_forward_hooks
    assert not nn_module._global_forward_pre_hooks
    assert torch.utils._python_dispatch._len_torch_dispatch_stack() == 0
    assert type(torch.ones(1) + 1) is Tensor
    assert torch.is_grad_enabled()


def test_warning_of_forward_is_given_once() -> None:
    """The default filter shows a warning once for each line, so it is shown once in any case."""

    def warn(m: Function, x: Tensor) -> Tensor:
        warnings.warn("from forward", UserWarning, stacklevel=1)
        return (x @ m.weight).tanh()

    def fall_back(m: Function, x: Tensor) -> Tensor:
        warnings.warn("from forward", UserWarning, stacklevel=1)
        return (x @ m.weight) * float(x.sum())

    for forward in (warn, fall_back):
        new = fxckpt.rewrite(Function(forward), "nothing")
        with warnings.catch_warnings(record=True) as caught:
            warnings.resetwarnings()
            warnings.simplefilter("default")
            for _ in range(3):
                total(new(x())).backward()
        ours = [w for w in caught if w.category is FallbackWarning]
        theirs = [w for w in caught if w.category is UserWarning]
        assert len(theirs) == 1
        assert theirs[0].filename == __file__
        assert len(ours) == (forward is fall_back)
        assert all(w.filename == __file__ for w in ours)


def test_warning_turned_into_an_error() -> None:
    def forward(m: Function, x: Tensor) -> Tensor:
        if m.loud:
            warnings.warn("too loud", UserWarning, stacklevel=1)
        return (x @ m.weight).tanh()

    def make() -> nn.Module:
        model = Function(forward)
        model.loud = True
        return model

    def use(model: nn.Module) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            seen = _caught(model, x())
        model.loud = False
        return seen, steps(model)

    assert captures(both(make, use, strict=False))


def test_print_in_forward(capsys) -> None:
    """Printed when a call is new, and by what runs eagerly; no more often than in eager."""

    def forward(m: Function, x: Tensor) -> Tensor:
        print("called", tuple(x.shape))
        return (x @ m.weight).tanh()

    new = fxckpt.rewrite(Function(forward), "nothing", strict=True)
    for rows in (3, 3, 3, 5, 3):
        step(new, x(rows))
    lines = capsys.readouterr().out.splitlines()
    assert set(lines) == {"called (3, 4)", "called (5, 4)"}
    assert lines.count("called (3, 4)") <= 2
    assert lines.count("called (5, 4)") == 1
    with torch.no_grad():
        new(x())
    assert capsys.readouterr().out == "called (3, 4)\n"


def test_call_that_is_captured_in_vain_changes_state_once() -> None:
    """Buffers and generators."""

    def forward(m: Function, x: Tensor) -> Tensor:
        m.seen.add_(1)
        noise = torch.rand(4)
        return (x @ m.weight + noise) * (2 if float(x.sum()) > 0 else 3)

    def use(model: nn.Module) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FallbackWarning)
            return steps(model), list(model.buffers())

    both(lambda: Function(forward), use, strict=False)
