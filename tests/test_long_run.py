"""The long run of bench/long_run.py, short."""

from pathlib import Path

import pytest

from bench import long_run

STEPS = 16


@pytest.mark.slow
def test_killed_and_resumed_as_eager(tmp_path: Path) -> None:
    runs = long_run.compare(tmp_path, STEPS, planning=0.5)
    eager = runs.pop("eager")
    assert len(eager.losses) == STEPS
    assert len({*eager.losses}) == STEPS
    assert 0 < runs["killed"].killed < STEPS
    for found in runs.values():
        assert found.losses == eager.losses
        assert found.parameters == eager.parameters
        assert found.peak < eager.peak / 2
    long_run.draw({"eager": eager, **runs}, tmp_path / "losses.png")
    assert (tmp_path / "losses.png").stat().st_size
