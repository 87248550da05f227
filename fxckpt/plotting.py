"""Pictures by matplotlib: memory over a step, and the curve of memory and time.

matplotlib is imported when a picture is drawn, and used without its global state: programs that
draw with it themselves do not notice.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fxckpt.account import AS_IT_IS, BEFORE, COLOURS, KINDS, LIMIT, Account, highest
from fxckpt.errors import FxckptError
from fxckpt.quantities import readable

_LABELS = {
    "parameters": "parameters and buffers",
    "gradients": "gradients",
    "outputs": "outputs and their gradients",
    "saved": "saved for backward",
    "recomputed": "computed again",
    "temporary": "temporary",
    "outside": "outside of the blocks",
}
_ABOVE = 1.15  # of the axis, for what is written there
_NEAR = 0.08  # of the axis, below which labels of two points would lie on each other


class Spot(NamedTuple):
    """A plan or strategy on the curve: bytes at its peak, and what runs again, of the step."""

    peak: int
    overhead: float


def plot_memory(account: Account, path: str | os.PathLike[str]) -> None:
    """Draws the bytes over the step, by kind, and those of the step as it is.

    Raises:
        FxckptError: if matplotlib is not installed, or there is nothing to draw.
    """
    if not account.after:
        raise FxckptError(
            "report.plot(...): the model runs in parts, of which memory over the whole step is not "
            "known"
        )
    figure, axes = _canvas(width=10, height=4.6)
    unit, name = _unit(max(account.eager_peak or 0, account.peak or 0) + account.parameters)
    after = account.step_seconds + account.seconds
    end = max(account.step_seconds, after, *(m.seconds for m in account.after))
    scale, time = (1e3, "ms") if end < 1 else (1.0, "s")
    _areas(axes, account, unit, scale, end)
    base = account.parameters / unit
    highest_line = (max(account.eager_peak or 0, account.peak or 0) / unit) + base
    if account.rewritten:
        lasting = (*account.before, account.before[-1]._replace(seconds=account.step_seconds))
        times = [m.seconds * scale for m in lasting]
        live = [m.live / unit + base for m in lasting]
        axes.step(times, live, where="post", color=BEFORE, linewidth=1.2, label=AS_IT_IS)
    if account.budget is not None:
        limit = account.budget / unit + base
        highest_line = max(highest_line, limit)
        label = f"budget: {readable(account.budget)} above parameters"
        axes.axhline(limit, color=LIMIT, linestyle="--", linewidth=1.4, label=label)
    axes.set_xlim(0, end * scale)
    axes.set_ylim(0, highest_line * _ABOVE or 1)
    _mark_phases(axes, account, scale)
    _annotate(axes, account, unit, scale)
    axes.set_xlabel(f"time in the step, {time} (by the rates of {account.device})")
    axes.set_ylabel(f"memory, {name}")
    axes.set_title(f"{account.title}, {account.how}", loc="left", fontsize=11)
    _legend(axes, reverse=True)
    _save(figure, path)


def _areas(axes: Any, account: Account, unit: float, scale: float, end: float) -> None:
    lasting = (*account.after, account.after[-1]._replace(seconds=end))
    times = [m.seconds * scale for m in lasting]
    shares = {"parameters": [account.parameters / unit] * len(times)}
    for i, kind in enumerate(KINDS):
        shares[kind] = [m.kinds[i] / unit for m in lasting]
    below = [0.0] * len(times)
    for kind, share in shares.items():
        above = [b + s for b, s in zip(below, share, strict=True)]
        if any(share):
            options = {"step": "post", "color": COLOURS[kind], "label": _LABELS[kind]}
            axes.fill_between(times, below, above, linewidth=0, **options)
        below = above


def _mark_phases(axes: Any, account: Account, scale: float) -> None:
    """Where backward starts, which is at the same time before and after."""
    start = next((m.seconds for m in account.after if m.phase != "forward"), None)
    if start is None:
        return
    axes.axvline(start * scale, color="#555555", linewidth=0.8, linestyle=":")
    for text, side, shift in (("forward ", "right", -4), (" backward", "left", 4)):
        axes.annotate(
            text,
            (start * scale, 1),
            xycoords=("data", "axes fraction"),
            xytext=(shift, -4),
            textcoords="offset points",
            horizontalalignment=side,
            verticalalignment="top",
            color="#555555",
        )


def _annotate(axes: Any, account: Account, unit: float, scale: float) -> None:
    """What the peaks are, and where."""
    known = [(account.after, "peak", True)]
    if account.rewritten:
        near = (
            abs((account.eager_peak or 0) - (account.peak or 0)) / unit < 0.08 * axes.get_ylim()[1]
        )
        known = [(account.before, AS_IT_IS, True), (account.after, "fxckpt", not near)]
    for moments, name, above in known:
        moment = highest(moments)
        assert moment is not None, "there is something to draw"
        x, y = moment.seconds * scale, (moment.live + account.parameters) / unit
        left = x > 0.6 * axes.get_xlim()[1]
        where = f", {moment.path}" if moment.path and name != AS_IT_IS else ""
        axes.plot([x], [y], marker="o", markersize=5, color="black", zorder=5)
        axes.annotate(
            f"{name}: {readable(moment.live + account.parameters)}{where}",
            (x, y),
            xytext=(-8 if left else 8, 6 if above else -8),
            textcoords="offset points",
            horizontalalignment="right" if left else "left",
            verticalalignment="bottom" if above else "top",
            fontsize=9,
            zorder=6,
            bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "alpha": 0.8, "linewidth": 0},
        )


# --- the curve of memory and time -----------------------------------------------------------------


def plot_frontier(
    curve: Sequence[Spot],
    peers: Mapping[str, Spot],
    path: str | os.PathLike[str],
    *,
    eager_peak: int,
    device: str,
    chosen: Spot | None = None,
) -> None:
    """Draws what plans cost for their memory, connected by lines, and what usual strategies do.

    Raises:
        FxckptError: if matplotlib is not installed.
    """
    figure, axes = _canvas(width=8, height=4.6)
    unit, name = _unit(eager_peak)
    points = sorted({*curve})
    axes.plot(
        [p.peak / unit for p in points],
        [100 * p.overhead for p in points],
        color=COLOURS["saved"],
        marker="o",
        markersize=4,
        label="fxckpt",
    )
    marks = zip(peers.items(), "s^Dv<>ph", ("recomputed", "gradients", "outputs") * 3, strict=False)
    for (peer, spot), mark, kind in marks:
        options = {"linestyle": "none", "markersize": 8, "color": COLOURS[kind], "marker": mark}
        axes.plot([spot.peak / unit], [100 * spot.overhead], label=peer, **options)
    if chosen is not None:
        axes.plot(
            [chosen.peak / unit],
            [100 * chosen.overhead],
            marker="*",
            markersize=15,
            linestyle="none",
            color=LIMIT,
            label=f"chosen: {readable(chosen.peak)}, +{chosen.overhead:.1%}",
        )
    axes.axvline(eager_peak / unit, color=BEFORE, linewidth=1, linestyle=":", label=AS_IT_IS)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel(f"memory of the step at its peak, {name} (parameters not included)")
    axes.set_ylabel("time that runs again, % of the step")
    axes.set_title(f"Memory and time, by the rates of {device}", loc="left", fontsize=11)
    axes.grid(alpha=0.3)
    _legend(axes, reverse=False)
    _save(figure, path)


# --- what both have in common ---------------------------------------------------------------------


def _canvas(width: float, height: float) -> tuple[Any, Any]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise FxckptError(
            "plot(...): pictures are drawn by matplotlib, which is not installed. "
            "pip install fxckpt[plot]"
        ) from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _legend(axes: Any, *, reverse: bool) -> None:
    """Right of the picture; reversed, in the order in which areas lie on each other."""
    axes.legend(
        reverse=reverse,
        loc="upper left",
        bbox_to_anchor=(1.01, 1),
        borderaxespad=0,
        frameon=False,
        fontsize=9,
    )


def _save(figure: Any, path: str | os.PathLike[str]) -> None:
    try:
        figure.savefig(path, dpi=150)
    except ValueError as error:  # a kind of file that it does not know
        raise FxckptError(f"plot({str(path)!r}): {error}") from error


def _unit(size: int) -> tuple[float, str]:
    """What to divide bytes by so that they are readable, and its name."""
    for power, name in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if size >= 1024**power:
            return 1024.0**power, name
    return 1.0, "bytes"
