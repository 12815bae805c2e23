"""Skips rows of a run: which rows come next remains a pure function of the current row."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator

from torchladder.registry import require

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
            valid = 0 <= first <= last
            require(valid, f"data.skip_rows: [{first}, {last}] is not a range; use 0 <= first <= last.")
            if self.ranges and first <= self.ranges[-1][1] + 1:
                first, last = self.ranges[-1][0], max(self.ranges.pop()[1], last)
            self.ranges.append((first, last))
        self._firsts = [first for first, _ in self.ranges]

    def take(self, row: int, count: int) -> list[int]:
        """Returns the next ``count`` rows that are not skipped, from ``row`` on."""
        return [row for kept in self._kept_ranges(row, count) for row in kept]

    def advance(self, row: int, count: int) -> int:
        """Returns the row that follows after ``take(row, count)``."""
        for kept in self._kept_ranges(row, count):
            row = kept.stop
        return row

    def _kept_ranges(self, row: int, count: int) -> Iterator[range]:
        """Yields the next ``count`` rows that are not skipped, as ranges."""
        while count:
            index = bisect_right(self._firsts, row)
            if index and row <= self.ranges[index - 1][1]:
                row = self.ranges[index - 1][1] + 1
            end = min([row + count, *self._firsts[index : index + 1]])  # up to the next range that is skipped
            yield range(row, end)
            row, count = end, count - (end - row)
