"""The command line: answers, exit codes, data, errors that help."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from fxckpt import cli, targets
from fxckpt.plans import SCHEMA
from fxckpt.targets import Sizes, TargetError

SMALL = ["--set", "n_layer=2", "--set", "n_embd=64", "--set", "n_head=2", "--seq", "32"]
GPT2 = ["--model", "gpt2", *SMALL, "--set", "vocab_size=64", "--batch", "8"]
FAST = ["--device", "a100", "--seconds", "0.1"]


def make_chain(batch: int = 64, width: int = 16) -> tuple[nn.Module, tuple[Any, ...]]:
    """A factory, as users write them."""
    layers = [layer for _ in range(8) for layer in (nn.Linear(width, width), nn.Tanh())]
    return nn.Sequential(*layers), (torch.ones(batch, width),)


def make_nothing() -> int:
    """A factory that returns something else."""
    return 3


CHAIN = [f"{__name__}:make_chain", "--batch", "4096"]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    """Runs the command line: exit code, stdout, stderr."""

    def run_cli(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = cli.main(arguments)
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run_cli


# --- answers --------------------------------------------------------------------------------------


def test_plan(run, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    code, out, err = run("plan", *CHAIN, *FAST, "--budget", "0.5", "--save", str(path))
    assert code == 0
    assert out.startswith("it fits with this plan\n")
    assert re.search(r"runs again +\S+ \S+ \(\+\d+\.\d%\)", out)
    assert "a100 has 79.1 GiB" in out
    assert "making" in err
    assert "planning" in err
    assert json.loads(path.read_text())["schema"] == SCHEMA
    assert run("plan", *CHAIN, *FAST, "--quiet")[0::2] == (0, "")


def test_what_does_not_fit(run) -> None:
    code, out, err = run("plan", *CHAIN, *FAST, "--budget", "1KiB")
    assert (code, out) == (1, "")
    assert "it does not fit: no plan fits a budget of 1 KiB" in err
    wide = [f"{__name__}:make_chain", "--set", "width=65536"]
    code, _, err = run("plan", *wide, "--device", "t4")
    assert code == 1
    assert "alone are more than the memory of t4" in err
    assert run("explain", *wide, "--device", "t4")[0] == 1


def test_json(run) -> None:
    code, out, _ = run("plan", *GPT2, *FAST, "--budget", "0.6", "--json")
    data = json.loads(out)
    assert code == 0
    assert data["fits"]
    assert data["peak"] <= data["budget"] < data["eager_peak"]
    _, out, _ = run("explain", *GPT2, *FAST, "--policy", "dots", "--json")
    assert json.loads(out)["eager_peak"] == data["eager_peak"]


def test_explain(run, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    code, out, _ = run("explain", *GPT2, *FAST, "--budget", "0.6", "--html", str(page))
    assert code == 0
    assert "GPT2LMHeadModel, budget" in out
    assert page.read_text().startswith("<!DOCTYPE html>")
    _, out, _ = run("explain", *GPT2, *FAST, "--markdown")
    assert out.startswith("## GPT2LMHeadModel, as it is")


def test_frontier_and_compare(run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "curve.png"
    arguments = ["--points", "3", "--plot", str(picture), "--budget", "0.6"]
    code, out, _ = run("frontier", *GPT2, *FAST, *arguments)
    assert code == 0
    assert len(re.findall(r"^fxckpt ", out, re.MULTILINE)) == 3
    assert picture.stat().st_size > 5000
    code, out, _ = run("compare", *GPT2, *FAST, "--budget", "0.6", "--json")
    rows = {entry["strategy"]: entry for entry in json.loads(out)}
    assert code == 0
    assert {"as it is", "per-block checkpointing", "sqrt(n) segments"} <= rows.keys()
    for row in rows.values():
        assert row.get("fxckpt", 0) <= row["overhead"]


def test_fit_batch(run) -> None:
    code, out, err = run(
        "fit-batch", f"{__name__}:make_chain", *FAST, "--budget", "60KiB", "--json"
    )
    data = json.loads(out)
    assert code == 0
    assert data["batch"] > 1
    assert data["peak"] <= data["budget"]
    assert f"planning for a batch of {data['batch']}" in err
    larger = ["--batch", str(data["batch"] + 1), "--budget", "60KiB"]
    assert run("plan", f"{__name__}:make_chain", *FAST, *larger)[0] == 1


def test_it_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "fxckpt", "plan", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "python -m fxckpt plan --model gpt2" in done.stdout


# --- models by name -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes", "cls", "inputs"),
    [
        ("gpt2", {"n_layer": 1}, "GPT2LMHeadModel", {"input_ids", "labels"}),
        ("bert", {"num_hidden_layers": 1}, "BertForMaskedLM", {"input_ids", "labels"}),
        ("llama", {"num_hidden_layers": 1}, "LlamaForCausalLM", {"input_ids", "labels"}),
        ("t5", {"num_layers": 1}, "T5ForConditionalGeneration", {"input_ids", "labels"}),
        ("vit", {"num_hidden_layers": 1}, "ViTForImageClassification", {"pixel_values", "labels"}),
    ],
)
def test_models_of_transformers(name: str, changes: Any, cls: str, inputs: set[str]) -> None:
    target = targets.load(name, Sizes(3, 16, 224), torch.bfloat16, changes)
    assert type(target.model).__name__ == cls
    assert all(isinstance(p, FakeTensor) for p in target.model.parameters())
    assert {p.dtype for p in target.model.parameters()} == {torch.bfloat16}
    args, kwargs = target.call(3)
    assert (args, kwargs.keys()) == ((), inputs)
    assert all(value.shape[0] == 3 for value in kwargs.values())
    assert torch.get_default_dtype() is torch.float32


def test_tied_weights_stay_tied() -> None:
    model: Any = targets.load("gpt2", Sizes(), torch.float32, {"n_layer": 1}).model
    assert model.lm_head.weight is model.transformer.wte.weight


# --- questions that cannot be answered ------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan"], "one of the arguments module:factory --model is required"),
        (["plan", "gpt2", "--budget", "1GiB"], "is named by --model gpt2"),
        (["plan", "--model", "gtp2", "--budget", "1GiB"], "did you mean 'gpt2'"),
        (["plan", "--model", "gpt2"], "give --budget, or --device"),
        (["plan", *GPT2, "--device", "h20"], "did you mean 'h200'?"),
        (["plan", *GPT2, "--budget", "lots"], "expected bytes, such as 20GiB"),
        (["plan", *GPT2, "--batch", "0"], "expected a positive integer"),
        (["plan", *GPT2, *FAST, "--set", "layers=3"], "did you mean 'n_layer'"),
        (["plan", *GPT2, "--set", "n_layer"], "expected KEY=VALUE"),
        (["plan", *GPT2, *FAST, "--seq", "4096"], "has 1024 positions"),
        (["plan", "--model", "whisper", *FAST], "takes 'input_features'"),
        (["plan", "nowhere:make", *FAST], "cannot import 'nowhere'"),
        (["plan", f"{__name__}:make_chian", *FAST], "did you mean 'make_chain'"),
        (["plan", f"{__name__}:make_nothing", *FAST], r"has to return \(model, arguments\)"),
        (["plan", *CHAIN, *FAST, "--set", "height=3"], "unexpected keyword argument"),
        (["fit-batch", *CHAIN, *FAST, "--budget", "0.5"], "needs --budget in bytes"),
        (["explain", *GPT2, *FAST, "--policy", "dost"], "did you mean 'dots'"),
        (["explain", *CHAIN, *FAST, "--policy", "dots", "--budget", "1MB"], "exclude each other"),
        (["explian", *GPT2], "invalid choice: 'explian'"),
    ],
)
def test_usage_errors(run, arguments: list[str], message: str) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert re.search(message, err), err


def test_factory_without_batch() -> None:
    target = targets.load(f"{__name__}:make_fixed", Sizes(), torch.float32, {})
    target.call(1)
    with pytest.raises(TargetError, match="takes no argument batch="):
        target.call(2)


def make_fixed() -> tuple[nn.Module, dict[str, Any]]:
    """A factory for one batch alone."""
    return nn.Linear(2, 2), {"input": torch.ones(3, 2)}
