"""Rows that a run leaves out: which rows come next is still a function of the row that it stands at."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable

from torchladder.registry import ConfigError

RowRange = tuple[int, int]
"""The first and the last row of a stretch."""


class RowSkipper:
    """Counts rows as if the left out ones were not there.

    Args:
        ranges: first and last row of each stretch that is left out, in any order; they may overlap.

    Raises:
        ConfigError: a range that ends before it begins, or begins below 0.
    """

    def __init__(self, ranges: Iterable[RowRange] = ()) -> None:
        self.ranges: list[RowRange] = []
        for first, last in sorted(ranges):
            if not 0 <= first <= last:
                raise ConfigError(f"data.skip_rows: {first} to {last} is no range of rows.")
            if self.ranges and first <= self.ranges[-1][1] + 1:
                first, last = self.ranges[-1][0], max(self.ranges.pop()[1], last)
            self.ranges.append((first, last))
        self._firsts = [first for first, _ in self.ranges]

    def take(self, row: int, count: int) -> list[int]:
        """Returns the next ``count`` rows from ``row`` on."""
        rows: list[int] = []
        while len(rows) < count:
            row, free = self._stretch(row)
            end = row + count - len(rows)
            end = end if free is None else min(end, free)
            rows.extend(range(row, end))
            row = end
        return rows

    def after(self, row: int, count: int) -> int:
        """Returns the row to go on with when ``count`` rows from ``row`` on have been taken."""
        while count:
            row, free = self._stretch(row)
            taken = count if free is None else min(count, free - row)
            row, count = row + taken, count - taken
        return row

    def _stretch(self, row: int) -> tuple[int, int | None]:
        """Returns the first row from ``row`` on that is kept, and the next that is not, None where all are."""
        number = bisect_right(self._firsts, row)
        if number and row <= self.ranges[number - 1][1]:
            row = self.ranges[number - 1][1] + 1
        return row, self._firsts[number] if number < len(self._firsts) else None
