"""Compares fxckpt with eager PyTorch and its checkpointing peers: memory, time, gradients.

python bench/compare.py                                 GPT-2 that a small machine can train
python bench/compare.py --model resnet --rows 'torch.*' 'fxckpt.block'
python bench/compare.py --preset launch-bound           the figures that the project must reach
"""

import argparse
import json
import multiprocessing
import shlex
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench import report
from bench.measure import Memory, measure
from bench.models import FACTORIES, build
from bench.presets import PRESETS, Goal
from bench.rows import EAGER, Row, all_rows, select
from bench.step import DTYPES, Setup
from bench.timing import Failure, time_rows

CUDA_DEFAULT = ("cuda", "gpt2")
CUDA_PRESET = "gpt2-cuda"
COUNTS = ("layers", "width", "heads", "batch", "seq", "image", "patch", "vocab")
SIZES = (*COUNTS, "dropout")
IMPORTED_ONCE = ["torch", "torch.autograd.profiler", "tabulate", "transformers.modeling_utils"]


class Progress:
    """Says what happens now: one line that is overwritten, or a line each where not a terminal."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.overwrite = stream.isatty()

    def __call__(self, text: str) -> None:
        """Shows `text`."""
        line = f"\r\x1b[K{text}" if self.overwrite else f"{text}\n"
        print(line, end="", file=self.stream, flush=True)

    def done(self) -> None:
        """Leaves nothing of an overwritten line."""
        if self.overwrite:
            print("\r\x1b[K", end="", file=self.stream, flush=True)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, got {text!r}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, help="named options, which others override")
    parser.add_argument("--model", choices=FACTORIES, default="gpt2")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cuda where there is one")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="bf16, fp16: by autocast")
    sizes = parser.add_argument_group("sizes (each model has its own defaults)")
    for size in COUNTS:
        sizes.add_argument(f"--{size}", type=_positive)
    sizes.add_argument("--dropout", type=_fraction)
    parser.add_argument("--rows", nargs="+", default=["*"], metavar="GLOB", help="rows to run")
    parser.add_argument("--repeats", type=_positive, default=5, help="timed rounds")
    parser.add_argument("--threads", type=_positive, default=torch.get_num_threads())
    parser.add_argument("--compile", action="store_true", help="add torch.compile rows")
    parser.add_argument(
        "--budgets",
        nargs="+",
        type=_fraction,
        default=[1.0, 0.5, 0.2],
        metavar="RATIO",
        help="activation_memory_budget of Inductor's rows",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all raw numbers")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the table in Markdown")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the table: .png, .svg")
    return parser


@dataclass(frozen=True, slots=True)
class Job:
    """What one run of the program does.

    Attributes:
        setup: what is trained.
        rows: to run, eager first.
        left_out: names of selected rows that this model has not.
        budgets: of Inductor's rows; None if nothing is compiled.
        repeats: timed rounds.
        goals: figures to reach.
        json: file for the raw numbers.
        write: file for the table in Markdown.
        plot: file for the picture.
        command: what was called.
    """

    setup: Setup
    rows: list[Row]
    left_out: list[str]
    budgets: tuple[float, ...] | None
    repeats: int
    goals: tuple[Goal, ...]
    json: Path | None
    write: Path | None
    plot: Path | None
    command: str


def parse(arguments: Sequence[str] | None) -> Job:
    """Reads the command line; exits with a message if something in it is wrong.

    Args:
        arguments: as given to the program; None for `sys.argv`.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    cuda = torch.cuda.is_available()
    if options.device == "cuda" and not cuda:
        parser.error("--device cuda: this torch sees no CUDA device")
    device = options.device or ("cuda" if cuda else "cpu")
    preset = options.preset or (CUDA_PRESET if (device, options.model) == CUDA_DEFAULT else None)
    if preset:
        parser.set_defaults(**PRESETS[preset].options)
        options = parser.parse_args(arguments)
    sizes = {size: value for size in SIZES if (value := getattr(options, size)) is not None}
    budgets = tuple(options.budgets) if options.compile else None
    try:
        case = build(options.model, **sizes)
        rows = select(all_rows(budgets), options.rows)
    except ValueError as error:
        parser.error(str(error))
    return Job(
        setup=Setup(options.model, sizes, device, options.dtype, options.threads),
        rows=[row for row in rows if row.applies(case)],
        left_out=[row.name for row in rows if not row.applies(case)],
        budgets=budgets,
        repeats=options.repeats,
        goals=PRESETS[preset].goals if preset else (),
        json=options.json,
        write=options.write,
        plot=options.plot,
        command=_command(arguments),
    )


def _command(arguments: Sequence[str] | None) -> str:
    """What was called, without the names of files to write."""
    given = [*(sys.argv[1:] if arguments is None else arguments)]
    for option in ("--write", "--plot", "--json"):
        if option in given:
            place = given.index(option)
            del given[place : place + 2]
    return shlex.join(["python", "bench/compare.py", *given])


def measure_memory(job: Job, progress: Progress) -> dict[str, Memory | Failure]:
    """Measures each row in a process of its own.

    Raises:
        RuntimeError: eager itself failed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED_ONCE)
    found: dict[str, Memory | Failure] = {}
    for row in job.rows:
        progress(f"memory of {row.name}")
        with ProcessPoolExecutor(1, mp_context=context) as process:
            task = process.submit(measure, job.setup, row.name, job.budgets)
            try:
                found[row.name] = task.result()
            except BrokenProcessPool:
                found[row.name] = Failure("its process was killed, probably for want of memory")
            except Exception as error:
                found[row.name] = Failure.of(error)
    eager = found[EAGER]
    if isinstance(eager, Failure):
        raise RuntimeError(f"eager training fails: {eager.reason}")
    return found


def run(job: Job, progress: Progress) -> dict[str, report.Result]:
    """Measures memory, then time and gradients of the rows that could be measured."""
    memory = measure_memory(job, progress)
    failed = {name: part for name, part in memory.items() if isinstance(part, Failure)}
    working = [row for row in job.rows if row.name not in failed]
    timing = failed | time_rows(job.setup, working, job.repeats, progress)
    return {name: report.Result(memory[name], timing[name]) for name in memory}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the comparison and prints it."""
    job = parse(arguments)
    print(report.heading(job.setup, job.repeats), flush=True)
    if job.left_out:
        print(f"left out, not offered for {job.setup.model}: {', '.join(job.left_out)}")
    progress = Progress(sys.stderr)
    results = run(job, progress)
    progress.done()
    print(report.table(results))
    print(report.footer(job.setup, job.repeats))
    if job.goals:
        print("Figures to reach:", *(goal.line(results) for goal in job.goals), sep="\n")
    if job.write:
        page = report.page(job.setup, job.repeats, results, job.command)
        job.write.write_text(page, encoding="utf-8")
    if job.plot:
        report.plot(job.setup, results, job.plot)
    if job.json:
        job.json.write_text(json.dumps(report.raw(job.setup, job.repeats, results), indent=1))


if __name__ == "__main__":
    main()
