"""Rows that layers have in common, shown once: "layers.3-59.attn, x57".

Layers are what the numbers in module paths count. Rows are alike if they differ in nothing but the
number of one layer, and in the names of values; the innermost numbers are looked at first. A second
value that is like another one of the same layer stays a line of its own.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

from fxckpt.account import Row


class Entry(NamedTuple):
    """Rows that layers have in common.

    Attributes:
        row: The first of them.
        path: Their path, with the numbers of the layers: "layers.3-59.attn", "0-22/2" in steps.
        layers: How many there are.
    """

    row: Row
    path: str
    layers: int

    @property
    def bytes(self) -> int:
        """Of all of them."""
        return self.layers * self.row.bytes

    @property
    def seconds(self) -> float:
        """Of all of them."""
        return self.layers * self.row.seconds


def collapsed(rows: Iterable[Row]) -> list[Entry]:
    """The rows, those that layers have in common as one, in the order of the first of each."""
    seen: Counter[Hashable] = Counter()
    entries: list[tuple[Entry, Hashable]] = []
    for row in rows:
        like = _likeness(row)
        entries.append((Entry(row, row.path, 1), (like, seen[like, row.path])))
        seen[like, row.path] += 1
    deepest = max((entry.path.count(".") for entry, _ in entries), default=-1)
    for place in range(deepest, -1, -1):
        entries = _merged(entries, place)
    return [entry for entry, _ in entries]


def _likeness(row: Row) -> Hashable:
    """What rows of identical layers have in common, but for the path."""
    same = (row.action, row.bytes, row.shape, row.dtype, row.op, row.source, row.times)
    return *same, f"{row.seconds:.3g}"


def _merged(entries: Sequence[tuple[Entry, Hashable]], place: int) -> list[tuple[Entry, Hashable]]:
    """Merges what differs in a number at one place of the path."""
    groups: dict[Hashable, list[Entry]] = {}
    likeness = {}
    for i, (entry, like) in enumerate(entries):
        parts = entry.path.split(".")
        numbered = place < len(parts) and parts[place].isdigit()
        key: Hashable = i  # alone
        if numbered:
            key = like, entry.layers, (*parts[:place], "*", *parts[place + 1 :])
        groups.setdefault(key, []).append(entry)
        likeness[key] = like
    return [(_joined(group, place), likeness[key]) for key, group in groups.items()]


def _joined(group: Sequence[Entry], place: int) -> Entry:
    first = group[0]
    if len(group) == 1:
        return first
    parts = first.path.split(".")
    parts[place] = _ranges(sorted(int(e.path.split(".")[place]) for e in group))
    return Entry(first.row, ".".join(parts), sum(e.layers for e in group))


def _ranges(numbers: Sequence[int]) -> str:
    """Numbers as people write them: "0-7,10", or "0-22/2" for every second one."""
    steps = {b - a for a, b in itertools.pairwise(numbers)}
    if len(numbers) > 2 and len(steps) == 1 and (step := steps.pop()) > 1:
        return f"{numbers[0]}-{numbers[-1]}/{step}"
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][-1] + 1:
            found[-1].append(number)
        else:
            found.append([number])
    return ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in found)
