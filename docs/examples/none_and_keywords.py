"""None and keyword arguments, which reentrant checkpointing rejects, and a dictionary as result."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fxckpt


class Gated(nn.Module):
    """A layer with an optional mask and keyword-only options."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, *, scale: float = 1.0, extras: bool = False
    ) -> dict[str, Tensor | None]:
        """The output, and None or the gate."""
        gate = torch.sigmoid(self.gate(x))
        out = self.up(x) * gate * scale
        return {"out": out if mask is None else out * mask, "gate": gate if extras else None}


def main() -> tuple[list[bool], str]:
    """For each call whether it equals eager bit for bit; what reentrant checkpointing says."""
    torch.manual_seed(0)
    model = Gated()
    rewritten = fxckpt.rewrite(model, policy="nothing")
    x, mask = torch.randn(4, 8), torch.ones(4, 8).tril()
    equal = []
    for args, kwargs in [
        ((x,), {}),
        ((x, None), {"scale": 0.5}),
        ((x,), {"mask": mask, "scale": 0.5, "extras": True}),
    ]:
        steps = []
        for net in (model, rewritten):
            result = net(*args, **kwargs)
            grads = torch.autograd.grad(result["out"].sum(), list(model.parameters()))
            steps.append([*(t for t in result.values() if t is not None), *grads])
        equal.append(len(steps[0]) == len(steps[1]) and all(map(torch.equal, *steps)))
        print(f"keywords {list(kwargs)}: equal bit for bit: {equal[-1]}")
    try:
        checkpoint(model, x, None, scale=0.5, use_reentrant=True)
        refusal = ""
    except ValueError as error:
        refusal = str(error)
    print("torch.utils.checkpoint, reentrant:", refusal)
    return equal, refusal


if __name__ == "__main__":
    main()
