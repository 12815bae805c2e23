"""Documents of rows that were packed elsewhere, such as MathCoder2's: each ends at an eos token inside its row."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from torchladder.data.disk_cache import build_once
from torchladder.data.sources import TokenShard
from torchladder.registry import ConfigError


class EosDocuments:
    """Divides the documents of a shard after each eos; the places are searched for once and cached.

    Of several eos in a row, which are padding, only the last one ends a document.

    Args:
        shard: the rows.
        eos: the token that ends a document, with or without a label.
        cache: the cache folder.

    Attributes:
        lengths: (documents,) int64, tokens in each document.
        offsets: (documents,) int64, where each document begins in ``flat``.
    """

    def __init__(self, shard: TokenShard, eos: int, cache: Path) -> None:
        self.shard, self.eos, self.cache = shard, eos, cache
        saved = build_once(cache / "eos" / f"{self.fingerprint[:32]}.npy", self._write)
        self.offsets, self.lengths = np.load(saved, mmap_mode="r")

    @property
    def flat(self) -> Any:
        return self.shard.flat

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the shard's content and the eos."""
        return hashlib.sha256(f"{self.shard.fingerprint} eos {self.eos}".encode()).hexdigest()

    def locate(self, document: int) -> str:
        """Returns where the row is that contains a document, for error messages."""
        row = int(np.searchsorted(self.shard.offsets, self.offsets[document], side="right")) - 1
        locate = getattr(self.shard, "locate", None)
        return locate(row) if locate else f"row {row}"

    def __reduce__(self) -> tuple[type[EosDocuments], tuple[TokenShard, int, Path]]:
        return EosDocuments, (self.shard, self.eos, self.cache)  # workers map the files themselves

    def _write(self, target: Path) -> None:
        offsets, lengths = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for offset, length in zip(self.shard.offsets.tolist(), self.shard.lengths.tolist(), strict=True):
            tokens = np.asarray(self.shard.flat[offset : offset + length])
            is_eos = (tokens == self.eos) | (tokens == ~self.eos)
            begins = np.concatenate([[0], np.flatnonzero(is_eos[:-1] & ~is_eos[1:]) + 1])
            offsets.append(offset + begins)
            lengths.append(np.diff(begins, append=length))
        with open(target, "wb") as saved:
            np.save(saved, np.stack([np.concatenate(offsets), np.concatenate(lengths)]))


def divide_at_eos(shards: Sequence[TokenShard], eos: int | None, cache: Path) -> list[TokenShard]:
    """Returns shards whose documents end at each eos; raises ConfigError if there is no tokenizer to tell the eos."""
    if eos is None:
        raise ConfigError("documents_by_eos needs a tokenizer, whose eos token ends a document: set [tokenizer].")
    return [EosDocuments(shard, eos, cache) for shard in shards]
