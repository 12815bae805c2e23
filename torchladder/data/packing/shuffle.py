"""Shuffles documents and rows: pure functions of seed, source and epoch.

Shuffling documents alone is not enough. A document longer than a row fills consecutive rows, so a batch of consecutive
rows would hold only two or three documents and its gradients would be correlated. Rows are therefore shuffled, too,
and by a formula: a source may have 10 ** 9 rows, and a permutation of them stored as an array would take 8 GB.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np

FEISTEL_ROUNDS = 6
"""Four rounds are the fewest that pass for random (Luby and Rackoff, 1988)."""

_MASK_64 = (1 << 64) - 1


@dataclass(frozen=True)
class DocumentOrder:
    """The order of the documents in each epoch: as stored, or shuffled by (seed, source, epoch).

    Sorts random keys whose low bits hold the document's number, so no two are equal and every sorting algorithm agrees.
    NumPy keeps the raw streams of ``PCG64`` and ``SeedSequence`` stable across releases, but not ``permutation``: this
    way the order survives an upgrade.

    Attributes:
        num_documents: documents of the source.
        seed: seed of the run's data.
        source: index of the source.
        shuffle: whether to shuffle.
    """

    num_documents: int
    seed: int
    source: int
    shuffle: bool = True

    def __call__(self, epoch: int) -> np.ndarray:
        """Returns the documents of an epoch in order, (num_documents,) int64."""
        if not self.shuffle:
            return np.arange(self.num_documents)
        low_bits = np.uint64((1 << self.num_documents.bit_length()) - 1)
        seed = np.random.SeedSequence((self.seed, self.source, epoch))
        keys = np.random.PCG64(seed).random_raw(self.num_documents)
        keys &= ~low_bits
        keys |= np.arange(self.num_documents, dtype=np.uint64)
        keys.sort()  # in place, and several times as fast as argsort
        keys &= low_bits
        return keys.view(np.int64)


@dataclass(frozen=True)
class RowOrder:
    """Permutes the rows of each epoch: row of the source -> row of the packing.

    The row in which one epoch ends and the next begins stays in place, so nothing of the next epoch is read before all
    of this one has been.

    Attributes:
        rows_per_epoch: rows that read every document once; a fraction where rows cross epochs.
        seed: seed of the run's data.
        source: index of the source.
    """

    rows_per_epoch: Fraction
    seed: int
    source: int

    def __call__(self, row: int) -> int:
        tokens, seq_len = self.rows_per_epoch.as_integer_ratio()  # integers: fractions are slow
        epoch = row * seq_len // tokens
        first, end = -(-epoch * tokens // seq_len), (epoch + 1) * tokens // seq_len  # the rows wholly inside the epoch
        if not first <= row < end:
            return row
        return first + feistel_permute(row - first, end - first, (self.seed, self.source, epoch))


def feistel_permute(index: int, count: int, key: tuple[int, ...]) -> int:
    """Returns where a pseudorandom permutation of ``range(count)``, one for each key, sends an index.

    A Feistel network splits a number of 2h bits into halves (left, right) and repeats
    ``left, right = right, left ^ hash(right, key)``. Each round can be undone, whatever the hash, so the network
    permutes the 4 ** h numbers. ``count`` is smaller than that: a result outside the range is permuted again until it
    falls inside (cycle walking; Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002). That takes at most 4
    tries on average, since h is the smallest with count <= 4 ** h.

    Example with count = 5: h = 2, so 16 numbers are permuted. If the network sends 3 -> 11 -> 4 -> 9 -> 0, then
    3 goes to 4 (11 is outside the range) and 4 goes to 0.
    """
    half_bits = max(((count - 1).bit_length() + 1) // 2, 1)
    mask = (1 << half_bits) - 1
    round_keys = _round_keys(key)
    while True:
        left, right = index >> half_bits, index & mask
        for round_key in round_keys:
            left, right = right, left ^ (_splitmix64(right ^ round_key) & mask)
        index = left << half_bits | right
        if index < count:
            return index


@lru_cache(maxsize=64)
def _round_keys(key: tuple[int, ...]) -> tuple[int, ...]:
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8 * FEISTEL_ROUNDS).digest()
    return tuple(int.from_bytes(digest[i : i + 8], "little") for i in range(0, len(digest), 8))


def _splitmix64(word: int) -> int:
    """Scrambles 64 bits with the finalizer of SplitMix64."""
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & _MASK_64
    word = (word ^ word >> 27) * 0x94D049BB133111EB & _MASK_64
    return word ^ word >> 31
