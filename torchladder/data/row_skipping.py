"""Skips rows of a run: which rows come next remains a pure function of the current row."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable

from torchladder.registry import ConfigError

RowRange = tuple[int, int]
"""The first and the last row of a range, both inclusive."""


class RowSkipper:
    """Counts rows as if the skipped ones did not exist.

    Args:
        ranges: ranges of rows to skip, in any order; they may overlap.

    Attributes:
        ranges: the same ranges, sorted, without overlaps.

    Raises:
        ConfigError: a range ends before it begins, or begins below 0.
    """

    def __init__(self, ranges: Iterable[RowRange] = ()) -> None:
        self.ranges: list[RowRange] = []
        for first, last in sorted(ranges):
            if not 0 <= first <= last:
                raise ConfigError(f"data.skip_rows: [{first}, {last}] is not a range; use 0 <= first <= last.")
            if self.ranges and first <= self.ranges[-1][1] + 1:
                first, last = self.ranges[-1][0], max(self.ranges.pop()[1], last)
            self.ranges.append((first, last))
        self._firsts = [first for first, _ in self.ranges]

    def take(self, row: int, count: int) -> list[int]:
        """Returns the next ``count`` rows that are not skipped, from ``row`` on."""
        rows: list[int] = []
        while len(rows) < count:
            row, skipped = self._next_kept(row)
            end = row + count - len(rows)
            end = end if skipped is None else min(end, skipped)
            rows.extend(range(row, end))
            row = end
        return rows

    def advance(self, row: int, count: int) -> int:
        """Returns the row that follows after ``take(row, count)``."""
        while count:
            row, skipped = self._next_kept(row)
            taken = count if skipped is None else min(count, skipped - row)
            row, count = row + taken, count - taken
        return row

    def _next_kept(self, row: int) -> tuple[int, int | None]:
        """Returns the first row from ``row`` on that is kept, and the next one that is skipped, None if none is."""
        index = bisect_right(self._firsts, row)
        if index and row <= self.ranges[index - 1][1]:
            row = self.ranges[index - 1][1] + 1
        return row, self._firsts[index] if index < len(self._firsts) else None
