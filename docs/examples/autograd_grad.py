"""`torch.autograd.grad` through a checkpointed model, which reentrant checkpointing rejects."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fxckpt


def main() -> tuple[bool, bool, str]:
    """Whether gradients equal eager's bit for bit, of the input and of the weights; the refusal."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 8), nn.Tanh())
    rewritten = fxckpt.rewrite(model, policy="nothing")
    x = torch.randn(4, 8, requires_grad=True)

    def of_input(out: Tensor) -> Tensor:
        return torch.autograd.grad(out.sum(), x)[0]

    def of_weights(out: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out.sum(), list(model.parameters()))

    inputs = torch.equal(of_input(model(x)), of_input(rewritten(x)))
    weights = all(map(torch.equal, of_weights(model(x)), of_weights(rewritten(x))))
    try:
        of_input(checkpoint(model, x, use_reentrant=True))
        refusal = ""
    except RuntimeError as error:
        refusal = str(error)
    print("gradient of the input equal bit for bit:", inputs)
    print("gradients of the weights equal bit for bit:", weights)
    print("torch.utils.checkpoint, reentrant:", refusal)
    return inputs, weights, refusal


if __name__ == "__main__":
    main()
