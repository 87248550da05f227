"""Trains a GPT-2 from transformers with and without checkpointing; prints both peaks."""

import torch
from _memory import Memory, second_step
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import fxckpt


def build() -> nn.Module:
    """A GPT-2 with random weights, in training mode."""
    torch.manual_seed(0)
    size = {"n_layer": 8, "n_embd": 64, "n_head": 4, "n_positions": 128, "vocab_size": 256}
    model = GPT2LMHeadModel(GPT2Config(**size, bos_token_id=0, eos_token_id=0, use_cache=False))
    model.loss_type = "ForCausalLM"  # what transformers chooses too, after a warning
    return model.train()


def main() -> tuple[Memory, Memory]:
    """Memory of a training step without and with checkpointing."""
    model = build()
    tokens = torch.randint(256, (4, 128))
    found = []
    for net in (model, fxckpt.rewrite(model, policy="block")):
        found.append(second_step(lambda n=net: n(tokens, labels=tokens).loss, model.zero_grad))
    without, with_ = found
    print(f"without checkpointing  {without}")
    print(f"policy='block'         {with_}")
    return without, with_


if __name__ == "__main__":
    main()
