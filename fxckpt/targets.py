"""Models that a command line names: `module:factory`, or a configuration of transformers.

All are made on fake tensors: without memory, files or downloads.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fxckpt.errors import FxckptError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_HEADS = (  # the auto classes of transformers, the first that knows a configuration is taken
    "AutoModelForMaskedLM",
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForImageClassification",
    "AutoModel",
)
_ONE_STACK = ("AutoModelForCausalLM", "AutoModelForMaskedLM")
_LONGEST = 1024  # by default, of sequences

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class TargetError(FxckptError, ValueError):
    """The command line names a model that cannot be made."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What the arguments of a call are like; `length` None for what suits the model."""

    batch: int = 1
    length: int | None = None
    image: int | None = None


@dataclasses.dataclass(frozen=True)
class Target:
    """A model on fake tensors, and how to make arguments for it.

    Attributes:
        name: As it was given.
        model: The model.
        arguments: From a batch size to the arguments of a call, to be called in `mode`.
        mode: That of its tensors.
    """

    name: str
    model: nn.Module
    arguments: Callable[[int], Arguments]
    mode: FakeTensorMode

    def call(self, batch: int) -> Arguments:
        """The arguments of a call."""
        with self.mode:
            return self.arguments(batch)


def load(name: str, sizes: Sizes, dtype: torch.dtype, changes: Mapping[str, Any]) -> Target:
    """Makes the model that a name means.

    Args:
        name: "module:factory" or the type of a configuration of transformers, such as "gpt2".
        sizes: Of the arguments.
        dtype: Of the parameters, and of floating-point arguments.
        changes: Entries of the configuration, such as `n_layer`, or keyword arguments of the
            factory.

    Raises:
        TargetError: if there is none; says what comes near.
    """
    mode = FakeTensorMode()
    make = _of_factory if ":" in name else _of_transformers
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model, arguments = make(name, sizes, changes, mode)
    finally:
        torch.set_default_dtype(before)

    def in_dtype(batch: int) -> Arguments:
        torch.set_default_dtype(dtype)
        try:
            return arguments(batch)
        finally:
            torch.set_default_dtype(before)

    return Target(name, model.train(), in_dtype, mode)


# --- factories ------------------------------------------------------------------------------------


def _of_factory(
    name: str, sizes: Sizes, changes: Mapping[str, Any], mode: FakeTensorMode
) -> tuple[nn.Module, Callable[[int], Arguments]]:
    """A model by a function that returns it and the arguments of a call."""
    factory = _factory(name)
    parameters = inspect.signature(factory).parameters
    accepted = {"seq": sizes.length, "image": sizes.image}
    fixed = {k: v for k, v in accepted.items() if v is not None and k in parameters} | {**changes}
    by_batch = "batch" in parameters

    def made(batch: int) -> tuple[nn.Module, Arguments]:
        options = {**fixed, "batch": batch} if by_batch else fixed
        try:
            with mode:
                result = factory(**options)
        except TypeError as error:
            raise TargetError(f"{name}(**{options}): {error}") from error
        if not (isinstance(result, tuple) and len(result) == 2 and _is_call(result)):
            raise TargetError(
                f"{name}() has to return (model, arguments): a torch.nn.Module, and a tuple of "
                f"positional or a dictionary of keyword arguments; got {type(result).__name__}"
            )
        model, given = result
        return model, ((), dict(given)) if isinstance(given, Mapping) else (given, {})

    model, _ = made(sizes.batch)

    def arguments(batch: int) -> Arguments:
        if not by_batch and batch != sizes.batch:
            raise TargetError(f"{name}() takes no argument batch=, so batches cannot be compared")
        return made(batch)[1]

    return model, arguments


def _is_call(result: tuple[Any, ...]) -> bool:
    return isinstance(result[0], nn.Module) and isinstance(result[1], (tuple, Mapping))


def _factory(name: str) -> Callable[..., Any]:
    path, _, attribute = name.partition(":")
    sys.path.insert(0, "")  # as `python -m` does, also for a console script
    try:
        module = importlib.import_module(path)
    except ImportError as error:
        raise TargetError(f"{name}: cannot import {path!r} ({error})") from error
    finally:
        sys.path.remove("")
    found = getattr(module, attribute, None)
    if not callable(found):
        names = [each for each in vars(module) if callable(getattr(module, each))]
        raise TargetError(f"{name}: {path} has no function {attribute!r}{_near(attribute, names)}")
    made: Callable[..., Any] = found
    return made


# --- transformers ---------------------------------------------------------------------------------


def _of_transformers(
    name: str, sizes: Sizes, changes: Mapping[str, Any], mode: FakeTensorMode
) -> tuple[nn.Module, Callable[[int], Arguments]]:
    """A model of transformers with the head that its loss needs, as far as it has one."""
    try:
        import transformers
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    except ImportError as error:
        raise TargetError(
            f"{name}: models by name are those of transformers, which is not installed. "
            "pip install transformers, or name a function: module:factory"
        ) from error
    known = list(CONFIG_MAPPING.keys())
    if name not in known:
        raise TargetError(
            f"{name!r} is no type of model that transformers knows (types are as in "
            "its configurations: gpt2, bert, llama, vit; other models are named as functions, "
            f"module:factory){_near(name, known)}"
        )
    config = transformers.AutoConfig.for_model(name)
    entries = vars(config.get_text_config()) | vars(config)
    for key, value in changes.items():
        if key not in entries:
            raise TargetError(
                f"--set {key}: the configuration of {name} has none{_near(key, entries)}"
            )
        setattr(config, key, value)
    config.use_cache = False
    if getattr(config, "is_encoder_decoder", False) and not hasattr(
        config, "decoder_start_token_id"
    ):
        config.decoder_start_token_id = 0
    # Models of transformers are made to be made on "meta", which fake tensors are stricter than.
    with torch.device("meta"):
        model, head = _with_head(transformers, config, name)
    _make_fake(model, mode)
    return model, _arguments_for(model, config, name, sizes, with_loss=head != "AutoModel")


def _with_head(transformers: Any, config: Any, name: str) -> tuple[nn.Module, str]:
    encoder_decoder = getattr(config, "is_encoder_decoder", False)
    for head in _HEADS:
        if encoder_decoder and head in _ONE_STACK:
            continue  # which would be the decoder alone
        auto = getattr(transformers, head)
        if type(config) in auto._model_mapping.keys():
            try:
                return auto.from_config(config), head
            except (ImportError, ValueError, TypeError, RuntimeError) as error:
                raise TargetError(f"{name}: transformers cannot make it ({error})") from error
    raise TargetError(f"{name}: transformers has no model of its own for this configuration")


def _make_fake(model: nn.Module, mode: FakeTensorMode) -> None:
    """Replaces parameters and buffers on "meta" by fake ones on the CPU; what is tied stays so."""
    made: dict[torch.Tensor, torch.Tensor] = {}  # by identity, and keeps what it replaces

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if tensor not in made:
            with mode:
                like = torch.empty_strided(
                    tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu"
                )
                if isinstance(tensor, nn.Parameter):
                    like = nn.Parameter(like, requires_grad=tensor.requires_grad)
            made[tensor] = like
        return made[tensor]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for key, tensor in tensors.items():
                if tensor is not None:
                    tensors[key] = fake(tensor)  # type: ignore[assignment]


def _arguments_for(
    model: nn.Module, config: Any, name: str, sizes: Sizes, *, with_loss: bool
) -> Callable[[int], Arguments]:
    main: Any = getattr(model, "main_input_name", None)
    if main == "input_ids":
        length = _length(config, name, sizes)

        def text(batch: int) -> Arguments:
            tokens = torch.zeros(batch, length, dtype=torch.long)
            labels = {"labels": torch.zeros(batch, length, dtype=torch.long)} if with_loss else {}
            return (), {"input_ids": tokens, **labels}

        return text
    if main == "pixel_values":
        channels, size = getattr(config, "num_channels", 3), sizes.image or _image(config)
        shape = (channels, *((size, size) if isinstance(size, int) else size))

        def image(batch: int) -> Arguments:
            labels = {"labels": torch.zeros(batch, dtype=torch.long)} if with_loss else {}
            return (), {"pixel_values": torch.zeros(batch, *shape), **labels}

        return image
    raise TargetError(
        f"{name} takes {main!r}: only models of texts (input_ids) and of images (pixel_values) can "
        "be named. Write a function that returns (model, arguments), and name it: module:factory"
    )


def _length(config: Any, name: str, sizes: Sizes) -> int:
    entry = getattr(config.get_text_config(), "max_position_embeddings", None)
    most = entry if isinstance(entry, int) and entry > 0 else None
    if sizes.length is not None and most is not None and sizes.length > most:
        raise TargetError(
            f"--seq {sizes.length}: the configuration of {name} has {most} positions. "
            f"Give --set max_position_embeddings={sizes.length}, or a shorter sequence"
        )
    return sizes.length or min(most or _LONGEST, _LONGEST)


def _image(config: Any) -> Any:
    size = getattr(config, "image_size", 224)
    return size if isinstance(size, (int, tuple, list)) else 224


def _near(name: str, names: Any) -> str:
    found = difflib.get_close_matches(name, [*names], n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(map(repr, found))}?" if found else ""
