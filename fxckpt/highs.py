"""Linear and integer programs, solved by HiGHS through `scipy.optimize`.

Work is limited by numbers of nodes and not by a clock, so that equal programs get equal solutions.
The limit in seconds is for a solver that does not come to an end; no program comes near it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from numpy.typing import ArrayLike
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import csr_matrix

_SECONDS = 60.0
_UNIT = Bounds(0, 1)
_LIKELY = 0.05  # of the largest cost
SOLVED, NOTHING_FITS = 0, 2  # states of what is solved, and of what has no solution


def relaxed(costs: ArrayLike, matrix: csr_matrix, most: ArrayLike) -> Any:
    """The x from 0 to 1 with `matrix @ x <= most` whose costs are least; see `linprog`.

    Its x is None if there is none, or if it was not found.
    """
    limits = {"time_limit": _SECONDS}
    found = linprog(costs, matrix, most, bounds=(0, 1), method="highs", options=limits)
    if not found.success:
        found.x = None  # not the one whose costs are least: they would be taken for a bound
    return found


def near(
    costs: ArrayLike,
    matrix: csr_matrix,
    most: ArrayLike,
    whole: ArrayLike,
    *,
    nodes: int,
    gap: float,
    least: float = math.inf,
    proven: bool = False,
) -> Any:
    """Likewise with whole numbers, which are looked for near the optimum with fractions.

    A variable is fixed if its other value alone would cost more than is looked for: reduced-cost
    fixing (Dantzig, Fulkerson and Johnson 1954). What costs `_LIKELY` more than that optimum is
    soon searched, and comes first. Only if nothing is found there, more is searched.

    Args:
        costs: Of each variable; the largest is 1.
        matrix: See `relaxed`.
        most: Likewise.
        whole: See `branched`.
        nodes: Likewise.
        gap: Likewise.
        least: What costs more than that is not looked for.
        proven: Whether `mip_dual_bound` is to be a bound for all that cost at most `least`.
    """
    found = relaxed(costs, matrix, most)
    if found.x is None:
        found.mip_dual_bound = found.mip_gap = None
        return found
    limits, rest = LinearConstraint(matrix, ub=most), least - found.fun
    for more in [rest] if proven else sorted({min(_LIKELY, rest), rest}):
        low, high = found.upper.marginals < -more, found.lower.marginals <= more
        bounds = Bounds(low.astype(float), high.astype(float))
        made = branched(costs, limits, whole, nodes=nodes, gap=gap, bounds=bounds)
        if made.x is not None:
            break
    return made


def branched(
    costs: ArrayLike,
    constraints: LinearConstraint | Sequence[LinearConstraint],
    whole: ArrayLike,
    *,
    nodes: int,
    gap: float = 1e-4,
    bounds: Bounds = _UNIT,
) -> Any:
    """The x with least costs that is found after some branching; see `milp`.

    Args:
        costs: Of each variable.
        constraints: On x.
        whole: For each variable, whether it is to be a whole number.
        nodes: Of branching, at most.
        gap: Between what is found and what can be found, that is good enough; of the costs.
        bounds: Of x.
    """
    limits = {"node_limit": nodes, "mip_rel_gap": gap, "time_limit": _SECONDS}
    return milp(costs, constraints=constraints, bounds=bounds, integrality=whole, options=limits)
