"""What the comparison writes: a page and a picture of what it measured."""

from pathlib import Path

import pytest

from bench import compare, report
from bench.measure import Memory
from bench.report import Result
from bench.step import Setup
from bench.timing import Failure, Timing

SETUP = Setup("gpt2", {}, "cpu", "fp32", 1)


def result(size: int, seconds: float) -> Result:
    return Result(Memory(1 << 20, size << 20, 1 << 19, 0.5), Timing(0.0, True, [seconds] * 3))


RESULTS = {
    "eager": result(100, 0.2),
    "torch.checkpoint": result(60, 0.3),
    "fxckpt@0.4": Result(Failure("no plan fits"), Failure("no plan fits")),
}


def test_page() -> None:
    page = report.page(SETUP, 3, RESULTS, "python bench/compare.py")
    lines = [line for line in page.splitlines() if line.startswith("|")]
    assert page.startswith("# gpt2 ")
    assert "By `python bench/compare.py`." in page
    assert len(lines) == 2 + len(RESULTS)
    assert len({line.count("|") for line in lines}) == 1
    assert "fxckpt@0.4: no plan fits" in page


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "compared.svg"
    report.plot(SETUP, RESULTS, path)
    text = path.read_text()
    assert "torch.checkpoint" in text
    assert "fxckpt@0.4" not in text  # nothing was measured


def test_command_is_told_without_files() -> None:
    job = compare.parse(["--model", "mlp", "--write", "a.md", "--plot", "b.png", "--repeats", "2"])
    assert job.command == "python bench/compare.py --model mlp --repeats 2"
    assert (job.write, job.plot) == (Path("a.md"), Path("b.png"))
