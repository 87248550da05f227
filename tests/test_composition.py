"""Which decision each block takes, compared with all that there are."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxckpt.composition import BACKWARD, FORWARD, OUTSIDE, Composition, Moment, Option

MIB = 1 << 20


def composition(seed: int, calls: int, entries: int) -> Composition:
    """A chain of blocks, forward and back, with random menus and something outside."""
    draw = random.Random(seed).randrange
    menus = [
        [
            Option(
                (kept := draw(40)) * MIB,
                draw(3) * MIB,
                (kept + draw(5)) * MIB,
                (back := draw(40)) * MIB,
                (back + draw(3)) * MIB,
                float(draw(100)),
            )
            for _ in range(entries)
        ]
        for _ in range(calls)
    ]
    moments = []
    for c in range(calls):
        moments.append(Moment(FORWARD, c, draw(10) * MIB, tuple(range(c))))
        moments.append(Moment(OUTSIDE, -1, draw(20) * MIB, tuple(range(c + 1))))
    for c in reversed(range(calls)):
        alone = tuple(range(draw(c + 1), c + 1))
        moments.append(Moment(BACKWARD, c, draw(10) * MIB, tuple(range(c)), alone))
        moments.append(Moment(OUTSIDE, -1, draw(20) * MIB, tuple(range(c)), alone))
    return Composition(moments, menus)


def peak_by_hand(step: Composition, chosen: tuple[int, ...]) -> int:
    """The peak by the definition, moment by moment."""
    options = [menu[i] for menu, i in zip(step.menus, chosen, strict=True)]
    peak = 0
    for m in step.moments:
        live = m.outside
        for c in m.waiting:
            live += options[c].kept + (options[c].outputs if c in m.alone else 0)
        if m.phase == FORWARD:
            live += options[m.call].forward
        elif m.phase == BACKWARD:
            o = options[m.call]
            live += o.backward_alone if m.call in m.alone else o.backward
        peak = max(peak, live)
    return peak


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), calls=st.integers(1, 4), entries=st.integers(1, 4))
def test_the_fastest_that_fits(seed: int, calls: int, entries: int) -> None:
    step = composition(seed, calls, entries)
    every = [*itertools.product(range(entries), repeat=calls)]
    peaks = {chosen: peak_by_hand(step, chosen) for chosen in every}
    assert all(step.peak(chosen) == peak for chosen, peak in peaks.items())
    least = min(peaks.values())
    assert step.peak(step.least()) == least
    for budget in sorted({least, least - 1, *peaks.values()}):
        fitting = [step.seconds(chosen) for chosen, peak in peaks.items() if peak <= budget]
        found = step.fastest(budget)
        assert (found is None) == (not fitting)
        if found is not None:
            assert step.peak(found.chosen) <= budget
            best = min(fitting)
            assert found.bound <= best + 1e-6
            assert step.seconds(found.chosen) == pytest.approx(best, rel=2e-3, abs=1e-6)


def test_a_step_without_blocks() -> None:
    step = Composition([Moment(OUTSIDE, -1, 5, ())], [])
    assert step.peak(()) == 5
    assert step.fastest(4) is None
    found = step.fastest(5)
    assert found is not None
    assert (found.chosen, found.bound, step.least()) == ((), 0.0, ())
