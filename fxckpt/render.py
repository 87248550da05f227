"""An account as text of at most 100 columns, as Markdown, and as HTML for notebooks."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Iterable, Sequence

from tabulate import tabulate

from fxckpt.account import BEFORE, COLOURS, KINDS, LIMIT, Account, Moment, highest
from fxckpt.collapse import Entry, collapsed
from fxckpt.quantities import readable, readable_seconds

WIDTH = 100
_CHART = 72  # columns of a curve
_BARS = " ▁▂▃▄▅▆▇█"
_MOST_ROWS = 20  # of a table in text
_NARROWEST = 8  # that a column is cut down to
_CUT_FIRST = (("read by", 8), ("line", 14), ("op", 13), ("module", 26), ("shape", 16))
_DTYPES = {"float": "f", "bfloat": "bf", "int": "i", "uint": "u", "complex": "c"}


# --- text -----------------------------------------------------------------------------------------


def text(account: Account) -> str:
    """All that matters, as lines of at most `WIDTH` columns."""
    parts = [
        *_wrapped([title(account), *_circumstances(account)]),
        "",
        _table(_figures(account), ["", *_steps(account)]),
        *(["", *_curves(account)] if account.after else []),
        *(["", *_peak(account)] if account.after else []),
        *_values(account),
        *_warned(account),
    ]
    return "\n".join(line.rstrip() for part in parts for line in part.split("\n"))


def title(account: Account) -> str:
    """What is explained, in one line."""
    inputs = ", ".join(f"{i.name} {_tensor(i.dtype, i.shape)}" for i in account.inputs)
    return f"{account.title}, {account.how}" + (f": {inputs}" if inputs else "")


def _circumstances(account: Account) -> list[str]:
    """What the figures are about."""
    lines = [
        f"Times by the rates of {account.device}. Parameters and buffers of "
        f"{readable(account.parameters)} are there before the step, and not in the figures."
    ]
    if account.device != account.placed:
        lines.append(other_kernels(account.placed, account.device))
    if account.allocated is not None:
        lines.append(
            f"At most {readable(account.allocated)} were allocated on the device so far, all "
            "included (torch.cuda.max_memory_allocated)."
        )
    return lines


def other_kernels(placed: str, device: str) -> str:
    """What to know of a step that was captured on another device than it is to run on."""
    return (
        f"The operations are those that run on {placed}: {device} has kernels, above all for "
        "attention, that may keep less."
    )


def _wrapped(lines: Iterable[str], indent: str = "") -> list[str]:
    return [
        part
        for line in lines
        for part in textwrap.wrap(line, WIDTH, subsequent_indent=indent) or [""]
    ]


def _steps(account: Account) -> list[str]:
    return ["as it is", "fxckpt", ""] if account.rewritten else ["as it is"]


def _figures(account: Account) -> list[list[str]]:
    """The header: what is told, of the step as it is, of the one that is explained, and how."""
    if not account.rewritten:
        rows = [
            ["peak", _bytes(account.eager_peak)],
            ["saved for backward", readable(account.eager_saved)],
            ["time", readable_seconds(account.step_seconds)],
        ]
        if account.measured is not None:
            rows.append(["measured peak", f"{readable(account.measured)}: {_compared(account)}"])
        return rows
    before, after = account.eager_peak, account.peak
    share = f"{after / before:.0%}" if before and after is not None else ""
    saved = f"{account.saved / account.eager_saved:.0%}" if account.eager_saved else ""
    total = account.step_seconds + account.seconds
    again = f"+{account.overhead:.1%}: {readable_seconds(account.seconds)} run again"
    rows = [
        ["peak", _bytes(before), _bytes(after), share],
        ["saved for backward", readable(account.eager_saved), readable(account.saved), saved],
        ["time", readable_seconds(account.step_seconds), readable_seconds(total), again],
    ]
    if account.budget is not None:
        rows.append(["budget", "", readable(account.budget), _solved(account)])
    if account.measured is not None:
        rows.append(["measured peak", "", readable(account.measured), _compared(account)])
    return rows


def _compared(account: Account) -> str:
    """A measured peak beside the prediction."""
    if account.device != account.placed:
        return f"on {account.placed}, where kernels take other memory"
    return f"{(account.measured or 0) / account.peak:.0%} of the prediction" if account.peak else ""


def _bytes(size: int | None) -> str:
    return "not known" if size is None else readable(size)


def _solved(account: Account) -> str:
    """How good the plan is."""
    gap = account.gap
    if gap is None:
        return ""
    if gap == 0:
        return "nothing runs again" if not account.seconds else "optimal"
    bound = readable_seconds(account.bound or 0.0)
    gapped = f", gap {gap:.1%}" if gap < 10 else ""
    return f"at least {bound} have to run again{gapped}"


def _curves(account: Account) -> list[str]:
    """The bytes over the step, before and after, as bars."""
    end = max(_end(account.before), _end(account.after))
    top = max(account.eager_peak or 0, account.peak or 0)
    shown = [("as it is", account.before), ("fxckpt", account.after)]
    lines = [f"Memory over the step, up to {readable(top)}:"]
    for name, moments in shown if account.rewritten else shown[:1]:
        columns = binned(moments, end, _CHART)
        bars = "".join(_BARS[-(-live * (len(_BARS) - 1) // max(top, 1))] for live in columns)
        lines.append(f"  {name:10}{bars}")
        lines.append(f"  {'':10}{_phases(moments, end)}")
    return lines


def _phases(moments: Sequence[Moment], end: float) -> str:
    """Where forward and backward are, below a curve."""
    start = next((m.seconds for m in moments if m.phase != "forward"), end)
    forward = round(_CHART * start / end) if end else 0
    backward = round(_CHART * _end(moments) / end) - forward if end else 0
    return _span("forward", forward) + _span("backward", backward)


def _span(name: str, width: int) -> str:
    if width < len(name) + 4:
        return "─" * width
    return f"├{f' {name} ':─^{width - 2}}┤"


def _end(moments: Sequence[Moment]) -> float:
    return moments[-1].seconds if moments else 0.0


def binned(moments: Sequence[Moment], end: float, count: int) -> list[int]:
    """The most that lives in each of `count` equal parts of the time to `end`."""
    if not moments or not end:
        return [0] * count
    bins = [0] * count
    last, lasting = 0, 0
    for m in moments:
        place = min(int(count * m.seconds / end), count - 1)
        for i in range(last + 1, place + 1):  # what lives until then
            bins[i] = lasting
        bins[place] = max(bins[place], m.live)
        last, lasting = place, m.live
    return bins


def _peak(account: Account) -> list[str]:
    """What memory is at the peak, and what sets it."""
    splits = [account.split(eager=True), *([account.split()] if account.rewritten else [])]
    rows = [
        [f"  {kind}", *(_share(s[kind], sum(s.values())) for s in splits)]
        for kind in KINDS
        if any(s[kind] for s in splits)
    ]
    names = _steps(account)
    peaks = zip(names, map(highest, _both(account)), strict=False)
    where = [f"  {name}: {_place_of(moment)}" for name, moment in peaks]
    largest = [
        [f"  {readable(h.bytes)}", h.kind, h.name, h.path or "(root)"] for h in account.at_peak[:5]
    ]
    return [
        "What memory is at the peak:",
        _table(rows, ["", *names[: len(splits)]]),
        *(shorten(line, WIDTH) for line in where),
        "",
        "The largest values there:",
        _table(largest, ["  bytes", "kind", "value", "module"]),
    ]


def _share(size: int, whole: int) -> str:
    return f"{readable(size)} ({size / whole:.0%})" if whole and size else "-"


def _place_of(moment: Moment | None) -> str:
    if moment is None:
        return "nothing runs"
    phase = {"recompute": "recomputation"}.get(moment.phase, moment.phase)
    source = f" at {moment.source}" if moment.source else ""
    short = moment.op.removeprefix("aten.")
    name = moment.name if moment.name.startswith(short) else f"{moment.name} ({short})"
    return f"at {name} in {phase} of {moment.path or 'the root'}{source}"


def _values(account: Account) -> list[str]:
    """The tables of what is saved and what is computed again, largest first."""
    parts = []
    for action, title in (("saved", "Saved"), ("recomputed", "Computed again")):
        rows = [row for row in account.rows if row.action == action]
        if not rows:
            continue
        entries = sorted(collapsed(rows), key=lambda entry: -entry.bytes)
        total = readable(sum(row.bytes for row in rows))
        time = readable_seconds(sum(row.seconds for row in rows))
        cost = f", {time}" if action == "recomputed" else ""
        parts += ["", f"{title}: {len(rows)} values, {total}{cost}"]
        headers = ["  bytes", "shape", "op", "module", "line", "time", "read by"]
        parts.append(_table([_cells(entry) for entry in entries[:_MOST_ROWS]], headers))
        if left := entries[_MOST_ROWS:]:
            size = readable(sum(entry.bytes for entry in left))
            parts.append(f"  and {len(left)} more lines, {size}: to_markdown() has them")
    return parts


def _cells(entry: Entry) -> list[str]:
    row = entry.row
    return [
        f"  {readable(entry.bytes)}",
        _tensor(row.dtype, row.shape),
        row.op.removeprefix("aten."),
        _path(entry),
        row.source,
        readable_seconds(entry.seconds),
        row.reason.removeprefix("for "),
    ]


def _path(entry: Entry) -> str:
    return (entry.path or "(root)") + (f", x{entry.layers}" if entry.layers > 1 else "")


def _warned(account: Account) -> list[str]:
    return ["", *_wrapped((f"! {line}" for line in account.warnings), "  ")] * bool(
        account.warnings
    )


def _tensor(dtype: str, shape: Sequence[int]) -> str:
    """A dtype and shape as short as they are clear: "f32[8,1024]"."""
    letters = dtype.rstrip("0123456789")
    short = _DTYPES.get(letters, letters) + dtype[len(letters) :]
    return f"{short}[{','.join(map(str, shape))}]"


def _table(rows: Sequence[Sequence[str]], headers: Sequence[str]) -> str:
    """A table that is narrow enough: some columns are cut first, then the widest."""
    lines = [headers, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(headers))]
    excess = sum(widths) + 2 * (len(widths) - 1) - WIDTH
    for name, least in _CUT_FIRST:
        if name in headers and excess > 0:
            i = headers.index(name)
            cut = min(excess, max(widths[i] - least, 0))
            widths[i], excess = widths[i] - cut, excess - cut
    while excess > 0 and max(widths) > _NARROWEST:
        widths[widths.index(max(widths))] -= 1
        excess -= 1
    cells = [[*map(shorten, line, widths, headers)] for line in lines]
    # As headers, the first line would be padded.
    return tabulate(cells, tablefmt="plain", disable_numparse=True, preserve_whitespace=True)


def shorten(line: str, width: int, column: str = "") -> str:
    """Cuts a text that is too long: paths at the beginning, others at the end."""
    if len(line) <= width:
        return line
    if column in ("module", "line"):
        return "…" + line[len(line) - width + 1 :]
    return line[: width - 1] + "…"


# --- Markdown -------------------------------------------------------------------------------------


def markdown(account: Account) -> str:
    """The same with all rows of what backward reads, identical layers as one."""
    splits = [account.split(eager=True), *([account.split()] if account.rewritten else [])]
    names = _steps(account)
    parts = [
        f"## {_escaped(title(account))}",
        *_circumstances(account),
        _github(_figures(account), ["", *names]),
    ]
    if account.after:
        rows = [[kind, *(_share(s[kind], sum(s.values())) for s in splits)] for kind in KINDS]
        where = [
            f"- {n}: {_place_of(highest(m))}" for n, m in zip(names, _both(account), strict=False)
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
        _path(entry),
        row.op,
        row.source,
        readable_seconds(entry.seconds),
        row.reason,
        row.name,
    ]


def _both(account: Account) -> list[tuple[Moment, ...]]:
    return [account.before, *([account.after] if account.rewritten else [])]


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
            *(f"<p>{html.escape(line)}</p>" for line in _circumstances(account)),
            _html_table(_figures(account), ["", *_steps(account)]),
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
    end = max(_end(account.before), _end(account.after)) or 1.0
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
        f"{_legend()}{''.join(parts)}</svg>"
    )


def _apart(sizes: dict[str, int | None], distance: float) -> list[tuple[str, int]]:
    """The sizes that are known, without those that would be written over one before them."""
    found: list[tuple[str, int]] = []
    for colour, size in sizes.items():
        if size is not None and all(abs(size - other) >= distance for _, other in found):
            found.append((colour, size))
    return found


def _legend() -> str:
    parts = []
    for i, kind in enumerate(KINDS):
        x = 105 * i
        parts.append(f'<rect x="{x}" y="4" width="12" height="12" fill="{COLOURS[kind]}"/>')
        parts.append(f'<text x="{x + 16}" y="14">{kind}</text>')
    x = 105 * len(KINDS)
    parts.append(
        f'<path d="M{x} 10h14" stroke="{BEFORE}"/><text x="{x + 18}" y="14">as it is</text>'
    )
    return "".join(parts)
