"""`transformers.Trainer` with a callback: evaluation, checkpoints and losses as without it."""

import tempfile

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from fxckpt.integrations.transformers import FxckptCallback


class Tokens(Dataset):
    """Random tokens, to be learnt by heart."""

    def __init__(self) -> None:
        self.tokens = torch.randint(64, (32, 16), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


def build() -> nn.Module:
    """A GPT-2 with random weights."""
    torch.manual_seed(0)
    size = {"n_layer": 3, "n_embd": 32, "n_head": 2, "n_positions": 16, "vocab_size": 64}
    model = GPT2LMHeadModel(GPT2Config(**size, bos_token_id=0, eos_token_id=0))
    model.loss_type = "ForCausalLM"  # what transformers chooses too, after a warning
    return model


def train(callbacks: list[FxckptCallback], folder: str, steps: int) -> Trainer:
    """Two batches a step, an evaluation and a checkpoint in the middle and at the end."""
    arguments = TrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=steps // 2,
        save_steps=steps // 2,
        use_cpu=True,
        report_to=[],
    )
    data = Tokens()
    trainer = Trainer(build(), arguments, train_dataset=data, eval_dataset=data)
    for callback in callbacks:
        trainer.add_callback(callback)
    trainer.train()
    return trainer


def main(steps: int = 6) -> tuple[list[float], list[float], bool]:
    """Losses without and with the callback, and whether all parameters are equal in the end."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for callbacks in ([], [FxckptCallback("block")]):
            found.append(train(callbacks, folder, steps))
    keys = ("loss", "eval_loss")
    without, with_ = (
        [log[key] for log in trainer.state.log_history for key in keys if key in log]
        for trainer in found
    )
    pairs = zip(found[0].model.parameters(), found[1].model.parameters(), strict=True)
    equal = all(torch.equal(a, b) for a, b in pairs)
    print(f"losses without {without}\nlosses with    {with_}\nparameters equal: {equal}")
    return without, with_, equal


if __name__ == "__main__":
    main()
