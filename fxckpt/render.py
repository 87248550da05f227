"""An account as text of at most 100 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

from tabulate import tabulate

from fxckpt.account import KINDS, Account, Moment, highest
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
        *_wrapped([title(account), *circumstances(account)]),
        "",
        _table(figures(account), ["", *steps(account)]),
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


def circumstances(account: Account) -> list[str]:
    """What the figures are about."""
    lines = [
        f"Times by the rates of {account.device}. Parameters and buffers of "
        f"{readable(account.parameters)} are there before the step, and not in the figures."
    ]
    if account.units:
        lines.append(f"Units: {account.units}.")
    if account.device != account.placed:
        lines.append(other_kernels(account.placed, account.device))
    if account.allocated is not None:
        lines.append(
            f"At most {readable(account.allocated)} were allocated on the device so far, all "
            "included (torch.cuda.max_memory_allocated)."
        )
    if account.captures is not None:
        lines.append(f"Captured {account.captures} times so far, for all sizes of arguments.")
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


def steps(account: Account) -> list[str]:
    """The titles of the columns of `figures`, after the first."""
    return ["as it is", "fxckpt", ""] if account.rewritten else ["as it is"]


def figures(account: Account) -> list[list[str]]:
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
    end = max(end_of(account.before), end_of(account.after))
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
    backward = round(_CHART * end_of(moments) / end) - forward if end else 0
    return _span("forward", forward) + _span("backward", backward)


def _span(name: str, width: int) -> str:
    if width < len(name) + 4:
        return "─" * width
    return f"├{f' {name} ':─^{width - 2}}┤"


def end_of(moments: Sequence[Moment]) -> float:
    """When the last of the moments starts."""
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
        [f"  {kind}", *(share(s[kind], sum(s.values())) for s in splits)]
        for kind in KINDS
        if any(s[kind] for s in splits)
    ]
    names = steps(account)
    peaks = zip(names, map(highest, both(account)), strict=False)
    where = [f"  {name}: {place_of(moment)}" for name, moment in peaks]
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


def share(size: int, whole: int) -> str:
    """Bytes, and what share that is."""
    return f"{readable(size)} ({size / whole:.0%})" if whole and size else "-"


def place_of(moment: Moment | None) -> str:
    """Where a moment is: operation, phase, module and line."""
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
        path_of(entry),
        row.source,
        readable_seconds(entry.seconds),
        row.reason.removeprefix("for "),
    ]


def path_of(entry: Entry) -> str:
    """The path of rows that layers have in common, and how many there are."""
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


def both(account: Account) -> list[tuple[Moment, ...]]:
    """The step as it is, and the one that is explained if that is another."""
    return [account.before, *([account.after] if account.rewritten else [])]
