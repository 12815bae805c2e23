"""The loader ``rows``: sources, mixed by weight and packed into rows, an equal share of each step for every rank.

Step s trains on the global rows ``s * G .. s * G + G - 1`` (G the global batch size), of which data-parallel rank d of
D takes the contiguous share from ``s * G + d * G / D``. A row is a pure function of sources, weights, seed and its
number, so the global batch is the same for any number of ranks and workers, and resuming takes one integer.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

import torch
from torchdata.stateful_dataloader import StatefulDataLoader

from torchladder.data import packing as packings
from torchladder.data.corpus import Corpus, SourceConfig, SourceLoader
from torchladder.data.dataloader import Batch, SourceUsage, Tokenizer, register
from torchladder.data.disk_cache import DEFAULT, cache_path
from torchladder.data.mixing.interleave import PhasedInterleave
from torchladder.data.mixing.mixture_weights import DomainMultipliers, MixtureWeights
from torchladder.data.mixing.phases import Phase, Timetable
from torchladder.data.mixing.source_mix import SourceMix
from torchladder.data.packed_rows import PackedRows, RankBatchSampler, RowDataset, check_division
from torchladder.data.packing.shuffle import DocumentOrder, RowOrder
from torchladder.data.packing.spans import Packing
from torchladder.data.row_skipping import RowSkipper
from torchladder.registry import ConfigError, unknown_name


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
    steps: int | None = None

    sources: list[SourceConfig] = field(default_factory=list)
    """What to train on: files of tokens or text, or sources by name, each with a weight."""
    validation_sources: list[SourceConfig] = field(default_factory=list)
    """What to validate on; empty: the documents of raw text held out by validation_fraction."""
    validation_fraction: float = 0.02
    """Share of the documents of raw text held out for validation; unused with validation_sources."""
    exclude: list[str] = field(default_factory=list)
    """Sources by label, and files of tokens by path, name or glob, that are left out."""
    domains: DomainMultipliers = field(default_factory=dict)
    """Multipliers of what sources have in tokens: language -> domain -> multiplier, or domain -> multiplier."""
    languages: dict[str, float] = field(default_factory=dict)
    """Share of the rows of each language, relative to the others."""
    temperature: float | None = None
    """Shares by size: 1 as much of each language (else source) as it has, higher evens out; left out: by weight."""
    repeat: bool = True
    """Begin sources anew when they have been read; otherwise a run that reads more than there is, is an error."""
    phases: list[Phase] = field(default_factory=list)
    """The stage table: from a step, token or share of the run on other weights, window, lr_factor or rope_theta."""
    packing: str = "stream"
    """How documents fill rows: stream (cut at row ends), best_fit (few cuts, little padding), pad (in order)."""
    labels_across_documents: bool = True
    """The last token of a document predicts the first one of the next; otherwise it predicts nothing."""
    shuffle: bool = True
    """Read documents, and the rows that they fill, in an order of their own each epoch."""
    seed: int = 0
    """Decides the order of documents."""
    bos: bool = False
    """Begin each document of raw text with the tokenizer's bos token."""
    cache_folder: str = DEFAULT
    """Where tokenized text is kept; the default follows XDG_CACHE_HOME."""
    skip_rows: list[tuple[int, int]] = field(default_factory=list)
    """Rows that training leaves out, each range as its first and its last global row; the rows after them move up."""
    num_workers: int = 0
    """Processes that make rows ahead of time; 0 makes them when they are asked for. Never changes the rows."""
    prefetch_factor: int | None = None
    """Micro-batches each worker keeps ready; 2 when not given. Only with workers."""
    pin_memory: bool = False
    """Hand out batches in pinned memory, where there is an accelerator to copy them to."""

    def __post_init__(self) -> None:
        self._skipping: RowSkipper = RowSkipper(self.skip_rows if self.split == "train" else [])
        self._check()
        corpora = self._open()
        packings = [self._pack(number, corpus) for number, corpus in enumerate(corpora)]
        self._supply = SourceMix(
            corpora,
            packings,
            [self._repeats(source) for source in self._sources],
            self._mix(packings),
            self.seq_len,
            self.global_batch_size,
        )
        if self.split == "train" and self.steps is not None:
            end = self._skipping.after(0, self.steps * self.global_batch_size)
            self._supply.check(-(-end // self.global_batch_size))
        self.rows = sum(packed.rows or 0 for packed in packings) if self.split == "validation" else None
        """Global rows there are; None without end."""
        self._accumulation = self.global_batch_size // (self.dp_degree * self.local_batch_size)
        self._batches: Iterator[Batch | PackedRows] | None = None
        self.seek(0)

    @property
    def row(self) -> int:
        return self._skipping.after(self._first, self._taken // self._accumulation * self.global_batch_size)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._batches is None:
            self._batches = iter(self._data_loader())
        found = next(self._batches)
        self._taken += 1
        return found if isinstance(found, Batch) else found.batch()  # where memory is pinned, that thread has done it

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

    def leave_out(self, rows: Sequence[tuple[int, int]]) -> None:
        """Leaves out further ranges of rows, first to last, for the seek that follows.

        Raises:
            ConfigError: one of them is no range.
        """
        self._skipping = RowSkipper([*self._skipping.ranges, *rows])

    def fingerprint(self) -> dict[str, str]:
        """Returns what the rows depend on, by content: files may move, ranks and workers may change."""
        contents = json.dumps([corpus.fingerprint() for corpus in self._supply.corpora])
        mixture = self._supply.interleave
        weights, *later = (", ".join(map(str, shares)) for shares in mixture.shares)
        phases = [f"row {first}: {shares}" for first, shares in zip(mixture.firsts[1:], later, strict=True)]
        return {
            "sources": hashlib.sha256(contents.encode()).hexdigest(),
            "weights": weights,
            "phases": "; ".join(phases),
            "packing": self.packing,
            "labels_across_documents": str(self.labels_across_documents),
            "repeat": ", ".join(map(str, self._supply.repeats)),
            "shuffle": str(self.shuffle),
            "seed": str(self.seed),
            "seq_len": str(self.seq_len),
            "tokenizer": self.tokenizer.fingerprint if self.tokenizer else "none",
        }

    def describe(self) -> list[str]:
        """Returns a line on the whole, on each source, on each later mixture, and on the epochs of each phase."""
        order = f"shuffled with seed {self.seed}" if self.shuffle else "in order"
        order = order if self.rows is None else "in an order that is the same for every run"
        total = "" if self.rows is None else f", {self.rows:,} rows"
        tokens = sum(corpus.tokens for corpus in self._supply.corpora)
        whole = f"{self.split}: {self.packing}, {order}, {tokens:,} tokens{total}"
        lines = self._supply.describe()
        if self.split == "train" and self.steps is not None:
            lines += self._supply.epochs(self._starts(), self.steps)
        return [whole, *(f"  {line}" for line in lines)]

    def steps_for(self, epochs: float) -> int:
        return self._supply.steps_for(epochs)

    def usage(self) -> list[SourceUsage]:
        if self.steps is None:
            raise ConfigError("what a run reads depends on its steps, which are not known here.")
        return self._supply.usage(self._starts(), self.steps)

    def _starts(self) -> list[int]:
        """Returns the first step of each phase, the run's beginning among them."""
        return sorted({0, *self._timetable.starts})

    def _check(self) -> None:
        if not self.sources:
            raise ConfigError('data.sources is empty. For a first run: sources = [{ name = "python-stdlib" }].')
        check_division(self.seq_len, self.dp_rank, self.dp_degree, self.local_batch_size, self.global_batch_size)
        if self.split not in ("train", "validation"):
            raise ConfigError(f"split is {self.split!r}. Known: train, validation.")
        if self.seed < 0 or self.num_workers < 0:
            raise ConfigError(f"seed ({self.seed}) and num_workers ({self.num_workers}) are 0 at least.")
        if self.prefetch_factor is not None and (self.num_workers == 0 or self.prefetch_factor < 1):
            raise ConfigError("prefetch_factor is 1 at least, and only with num_workers above 0.")
        packings.registry.get(self.packing)
        # All that can be known before any text is tokenized, which may take long:
        self._timetable = Timetable(self.phases, self.steps, self.global_batch_size * self.seq_len)
        self._sources = [source for source in self.sources if source.title not in self.exclude]
        if not self._sources:
            raise ConfigError("data.exclude leaves no source.")
        self._shares = MixtureWeights(self.domains, self.languages, self.temperature)
        self._shares.check(self._sources)
        self._stages([Fraction(1)] * len(self._sources))
        named = {source.title for source in self.sources}
        for source in (*self._sources, *self.validation_sources):
            named |= source.check(self.exclude)
        for pattern in self.exclude:
            if pattern not in named:
                raise unknown_name("source or file of tokens in data.exclude", pattern, named)

    def _open(self) -> list[Corpus]:
        """Returns the documents of this split, source by source.

        Raises:
            ConfigError: a source cannot be read or holds no tokens, or nothing is held out for validation.
        """
        fraction = 0.0 if self.validation_sources else self.validation_fraction
        opener = SourceLoader(self.tokenizer, cache_path(self.cache_folder), fraction, self.bos, self.exclude)
        if self.split == "train" or self.validation_sources:
            chosen = self._sources if self.split == "train" else self.validation_sources
            corpora = [opener.open(source, "train") for source in chosen]
        else:
            raw = [source for source in self._sources if not source.is_tokens]
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
        once = validation or not self._repeats(self._sources[number])
        part = packings.registry.get(self.packing)
        facts = {
            "lengths": corpus.lengths,
            "seq_len": self.seq_len,
            "order": DocumentOrder(len(corpus.lengths), self.seed, number, shuffle=self.shuffle and not validation),
            "epochs": 1 if once else None,
            "cache": cache_path(self.cache_folder),
        }
        declared = inspect.signature(part).parameters
        return part(**{key: value for key, value in facts.items() if key in declared})

    def _order(self, number: int, packed: Packing) -> Callable[[int], int]:
        """Returns which row of a packing stands at a row of the source.

        Rows of validation come in random order, too, the same for every run: the first few speak for all.
        """
        if self.split == "train" and not self.shuffle:
            return int
        return RowOrder(packed.epoch_rows, self.seed if self.split == "train" else 0, number)

    def _repeats(self, source: SourceConfig) -> bool:
        return self.repeat if source.repeat is None else source.repeat

    def _mix(self, packings: Sequence[Packing]) -> PhasedInterleave:
        """Returns the source of every row, phase after phase."""
        if self.split == "validation":
            # Every source as often as it has rows, so that the first rows are of all sources too.
            return PhasedInterleave([[packed.rows or 0 for packed in packings]], [0])
        return self._stages([packed.epoch_rows for packed in packings])

    def _stages(self, sizes: Sequence[Fraction]) -> PhasedInterleave:
        """Returns the source of every row of the run, where an epoch of the sources takes ``sizes`` rows.

        Raises:
            ConfigError: weights that cannot be, or a source that is never read.
        """
        stages: dict[int, Sequence[float | Fraction]] = {0: self._shares.of(self._sources, sizes)}
        labels = [source.title for source in self.sources]
        for phase, step in zip(self.phases, self._timetable.starts, strict=True):
            weights = phase.listed(labels)
            if weights is not None:
                kept = [weight for label, weight in zip(labels, weights, strict=True) if label not in self.exclude]
                stages[step * self.global_batch_size] = kept
        for source, of_source in zip(self._sources, zip(*stages.values(), strict=True), strict=True):
            if not any(of_source):
                raise ConfigError(f"the source {source.title} is never read: its weight is above 0 in no phase.")
        return PhasedInterleave(list(stages.values()), list(stages))

    def _data_loader(self) -> StatefulDataLoader:
        sampler = RankBatchSampler(
            self.dp_rank,
            self.dp_degree,
            self.local_batch_size,
            self.global_batch_size,
            self.rows,
            self._first,
            self._skipping,
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="'set_vital' is deprecated")  # of torchdata's own making
            return StatefulDataLoader(
                RowDataset(
                    self._supply.corpora,
                    self._supply.packings,
                    [self._order(number, packed) for number, packed in enumerate(self._supply.packings)],
                    self._supply.interleave,
                    self.seq_len,
                    self.labels_across_documents,
                    self.rows,
                ),
                batch_size=None,  # the sampler yields whole micro-batches
                sampler=sampler,
                num_workers=self.num_workers,
                prefetch_factor=self.prefetch_factor,
                snapshot_every_n_steps=1 << 62,  # the row is the whole state, workers need not send theirs
                pin_memory=self.pin_memory and torch.accelerator.is_available(),
                # Its own generator: the default one would be advanced by every start, and dropout with it.
                generator=torch.Generator(),
            )
