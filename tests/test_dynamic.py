"""One capture for calls of many sizes: `rewrite(dynamic=True)`."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_same_training, captures, sgd
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from fxckpt.installation import runner_of

VOCABULARY = 64
POLICIES = ("nothing", "dots", "attention", "block", "sqrt")


def pairs(count: int, *, batch: int = 7, length: int = 24, least: int = 2) -> list[tuple[int, int]]:
    """Different pairs of a batch and a length, in the order of a shuffled data set."""
    found = [(b, n) for b in range(least, batch + 1) for n in range(least, length + 1)]
    random.Random(0).shuffle(found)
    return found[:count]


# --- models -------------------------------------------------------------------------------------


def gpt2() -> nn.Module:
    """Dropout, causal attention, tied weights, a loss of shifted labels."""
    return GPT2LMHeadModel(
        GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=VOCABULARY, n_positions=32)
    )


def llama() -> nn.Module:
    """Rotary embeddings, grouped heads."""
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=VOCABULARY,
        )
    )


def bert() -> nn.Module:
    """A mask of padding, classes."""
    return BertForSequenceClassification(
        BertConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=VOCABULARY,
        )
    )


def texts(batch: int, length: int) -> dict[str, Tensor]:
    """Texts with padding at the end, of which the loss knows nothing."""
    ids = torch.randint(0, VOCABULARY, (batch, length))
    mask = torch.ones(batch, length, dtype=torch.long)
    for row in range(1, batch):
        mask[row, max(2, length - row) :] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def unpadded(batch: int, length: int) -> dict[str, Tensor]:
    """Texts that are their own labels."""
    ids = torch.randint(0, VOCABULARY, (batch, length))
    return {"input_ids": ids, "labels": ids}


def classified(batch: int, length: int) -> dict[str, Tensor]:
    """Texts of classes."""
    return {**texts(batch, length), "labels": torch.randint(0, 2, (batch,))}


class Mlp(nn.Module):
    """Tokens of any leading sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 8)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.drop(F.gelu(self.norm(self.up(x)))))


class Convnet(nn.Module):
    """Images of any size, batch statistics, pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, stride=2)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.first(x))), 2)
        x = F.avg_pool2d(F.relu(self.second(x)), 2, ceil_mode=True)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Encoder(nn.Module):
    """torch's own encoder, with dropout and a mask of padding."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.embed = nn.Embedding(VOCABULARY, 16)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.layers(self.embed(ids), src_key_padding_mask=mask).mean(1)


def tokens(batch: int, length: int) -> Tensor:
    return torch.randn(batch, length, 8, requires_grad=True)


def images(batch: int, length: int) -> Tensor:
    return torch.randn(batch, 3, length + 10, 2 * length + 9)


def padded(batch: int, length: int) -> tuple[Tensor, Tensor]:
    given = texts(batch, length)
    return given["input_ids"], given["attention_mask"] == 0


def loss_of(result: Any) -> Tensor:
    """The model's own loss."""
    loss: Tensor = result.loss
    return loss


def square(result: Tensor) -> Tensor:
    """A loss of one tensor."""
    return result.pow(2).sum()


Case = tuple[Callable[[], nn.Module], Callable[[int, int], Any], Callable[[Any], Tensor]]
CASES: dict[str, Case] = {
    "gpt2": (gpt2, unpadded, loss_of),
    "llama": (llama, texts, loss_of),
    "bert": (bert, classified, loss_of),
    "mlp": (Mlp, tokens, square),
    "convnet": (Convnet, images, square),
    "encoder": (Encoder, padded, square),
}


def run(case: Case, sizes: list[tuple[int, int]], policy: Any, **options: Any) -> nn.Module:
    """Trains on batches of these sizes, as eager does; the rewritten model."""
    make, batch, loss = case
    return assert_same_training(
        make,
        lambda number: batch(*sizes[number]),
        loss,
        policy,
        steps=len(sizes),
        optimizer=options.pop("optimizer", sgd),
        dynamic=True,
        **options,
    )


def reasons(model: nn.Module) -> list[str]:
    """Why calls are captured size by size."""
    return [*runner_of(model).captures.of_one_size.values()]


# --- one capture for many sizes -------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_200_sizes_have_at_most_3_captures(name: str) -> None:
    sizes = pairs(130) if name == "convnet" else pairs(138, least=2)
    model = run(CASES[name], [*sizes, *reversed(sizes)][:200], "dots")
    assert not reasons(model)
    assert len(captures(model)) <= 3


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ["gpt2", "convnet", "encoder"])
def test_policies_serve_all_sizes(name: str, policy: str) -> None:
    if policy in ("attention", "block", "sqrt") and name == "convnet":
        pytest.skip("it has neither attention nor blocks")
    model = run(CASES[name], pairs(12), policy)
    assert not reasons(model)
    assert len(captures(model)) <= 3


@pytest.mark.parametrize("name", CASES)
def test_a_size_of_one_is_another_kind(name: str) -> None:
    sizes = [(1, 6), (3, 5), (1, 9), (2, 7), (4, 4), (1, 3)]
    model = run(CASES[name], sizes, "nothing")
    assert not reasons(model)
    assert len(captures(model)) == 2 + (name == "bert")
