"""The order of documents and of the rows that they fill, each a pure function of seed, source and epoch.

Rows in random order come in closed form: where a row comes from is computed, never stored.

Documents in a shuffled order are not enough: a long document fills rows that follow each other, so a batch of
neighbouring rows would hold two or three documents and their gradients would say the same thing.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np

FEISTEL_ROUNDS = 6
"""Rounds of the Feistel network; four are the fewest that look random."""

_WORD = (1 << 64) - 1


@dataclass(frozen=True)
class DocumentOrder:
    """The documents of each epoch: as stored, or shuffled by (seed, source, epoch).

    Shuffling sorts random keys, each with its document's number in the low bits: no two are equal, so every sort gives
    the same order. NumPy keeps the raw streams of its bit generators and of ``SeedSequence`` the same in every release,
    which it does not promise for ``permutation``: the order outlives an upgrade.
    """

    documents: int
    seed: int
    source: int
    shuffle: bool = True

    def __call__(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(self.documents)
        low = np.uint64((1 << self.documents.bit_length()) - 1)
        keys = np.random.PCG64(np.random.SeedSequence((self.seed, self.source, epoch))).random_raw(self.documents)
        keys &= ~low
        keys |= np.arange(self.documents, dtype=np.uint64)
        keys.sort()  # in place, and several times as fast as argsort
        keys &= low
        return keys.view(np.int64)


@dataclass(frozen=True)
class RowOrder:
    """A permutation of the rows of each epoch: row → the row of the packing that stands there.

    The row in which an epoch ends and the next one begins stays where it is: nothing of the next epoch is read before
    all of this one has been.

    Attributes:
        epoch_rows: rows that read every document once.
        seed: of the run's data.
        source: number of the source.
    """

    epoch_rows: Fraction
    seed: int
    source: int

    def __call__(self, row: int) -> int:
        tokens, seq_len = self.epoch_rows.numerator, self.epoch_rows.denominator  # whole numbers: fractions are slow
        epoch = row * seq_len // tokens
        first, end = -(-epoch * tokens // seq_len), (epoch + 1) * tokens // seq_len
        if not first <= row < end:
            return row
        return first + feistel_permute(row - first, end - first, (self.seed, self.source, epoch))


def feistel_permute(index: int, count: int, key: tuple[int, ...]) -> int:
    """Returns where a permutation of ``range(count)``, one for every key, puts an index.

    A Feistel network permutes the next larger power of four; what falls outside the range is permuted again until it
    falls inside (Black and Rogaway, Ciphers with arbitrary finite domains, 2002).
    """
    half = max(((count - 1).bit_length() + 1) // 2, 1)
    mask = (1 << half) - 1
    keys = _keys(key)
    while True:
        left, right = index >> half, index & mask
        for round_key in keys:
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        index = left << half | right
        if index < count:
            return index


@lru_cache(maxsize=64)
def _keys(key: tuple[int, ...]) -> tuple[int, ...]:
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8 * FEISTEL_ROUNDS).digest()
    return tuple(int.from_bytes(digest[i : i + 8], "little") for i in range(0, len(digest), 8))


def _mix(word: int) -> int:
    """Scrambles 64 bits (the finalizer of SplitMix64)."""
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    word = (word ^ word >> 27) * 0x94D049BB133111EB & _WORD
    return word ^ word >> 31
