"""The usual training loop, AdamW and cross entropy: every loss is the same, bit for bit."""

import copy

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fxckpt


def train(model: nn.Module, inputs: Tensor, labels: Tensor, steps: int) -> list[float]:
    """The losses; nothing in here knows about checkpointing."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(1)  # the same dropout for both models
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = cross_entropy(model(inputs).mean(1), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def main(steps: int = 10) -> tuple[list[float], list[float]]:
    """Losses of eager and of checkpointed training from the same weights."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True)
    model = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    rewritten = fxckpt.rewrite(copy.deepcopy(model), policy="block")
    inputs, labels = torch.randn(16, 8, 32), torch.randint(10, (16,))
    eager, ours = (train(m, inputs, labels, steps) for m in (model, rewritten))
    for step, (a, b) in enumerate(zip(eager, ours, strict=True)):
        print(f"step {step}  eager {a:.8f}  fxckpt {b:.8f}  {'equal' if a == b else 'DIFFERENT'}")
    return eager, ours


if __name__ == "__main__":
    main()
