"""The arguments of the command line, and what is told of them by `--help`."""

from __future__ import annotations

import argparse
import ast
import difflib
from collections.abc import Callable, Mapping
from typing import Any

from fxckpt.quantities import parse_bytes
from fxckpt.rates import DEVICES
from fxckpt.targets import DTYPES

STATES = {"none": 0, "sgd": 0, "momentum": 1, "adam": 2, "adamw": 2}  # copies of the parameters
COMMANDS = {
    "explain": "what a step holds, saves and computes again",
    "plan": "what it costs to fit a budget",
    "frontier": "the curve of memory and time",
    "fit-batch": "the largest batch that fits",
    "compare": "usual strategies beside plans in the same memory",
}


def parser_of(description: str, runs: Mapping[str, Callable[..., int]]) -> argparse.ArgumentParser:
    """The parser of the command line.

    Args:
        description: Of the program, with an example of each command on a line.
        runs: What runs each of `COMMANDS`: it is in `run` of what is parsed.
    """
    parser = argparse.ArgumentParser(
        prog="python -m fxckpt",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, about in COMMANDS.items():
        _add(commands, name, about, description, runs[name])
    return parser


def _add(commands: Any, name: str, about: str, description: str, run: Callable[..., int]) -> None:
    (example,) = (line for line in description.splitlines() if f"fxckpt {name} " in line)
    parser = commands.add_parser(
        name,
        help=about,
        description=about,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("target", nargs="?", metavar="module:factory")
    which.add_argument("--model", help="a type of model of transformers: gpt2, bert, llama, vit")
    parser.add_argument("--batch", type=_positive, default=1)
    parser.add_argument("--seq", type=_positive, help="length of texts, 1024 at most by default")
    parser.add_argument("--image", type=_positive, help="width and height of images")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the parameters")
    parser.add_argument(
        "--set",
        action="append",
        type=_change,
        default=[],
        metavar="KEY=VALUE",
        help="an entry of the configuration, or an argument of the factory",
    )
    parser.add_argument("--device", type=_device, help=f"{', '.join(DEVICES)}; cpu is measured")
    parser.add_argument("--budget", type=_budget, help="20GiB, 500MB, or 0.5 of the peak as it is")
    parser.add_argument("--optimizer", choices=STATES, default="adamw", help="for its states")
    parser.add_argument("--seconds", type=float, default=10.0, help="for planning, about")
    parser.add_argument("--json", action="store_true", help="print data instead of text")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    if name == "explain":
        parser.add_argument("--policy", help="instead of a budget, such as block, dots, sqrt")
        parser.add_argument("--html", metavar="FILE", help="write a page to look at")
        parser.add_argument("--markdown", action="store_true", help="print Markdown")
    if name in ("explain", "frontier"):
        parser.add_argument("--plot", metavar="FILE", help="draw a picture: .png, .svg")
    if name == "frontier":
        parser.add_argument("--points", type=_positive, default=8)
    if name == "plan":
        parser.add_argument("--save", metavar="FILE", help="write the plan, for rewrite(plan=...)")


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def _device(text: str) -> str:
    if text not in DEVICES and text.partition(":")[0] not in ("cpu", "cuda"):
        near = difflib.get_close_matches(text, DEVICES, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(DEVICES)}{hint}")
    return text


def _budget(text: str) -> int | float:
    size = parse_bytes(text)
    if "." in text and text.replace(".", "", 1).isdigit() and 0 < float(text) <= 1:
        return float(text)
    if size is None:
        raise argparse.ArgumentTypeError(
            f"expected bytes, such as 20GiB or 500MB, or a fraction such as 0.5; got {text!r}"
        )
    return size


def _change(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE, got {text!r}")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value
