"""Trained by accelerate: bit for bit as without fxckpt."""

from __future__ import annotations

from typing import Any

import accelerate
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from training import assert_same, encoder, forget_accelerator, vectors

import fxckpt


def trained(how: str, precision: str) -> tuple[list[float], nn.Module, Any]:
    """Losses, what `prepare` returned and the accelerator."""
    forget_accelerator()
    accelerator = accelerate.Accelerator(
        cpu=True, mixed_precision=precision, gradient_accumulation_steps=2
    )
    model = encoder()
    if how == "before":
        fxckpt.rewrite_(model, "block", strict=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    net, optimizer, batches = accelerator.prepare(model, optimizer, vectors())
    if how == "after":
        fxckpt.rewrite_(net, "block", strict=True)
    torch.manual_seed(1)
    losses = []
    for x, y in batches:
        with accelerator.accumulate(net):
            loss = cross_entropy(net(x).mean(1), y)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses, net, accelerator


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("how", ["before", "after"])
def test_accelerate(how: str, precision: str, tmp_path: Any) -> None:
    expected, eager, _ = trained("eager", precision)
    losses, net, accelerator = trained(how, precision)
    fxckpt.graphs(net)  # something was captured
    assert losses == expected
    assert_same(net.parameters(), eager.parameters())
    accelerator.save_model(net, tmp_path)
    plain = accelerator.unwrap_model(net)
    assert fxckpt.is_rewritten(plain)
    saved = accelerator.get_state_dict(net)
    encoder().load_state_dict(saved)
    assert list(saved) == list(eager.state_dict())


def test_unwrapped_without_mixed_precision() -> None:
    _, eager, accelerator = trained("eager", "bf16")
    eager = accelerator.unwrap_model(eager, keep_fp32_wrapper=False)
    _, net, accelerator = trained("before", "bf16")
    net = accelerator.unwrap_model(net, keep_fp32_wrapper=False)
    x, _ = next(iter(vectors()))
    for model in (eager, net):
        torch.manual_seed(1)
        model.zero_grad()
        model(x).sum().backward()
    fxckpt.graphs(net)
    assert_same([p.grad for p in net.parameters()], [p.grad for p in eager.parameters()])


def stepped(steps: str, how: Any) -> list[list[torch.Tensor]]:
    """Gradients of two calls after each step: prepared, unwrapped, rewritten, restored."""
    forget_accelerator()
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    model, (x, _), found = encoder(2), next(iter(vectors())), []
    for step in steps:
        if step == "P":
            model = accelerator.prepare(model)
        elif step == "U":
            model = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        elif step == "R":
            model = how(model) if how else model
        elif how:
            model = fxckpt.restore_(model)
        for _ in range(2):
            torch.manual_seed(1)
            model.zero_grad()
            model(x).float().sum().backward()
            found.append([p.grad.clone() for p in model.parameters()])
        if how and fxckpt.is_rewritten(model):
            fxckpt.graphs(model)
    return found


@pytest.mark.parametrize("steps", ["PRUS", "PRSU", "RPSU", "RPRU", "PRUP"])
@pytest.mark.parametrize("how", [fxckpt.rewrite, fxckpt.rewrite_])
def test_every_order(steps: str, how: Any) -> None:
    """The model is checkpointed where it is rewritten, in mixed precision where it is prepared."""

    def install(model: nn.Module) -> nn.Module:
        return how(model, "block", strict=True)

    for ours, expected in zip(stepped(steps, install), stepped(steps, None), strict=True):
        assert_same(ours, expected)
