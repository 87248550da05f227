"""Trained by `transformers.Trainer`, with PEFT too: bit for bit as without fxckpt."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers import captures
from torch import nn
from training import Tokens, assert_same, gpt2, llama
from transformers import GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

import fxckpt
from fxckpt.integrations.transformers import FxckptCallback

STEPS = 4  # half of them before a checkpoint
Build = Callable[[], nn.Module]


def trainer_of(model: Any, folder: Path, *callbacks: TrainerCallback, **arguments: Any) -> Trainer:
    """A trainer that logs, evaluates and saves."""
    usual = {
        "per_device_train_batch_size": 4,
        "max_steps": STEPS,
        "logging_steps": 1,
        "save_steps": STEPS // 2,
        "eval_strategy": "steps",
        "eval_steps": STEPS // 2,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": [],
        "seed": 3,
    }
    return Trainer(
        model,
        TrainingArguments(str(folder), **{**usual, **arguments}),
        train_dataset=Tokens(24),
        eval_dataset=Tokens(8),
        callbacks=[*callbacks],
    )


def losses(trainer: Trainer) -> list[float]:
    """Of training and evaluation."""
    logs = trainer.state.log_history
    return [log[key] for log in logs for key in ("loss", "eval_loss") if key in log]


class Watched(TrainerCallback):
    """Looks at the model while it is trained."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Notes how many graphs were captured."""
        self.captured = len(captures(kwargs["model"]))


def trained(build: Build, folder: Path, how: str, **arguments: Any) -> Trainer:
    """Trained as it is, rewritten in place, or with the callback; the last two as a whole."""
    model, callbacks, watched = build(), [], Watched()
    if how == "rewritten":
        fxckpt.rewrite_(model, "block", strict=True)
    if how == "callback":
        callbacks = [FxckptCallback(budget=0.7, strict=True, planning_seconds=1.0)]
    if how != "eager":
        callbacks.append(watched)
    trainer = trainer_of(model, folder, *callbacks, **arguments)
    trainer.train()
    assert how == "eager" or watched.captured
    return trainer


def assert_same_training(ours: Trainer, eager: Trainer) -> None:
    """Asserts equal losses and parameters."""
    assert losses(ours) == losses(eager)
    assert len(losses(ours)) >= STEPS
    assert_same(ours.model.parameters(), eager.model.parameters())


@pytest.fixture
def eager(tmp_path: Path) -> Callable[..., Trainer]:
    """Trains without fxckpt."""
    return lambda build, **arguments: trained(build, tmp_path / "eager", "eager", **arguments)


@pytest.mark.parametrize("how", ["rewritten", "callback"])
@pytest.mark.parametrize("build", [gpt2, llama])
def test_trainer(build: Build, how: str, eager: Callable[..., Trainer], tmp_path: Path) -> None:
    arguments = {"gradient_accumulation_steps": 2}
    expected = eager(build, **arguments)
    found = trained(build, tmp_path / "ours", how, **arguments)
    assert_same_training(found, expected)
    assert_same_files(tmp_path, f"checkpoint-{STEPS}")


def assert_same_files(folder: Path, checkpoint: str) -> None:
    """Asserts that the weights, the configuration and the optimizer were saved as without."""
    names = {path.name for path in (folder / "eager" / checkpoint).iterdir()}
    assert names == {path.name for path in (folder / "ours" / checkpoint).iterdir()}
    compared = {n for n in names if n.endswith((".safetensors", "config.json", "optimizer.pt"))}
    assert len(compared) >= 3
    for name in compared:
        ours, eager = (folder / who / checkpoint / name for who in ("ours", "eager"))
        assert ours.read_bytes() == eager.read_bytes()


@pytest.mark.parametrize(
    "arguments",
    [
        {"bf16": True},
        {"use_cache": True},
        {"label_names": ["labels"]},
        {"label_smoothing_factor": 0.1},
        {"neftune_noise_alpha": 5.0},
    ],
    ids=lambda a: next(iter(a)),
)
def test_arguments_of_the_trainer(
    arguments: dict[str, Any], eager: Callable[..., Trainer], tmp_path: Path
) -> None:
    expected = eager(llama, **arguments)
    assert_same_training(trained(llama, tmp_path / "ours", "rewritten", **arguments), expected)


def test_resume_save_and_generate(eager: Callable[..., Trainer], tmp_path: Path) -> None:
    expected = eager(gpt2)
    trained(gpt2, tmp_path / "ours", "callback")
    for callbacks in [[FxckptCallback("block", strict=True)], []]:
        resumed = trainer_of(gpt2(), tmp_path / "ours", *callbacks)
        resumed.train(resume_from_checkpoint=str(tmp_path / "ours" / f"checkpoint-{STEPS // 2}"))
        assert_same(resumed.model.parameters(), expected.model.parameters())
    ours = fxckpt.rewrite_(resumed.model, "block")
    resumed.save_model(str(tmp_path / "saved"))
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path / "saved")
    prompt = torch.zeros(1, 4, dtype=torch.long)
    for model in (ours, loaded):
        model.eval()
        settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        again, alone = (m.generate(prompt, **settings) for m in (model, expected.model.eval()))
        assert torch.equal(again, alone)


@pytest.mark.parametrize("how", ["rewritten", "callback"])
def test_lora(how: str, eager: Callable[..., Trainer], tmp_path: Path) -> None:
    def build() -> nn.Module:
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_dropout=0.1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks for what has a new name
            return peft.get_peft_model(llama(), config)

    expected, found = eager(build), trained(build, tmp_path / "ours", how)
    assert_same_training(found, expected)
    names = ["adapter_model.safetensors", "adapter_config.json", "optimizer.pt"]
    for name in names:
        ours, eagers = (tmp_path / who / f"checkpoint-{STEPS}" for who in ("ours", "eager"))
        assert (ours / name).read_bytes() == (eagers / name).read_bytes()
    merged = found.model.merge_and_unload()
    assert_same(merged.parameters(), expected.model.merge_and_unload().parameters())


@pytest.mark.parametrize("build", [gpt2, llama])
def test_key_value_caches_make_no_noise(build: Build) -> None:
    model = build().train()
    ours, tokens = fxckpt.rewrite(model, "block", strict=True), torch.zeros(2, 8, dtype=torch.long)
    for net in (model, ours):
        net.zero_grad()
        torch.manual_seed(0)
        out = net(tokens, labels=tokens)  # use_cache=True is the default
        out.loss.backward()
        assert out.past_key_values.get_seq_length() == 8
    assert len(captures(ours)) == 1


# --- the callback -------------------------------------------------------------------------------


def test_callback_restores_the_model(tmp_path: Path) -> None:
    model, watched = gpt2(), Watched()
    forward = model.forward
    trainer_of(model, tmp_path, FxckptCallback("block"), watched).train()
    assert watched.captured
    assert type(model) is GPT2LMHeadModel
    assert not fxckpt.is_rewritten(model)
    assert model.forward == forward


def test_checkpoints_lead_to_no_other_capture(tmp_path: Path) -> None:
    model, watched = gpt2(), Watched()
    model.save_pretrained(tmp_path)  # as if loaded: notes the dtype and the class in the config
    trainer_of(model, tmp_path, FxckptCallback("block"), watched, save_steps=1).train()
    assert watched.captured == 1


def test_callback_goes_on_after_an_error(tmp_path: Path) -> None:
    class Fails(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            raise KeyError("stop")

    callback, fails = FxckptCallback("block"), Fails()
    trainer = trainer_of(gpt2(), tmp_path, callback, fails)
    with pytest.raises(KeyError, match="stop"):
        trainer.train()
    trainer.remove_callback(fails)
    trainer.train()
    assert not fxckpt.is_rewritten(trainer.model)


def test_callback_refuses_a_rewritten_model(tmp_path: Path) -> None:
    model = fxckpt.rewrite_(gpt2(), "block")
    with pytest.raises(fxckpt.FxckptError, match="is rewritten already"):
        trainer_of(model, tmp_path, FxckptCallback("block")).train()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"policy": "blok"}, fxckpt.PolicyError),
        ({"budget": "8 apples"}, fxckpt.BudgetError),
        ({"policy": "block", "budget": 0.5}, fxckpt.BudgetError),
        ({"polcy": "block"}, TypeError),
    ],
)
def test_callback_refuses_options_at_once(arguments: dict[str, Any], error: Any) -> None:
    with pytest.raises(error):
        FxckptCallback(**arguments)


def test_callback_refuses_what_makes_it_useless(tmp_path: Path) -> None:
    trainer = trainer_of(gpt2(), tmp_path, FxckptCallback("block"))
    trainer.args.gradient_checkpointing = True
    with pytest.raises(fxckpt.FxckptError, match="gradient_checkpointing=True in TrainingArg"):
        FxckptCallback("block").on_train_begin(trainer.args, None, None, model=trainer.model)
    assert not fxckpt.is_rewritten(trainer.model)


class Compiled(TrainerCallback):
    """Tells what was compiled."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Notes the latest graphs of Dynamo, and how many halves Inductor has compiled."""
        self.operations = torch._dynamo.utils.counters["stats"]["calls_captured"]
        programs = [p for c in captures(kwargs["model"]) for p in c._programs.values()]
        self.halves = sum(len(p.compiled or ()) for p in programs)


@pytest.mark.parametrize(
    ("backend", "steps"), [("aot_eager", 4), pytest.param("inductor", 12, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("build", [gpt2, llama])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Inductor's
def test_callback_with_torch_compile(
    build: Build,
    backend: str,
    steps: int,
    eager: Callable[..., Trainer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The losses of eager, with its masks of dropout, in one operation without breaks."""
    expected = eager(build, max_steps=steps)
    for name in ("BACKEND", "MODE"):  # that is how the arguments tell accelerate
        monkeypatch.setenv(f"ACCELERATE_DYNAMO_{name}", "")
        monkeypatch.delenv(f"ACCELERATE_DYNAMO_{name}")
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    seen = Compiled()
    callback = FxckptCallback("block", strict=True)
    ours = trainer_of(
        build(), tmp_path / "ours", callback, seen, max_steps=steps, torch_compile_backend=backend
    )
    ours.train()
    assert seen.operations
    assert not torch._dynamo.utils.counters["graph_break"]
    assert not fxckpt.is_rewritten(ours.model)
    if backend == "aot_eager":
        assert_same_training(ours, expected)
    else:
        assert seen.halves
        assert losses(ours) == pytest.approx(losses(expected), rel=1e-4)
    assert ours.evaluate()["eval_loss"] == pytest.approx(expected.evaluate()["eval_loss"], rel=1e-4)


OWN = "activation_checkpointing_enable"  # gradient_checkpointing_enable before transformers 5.20


@pytest.mark.parametrize(
    ("policy", "options"),
    [("block", {}), ("dots", {}), ("norm", {}), ("block", {"units": "blocks"})],
)
def test_beside_checkpointing_of_the_model_itself(policy: str, options: dict[str, Any]) -> None:
    """Both at once are exact, whichever was switched on first."""
    tokens = torch.arange(32).view(2, 16)
    found = []
    for order in ("eager", "model first", "rewritten first"):
        model = llama().train()
        enable = getattr(model, OWN, None) or model.gradient_checkpointing_enable
        if order != "rewritten first":
            enable({"use_reentrant": False})
        if order != "eager":
            model = fxckpt.rewrite_(model, policy, strict=True, **options)
        if order == "rewritten first":
            enable({"use_reentrant": False})
        for _ in range(2):
            model.zero_grad()
            model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        assert order == "eager" or captures(model) or options
        found.append([p.grad for p in model.parameters()])
    assert_same(found[1], found[0])
    assert_same(found[2], found[0])


def test_trainer_that_checkpoints_by_itself(eager: Callable[..., Trainer], tmp_path: Path) -> None:
    name = "activation" if hasattr(llama(), OWN) else "gradient"
    kwargs: dict[str, Any] = {f"{name}_checkpointing": True, "save_strategy": "no"}
    kwargs[f"{name}_checkpointing_kwargs"] = {"use_reentrant": False}
    expected = eager(llama, **kwargs)
    assert_same_training(trained(llama, tmp_path / "ours", "rewritten", **kwargs), expected)


def test_callback_tells_if_the_model_is_not_called(tmp_path: Path) -> None:
    class Around(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
            hidden = model.transformer(inputs["input_ids"]).last_hidden_state
            return hidden.square().mean()

    arguments = TrainingArguments(str(tmp_path), max_steps=2, use_cpu=True, report_to=[])
    callbacks = [FxckptCallback("block")]
    trainer = Around(gpt2(), arguments, train_dataset=Tokens(8), callbacks=callbacks)
    with pytest.warns(fxckpt.FallbackWarning, match="does not call the forward of GPT2LMHead"):
        trainer.train()


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.split(".")[0] == "transformers"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "fxckpt.integrations.transformers")
    with pytest.raises(ModuleNotFoundError, match="pip install transformers"):
        import fxckpt.integrations.transformers  # noqa: F401
