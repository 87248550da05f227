"""Each example under docs/examples/ shows what it says, and docs/limits.md says what is so."""

import ast
import importlib
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "docs" / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("[a-z]*.py"))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch):
    """Runs `main` of the example with that name, as if it were a script."""
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def run_example(name: str, *args: Any) -> Any:
        return importlib.import_module(name).main(*args)

    return run_example


def test_every_example_is_tested_and_listed() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for name in NAMES:
        assert f'run("{name}"' in source
        assert f"[{name}.py]({name}.py)" in listed


def test_bert_layers_are_checkpointed_without_editing_the_model(run) -> None:
    memory, equal = run("bert_layers")
    assert equal
    eager = memory.pop("eager")
    assert len(memory) == 2
    for rewritten in memory.values():
        assert rewritten.saved < eager.saved / 4
        assert rewritten.peak < eager.peak / 2


def test_batch_norm_statistics_are_updated_once(run) -> None:
    found = run("residual_batchnorm")
    for name in ("eager", "fxckpt"):
        assert found[name] == {
            "batches": 1,
            "gradients": True,
            "statistics": True,
            "evaluation": True,
        }
    assert found["torch.utils.checkpoint"]["batches"] == 2
    assert not found["torch.utils.checkpoint"]["statistics"]


def test_gpt2_peaks_lower(run) -> None:
    without, with_ = run("gpt2_peak")
    assert with_.peak < without.peak / 2
    assert with_.saved < without.saved / 4


def test_adamw_losses_are_equal(run) -> None:
    eager, ours = run("adamw_loop", 5)
    assert len(eager) == 5
    assert eager == ours
    assert eager[-1] < eager[0]


def test_amp_is_exact(run) -> None:
    assert run("amp") == {"bfloat16": True, "float16": True, "float32": True}


def test_none_and_keywords(run) -> None:
    equal, refusal = run("none_and_keywords")
    assert equal == [True, True, True]
    assert "Unexpected keyword arguments" in refusal


def test_autograd_grad(run) -> None:
    inputs, weights, refusal = run("autograd_grad")
    assert inputs
    assert weights
    assert "incompatible with .grad()" in refusal


def test_more_samples_fit(run) -> None:
    before, after = run("largest_batch")
    assert before > 1
    assert after >= 2 * before


def test_memory_grows_like_the_square_root(run) -> None:
    found = run("sqrt_memory")
    (shortest, *_, longest) = sorted(found)
    growth = longest / shortest
    eager, ours = zip(found[shortest], found[longest], strict=True)
    for what in ("saved", "peak"):
        grown_eager = getattr(eager[1], what) / getattr(eager[0], what)
        grown_ours = getattr(ours[1], what) / getattr(ours[0], what)
        assert grown_eager > 0.8 * growth
        assert grown_ours < 1.2 * growth**0.5


# --- docs/limits.md -----------------------------------------------------------------------------

# Caught by the runtime, which then runs forward again: nobody sees it.
INTERNAL = {"backward needs {}, which was not kept"}


def reasons() -> set[str]:
    """The first argument of each `CaptureError(...)` in the package, `{}` where it varies."""
    found = set()
    for path in (ROOT / "fxckpt").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("CaptureError"):
                text = template(node.args[0])
                if text is not None:
                    found.add(text)
    return found


def template(node: ast.expr) -> str | None:
    """The text of a string or f-string, `{}` where it varies; None of anything else."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(v.value if isinstance(v, ast.Constant) else "{}" for v in node.values)
    return None


def quoted() -> set[str]:
    """The messages in the tables of docs/limits.md, `{}` for what stands in angle brackets."""
    text = (ROOT / "docs" / "limits.md").read_text(encoding="utf-8")
    cells = re.findall(r"^\| ``? ?(.+?) ?``? \|", text, re.MULTILINE)
    return {re.sub(r"<\w+>", "{}", cell) for cell in cells}


def test_every_reason_to_fall_back_is_documented() -> None:
    missing = reasons() - INTERNAL - quoted()
    assert not missing, f"docs/limits.md lacks {sorted(missing)}"


def test_no_documented_reason_is_outdated() -> None:
    outdated = quoted() - reasons()
    assert not outdated, f"docs/limits.md quotes what the code no longer says: {sorted(outdated)}"
