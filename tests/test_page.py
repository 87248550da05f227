"""The page of a report, in a real browser."""

import dataclasses
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import chain

import fxckpt
from fxckpt import page
from fxckpt.account import Row
from fxckpt.report import Report

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@pytest.fixture(scope="module")
def report() -> Report:
    x = torch.ones(4096, 16)
    return fxckpt.explain(chain(12, 16), x, budget=0.5, device="a100", planning_seconds=0.5)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser: Any, tmp_path: Path) -> Iterator[Any]:
    """Opens a report; the page may load nothing else, and no script may fail."""
    problems: list[str] = []
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.on("console", lambda message: problems.append(message.text))
    tab.on("request", lambda request: problems.append(request.url) if len(opened_urls) else None)
    opened_urls: list[str] = []

    def open_report(report: Report) -> Any:
        path = tmp_path / "report.html"
        report.to_html(path)
        tab.goto(path.as_uri())
        opened_urls.append(path.as_uri())
        return tab

    yield open_report
    tab.close()
    assert problems == []


def rows_of(tab: Any) -> list[list[str]]:
    return tab.eval_on_selector_all(
        "#rows tbody tr", "rows => rows.map(row => [...row.cells].map(cell => cell.textContent))"
    )


def test_figures_and_picture(opened: Any, report: Report) -> None:
    tab = opened(report)
    assert "budget" in tab.text_content("h1")
    assert tab.locator("#chart svg path").count() >= 6
    legend = tab.text_content("#legend")
    assert all(f"{kind}: " in legend for kind in report.split())
    assert "budget: " in legend


def test_hover_names_the_operation(opened: Any, report: Report) -> None:
    tab = opened(report)
    assert not tab.is_visible("#tip")
    tab.hover("#chart svg", position={"x": 500, "y": 120})
    shown = tab.inner_text("#tip")
    found = re.match(r"(\w+) \((\S+)\), (forward|recompute|backward)", shown)
    assert found
    assert found[1] in {m.name for m in report.after}
    tab.hover("h1")
    assert not tab.is_visible("#tip")


def test_filter_and_sort(opened: Any, report: Report) -> None:
    tab = opened(report)
    assert len(rows_of(tab)) == len(report.shown_rows)
    tab.fill("#filter", "tanh saved")
    wanted = [r for r in report.rows if r.action == "saved" and "tanh" in r.op]
    assert wanted
    assert [row[-1] for row in rows_of(tab)] == [r.name for r in wanted]
    tab.fill("#filter", "")
    tab.click('th[data-column="name"]')
    names = [row[-1] for row in rows_of(tab)]
    tab.click('th[data-column="name"]')
    assert [row[-1] for row in rows_of(tab)] == names[::-1]
    assert names != names[::-1]
    tab.uncheck('#actions input[value="saved"]')
    assert {row[0] for row in rows_of(tab)} == {"recomputed"}
    assert tab.text_content("#count").startswith(
        f"{len(rows_of(tab))} of {len(report.rows)} values"
    )


def test_three_thousand_rows(opened: Any, report: Report) -> None:
    """All are there, and are found."""
    row = report.shown_rows[0]
    rows = [row._replace(name=f"v{i}", path=f"layers.{i}.mlp") for i in range(3000)]
    tab = opened(with_rows(report, rows))
    assert len(rows_of(tab)) == 3000
    tab.fill("#filter", "layers.1234.")
    assert [shown[-1] for shown in rows_of(tab)] == ["v1234"]


def test_data_cannot_end_the_script(opened: Any, report: Report) -> None:
    row = report.shown_rows[0]._replace(source="</script><b id='hostile'>x</b><!--DATA-->")
    tab = opened(with_rows(report, [row]))
    assert tab.locator("#hostile").count() == 0
    assert row.source in rows_of(tab)[0]


def test_the_data_is_the_report(report: Report) -> None:
    (script,) = re.findall(r"^const data = (.*);$", page.page(report), re.MULTILINE)
    data = json.loads(script)
    assert {key: data[key] for key in report.to_dict()} == report.to_dict()


def with_rows(report: Report, rows: list[Row]) -> Report:
    return dataclasses.replace(report, rows=tuple(rows))
