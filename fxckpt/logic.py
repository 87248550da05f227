"""The rows of the program of `exact` that do not concern memory; pure numbers."""

from __future__ import annotations

from collections import Counter

from fxckpt.columns import OFTEN, Columns, Rows


def logic(columns: Columns) -> Rows:
    """What is there was saved, or runs again."""
    problem = columns.problem
    n, m, again = columns.n, columns.m, columns.again
    rows = Rows(columns.count)
    for o, operands in enumerate(problem.operands):
        rows.add([(n + m + o, 1), (n + o, -1)])
        for u in dict.fromkeys(operands):
            if problem.producer[u] != o:
                rows.add([(n + o, 1), (u, -1), (int(again[u]), -1)])
    for v in range(n):
        if columns.last[v] >= 0:
            rows.add([(v, -1), (int(again[v]), -1)], -1)
        rows.add([(v, 1), (int(again[v]), 1)], 1)
    for f, v in zip(columns.fleeting, columns.breakable, strict=True):
        rows.add([(int(f), 1), (int(again[v]), -1)])
        rows.add([(int(f), 1), (n + 2 * m + int(problem.producer[v]), -1)])
    for v in columns.several:
        rows.add([(int(again[v]), 1), (n + int(problem.producer[v]), -1)])
    return rows


def runs(columns: Columns) -> Rows:
    """How often operations run again.

    What is let go runs for each time that a reader does, and once more if backward reads it:

        runs(o) >= runs(c) + (1 if backward reads u) - OFTEN (1 - g(o))    if c reads u, made by o

    This is nearly so, not always: a reader may run while the value is there. It is for plans.
    """
    rows, g = Rows(columns.count), columns.n + columns.m
    for u, o in enumerate(map(int, columns.problem.producer)):
        for c in columns.readers[u]:
            if c != o:
                entries = Counter({g + o: OFTEN})
                entries.update(_runs(columns, c))
                entries.subtract(_runs(columns, o))
                rows.add(entries.items(), OFTEN - (columns.last[u] >= 0))
    return rows


def _runs(columns: Columns, o: int) -> dict[int, float]:
    """Columns, and how often an operation runs again if they are 1."""
    n, m = columns.n, columns.m
    return {n + o: 1, n + m + o: 1, n + 2 * m + o: 1, columns.often + o: OFTEN}
