"""Which source each row comes from: a fixed interleave in which every source keeps its proportion at every row.

Drawing the source of each row at random would be off by about sqrt(r) rows after r rows. Here the count of a source of
proportion p is always less than one row away from r * p. Equivalently its row j (from 0) lies between two rows: not
before ``floor(j / p)``, its release, and not after ``ceil((j + 1) / p) - 1``, its deadline. Taking, at every row, the
released source with the earliest deadline meets all deadlines (Tijdeman, The chairman assignment problem, 1980).

Example with proportions 0.5, 0.3, 0.2, called A, B, C, and the next (release, deadline) of each source:

    row 0   A (0, 1)   B (0, 3)   C (0, 4)   -> A
    row 1   A (2, 3)   B (0, 3)   C (0, 4)   -> B, since A is not released before row 2
    row 2   A (2, 3)   B (3, 6)   C (0, 4)   -> A
    row 3   A (4, 5)   B (3, 6)   C (0, 4)   -> C
    row 4   A (4, 5)   B (3, 6)   C (5, 9)   -> A

That rule alone would have to run from row 0 to find row 10,000,000. So rows are divided into blocks, and the counts at
the boundary of a block are computed without the blocks before it: any row costs one block. Let W be more than any
1 / p. The counts at a boundary S take two steps:

1. At S - W, round r * p down for each source; give the rows still missing to sources that were rounded, the earliest
   deadlines first. The rule can continue from these counts forever: what must come by any t > S - W has room. (If
   every source that was given a row has its next deadline by t too, the sum over all sources says so. If not, no other
   rounded source has one by t, and each of the rest owes at most its proportion of the time.)
2. From there the rule runs for W rows, to S. So the deadlines after S can be met, since the rule could just continue;
   and those before S are met: rows released in the last W rows were placed by this run, and those released earlier
   have their deadlines before S.

Blocks have at least 2 W rows. Within a block the rule runs from the counts at its first boundary, each source up to its
count at the next boundary: by 1 and 2 every interval has room for the rows due in it, so the rule meets all deadlines.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from heapq import heapify, heappop, heappush
from itertools import islice, pairwise

import numpy as np

from torchladder.registry import ConfigError

MIN_PROPORTION = Fraction(1, 10**6)
"""Below it, computing a block would take seconds."""
MIN_BLOCK_ROWS = 1 << 14


class WeightedInterleave:
    """Maps every row of a run to a row of one of its sources.

    Args:
        weights: one per source, in any unit, 0 for no rows; converted to fractions exactly as they print in decimal.

    Attributes:
        proportions: of each source; they sum to 1.

    Raises:
        ConfigError: a weight is negative or not finite, none is above 0, or a proportion is below one in a million.
    """

    def __init__(self, weights: Sequence[float | Fraction]) -> None:
        if not any(weights) or not all(math.isfinite(weight) and weight >= 0 for weight in weights):
            raise ConfigError(f"weights are {list(weights)}; they must be 0 or more and finite, and one above 0.")
        exact = [Fraction(str(weight)) for weight in weights]
        self.proportions = [weight / sum(exact) for weight in exact]
        smallest = min(filter(None, self.proportions))
        if smallest < MIN_PROPORTION:
            raise ConfigError(f"weights are {list(weights)}; the smallest is less than a millionth of their sum.")
        # Integers from here on, since fractions are slow: the proportion of source i is _numerators[i] / _denominator.
        self._denominator = math.lcm(*(proportion.denominator for proportion in self.proportions))
        self._numerators = [int(proportion * self._denominator) for proportion in self.proportions]
        self._settle_rows = math.ceil(1 / smallest) + 1  # W
        self._block_rows = max(MIN_BLOCK_ROWS, 2 * self._settle_rows)
        self._blocks: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __call__(self, row: int) -> tuple[int, int]:
        """Returns the source of a row, and which of that source's rows it is."""
        number, offset = divmod(row, self._block_rows)
        source, index = self._block(number)
        return int(source[offset]), int(index[offset])

    def counts(self, row: int) -> list[int]:
        """Returns how many of the rows before ``row`` come from each source."""
        number, offset = divmod(row, self._block_rows)
        counts = self._counts_at_block(number)
        for source in islice(self._block_sources(number), offset):
            counts[source] += 1
        return counts

    def _block(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the source and the index within it of each row of a block; keeps the last two blocks."""
        if number not in self._blocks:
            source = np.fromiter(self._block_sources(number), np.int64, self._block_rows)
            index = np.empty_like(source)
            for i, count in enumerate(self._counts_at_block(number)):
                is_i = source == i
                index[is_i] = count + np.arange(is_i.sum())
            while len(self._blocks) > 1:
                del self._blocks[next(iter(self._blocks))]
            self._blocks[number] = source, index
        return self._blocks[number]

    def _block_sources(self, number: int) -> Iterator[int]:
        """Yields the source of each row of a block."""
        return self._earliest_deadline_first(
            self._counts_at_block(number), number * self._block_rows, self._counts_at_block(number + 1)
        )

    def _counts_at_block(self, number: int) -> list[int]:
        """Returns each source's count at the first row of a block."""
        row = number * self._block_rows
        if row == 0:
            return [0] * len(self._numerators)
        row -= self._settle_rows  # step 1 above
        counts = [row * numerator // self._denominator for numerator in self._numerators]
        rounded = [i for i, numerator in enumerate(self._numerators) if row * numerator % self._denominator]
        by_deadline = sorted(rounded, key=lambda i: (self._deadline(i, counts[i]), i))
        for i in by_deadline[: row - sum(counts)]:
            counts[i] += 1
        for source in islice(self._earliest_deadline_first(counts, row), self._settle_rows):  # step 2
            counts[source] += 1
        return counts

    def _earliest_deadline_first(self, counts: list[int], row: int, until: list[int] | None = None) -> Iterator[int]:
        """Yields the source of each row from ``row`` on: the released one with the earliest deadline.

        Args:
            counts: rows of each source before ``row``.
            until: counts at which to stop; None never stops.
        """
        counts = list(counts)
        waiting: list[tuple[int, int]] = []
        released: list[tuple[int, int]] = []
        for i, count in enumerate(counts):
            if self._numerators[i] and (until is None or count < until[i]):
                waiting.append((self._release(i, count), i))
        heapify(waiting)
        while waiting or released:
            while waiting and waiting[0][0] <= row:
                i = heappop(waiting)[1]
                heappush(released, (self._deadline(i, counts[i]), i))
            i = heappop(released)[1]
            yield i
            row += 1
            counts[i] += 1
            if until is None or counts[i] < until[i]:
                heappush(waiting, (self._release(i, counts[i]), i))

    def _release(self, i: int, index: int) -> int:
        return index * self._denominator // self._numerators[i]

    def _deadline(self, i: int, index: int) -> int:
        return -(-(index + 1) * self._denominator // self._numerators[i]) - 1


class PhasedInterleave:
    """The interleave of a run whose weights change: each phase continues every source where the last one left it.

    Args:
        weights: for each phase, the weight of each source; 0 for a source that the phase does not read.
        first_rows: the first row of each phase; the first one is 0.

    Attributes:
        proportions: for each phase, the proportion of each source.
        first_rows: as given.
    """

    def __init__(self, weights: Sequence[Sequence[float | Fraction]], first_rows: Sequence[int]) -> None:
        self.first_rows = list(first_rows)
        self._interleaves = [WeightedInterleave(phase) for phase in weights]
        self.proportions = [interleave.proportions for interleave in self._interleaves]
        self._counts_before = [[0] * len(weights[0])]  # of each phase
        for phase, (first, end) in enumerate(pairwise(self.first_rows)):
            self._counts_before.append(self._counts_in_phase(phase, end - first))

    def __call__(self, row: int) -> tuple[int, int]:
        """Returns the source of a row, and which of that source's rows it is."""
        phase = self.phase(row)
        source, index = self._interleaves[phase](row - self.first_rows[phase])
        return source, self._counts_before[phase][source] + index

    def counts(self, row: int) -> list[int]:
        """Returns how many of the rows before ``row`` come from each source."""
        phase = self.phase(row)
        return self._counts_in_phase(phase, row - self.first_rows[phase])

    def phase(self, row: int) -> int:
        """Returns the number of the phase that a row belongs to."""
        return bisect.bisect_right(self.first_rows, row) - 1

    def _counts_in_phase(self, phase: int, rows: int) -> list[int]:
        """Returns the counts after the first ``rows`` rows of a phase, earlier phases included."""
        return [
            sum(pair) for pair in zip(self._counts_before[phase], self._interleaves[phase].counts(rows), strict=True)
        ]
