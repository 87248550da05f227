"""LoRA by peft: a frozen Llama, a few trainable parameters, and what is kept for backward."""

import peft
import torch
from _memory import Memory, second_step
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import fxckpt


def build() -> nn.Module:
    """A Llama with random weights and adapters on its queries and values."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 6}
    size = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 256}
    model = LlamaForCausalLM(LlamaConfig(**heads, **size, use_cache=False))
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.1))


def main() -> tuple[Memory, Memory, bool]:
    """Memory of a step without and with checkpointing, and whether all gradients are equal."""
    tokens = torch.randint(256, (4, 128))
    memory, gradients = [], []
    for model in (build(), fxckpt.rewrite(build(), policy="block")):
        model.train()
        memory.append(second_step(lambda m=model: m(tokens, labels=tokens).loss, model.zero_grad))
        torch.manual_seed(1)
        model(tokens, labels=tokens).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    equal = all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    print(f"{len(gradients[0])} trainable parameters; all gradients equal: {equal}")
    print(f"without checkpointing  {memory[0]}\npolicy='block'         {memory[1]}")
    return memory[0], memory[1], equal


if __name__ == "__main__":
    main()
