"""What lies outside of modules: caches that forward fills, and what is not watched."""

import functools
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from traps import EITHER, Stage, Trap, function, rows, same
from traps.effects import effect, times
from traps.state import changes

# --- caches outside of modules --------------------------------------------------------------------


def cached(name: str, make: Callable[[], Callable[[Any, Tensor], Any]]) -> Trap:
    """Other shapes and evaluation mode meet what the first calls left in a cache."""

    def play(stage: Stage) -> None:
        for n in (3, 3, 2, 3):
            stage.step(rows(n))
        stage.model.eval()
        stage.note("evaluation", stage.model(rows()).detach())
        stage.model.train()
        stage.step(rows(5))

    def run() -> None:
        read: Any = None

        def made() -> nn.Module:
            nonlocal read
            read = make()
            return function(lambda m, x: x @ m.weight * read(m, x))()

        same(made, play, warns=EITHER)

    return Trap(f"cache: {name}", run)


def memoized() -> Callable[[Any, Tensor], Any]:
    table = functools.lru_cache(lambda width: torch.arange(1.0, width + 1))
    return lambda m, x: table(x.shape[1])


def closed_over() -> Callable[[Any, Tensor], Any]:
    table: dict[Any, Any] = {}

    def read(m: Any, x: Tensor) -> Any:
        if "a" not in table:
            table["a"] = torch.arange(4.0)
        return table["a"]

    return read


def of_an_object() -> Callable[[Any, Tensor], Any]:
    holder = SimpleNamespace(table=None)

    def read(m: Any, x: Tensor) -> Any:
        m.holder = holder
        if holder.table is None:
            holder.table = torch.arange(4.0)
        return holder.table

    return read


def of_shape() -> Callable[[Any, Tensor], Any]:
    table = functools.lru_cache(lambda n: torch.arange(n * 4.0).view(n, 4))
    return lambda m, x: table(len(x))


def filled_table(m: Any) -> Any:
    if "a" not in m.it:
        m.it["a"] = torch.ones(4) * 3
    return m.it["a"]


def filled_object(m: Any) -> Any:
    if m.it.a is None:
        m.it.a = torch.ones(4) * 3
    return m.it.a


CACHES = [
    effect("tensor kept in a dictionary", times(filled_table), it=dict, warns=EITHER),
    effect("tensor kept in an object", times(filled_object),
           it=lambda: SimpleNamespace(a=None), warns=EITHER),
    cached("lru_cache", memoized),
    cached("lru_cache by shape", of_shape),
    cached("closure", closed_over),
    cached("object", of_an_object),
]  # fmt: skip

# --- what steers a model from outside -------------------------------------------------------------


class Factor(nn.Linear):
    """Multiplies by an attribute of its class."""

    factor = 2

    def forward(self, x: Tensor) -> Tensor:
        return self.scaled(super().forward(x)) * self.factor * FACTOR

    def scaled(self, x: Tensor) -> Tensor:
        return x * 2


SCALED = Factor.scaled


FACTOR = 2
FOLDER = tempfile.TemporaryDirectory()
FILE = Path(FOLDER.name) / "factor"


def set_global(value: int) -> None:
    globals()["FACTOR"] = value


def reset() -> None:
    """As in the beginning, for eager and for ours."""
    Factor.factor, Factor.scaled = 2, SCALED
    set_global(2)
    default.__defaults__ = (2,)
    default.k = 2
    os.environ["FXCKPT_TRAP"] = "2"
    FILE.write_text("2")


def default(m: Any, x: Tensor, factor: int = 2) -> Tensor:
    return x @ m.weight * factor * default.k


def closure() -> nn.Module:
    """Its forward reads a variable that `turn` sets."""
    factor = 2

    def forward(m: Any, x: Tensor) -> Tensor:
        return x @ m.weight * factor

    def turn() -> None:
        nonlocal factor
        factor = 3

    forward.turn = turn
    return function(forward)()


def outer(name: str, make: Callable[[], nn.Module], change: Any, **options: Any) -> Trap:
    """Something around the model changes."""
    return changes(name, lambda: (reset(), make())[1], change, **options)


def factor() -> nn.Module:
    return Factor(4, 4)


def of_environment(m: Any, x: Tensor) -> Tensor:
    return x @ m.weight * int(os.environ["FXCKPT_TRAP"])


def of_file(m: Any, x: Tensor) -> Tensor:
    return x @ m.weight * int(FILE.read_text())


default.k = 2
AROUND = [
    outer("attribute of a class", factor, lambda m: setattr(Factor, "factor", 3)),
    outer("global", factor, lambda m: set_global(3)),
    outer("closure", closure, lambda m: m.function.turn()),
    outer("default", function(default), lambda m: setattr(default, "__defaults__", (3,))),
    outer("attribute of a function", function(default), lambda m: setattr(default, "k", 3)),
    outer("method of a class", factor, lambda m: setattr(Factor, "scaled", lambda m, x: x * 5)),
    # Not watched: the model has to be rewritten again.
    outer("environment", function(of_environment), lambda m: os.environ.update(FXCKPT_TRAP="3"),
          again=True),
    outer("file", function(of_file), lambda m: FILE.write_text("3"), again=True),
]  # fmt: skip

TRAPS = CACHES + AROUND
