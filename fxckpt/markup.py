"""An account as Markdown, and as HTML for notebooks."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from tabulate import tabulate

from fxckpt.account import BEFORE, COLOURS, KINDS, LIMIT, Account, highest
from fxckpt.collapse import Entry, collapsed
from fxckpt.quantities import readable, readable_seconds
from fxckpt.render import (
    both,
    circumstances,
    end_of,
    figures,
    path_of,
    place_of,
    share,
    steps,
    title,
)

# --- Markdown -------------------------------------------------------------------------------------


def markdown(account: Account) -> str:
    """The same with all rows of what backward reads, identical layers as one."""
    splits = [account.split(eager=True), *([account.split()] if account.rewritten else [])]
    names = steps(account)
    parts = [
        f"## {_escaped(title(account))}",
        *circumstances(account),
        _github(figures(account), ["", *names]),
    ]
    if account.after:
        rows = [
            [kind, *(share(s[kind], sum(s.values())) for s in splits)] for kind in account.kinds
        ]
        where = [
            f"- {n}: {place_of(highest(m))}" for n, m in zip(names, both(account), strict=False)
        ]
        parts += [
            "### At the peak",
            _github(rows, ["", *names[: len(splits)]]),
            _escaped("\n".join(where)),
        ]
    parts += ["### Values", _github(map(_all_cells, collapsed(account.shown_rows)), COLUMNS)]
    if account.warnings:
        parts += ["### Warnings", "\n".join(f"- {_escaped(line)}" for line in account.warnings)]
    return "\n\n".join(parts) + "\n"


COLUMNS = ("action", "bytes", "shape", "dtype", "module", "op", "line", "time", "reason", "value")


def _all_cells(entry: Entry) -> list[str]:
    row = entry.row
    return [
        row.action,
        readable(entry.bytes),
        "x".join(map(str, row.shape)) or "scalar",
        row.dtype,
        path_of(entry),
        row.op,
        row.source,
        readable_seconds(entry.seconds),
        row.reason,
        row.name,
    ]


def _github(rows: Iterable[Sequence[str]], headers: Sequence[str]) -> str:
    cells = [[_escaped(cell) for cell in row] for row in rows]
    return tabulate(cells, headers, "github", disable_numparse=True)


def _escaped(line: str) -> str:
    for mark in ("\\", "|", "_", "*", "<"):
        line = line.replace(mark, f"\\{mark}")
    return line


# --- notebooks ------------------------------------------------------------------------------------


def notebook(account: Account) -> str:
    """The figures, the picture, and the rows to unfold, as HTML without scripts."""
    rows = [_all_cells(entry) for entry in collapsed(account.shown_rows)]
    return "".join(
        [
            f"<h4>{html.escape(title(account))}</h4>",
            figures_as_html(account),
            picture(account) if account.after else "",
            f"<details><summary>{len(account.shown_rows)} values</summary>",
            _html_table(rows, COLUMNS),
            "</details>",
        ]
    )


def figures_as_html(account: Account) -> str:
    """The header, and what it is about."""
    warned = "".join(f"<li>{html.escape(line)}</li>" for line in account.warnings)
    return "".join(
        [
            *(f"<p>{html.escape(line)}</p>" for line in circumstances(account)),
            _html_table(figures(account), ["", *steps(account)]),
            f"<ul>{warned}</ul>" if warned else "",
        ]
    )


def _html_table(rows: Iterable[Sequence[str]], headers: Sequence[str]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in headers)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


_SVG_WIDTH, _SVG_HEIGHT, _LEGEND, _LABELS = 720, 240, 24, 80


def picture(account: Account) -> str:
    """The bytes over the step as a small SVG: areas by kind, and the step as it is as a line."""
    end = max(end_of(account.before), end_of(account.after)) or 1.0
    limit = account.budget if account.budget is not None else 0
    top = max(account.eager_peak or 0, account.peak or 0, limit) * 1.05 or 1.0

    def points(curve: Iterable[tuple[float, float]]) -> str:
        return " ".join(
            f"{_SVG_WIDTH * x / end:.1f},{_LEGEND + _SVG_HEIGHT * (1 - y / top):.1f}"
            for x, y in curve
        )

    times = [m.seconds for m in account.after]
    below, parts = [0] * len(times), []
    for i, kind in enumerate(KINDS):
        above = [b + m.kinds[i] for b, m in zip(below, account.after, strict=True)]
        outline = [*zip(times, above, strict=True), *zip(times[::-1], below[::-1], strict=True)]
        parts.append(f'<polygon points="{points(outline)}" fill="{COLOURS[kind]}"/>')
        below = above
    line = points((m.seconds, m.live) for m in account.before)
    known = {LIMIT: account.budget, "#555": account.eager_peak, "#222": account.peak}
    parts += [
        f'<text x="{_SVG_WIDTH + 4}" y="{points([(0, size)]).split(",")[1]}" fill="{colour}">'
        f"{readable(size)}</text>"
        for colour, size in _apart(known, top * 12 / _SVG_HEIGHT)
    ]
    parts.append(f'<polyline points="{line}" fill="none" stroke="{BEFORE}"/>')
    if account.budget is not None:
        level = points([(0, account.budget), (end, account.budget)])
        parts.append(
            f'<polyline points="{level}" stroke="{LIMIT}" stroke-dasharray="6 4" fill="none"/>'
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_SVG_WIDTH + _LABELS}" '
        f'height="{_SVG_HEIGHT + _LEGEND}" font-family="sans-serif" font-size="12">'
        f"{_legend(account.kinds)}{''.join(parts)}</svg>"
    )


def _apart(sizes: dict[str, int | None], distance: float) -> list[tuple[str, int]]:
    """The sizes that are known, without those that would be written over one before them."""
    found: list[tuple[str, int]] = []
    for colour, size in sizes.items():
        if size is not None and all(abs(size - other) >= distance for _, other in found):
            found.append((colour, size))
    return found


def _legend(kinds: Sequence[str]) -> str:
    parts = []
    for i, kind in enumerate(kinds):
        x = 105 * i
        parts.append(f'<rect x="{x}" y="4" width="12" height="12" fill="{COLOURS[kind]}"/>')
        parts.append(f'<text x="{x + 16}" y="14">{kind}</text>')
    x = 105 * len(kinds)
    parts.append(
        f'<path d="M{x} 10h14" stroke="{BEFORE}"/><text x="{x + 18}" y="14">as it is</text>'
    )
    return "".join(parts)
