"""Which source each row comes from: a fixed interleave in which every source keeps its share at every row.

After any number of rows r, the count of source i is less than one row away from ``r * w_i / sum(w)``. With p its share,
its row number j (from 0) so has a window: not before row ``floor(j / p)``, and by row ``ceil((j + 1) / p) - 1``. Taking
the eligible source with the earliest deadline meets every window (Tijdeman, The chairman assignment problem, 1980).

That rule alone would have to run from row 0. Here rows come in blocks, and the counts at a border are known without the
blocks before it, so any row costs one block. Let W be more than any 1 / p. The counts at a border S take two steps:

1. At S - W, round what is due to each source down, then give the rows still missing to sources that were rounded, the
   earliest deadlines first. The rule can go on from here for ever: what must come by some t > S - W has room. (If every
   source that was given a row has its next deadline by t too, the sum over all sources says so. If not, no other
   rounded source has one by t, and each of the rest owes at most its share of the time.)
2. From there the rule runs W rows, to S. So the counts at S can be left, since the rule could just go on, and they can
   be reached: counted rows whose windows open in the last W were placed by this run, and no earlier window is cut by S.

Blocks have at least 2 W rows. Within one the rule runs from the counts at its first border, every source up to its
count at the next: by 1 and 2 every interval has room for the windows in it, so the earliest deadline meets them all.
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
"""The smallest share of a source: below, a block would take seconds."""


class WeightedInterleave:
    """Assigns every row of a run to a row of one of its sources.

    Args:
        weights: one per source, in any unit; taken as the decimal numbers they print as, without rounding.

    Raises:
        ConfigError: a weight is not a positive number, or a share is below one in a million.
    """

    def __init__(self, weights: Sequence[float | Fraction]) -> None:
        if not weights or not all(math.isfinite(weight) and weight > 0 for weight in weights):
            raise ConfigError(
                f"weights are {list(weights)}; each is a finite number above 0, and there is one at least."
            )
        exact = [Fraction(str(weight)) for weight in weights]
        self.shares = [weight / sum(exact) for weight in exact]
        if min(self.shares) < MIN_PROPORTION:
            raise ConfigError(f"weights are {list(weights)}; the smallest is less than a millionth of their sum.")
        # Whole numbers from here on: the share of source i is _parts[i] / _whole.
        self._whole = math.lcm(*(share.denominator for share in self.shares))
        self._parts = [int(share * self._whole) for share in self.shares]
        self._settle = math.ceil(1 / min(self.shares)) + 1  # W
        self.block = max(1 << 14, 2 * self._settle)
        self._blocks: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __call__(self, row: int) -> tuple[int, int]:
        """Returns the source of a row, and which of that source's rows it is."""
        number, offset = divmod(row, self.block)
        source, index = self._rows(number)
        return int(source[offset]), int(index[offset])

    def counts(self, row: int) -> list[int]:
        """Returns how many of the rows before ``row`` are of each source."""
        number, offset = divmod(row, self.block)
        counts = self._border(number)
        for source in islice(self._block(number), offset):
            counts[source] += 1
        return counts

    def _rows(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns source and index of each row of a block, keeping the two blocks read last."""
        if number not in self._blocks:
            source = np.fromiter(self._block(number), np.int64, self.block)
            index = np.empty_like(source)
            for i, count in enumerate(self._border(number)):
                mine = source == i
                index[mine] = count + np.arange(mine.sum())
            while len(self._blocks) > 1:
                del self._blocks[next(iter(self._blocks))]
            self._blocks[number] = source, index
        return self._blocks[number]

    def _block(self, number: int) -> Iterator[int]:
        """Yields the source of each row of a block."""
        return self._earliest(self._border(number), number * self.block, self._border(number + 1))

    def _border(self, number: int) -> list[int]:
        """Returns each source's count where a block begins."""
        row = number * self.block
        if row == 0:
            return [0] * len(self._parts)
        before = row - self._settle
        counts = self._rounded(before)
        for source in islice(self._earliest(counts, before), self._settle):
            counts[source] += 1
        return counts

    def _rounded(self, row: int) -> list[int]:
        """Returns whole counts that sum to ``row`` and from which every later window can be met (step 1 above)."""
        counts = [row * part // self._whole for part in self._parts]
        fractional = [i for i, part in enumerate(self._parts) if row * part % self._whole]
        by_deadline = sorted(fractional, key=lambda i: (self._deadline(i, counts[i]), i))
        for i in by_deadline[: row - sum(counts)]:
            counts[i] += 1
        return counts

    def _earliest(self, counts: list[int], row: int, until: list[int] | None = None) -> Iterator[int]:
        """Yields the source of each row from ``row`` on: eligible, and of the earliest deadline.

        Args:
            counts: rows of each source so far.
            until: counts to end with; endless without.
        """
        counts = list(counts)
        waiting: list[tuple[int, int]] = []
        ready: list[tuple[int, int]] = []
        for i, count in enumerate(counts):
            if until is None or count < until[i]:
                waiting.append((self._release(i, count), i))
        heapify(waiting)
        while waiting or ready:
            while waiting and waiting[0][0] <= row:
                i = heappop(waiting)[1]
                heappush(ready, (self._deadline(i, counts[i]), i))
            i = heappop(ready)[1]
            yield i
            row += 1
            counts[i] += 1
            if until is None or counts[i] < until[i]:
                heappush(waiting, (self._release(i, counts[i]), i))

    def _release(self, i: int, index: int) -> int:
        return index * self._whole // self._parts[i]

    def _deadline(self, i: int, index: int) -> int:
        return -(-(index + 1) * self._whole // self._parts[i]) - 1


class PhasedInterleave:
    """Which source each row of a run comes from: a mixture per phase, each source going on where it was.

    Args:
        shares: for each phase, the share of each source; 0 for one that the phase leaves out.
        firsts: the first row of each phase, from 0.
    """

    def __init__(self, shares: Sequence[Sequence[float | Fraction]], firsts: Sequence[int]) -> None:
        self.firsts = list(firsts)
        self._sources = [[i for i, share in enumerate(of_phase) if share] for of_phase in shares]
        self._mixtures = [
            WeightedInterleave([of_phase[i] for i in sources])
            for of_phase, sources in zip(shares, self._sources, strict=True)
        ]
        self.shares = [[Fraction(0)] * len(of_phase) for of_phase in shares]
        for of_phase, sources, mixture in zip(self.shares, self._sources, self._mixtures, strict=True):
            for source, share in zip(sources, mixture.shares, strict=True):
                of_phase[source] = share
        self._before = [[0] * len(shares[0])]
        for phase, (first, until) in enumerate(pairwise(self.firsts)):
            self._before.append(self._add(phase, until - first))

    def __call__(self, row: int) -> tuple[int, int]:
        """Returns the source of a row, and which of that source's rows it is."""
        phase = bisect.bisect_right(self.firsts, row) - 1
        source, index = self._mixtures[phase](row - self.firsts[phase])
        source = self._sources[phase][source]
        return source, self._before[phase][source] + index

    def counts(self, row: int) -> list[int]:
        """Returns how many of the rows before ``row`` are of each source."""
        phase = bisect.bisect_right(self.firsts, row) - 1
        return self._add(phase, row - self.firsts[phase])

    def _add(self, phase: int, rows: int) -> list[int]:
        counts = list(self._before[phase])
        for source, count in zip(self._sources[phase], self._mixtures[phase].counts(rows), strict=True):
            counts[source] += count
        return counts
