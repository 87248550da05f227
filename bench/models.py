"""Models by name, with random weights and batches: `build("gpt2", layers=2)`.

Shared by the benchmark (default sizes) and the tests (`tiny=True`). Nothing is downloaded.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench import networks

Batch = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Case:
    """A model in train mode and all that a training step of it needs.

    Attributes:
        model: the module.
        batch: seed to keyword arguments of the model, on the CPU.
        loss: output of the model to a scalar.
        blocks: paths of the repeated blocks, for `torch.utils.checkpoint` per block.
        has_own_checkpointing: `gradient_checkpointing_enable` exists and works.
    """

    model: nn.Module
    batch: Callable[[int], Batch]
    loss: Callable[[Any], Tensor]
    blocks: tuple[str, ...]
    has_own_checkpointing: bool


def build(name: str, *, tiny: bool = False, seed: int = 0, **sizes: float) -> Case:
    """The case called `name`; equal arguments give equal weights.

    Args:
        name: a key of `FACTORIES`.
        tiny: sizes that a test runs in milliseconds.
        seed: of the weights.
        **sizes: override single sizes, see the factory's parameters.

    Raises:
        ValueError: no such model, or the model has no such size.

    Example:
        >>> case = build("mlp", tiny=True)
        >>> case.loss(case.model(**case.batch(0))).backward()
    """
    chosen = {**(TINY.get(name, {}) if tiny else {}), **sizes}
    _check_sizes(name, chosen)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        case = FACTORIES[name](**chosen)
    case.model.train()
    return case


def _check_sizes(name: str, sizes: dict[str, float]) -> None:
    if name not in FACTORIES:
        raise ValueError(f"unknown model {name!r}; choose from {', '.join(FACTORIES)}")
    known = default_sizes(name)
    if unknown := [size for size in sizes if size not in known]:
        raise ValueError(f"{name} has no size {', '.join(unknown)}; it has {', '.join(known)}")
    full = {**known, **sizes}
    if full["width"] % full.get("heads", 1):
        raise ValueError(f"width={full['width']} is not a multiple of heads={full['heads']}")


def default_sizes(name: str) -> dict[str, float]:
    """The sizes that model `name` takes, with their defaults."""
    parameters = inspect.signature(FACTORIES[name]).parameters
    return {size: parameter.default for size, parameter in parameters.items()}


def block_names(model: nn.Module) -> tuple[str, ...]:
    """Paths of the modules in the outermost `nn.ModuleList`s: a transformer's layers."""
    lists = [name for name, child in model.named_modules() if isinstance(child, nn.ModuleList)]
    outer = [name for name in lists if not any(name.startswith(other + ".") for other in lists)]
    return tuple(
        f"{name}.{child}"
        for name in outer
        for child, _ in model.get_submodule(name).named_children()
    )


def _transformer(model: nn.Module, batch: Callable[[torch.Generator], Batch]) -> Case:
    return Case(
        model,
        _seeded(batch),
        lambda output: output.loss,
        block_names(model),
        has_own_checkpointing=True,
    )


def _network(model: nn.Module, batch: Callable[[torch.Generator], Batch]) -> Case:
    return Case(model, _seeded(batch), _classify, block_names(model), has_own_checkpointing=False)


def _seeded(batch: Callable[[torch.Generator], Batch]) -> Callable[[int], Batch]:
    return lambda seed: batch(torch.Generator().manual_seed(seed))


def _classify(scores: Tensor) -> Tensor:
    """Cross entropy of scores (batch, classes, ...) against classes dealt out in turn."""
    count = scores.numel() // scores.shape[1]
    turn = torch.arange(count, device=scores.device).view(scores[:, 0].shape)
    return F.cross_entropy(scores, turn % scores.shape[1])


def _tokens(batch: int, seq: int, vocab: int) -> Callable[[torch.Generator], Batch]:
    def draw(generator: torch.Generator) -> Batch:
        ids = torch.randint(vocab, (batch, seq), generator=generator)
        return {"input_ids": ids, "labels": ids.clone()}

    return draw


def _padded_tokens(batch: int, seq: int, vocab: int) -> Callable[[torch.Generator], Batch]:
    """Tokens of which every second sample is padded in its last quarter."""
    whole = _tokens(batch, seq, vocab)

    def draw(generator: torch.Generator) -> Batch:
        mask = torch.ones(batch, seq, dtype=torch.long)
        mask[1::2, seq - seq // 4 :] = 0
        return {**whole(generator), "attention_mask": mask}

    return draw


def _images(batch: int, image: int, argument: str) -> Callable[[torch.Generator], Batch]:
    return lambda generator: {argument: torch.randn(batch, 3, image, image, generator=generator)}


def gpt2(
    layers: int = 12,
    width: int = 256,
    heads: int = 4,
    batch: int = 4,
    seq: int = 128,
    vocab: int = 8192,
    dropout: float = 0.1,
) -> Case:
    """GPT-2 (Radford et al. 2019) with its language modelling loss."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=layers,
        n_embd=width,
        n_head=heads,
        n_positions=max(seq, 16),
        vocab_size=vocab,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # transformers does not find it by this class's name, and warns
    return _transformer(model, _tokens(batch, seq, vocab))


def bert(
    layers: int = 12,
    width: int = 256,
    heads: int = 4,
    batch: int = 4,
    seq: int = 128,
    vocab: int = 8192,
    dropout: float = 0.1,
) -> Case:
    """BERT (Devlin et al. 2018) with its masked language modelling loss, padding in the batch."""
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        max_position_embeddings=max(seq, 16),
        vocab_size=vocab,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        use_cache=False,
    )
    return _transformer(BertForMaskedLM(config), _padded_tokens(batch, seq, vocab))


def llama(
    layers: int = 12,
    width: int = 256,
    heads: int = 4,
    batch: int = 4,
    seq: int = 128,
    vocab: int = 8192,
    dropout: float = 0.0,
) -> Case:
    """Llama (Touvron et al. 2023), grouped queries; dropout is attention's only."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shared = _llama_like(layers, width, heads, seq, vocab, dropout)
    config = LlamaConfig(intermediate_size=8 * width // 3, **shared)
    return _transformer(LlamaForCausalLM(config), _tokens(batch, seq, vocab))


def mixtral(
    layers: int = 8,
    width: int = 256,
    heads: int = 4,
    batch: int = 4,
    seq: int = 128,
    vocab: int = 8192,
    dropout: float = 0.0,
) -> Case:
    """Mixtral (Jiang et al. 2024): four experts a layer, two of them a token."""
    from transformers import MixtralConfig, MixtralForCausalLM

    shared = _llama_like(layers, width, heads, seq, vocab, dropout)
    config = MixtralConfig(intermediate_size=2 * width, num_local_experts=4, **shared)
    return _transformer(MixtralForCausalLM(config), _tokens(batch, seq, vocab))


def _llama_like(
    layers: int, width: int, heads: int, seq: int, vocab: int, dropout: float
) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 2),
        "max_position_embeddings": max(seq, 16),
        "vocab_size": vocab,
        "attention_dropout": dropout,
        "use_cache": False,
    }


def t5(
    layers: int = 6,
    width: int = 256,
    heads: int = 4,
    batch: int = 4,
    seq: int = 128,
    vocab: int = 8192,
    dropout: float = 0.1,
) -> Case:
    """T5 (Raffel et al. 2019): `layers` encoder and as many decoder layers, padding."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        num_layers=layers,
        d_model=width,
        num_heads=heads,
        d_kv=width // heads,
        d_ff=4 * width,
        vocab_size=vocab,
        dropout_rate=dropout,
        decoder_start_token_id=0,
        use_cache=False,
    )
    return _transformer(T5ForConditionalGeneration(config), _padded_tokens(batch, seq, vocab))


def vit(
    layers: int = 12,
    width: int = 192,
    heads: int = 3,
    batch: int = 4,
    image: int = 224,
    patch: int = 16,
    vocab: int = 1000,
    dropout: float = 0.0,
) -> Case:
    """Vision transformer (Dosovitskiy et al. 2020); `vocab` counts classes."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        image_size=image,
        patch_size=patch,
        num_labels=vocab,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    images = _images(batch, image, "pixel_values")

    def draw(generator: torch.Generator) -> Batch:
        labels = torch.randint(vocab, (batch,), generator=generator)
        return {**images(generator), "labels": labels}

    return _transformer(ViTForImageClassification(config), draw)


def resnet(
    layers: int = 18, width: int = 64, batch: int = 8, image: int = 96, vocab: int = 1000
) -> Case:
    """ResNet (He et al. 2016) of depth `layers`: 10, 18, 34, 50 or 101; `vocab` counts classes."""
    return _network(networks.ResNet(layers, width, vocab), _images(batch, image, "images"))


def unet(layers: int = 4, width: int = 32, batch: int = 2, image: int = 96, vocab: int = 4) -> Case:
    """U-Net (Ronneberger et al. 2015) that halves the image `layers` times; `vocab` classes."""
    if image % 2**layers:
        raise ValueError(f"unet with layers={layers} needs an image size divisible by {2**layers}")
    return _network(networks.UNet(layers, width, vocab), _images(batch, image, "images"))


def mlp(
    layers: int = 16, width: int = 256, batch: int = 512, vocab: int = 10, dropout: float = 0.0
) -> Case:
    """Residual multilayer perceptron; `vocab` counts classes."""
    return _network(
        networks.MLP(layers, width, vocab, dropout),
        lambda generator: {"x": torch.randn(batch, width, generator=generator)},
    )


FACTORIES: dict[str, Callable[..., Case]] = {
    factory.__name__: factory
    for factory in (gpt2, bert, llama, t5, mixtral, vit, resnet, unet, mlp)
}

_TINY_TEXT: dict[str, float] = {
    "layers": 2,
    "width": 16,
    "heads": 2,
    "batch": 2,
    "seq": 8,
    "vocab": 32,
}
TINY: dict[str, dict[str, float]] = {
    **dict.fromkeys(("gpt2", "bert", "llama", "t5", "mixtral"), _TINY_TEXT),
    "vit": {"layers": 2, "width": 16, "heads": 2, "batch": 2, "image": 16, "patch": 8, "vocab": 5},
    "resnet": {"layers": 10, "width": 4, "batch": 2, "image": 32, "vocab": 5},
    "unet": {"layers": 2, "width": 4, "batch": 2, "image": 16, "vocab": 3},
    "mlp": {"layers": 3, "width": 8, "batch": 4, "vocab": 3},
}
