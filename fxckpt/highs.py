"""Linear and integer programs, solved by HiGHS through `scipy.optimize`.

Work is limited by numbers of nodes and not by a clock, so that equal programs get equal solutions.
The limit in seconds is for a solver that does not come to an end; no program comes near it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from numpy.typing import ArrayLike
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import csr_matrix

_SECONDS = 60.0
_UNIT = Bounds(0, 1)


def relaxed(costs: ArrayLike, matrix: csr_matrix, most: ArrayLike) -> Any:
    """The x from 0 to 1 with `matrix @ x <= most` whose costs are least; see `linprog`.

    Its x is None if there is none, or if it was not found.
    """
    limits = {"time_limit": _SECONDS}
    found = linprog(costs, matrix, most, bounds=(0, 1), method="highs", options=limits)
    if not found.success:
        found.x = None  # not the one whose costs are least: they would be taken for a bound
    return found


def branched(
    costs: ArrayLike,
    constraints: LinearConstraint | Sequence[LinearConstraint],
    whole: ArrayLike,
    *,
    nodes: int,
    gap: float = 1e-4,
    bounds: Bounds = _UNIT,
    presolve: bool = True,
) -> Any:
    """The x with least costs that is found after some branching; see `milp`.

    Args:
        costs: Of each variable.
        constraints: On x.
        whole: For each variable, whether it is to be a whole number.
        nodes: Of branching, at most.
        gap: Between what is found and what can be found, that is good enough; of the costs.
        bounds: Of x.
        presolve: Whether to make it simpler first; HiGHS prints a line where it mends a solution.
    """
    limits = {"node_limit": nodes, "mip_rel_gap": gap, "time_limit": _SECONDS, "presolve": presolve}
    return milp(costs, constraints=constraints, bounds=bounds, integrality=whole, options=limits)
