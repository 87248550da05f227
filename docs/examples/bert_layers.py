"""Checkpoints the encoder layers of a BERT from transformers, without editing the model."""

import torch
from _memory import Memory, second_step
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

import fxckpt


def build() -> nn.Module:
    """A BERT with random weights, in training mode: dropout is on."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=128,
        hidden_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=64,
    )
    return BertForSequenceClassification(config).train()


def train_once(model: nn.Module, batch: dict[str, Tensor]) -> tuple[list[Tensor], Memory]:
    """The gradients of one step, and its memory."""
    torch.manual_seed(1)  # the same dropout for every model
    model(**batch).loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return grads, second_step(lambda: model(**batch).loss, model.zero_grad)


def main() -> tuple[dict[str, Memory], bool]:
    """Memory by way of training, and whether all gradients are equal bit for bit."""
    model = build()
    batch = {"input_ids": torch.randint(128, (8, 64)), "labels": torch.randint(2, (8,))}
    expected, memory = train_once(model, batch)
    found, equal = {"eager": memory}, True
    ways = {
        'policy="block"': fxckpt.rewrite(model, policy="block"),
        'recompute="bert.encoder.layer.*"': fxckpt.rewrite(model, recompute="bert.encoder.layer.*"),
    }
    for name, rewritten in ways.items():
        grads, found[name] = train_once(rewritten, batch)
        equal &= all(map(torch.equal, expected, grads)) and len(expected) == len(grads)
    for name, memory in found.items():
        print(f"{name:34} {memory}")
    print("gradients equal bit for bit:", equal)
    return found, equal


if __name__ == "__main__":
    main()
