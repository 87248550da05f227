"""A long training, eager and rewritten under a budget: the same losses, bit for bit.

    python bench/long_run.py --out FOLDER [--steps 2000]

A small GPT learns the source files of Python's standard library, byte by byte. Each run is a
process of its own: one eager, one rewritten, and one rewritten that is killed in the middle and
started again, which goes on from its latest checkpoint. Prints a report in Markdown, and draws the
losses to FOLDER/losses.png. The text, and so the losses, depend on the version of Python.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import platform
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fxckpt
from bench.measure import peak_and_saved

WIDTH, LAYERS, HEADS, LENGTH, BATCH = 64, 4, 4, 64, 8
BUDGET, RATE, PLANNING_SECONDS = 0.4, 2e-3, 10.0


class GPT(nn.Module):
    """A byte-level language model; returns the loss, so that the budget is for all of the step."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(256, WIDTH), nn.Embedding(LENGTH, WIDTH)
        options = {"activation": "gelu", "batch_first": True, "norm_first": True}
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, dropout=0.1, **options)
        self.layers = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(LENGTH))

    def forward(self, text: Tensor) -> Tensor:
        """The mean cross entropy of each next byte, in nats; text is batch by length + 1."""
        x = self.token(text[:, :-1]) + self.place.weight
        x = self.layers(x, mask=self.mask, is_causal=True)
        return cross_entropy(self.head(self.norm(x)).flatten(0, 1), text[:, 1:].flatten())


def corpus() -> Tensor:
    """The bytes of the modules of the standard library, packages left out."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(f.read_bytes() for f in files)), dtype=torch.uint8)


def batch(text: Tensor, step: int) -> Tensor:
    """The samples of a step, the same in each run."""
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(len(text) - LENGTH - 1, (BATCH,), generator=generator)
    return torch.stack([text[s : s + LENGTH + 1] for s in starts.tolist()]).long()


# --- one process ------------------------------------------------------------------------------


def train(
    folder: Path, steps: int, every: int, budget: float | None, planning_seconds: float
) -> None:
    """Trains, from the latest checkpoint in the folder if there is one.

    Writes each loss with all its bits, and a checkpoint every so many steps.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, text = GPT(), corpus()
    if budget is not None:
        fxckpt.rewrite_(model, budget=budget, strict=True, planning_seconds=planning_seconds)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * s / steps))
    )
    stateful = {"model": model, "optimizer": optimizer, "schedule": schedule}
    latest, losses, first = folder / "checkpoint.pt", folder / "losses.txt", 0
    if latest.exists():
        saved = torch.load(latest)
        first = saved["step"]
        for name, each in stateful.items():
            each.load_state_dict(saved[name])
        torch.set_rng_state(saved["random"])
    known = losses.read_text().splitlines(keepends=True) if losses.exists() else []
    losses.write_text("".join(known[:first]))
    with losses.open("a") as out:
        for step in range(first, steps):
            start = time.perf_counter()
            loss = model(batch(text, step))
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            print(loss.item().hex(), time.perf_counter() - start, file=out, flush=True)
            if (step + 1) % every == 0:
                states = {name: each.state_dict() for name, each in stateful.items()}
                states |= {"step": step + 1, "random": torch.get_rng_state()}
                torch.save(states, folder / "new.pt")
                os.replace(folder / "new.pt", latest)  # at any moment there is a whole one
    whole = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
    peak, _ = peak_and_saved(_Step(model, batch(text, 0)), "cpu")
    (folder / "end.txt").write_text(f"{hashlib.sha256(whole).hexdigest()} {peak}")


@dataclass
class _Step:
    """One forward and backward, to be measured."""

    model: nn.Module
    text: Tensor

    def run(self, between: Callable[[], None]) -> None:
        """Runs it."""
        loss = self.model(self.text)
        between()
        loss.backward()


# --- all processes ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """What one training left.

    Attributes:
        losses: One a step, with all bits.
        seconds: Of each step.
        parameters: A hash of all bits in the end.
        peak: Bytes that a step holds at most, above what was there before it.
        killed: After how many steps it was killed; 0 for never.
    """

    losses: list[str]
    seconds: list[float]
    parameters: str
    peak: int
    killed: int

    @classmethod
    def read(cls, folder: Path, killed: int) -> Run:
        """From the files in a folder."""
        lines = [line.split() for line in (folder / "losses.txt").read_text().splitlines()]
        parameters, peak = (folder / "end.txt").read_text().split()
        return cls(
            [a for a, _ in lines], [float(b) for _, b in lines], parameters, int(peak), killed
        )


def run(folder: Path, steps: int, *options: Any, kill_at: int = 0) -> Run:
    """Trains in a process of its own; kills it after some steps and starts another one."""
    folder.mkdir(parents=True)
    every = max(1, steps // 4)
    command = [sys.executable, __file__, "--worker", "--out", folder, "--steps", steps]
    command += ["--every", every, *options]
    command, killed = [str(part) for part in command], 0
    if kill_at:
        with subprocess.Popen(command) as process:
            while (killed := _steps_done(folder)) < kill_at:
                if process.poll() is not None:
                    raise RuntimeError(f"training ended after {killed} of {steps} steps")
                time.sleep(0.01)
            process.kill()
        killed = _steps_done(folder)
    subprocess.run(command, check=True)
    return Run.read(folder, killed)


def _steps_done(folder: Path) -> int:
    losses = folder / "losses.txt"
    return len(losses.read_text().splitlines()) if losses.exists() else 0


def compare(folder: Path, steps: int, planning: float = PLANNING_SECONDS) -> dict[str, Run]:
    """The three trainings."""
    options = ("--budget", BUDGET, "--planning-seconds", planning)
    return {
        "eager": run(folder / "eager", steps),
        "rewritten": run(folder / "rewritten", steps, *options),
        "killed": run(folder / "killed", steps, *options, kill_at=steps * 5 // 8),
    }


def report(runs: dict[str, Run]) -> str:
    """The table, and what is equal."""
    eager = runs["eager"]
    rows = [
        "| run | peak of a step | median step | first loss | last loss |",
        "|---|---|---|---|---|",
    ]
    for name, r in runs.items():
        first, last = (float.fromhex(r.losses[i]) for i in (0, -1))
        milliseconds = 1e3 * statistics.median(r.seconds)
        rows.append(
            f"| {name} | {r.peak / 2**20:.1f} MiB | {milliseconds:.0f} ms | {first} | {last} |"
        )
    rows.append("")
    for name, r in runs.items():
        if r is not eager:
            same = sum(a == b for a, b in zip(r.losses, eager.losses, strict=True))
            end = "equal" if r.parameters == eager.parameters else "DIFFERENT"
            killed = f" (killed after step {r.killed}, started again)" if r.killed else ""
            rows.append(
                f"- {name}{killed}: {same} of {len(eager.losses)} losses are equal to eager's, bit "
                f"for bit; the parameters in the end are {end}."
            )
    return "\n".join(rows)


def draw(runs: dict[str, Run], path: Path) -> None:
    """Both curves in one picture, and their difference below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    eager, ours = ([float.fromhex(x) for x in runs[n].losses] for n in ("eager", "rewritten"))
    again = [float.fromhex(x) for x in runs["killed"].losses]
    figure, (top, below) = pyplot.subplots(
        2, sharex=True, height_ratios=(4, 1), figsize=(7, 4.5), layout="constrained"
    )
    top.plot(eager, color="#b0bec5", linewidth=4, label="eager")
    top.plot(ours, color="#c62828", linewidth=0.7, label=f"rewritten, budget={BUDGET}")
    top.axvline(runs["killed"].killed, color="#555555", linestyle=":", linewidth=1)
    top.annotate(
        "a third run is killed here,\nand goes on from its checkpoint",
        (runs["killed"].killed, max(eager)),
        xytext=(6, 0),
        textcoords="offset points",
        va="top",
        fontsize=8,
    )
    top.set_ylabel("loss (nats a byte)")
    top.legend(loc="upper left", bbox_to_anchor=(0.15, 1), frameon=False)
    lines = ((ours, "rewritten", "#ef9a9a", 4), (again, "killed and resumed", "#1565c0", 1))
    for losses, name, color, width in lines:
        difference = [a - b for a, b in zip(losses, eager, strict=True)]
        below.plot(difference, color=color, label=name, linewidth=width)
    below.set_ylim(-1e-6, 1e-6)
    below.set_ylabel("minus eager")
    below.set_xlabel("step")
    below.legend(loc="upper right", frameon=False, ncols=2, fontsize=8)
    for axes in (top, below):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main(arguments: Sequence[str] | None = None) -> dict[str, Run] | None:
    """Everything, or the work of one process."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="a folder, for all that is written")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--every", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--budget", type=float, help=argparse.SUPPRESS)
    parser.add_argument(
        "--planning-seconds", type=float, default=PLANNING_SECONDS, help=argparse.SUPPRESS
    )
    options = parser.parse_args(arguments)
    if options.worker:
        seconds = options.planning_seconds
        train(options.out, options.steps, options.every, options.budget, seconds)
        return None
    runs = compare(options.out, options.steps)
    size = sum(p.numel() for p in GPT().parameters())
    print(f"torch {torch.__version__}, Python {platform.python_version()}, one thread; ", end="")
    print(f"{size} parameters, {len(corpus())} bytes of text, {options.steps} steps\n")
    print(report(runs))
    draw(runs, options.out / "losses.png")
    return runs


if __name__ == "__main__":
    main()
