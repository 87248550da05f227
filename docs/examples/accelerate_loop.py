"""accelerate with mixed precision and accumulated gradients: rewrite the model, then prepare it."""

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import fxckpt


def train(rewritten: bool) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses, and what accelerate would save."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True)
    model = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    if rewritten:
        fxckpt.rewrite_(model, policy="block")
    data = DataLoader(TensorDataset(torch.randn(16, 8, 32), torch.randint(10, (16,))), batch_size=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
    model, optimizer, data = accelerator.prepare(model, optimizer, data)
    losses = []
    for x, labels in data:
        with accelerator.accumulate(model):
            loss = cross_entropy(model(x).mean(1), labels)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses, accelerator.get_state_dict(model)


def main() -> tuple[list[float], list[float], bool]:
    """Losses without and with checkpointing, and whether the same would be saved."""
    (without, saved), (with_, also_saved) = train(rewritten=False), train(rewritten=True)
    same_keys = list(saved) == list(also_saved)
    equal = same_keys and all(torch.equal(saved[key], also_saved[key]) for key in saved)
    print(f"losses without {without}\nlosses with    {with_}\nsaved equal: {equal}")
    return without, with_, equal


if __name__ == "__main__":
    main()
