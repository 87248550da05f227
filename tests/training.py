"""Small models, data and checks for the tests of training libraries."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import accelerate
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

VOCABULARY, LENGTH = 64, 16


class Tokens(Dataset):
    """Random tokens as their own labels, some of them padded."""

    def __init__(self, count: int) -> None:
        self.tokens = torch.randint(VOCABULARY, (count, LENGTH), generator=generator())

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens, end = self.tokens[index], LENGTH - index % 4
        mask = (torch.arange(LENGTH) < end).long()
        return {
            "input_ids": tokens,
            "attention_mask": mask,
            "labels": tokens.where(mask.bool(), -100),
        }


def generator() -> torch.Generator:
    """A generator of its own, the same each time."""
    return torch.Generator().manual_seed(0)


def gpt2(**settings: Any) -> nn.Module:
    """A GPT-2 whose embedding is tied to its head, with dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 32, "vocab_size": VOCABULARY}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, **settings))
    model.loss_type = "ForCausalLM"  # what transformers chooses too, after a warning
    return model


def llama(**settings: Any) -> nn.Module:
    """A Llama with grouped queries."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": VOCABULARY}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    tokens = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **tokens, **settings))


def encoder(layers: int = 3) -> nn.TransformerEncoder:
    """Transformer layers of torch, with dropout."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


def vectors(count: int = 24) -> DataLoader:
    """Batches of four for `encoder`, and classes."""
    x = torch.randn(count, 8, 32, generator=generator())
    y = torch.randint(10, (count,), generator=generator())
    return DataLoader(TensorDataset(x, y), batch_size=4)


def forget_accelerator() -> None:
    """Lets another accelerator be made; there is one in a process."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def assert_same(ours: Iterable[Tensor], eager: Iterable[Tensor]) -> None:
    """Asserts that tensors are equal, bit by bit."""
    for a, b in zip(ours, eager, strict=True):
        assert torch.equal(a, b)
