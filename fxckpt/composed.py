"""A plan over blocks as what an account tells of a step: the bytes over time, and at the peak."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fxckpt.account import KINDS, Holding, Moment
from fxckpt.budgeting import StepPlan
from fxckpt.composition import BACKWARD, FORWARD, OUTSIDE, Composition

_OUTSIDE = "code outside of blocks"


def before(plan: StepPlan) -> tuple[Moment, ...]:
    """The step as it is."""
    return tuple(_moments(plan, plan.eager, [0] * len(plan.chosen)))


def after(plan: StepPlan) -> tuple[Moment, ...]:
    """The step as planned."""
    return tuple(_moments(plan, plan.composition, plan.chosen))


def at_peak(plan: StepPlan) -> tuple[Holding, ...]:
    """What lives at the peak of the step as planned, the largest first."""
    step = plan.composition
    live = step.live(plan.chosen)
    moment = step.moments[live.index(max(live))]
    paths = [spot.called.path for spot in plan.spots.values()]
    kept = {c: step.kept(moment, c, plan.chosen) for c in moment.waiting}
    found = [Holding(f"kept by {paths[c]}", paths[c], "saved", size) for c, size in kept.items()]
    found.append(Holding(moment.operation or _OUTSIDE, "", "outside", moment.outside))
    if moment.phase != OUTSIDE:
        own = max(live) - moment.outside - sum(kept.values())
        path = paths[moment.call]
        found.append(Holding(f"{moment.phase} of {path}", path, "temporary", own))
    return tuple(sorted(found, key=lambda holding: -holding.bytes))


def _moments(plan: StepPlan, step: Composition, chosen: Sequence[int]) -> Iterator[Moment]:
    spots = [*plan.spots.values()]
    now, backward_started = 0.0, False
    for moment, live in zip(step.moments, step.live(chosen), strict=True):
        backward_started |= moment.phase == BACKWARD or "Backward" in moment.operation
        phase = "backward" if backward_started else "forward"
        saved = sum(step.kept(moment, c, chosen) for c in moment.waiting)
        shares = {"outside": moment.outside, "saved": saved}
        kinds = tuple({**shares, "temporary": live - sum(shares.values())}.get(k, 0) for k in KINDS)
        path = "" if moment.phase == OUTSIDE else spots[moment.call].called.path
        name = f"{moment.phase} of {path}" if path else moment.operation or _OUTSIDE
        yield Moment(name, path, "", "", phase, now, live, kinds)
        if moment.phase != OUTSIDE:  # backward takes about twice as long as forward
            whole, again = spots[moment.call].menu.seconds, step.menus[moment.call]
            more = again[chosen[moment.call]].seconds
            now += whole / 3 if moment.phase == FORWARD else 2 * whole / 3 + more
