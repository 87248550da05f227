"""The modules of torch itself, with the sample inputs that torch tests them with.

They are single layers rather than models, and there are too many to train with every policy: this
module has no `all_of`, so that they are no part of the zoo.
"""

import functools
import os
import warnings
from collections import defaultdict
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import nn

from bench.architectures.case import Architecture


@functools.cache
def names() -> tuple[str, ...]:
    """The modules that torch has sample inputs for, e.g. `"nn.Linear"`, in its order."""
    return tuple(_infos())


def samples(name: str, dtype: torch.dtype, *, training: bool) -> list[Architecture]:
    """All samples of a module: valid arguments, then arguments for which its forward raises.

    Args:
        name: one of `names()`.
        dtype: of parameters and inputs.
        training: mode of the modules.

    Example:
        >>> sample = samples("nn.Linear", torch.float32, training=True)[0]
        >>> args, kwargs = sample.batch(0)
        >>> sample.make()(*args, **kwargs).shape
        torch.Size([4, 8])
    """
    info = _infos()[name]
    draw = functools.partial(_draw, info, dtype, training)
    take = _pool(draw)
    return [
        Architecture(
            f"{name}[{index}]",
            "torch",
            functools.partial(_make, info.module_cls, sample.constructor_input, training),
            functools.partial(take, index),
        )
        for index, sample in enumerate(draw(0))
    ]


@functools.cache
def _infos() -> dict[str, Any]:
    # The import takes seconds, and changes settings of the whole process.
    with warnings.catch_warnings(), mock.patch.dict(os.environ):
        from torch.testing._internal.common_modules import module_db
    return {info.name: info for info in module_db}


def _draw(info: Any, dtype: torch.dtype, training: bool, seed: int) -> list[Any]:
    from torch.testing._internal.common_modules import ModuleErrorEnum

    options = {"device": "cpu", "dtype": dtype, "requires_grad": True, "training": training}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        valid = info.module_inputs_func(info, **options)
        faulty = (info.module_error_inputs_func or _none)(info, **options)
    raising = (f for f in faulty if f.error_on is ModuleErrorEnum.FORWARD_ERROR)
    return [*valid, *(f.module_error_input for f in raising)]


def _none(*_: Any, **__: Any) -> tuple[()]:
    return ()


def _make(module_class: type[nn.Module], given: Any, training: bool) -> nn.Module:
    return module_class(*given.args, **given.kwargs).train(training)


def _pool(draw: Callable[[int], list[Any]]) -> Callable[[int, int], Any]:
    """The arguments of one sample; torch draws those of all at a time, so the rest is kept."""
    kept: dict[tuple[int, int], list[Any]] = defaultdict(list)

    def take(index: int, step: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if not kept[index, step]:
            for i, sample in enumerate(draw(step)):
                kept[i, step].append(sample.forward_input)
        given = kept[index, step].pop()
        return given.args, given.kwargs

    return take
