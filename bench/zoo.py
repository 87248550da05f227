"""Examines the zoo: which architectures are captured whole, exactly, and what is saved.

python bench/zoo.py --only 'hf/gpt*' 'hf/t5*'
python bench/zoo.py --write docs/coverage.md            all of them; takes an hour
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from fnmatch import fnmatchcase
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from bench.architectures import architectures
from bench.architectures.coverage import markdown, public, totals
from bench.architectures.examine import POLICIES, Row, examine

IMPORTED_ONCE = ["torch", "scipy.optimize", "transformers.modeling_utils"]


def examine_one(name: str, policies: tuple[str, ...], threads: int) -> Row:
    """Examines the architecture called `name`; to be called in a process of its own."""
    import transformers

    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    return examine(architectures()[name], policies)


def examine_all(names: Sequence[str], options: argparse.Namespace) -> Iterator[Row]:
    """The rows of the architectures in their order, each from a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED_ONCE)
    families = {name: architecture.family for name, architecture in architectures().items()}

    def guarded(name: str) -> Row:
        with ProcessPoolExecutor(1, mp_context=context) as process:
            task = process.submit(examine_one, name, tuple(options.policy), options.threads)
            try:
                return task.result()
            except BrokenProcessPool:
                return Row(name, families[name], "raises", "its process was killed")

    with ThreadPoolExecutor(options.jobs) as threads:
        yield from threads.map(guarded, names)


def _line(row: Row) -> str:
    kept = " ".join(f"{policy} {ratio:.2f}" for policy, ratio in row.ratios.items())
    notes = "; ".join([*row.unreproducible[:1], *([row.reason] if row.reason else [])])
    return f"{row.name:32} {row.status:6} {kept:24} {row.first_call:5.1f} s  {public(notes)}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=["*"], metavar="GLOB", help="of names")
    parser.add_argument("--family", nargs="+", default=["*"], metavar="GLOB")
    parser.add_argument("--policy", nargs="+", default=list(POLICIES))
    parser.add_argument("--jobs", type=int, default=1, help="architectures at the same time")
    parser.add_argument("--threads", type=int, default=1, help="of torch, in each job")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the page in Markdown")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rows")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the examination and prints a line for each architecture."""
    parser = _parser()
    options = parser.parse_args(arguments)
    chosen = [
        name
        for name, architecture in architectures().items()
        if any(fnmatchcase(name, glob) for glob in options.only)
        and any(fnmatchcase(architecture.family, glob) for glob in options.family)
    ]
    if not chosen:
        parser.error("no architecture matches")
    rows = []
    for row in examine_all(chosen, options):
        rows.append(row)
        print(_line(row), flush=True)
    print(totals(rows))
    if options.write:
        options.write.write_text(markdown(rows, options.policy), encoding="utf-8")
    if options.json:
        options.json.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
