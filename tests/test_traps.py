"""Each trap holds, and bites when what protects against it is taken out: see `traps`."""

import pytest
from traps import (
    Trap,
    aliasing,
    arguments,
    callers,
    effects,
    hooks,
    inner_hooks,
    inputs,
    modes,
    outside,
    results,
    state,
    structure,
)

THEMES = (
    *(arguments, modes, state, structure, effects, outside),
    *(hooks, inner_hooks, results, inputs, aliasing, callers),
)
TRAPS = [
    pytest.param(trap, id=f"{theme.__name__.removeprefix('traps.')}: {trap.name}")
    for theme in THEMES
    for trap in theme.TRAPS
]


@pytest.mark.parametrize("trap", TRAPS)
def test_holds(trap: Trap) -> None:
    trap.run()


@pytest.mark.parametrize("trap", [p for p in TRAPS if p.values[0].guard is not None])
def test_bites(trap: Trap, monkeypatch: pytest.MonkeyPatch) -> None:
    trap.guard(monkeypatch)
    with pytest.raises(Exception) as caught:  # noqa: PT011
        trap.run()
    assert not isinstance(caught.value, (TypeError, NameError)), "the guard itself is broken"
