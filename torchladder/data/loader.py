"""The loader ``rows``: sources, mixed by weight and packed into rows, an equal share of each step for every rank.

Step s trains on the global rows ``s * G .. s * G + G - 1`` (G the global batch size), of which data-parallel rank d of
D takes the contiguous share from ``s * G + d * G / D``. A row is a pure function of sources, weights, seed and its
number, so the global batch is the same for any number of ranks and workers, and resuming takes one integer.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torchdata.stateful_dataloader import StatefulDataLoader

from torchladder.data import packing as packings
from torchladder.data.base import Batch, Tokenizer, register
from torchladder.data.cache import DEFAULT, cache_path
from torchladder.data.corpus import INDEXED, Corpus, Opener, SourceConfig
from torchladder.data.dataset import RankRows, Rows
from torchladder.data.mixture import Mixture
from torchladder.data.packing import Order, Packing
from torchladder.data.shuffle import RowOrder, Shuffled
from torchladder.registry import ConfigError


@register("rows")
@dataclass(kw_only=True, eq=False)
class RowLoader:
    """Rows of tokens from weighted sources."""

    seq_len: int
    split: Literal["train", "validation"]
    tokenizer: Tokenizer | None
    dp_rank: int
    dp_degree: int
    local_batch_size: int
    global_batch_size: int

    sources: list[SourceConfig] = field(default_factory=list)
    """What to train on: files of tokens or text, or sources by name, each with a weight."""
    validation_sources: list[SourceConfig] = field(default_factory=list)
    """What to validate on; empty: the documents of raw text held out by validation_fraction."""
    validation_fraction: float = 0.02
    """Share of the documents of raw text held out for validation; unused with validation_sources."""
    packing: str = "stream"
    """How documents fill rows."""
    shuffle: bool = True
    """Read documents, and the rows that they fill, in an order of their own each epoch."""
    seed: int = 0
    """Decides the order of documents."""
    bos: bool = False
    """Begin each document of raw text with the tokenizer's bos token."""
    cache_folder: str = DEFAULT
    """Where tokenized text is kept; the default follows XDG_CACHE_HOME."""
    num_workers: int = 0
    """Processes that make rows ahead of time; 0 makes them when they are asked for. Never changes the rows."""
    prefetch_factor: int | None = None
    """Micro-batches each worker keeps ready; 2 when not given. Only with workers."""
    pin_memory: bool = False
    """Hand out batches in pinned memory, where there is an accelerator to copy them to."""

    def __post_init__(self) -> None:
        self._check()
        validation = self.split == "validation"
        self._corpora = self._open()
        self._packings = [self._pack(number, corpus) for number, corpus in enumerate(self._corpora)]
        # Validation takes every source as often as it has rows, so that its first rows are of all sources too.
        counts = [packed.rows or 0 for packed in self._packings]
        self._mixture = Mixture(counts if validation else [source.weight for source in self.sources])
        self.rows = sum(counts) if validation else None
        """Global rows there are; None without end."""
        self._accumulation = self.global_batch_size // (self.dp_degree * self.local_batch_size)
        self._batches: Iterator[Batch] | None = None
        self.seek(0)

    @property
    def row(self) -> int:
        return self._first + self._taken // self._accumulation * self.global_batch_size

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._batches is None:
            self._batches = iter(self._data_loader())
        batch = next(self._batches)
        self._taken += 1
        return batch

    def seek(self, row: int) -> None:
        """Continues at a global row, which becomes the first of a global batch.

        Raises:
            ConfigError: the row is negative.
        """
        if row < 0:
            raise ConfigError(f"there is no row {row}: rows count from 0.")
        self._first = row
        self._taken = 0
        self._batches = None  # workers start with the first batch, not before

    def fingerprint(self) -> dict[str, str]:
        """Returns what the rows depend on, by content: files may move, ranks and workers may change."""
        contents = json.dumps([corpus.fingerprint() for corpus in self._corpora])
        return {
            "sources": hashlib.sha256(contents.encode()).hexdigest(),
            "weights": ", ".join(map(str, self._mixture.shares)),
            "packing": self.packing,
            "shuffle": str(self.shuffle),
            "seed": str(self.seed),
            "seq_len": str(self.seq_len),
            "tokenizer": self.tokenizer.fingerprint if self.tokenizer else "none",
        }

    def describe(self) -> list[str]:
        """Returns one line on the whole and one on each source."""
        order = f"shuffled with seed {self.seed}" if self.shuffle else "in order"
        order = order if self.split == "train" else "always the same order"
        total = "" if self.rows is None else f", {self.rows:,} rows"
        lines = [f"{self.split}: {self.packing}, {order}, {sum(c.tokens for c in self._corpora):,} tokens{total}"]
        for corpus, share in zip(self._corpora, self._mixture.shares, strict=True):
            line = f"  {corpus.label}: {float(share):.1%} of the rows, {len(corpus.lengths):,} documents"
            lines.append(f"{line}, {corpus.tokens:,} tokens")
            if self.rows is None:
                steps = corpus.tokens / self.seq_len / float(share * self.global_batch_size)
                lines[-1] += f", an epoch every {steps:,.1f} steps"
        return lines

    def _check(self) -> None:
        if not self.sources:
            raise ConfigError('data.sources is empty. For a first run: sources = [{ name = "python-stdlib" }].')
        for name in ("seq_len", "dp_degree", "local_batch_size", "global_batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it is 1 at least.")
        if not 0 <= self.dp_rank < self.dp_degree:
            raise ConfigError(f"dp_rank is {self.dp_rank}; it is from 0 to {self.dp_degree - 1}.")
        if self.global_batch_size % (self.dp_degree * self.local_batch_size):
            raise ConfigError(
                f"global_batch_size {self.global_batch_size} is not a multiple of {self.dp_degree} data-parallel ranks "
                f"times local_batch_size {self.local_batch_size}."
            )
        if self.split not in ("train", "validation"):
            raise ConfigError(f"split is {self.split!r}. Known: train, validation.")
        if self.seed < 0 or self.num_workers < 0:
            raise ConfigError(f"seed ({self.seed}) and num_workers ({self.num_workers}) are 0 at least.")
        if self.prefetch_factor is not None and (self.num_workers == 0 or self.prefetch_factor < 1):
            raise ConfigError("prefetch_factor is 1 at least, and only with num_workers above 0.")
        packings.registry.get(self.packing)
        # Before any text is tokenized, which may take long:
        Mixture([source.weight for source in self.sources])
        for source in (*self.sources, *self.validation_sources):
            source.check()

    def _open(self) -> list[Corpus]:
        """Returns the documents of this split, source by source.

        Raises:
            ConfigError: a source cannot be read or holds no tokens, or nothing is held out for validation.
        """
        fraction = 0.0 if self.validation_sources else self.validation_fraction
        opener = Opener(self.tokenizer, cache_path(self.cache_folder), fraction, self.bos)
        if self.split == "train" or self.validation_sources:
            chosen = self.sources if self.split == "train" else self.validation_sources
            corpora = [opener.open(source, "train") for source in chosen]
        else:
            raw = [source for source in self.sources if source.kind() != INDEXED]
            corpora = [opener.open(source, "validation") for source in raw]
            # A small source may have nothing held out; what the others hold out still serves.
            corpora = [corpus for corpus in corpora if corpus.tokens > 1]
        if not corpora:
            raise ConfigError(
                "nothing is held out for validation: give data.validation_sources, or raw text sources with a larger "
                f"validation_fraction than {fraction}."
            )
        for corpus in corpora:
            if corpus.tokens < 2:
                raise ConfigError(f"the source {corpus.label} has {corpus.tokens} tokens; a row needs 2 at least.")
        return corpora

    def _pack(self, number: int, corpus: Corpus) -> Packing:
        validation = self.split == "validation"
        order = Order(len(corpus.lengths), self.seed, number, shuffle=self.shuffle and not validation)
        part = packings.registry.get(self.packing)
        return part(lengths=corpus.lengths, seq_len=self.seq_len, order=order, epochs=1 if validation else None)

    def _ordered(self) -> list[Packing | Shuffled]:
        """Returns each source's rows in the order in which they are read.

        Rows of validation come in random order, too, the same for every run: the first few speak for all.
        """
        if self.split == "train" and not self.shuffle:
            return list(self._packings)
        seed = self.seed if self.split == "train" else 0
        return [Shuffled(packed, RowOrder(packed.epoch_rows, seed, n)) for n, packed in enumerate(self._packings)]

    def _data_loader(self) -> StatefulDataLoader:
        sampler = RankRows(
            self.dp_rank, self.dp_degree, self.local_batch_size, self.global_batch_size, self.rows, self._first
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="'set_vital' is deprecated")  # of torchdata's own making
            return StatefulDataLoader(
                Rows(self._corpora, self._ordered(), self._mixture, self.seq_len, self.rows),
                batch_size=None,  # the sampler yields whole micro-batches
                sampler=sampler,
                num_workers=self.num_workers,
                prefetch_factor=self.prefetch_factor,
                pin_memory=self.pin_memory and torch.accelerator.is_available(),
                # Its own generator: the default one would be advanced by every start, and dropout with it.
                generator=torch.Generator(),
            )
