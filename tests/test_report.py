"""Reports: their figures are those of the replay, and what is shown of them is complete."""

import dataclasses
import json
import math
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Stack, chain
from hypothesis import given
from hypothesis import strategies as st
from test_random_models import instructions, make_program
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fxckpt
from bench.models import build
from fxckpt import RECOMPUTE, SAVE, CaptureError, FallbackWarning, FxckptError, Report
from fxckpt.account import Account, Row
from fxckpt.capture import capture
from fxckpt.collapse import collapsed
from fxckpt.joint import Joint
from fxckpt.memory import Memory
from fxckpt.render import WIDTH, binned, shorten

DEVICE = "a100"
X, LARGE = torch.ones(64, 16), torch.ones(4096, 16)


def explained(model: Any, *args: Any, **kwargs: Any) -> Report:
    """With rates that do not depend on this machine."""
    return fxckpt.explain(model, *args, device=DEVICE, planning_seconds=1.0, **kwargs)


def joint_of_call(model: nn.Module, *args: Any, **kwargs: Any) -> Joint:
    tape = capture(model.forward, args, kwargs, module=model)
    return tape.joint(tape.expected_backward())


def assert_consistent(report: Account) -> None:
    """What a report says in one place is what it says in the others."""
    for moments, peak in ((report.before, report.eager_peak), (report.after, report.peak)):
        assert all(sum(m.kinds) == m.live for m in moments)
        assert min(min(m.kinds) for m in moments) >= 0
        assert [m.seconds for m in moments] == sorted(m.seconds for m in moments)
        assert max(m.live for m in moments) == peak
    assert sum(report.split().values()) == report.peak == sum(h.bytes for h in report.at_peak)
    assert sum(row.bytes for row in report.rows if row.action == "saved") == report.saved
    again = math.fsum(row.seconds for row in report.rows if row.action == "recomputed")
    assert again == pytest.approx(report.seconds)
    assert sum(entry.layers for entry in collapsed(report.rows)) == len(report.rows)


# --- figures --------------------------------------------------------------------------------------


@given(
    code=instructions,
    rows=st.integers(2, 3),
    width=st.sampled_from([2, 4]),
    share=st.integers(0, 4),
)
def test_random_models(code: list[Any], rows: int, width: int, share: int) -> None:
    def policy(value: Any) -> Any:
        return SAVE if sum(map(ord, value.name)) % 4 < share else RECOMPUTE

    model, x, ids = make_program(code, width), torch.randn(rows, width), torch.arange(rows)
    try:
        report = explained(model, x, ids=ids, policy=policy)
    except (CaptureError, RuntimeError):
        return  # eager raises as well, or says in advance what it is
    assert_consistent(report)
    joint = joint_of_call(model, x, ids=ids)
    saved = {v.node for v in joint.values() if policy(v) is SAVE}
    replay = Memory(joint, workspaces=False).replay(saved)
    assert (report.peak, report.saved) == (replay.peak, replay.saved)
    assert [m.live for m in report.after] == [m.live for m in replay.moments]
    assert max(map(len, str(report).split("\n"))) <= WIDTH
    assert json.loads(report.to_json()) == report.to_dict()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in ("gpt2", "resnet", "unet", "t5")),
        *((name, {"policy": "dots"}) for name in ("gpt2", "resnet", "unet", "t5")),
        *((name, {"budget": 0.9}) for name in ("gpt2", "unet")),
    ],
    ids=str,
)
def test_models(name: str, options: dict[str, Any]) -> None:
    case = build(name, tiny=True)
    report = explained(case.model, **case.batch(0), **options)
    assert_consistent(report)
    assert report.rewritten == bool(options)
    assert {row.action for row in report.rows} <= {"saved", "recomputed", "output", "freed"}
    assert any(row.action == "recomputed" for row in report.rows) == bool(options)
    text = str(report)
    assert max(map(len, text.split("\n"))) <= WIDTH
    assert type(case.model).__name__ in text
    if "budget" in options:
        plan = fxckpt.plan(
            case.model, budget=0.9, device=DEVICE, planning_seconds=1.0, **case.batch(0)
        )
        figures = (plan.peak, plan.eager_peak, plan.budget, plan.bound, plan.gap)
        found = (report.peak, report.eager_peak, report.budget, report.bound, report.gap)
        assert found == figures
        assert report.seconds == pytest.approx(plan.seconds)


def test_the_step_as_it_is() -> None:
    report = explained(chain(4, 16), X)
    assert (report.how, report.rewritten, report.seconds) == ("as it is", False, 0)
    assert (report.saved, report.peak) == (report.eager_saved, report.eager_peak)
    assert {row.reason.split()[0] for row in report.rows if row.action == "saved"} == {"for"}
    assert report.inputs == (("input", "float32", (64, 16)),)
    assert report.parameters == 4 * (16 * 16 + 16) * 4


def test_what_is_measured_is_what_was_foretold() -> None:
    model = chain(6, 16)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for options in ({}, {"policy": "nothing"}, {"budget": 0.7}):
        report = fxckpt.explain(model, LARGE, measure=True, planning_seconds=1.0, **options)
        assert report.measured == report.peak
        assert "100% of the prediction" in str(report)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert "on cpu" in str(explained(model, X, measure=True))


def test_fake_tensors() -> None:
    with FakeTensorMode():
        model, x = chain(4, 64), torch.ones(1 << 20, 64)
    report = explained(model, x, policy="nothing")
    assert_consistent(report)
    assert report.peak >= x.numel() * 4 * 4


# --- what is explained ----------------------------------------------------------------------------


def test_a_rewritten_model_after_a_step() -> None:
    model = fxckpt.rewrite(chain(8, 16), budget=0.6, planning_seconds=1.0)
    with pytest.raises(FxckptError, match="nothing was captured"):
        fxckpt.explain(model)
    model(LARGE).backward(LARGE)
    report = explained(model)
    assert_consistent(report)
    assert report.budget is not None
    assert report.peak <= report.budget < report.eager_peak
    assert report.bound is not None
    assert report.how.startswith("budget ")
    asked = explained(model, LARGE)
    assert asked.to_dict() == report.to_dict()
    other = explained(model, LARGE[:2048])
    assert other.eager_peak < report.eager_peak


def test_a_rewritten_model_with_a_policy() -> None:
    model = fxckpt.rewrite(Stack(), recompute="blocks.*", example_inputs=(torch.ones(2, 4, 8),))
    report = explained(model)
    assert_consistent(report)
    assert report.how == "recompute='blocks.*'"
    assert report.budget is report.gap is None
    assert explained(model, torch.ones(2, 4, 8), policy="dots").how == "policy='dots'"


def test_a_plan_that_is_used() -> None:
    model = chain(8, 16)
    plan = fxckpt.plan(model, LARGE, budget=0.6, device=DEVICE, planning_seconds=1.0)
    lean = fxckpt.rewrite(model, plan=plan)
    lean(LARGE).backward(LARGE)
    report = fxckpt.explain(lean)
    assert (report.budget, report.peak, report.device) == (plan.budget, plan.peak, DEVICE)


def test_functions() -> None:
    def wave(x: Tensor) -> Tensor:
        return x.sin().sin().cos().sum()

    x = torch.ones(64, requires_grad=True)
    plain = explained(wave, x)
    assert plain.title == "wave"
    lean = fxckpt.checkpoint(wave)
    report = explained(lean, x)
    assert_consistent(report)
    assert (report.title, report.saved) == ("wave", 0)
    assert report.how == "policy='nothing'"
    lean(x).backward()
    assert explained(lean).to_dict() == {
        **report.to_dict(),
        "inputs": explained(lean).to_dict()["inputs"],
    }


class Counting(nn.Module):
    """Cannot be captured as a whole; its chain can."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.calls = nn.Sequential(*chain(4, 16)), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.inner(x) * torch.tensor(x.flatten()[0].item())


def test_a_model_that_runs_in_parts() -> None:
    model = fxckpt.rewrite(Counting(), "nothing")
    with pytest.warns(FallbackWarning):
        model(X).sum().backward()
    report = explained(model)
    assert report.peak is report.eager_peak is None
    assert report.rows
    assert all(row.path.startswith("inner") for row in report.rows)
    assert any("eagerly, but for 1 of its parts" in line for line in report.warnings)
    assert "not known" in str(report)
    assert "inner" in report.to_markdown() + report._repr_html_()
    with pytest.raises(FxckptError, match="runs in parts"):
        report.plot("never.png")


def test_blocks_that_share_a_capture() -> None:
    layers = [nn.TransformerEncoderLayer(16, 2, 32, batch_first=True) for _ in range(4)]
    model = fxckpt.rewrite(nn.Sequential(*layers), "nothing", units="blocks")
    with pytest.raises(FxckptError, match="nothing was captured"):
        explained(model)
    model(torch.ones(2, 4, 16)).sum().backward()
    report = explained(model)
    assert {row.path.partition(".")[0] for row in report.rows} == {"0", "1", "2", "3"}
    assert report.saved == sum(row.bytes for row in report.rows if row.action == "saved")
    assert len(collapsed(report.rows)) < len(report.rows) / 2
    assert any("4 blocks run as units" in line for line in report.warnings)
    with pytest.raises(FxckptError, match="its blocks"):
        explained(model, torch.ones(2, 4, 16))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: fxckpt.explain(3), FxckptError, "expected a module or a function, got int"),
        (lambda m: fxckpt.explain(m.eval(), X), FxckptError, "evaluation mode"),
        (lambda m: fxckpt.explain(m, X, policy="dost"), FxckptError, "did you mean 'dots'"),
        (lambda m: fxckpt.explain(m, X, budget="lots"), FxckptError, "expected a positive number"),
        (
            lambda m: fxckpt.explain(m, X, budget=0.5, policy="dots"),
            FxckptError,
            "the planner decides alone",
        ),
        (lambda m: fxckpt.explain(m, X, device="h2000"), FxckptError, "the names are v100"),
        (
            lambda m: fxckpt.explain(fxckpt.rewrite(m, "dots"), measure=True),
            FxckptError,
            "needs the arguments",
        ),
    ],
)
def test_wrong_calls(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(chain(2, 16))


def test_the_most_that_was_allocated_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for a device that is not here."""
    report = explained(chain(2, 16), X)
    assert report.allocated is None
    shown = str(dataclasses.replace(report, allocated=5 << 30))
    assert "At most 5 GiB were allocated on the device so far" in shown


# --- warnings -------------------------------------------------------------------------------------


def test_gradients_that_fill_memory() -> None:
    report = explained(chain(4, 256), torch.ones(2, 256), policy="nothing")
    assert any(line.startswith("activations are not what fills memory") for line in report.warnings)
    assert "! activations" in str(report)
    assert not explained(chain(4, 16), LARGE).warnings


def test_recomputing_everything_at_once() -> None:
    report = explained(chain(4, 16), LARGE, policy="nothing")
    assert any("peak is not lower" in line for line in report.warnings) == (
        report.peak >= report.eager_peak
    )


# --- identical layers -----------------------------------------------------------------------------


def row(path: str, op: str = "mm", size: int = 8) -> Row:
    return Row("x", "saved", size, (2,), "float32", path, op, "m.py:1", 1.0, 0, "for y")


def test_identical_layers_are_one_line() -> None:
    rows = [row(f"layers.{i}.mlp", op) for i in range(60) for op in ("mm", "gelu", "mm")]
    entries = collapsed([row("embed"), *rows, row("layers.60.mlp", size=4)])
    assert [(e.path, e.row.op, e.layers, e.bytes) for e in entries] == [
        ("embed", "mm", 1, 8),
        ("layers.0-59.mlp", "mm", 60, 480),
        ("layers.0-59.mlp", "gelu", 60, 480),
        ("layers.0-59.mlp", "mm", 60, 480),
        ("layers.60.mlp", "mm", 1, 4),
    ]


def test_numbers_of_layers() -> None:
    assert [e.path for e in collapsed([row(f"{i}") for i in range(0, 24, 2)])] == ["0-22/2"]
    assert [e.path for e in collapsed([row(f"{i}") for i in (0, 1, 2, 7)])] == ["0-2,7"]
    nested = [row(f"h.{i}.experts.{j}") for i in range(3) for j in range(4)]
    assert [(e.path, e.layers) for e in collapsed(nested)] == [("h.0-2.experts.0-3", 12)]
    stages = [row(f"s.{i}.blocks.{j}", size=8 << i) for i in range(2) for j in range(2 + i)]
    assert [e.path for e in collapsed(stages)] == ["s.0.blocks.0-1", "s.1.blocks.0-2"]


# --- what is shown --------------------------------------------------------------------------------


def test_text_tells_what_matters() -> None:
    report = explained(chain(12, 64), torch.ones(4096, 64), budget=0.5)
    text = str(report)
    for part in (
        "Sequential, budget",
        "peak",
        "as it is",
        "fxckpt",
        "budget",
        "forward",
        "backward",
    ):
        assert part in text
    assert re.search(r", x\d+ ", text)
    assert re.search(r"Saved: \d+ values", text)
    assert re.search(r"Computed again: \d+ values", text)


def test_markdown_has_all_rows() -> None:
    report = explained(chain(5, 16), X, policy="nothing")
    table = report.to_markdown().split("### Values")[1].split("###")[0]
    assert len(re.findall(r"^\| recomputed", table, re.MULTILINE)) == len(
        collapsed(report.shown_rows)
    )


def test_notebooks_get_valid_html() -> None:
    from html.parser import HTMLParser

    open_tags: list[str] = []

    class Check(HTMLParser):
        def handle_starttag(self, tag: str, attrs: Any) -> None:
            if tag not in ("rect", "path", "polygon", "polyline"):
                open_tags.append(tag)

        def handle_endtag(self, tag: str) -> None:
            if tag not in ("rect", "path", "polygon", "polyline"):
                assert open_tags.pop() == tag

    shown = explained(chain(5, 16), X, budget=0.8)._repr_html_()
    Check().feed(shown)
    assert open_tags == []
    assert "<svg" in shown


def test_bins_hold_the_most() -> None:
    report = explained(chain(5, 16), X)
    end = report.after[-1].seconds
    for count in (1, 3, 7, 200):
        assert max(binned(report.after, end, count)) == report.peak
    assert binned((), 0.0, 3) == [0, 0, 0]


@given(st.text(max_size=40), st.integers(2, 30), st.sampled_from(["module", "op"]))
def test_shortened(line: str, width: int, column: str) -> None:
    cut = shorten(line, width, column)
    assert len(cut) <= width
    assert cut == line or "…" in cut


# --- pictures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plot(suffix: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"memory.{suffix}"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        explained(chain(5, 16), X, budget=0.8).plot(path)
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG" if suffix == "png" else b"<?xml")
    assert len(content) > 5000


def test_plot_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(FxckptError, match=r"pip install fxckpt\[plot\]"):
        explained(chain(2, 16), X).plot(tmp_path / "memory.png")


def test_plot_to_a_file_of_an_unknown_kind(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(FxckptError, match="docx"):
        explained(chain(2, 16), X).plot(tmp_path / "memory.docx")


def test_the_curve_and_its_rivals(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    case = build("gpt2", tiny=True)
    curve = fxckpt.frontier(
        case.model, points=3, device=DEVICE, planning_seconds=0.5, **case.batch(0)
    )
    assert curve.peers.keys() == {
        "per-block checkpointing", "selective, matmuls saved", "sqrt(n) segments",
        "attention recomputed",
    }  # fmt: skip
    for name, ours in curve.beside.items():
        assert ours.peak <= curve.peers[name].peak
        assert ours.overhead <= curve.peers[name].overhead
    assert json.loads(json.dumps(curve.to_dict())) == curve.to_dict()
    curve.plot(tmp_path / "curve.svg", chosen=curve[1])
    assert "per-block checkpointing" in (tmp_path / "curve.svg").read_text()
