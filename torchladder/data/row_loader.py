"""The loader ``rows``: mixes sources by weight, packs documents into rows, and divides each step over the ranks.

Step s trains on the global rows ``s * G .. s * G + G - 1`` (G: the global batch size; where it varies, a step begins
after the rows of those before it). Data-parallel rank d of D takes the contiguous share that begins ``d * G / D`` rows
later. A row is a pure function of sources, weights, seed and its number, so the global batch is the same for any number
of ranks and workers, and one integer is enough to resume.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

import numpy as np
import torch
from torchdata.stateful_dataloader import StatefulDataLoader

from torchladder.batch_schedule import BatchSchedule
from torchladder.data import packing as packings
from torchladder.data.corpus import Corpus, SourceLoader
from torchladder.data.dataloader import Batch, SourceUsage, register
from torchladder.data.disk_cache import DEFAULT_FOLDER, cache_path
from torchladder.data.file_patterns import warn_once
from torchladder.data.formats.document_split import holds_out
from torchladder.data.loader_workers import ignore_run_signals, is_worker_death, start_workers
from torchladder.data.mixing.interleave import PhasedInterleave
from torchladder.data.mixing.mixture_weights import DomainMultipliers, MixtureWeights
from torchladder.data.mixing.source_history import SourceHistory
from torchladder.data.mixing.source_mix import SourceMix, in_order
from torchladder.data.packed_rows import BatchLayout, PackedRows, RankBatchSampler, RowDataset, preview_row
from torchladder.data.packing.shuffle import DocumentOrder, RowOrder
from torchladder.data.packing.spans import Packing
from torchladder.data.prepare.text_counts import MAX_UNKNOWN_FRACTION, check_max_unknown_fraction
from torchladder.data.row_skipping import RowSkipper
from torchladder.data.source_config import SourceConfig, warn_of_shared_files
from torchladder.data.sources import check_validation_fraction
from torchladder.data.tokenizer import Tokenizer
from torchladder.registry import ConfigError, require, unknown_name

logger = logging.getLogger(__name__)


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
    batch_schedule: BatchSchedule | None = None
    vocab_size: int | None = None
    steps: int | None = None
    weight_changes: Mapping[int, list[float] | dict[str, float] | None] = field(default_factory=dict)
    check_only: bool = False

    sources: list[SourceConfig] = field(default_factory=list)
    """Training data: token files, text files, or registered sources by name, each with a weight."""
    validation_sources: list[SourceConfig] = field(default_factory=list)
    """Validation data; empty: the documents of raw text held out by validation_fraction."""
    validation_fraction: float = 0.02
    """Fraction of the raw-text documents held out for validation; not used with validation_sources."""
    exclude: list[str] = field(default_factory=list)
    """Sources to leave out, by label, and token files to leave out, by path, name or glob."""
    domains: DomainMultipliers = field(default_factory=dict)
    """Multipliers of the sizes of sources: language -> domain -> multiplier, or domain -> multiplier."""
    languages: dict[str, float] = field(default_factory=dict)
    """Proportion of the rows of each language, relative to the others."""
    temperature: float | None = None
    """Samples languages (sources without a language) by size: 1 in proportion, more is flatter. Default: by weight."""
    repeat: bool = True
    """Start a source over when all of it has been read; otherwise a run that needs more data is an error."""
    packing: str = "stream"
    """How documents fill rows: stream (concatenate and cut), best_fit (few cuts, little padding), pad (in order)."""
    labels_across_documents: bool = True
    """The last token of a document predicts the first one of the next; otherwise it has no label."""
    shuffle: bool = True
    """Shuffle documents, and the rows that they fill, differently each epoch."""
    seed: int = 0
    """Seed of the shuffle."""
    bos: bool = False
    """Begin each document of raw text with the tokenizer's bos token."""
    check_tokenizer: bool = True
    """Refuse prepared tokens that another tokenizer has written; false reads them with a warning."""
    max_unknown_fraction: float = MAX_UNKNOWN_FRACTION
    """Largest fraction of a text's tokens that may be unknown to the tokenizer; more is an error."""
    cache_folder: str = DEFAULT_FOLDER
    """Folder for tokenized text; the default follows XDG_CACHE_HOME."""
    first_step: int = 0
    """Step that reads the first rows of this data: for sources that replace others in the middle of a run."""
    skip_rows: list[tuple[int, int]] = field(default_factory=list)
    """Ranges [first, last] of global rows that training skips; later rows move up."""
    num_workers: int = 0
    """Worker processes that make rows ahead of time; 0 makes them in the main process. Does not change the rows."""
    prefetch_factor: int | None = None
    """Micro-batches that each worker prepares ahead (default 2); only with num_workers above 0."""
    pin_memory: bool = False
    """Return batches in pinned memory if there is an accelerator."""

    def __post_init__(self) -> None:
        self._skipper = RowSkipper(self.skip_rows if self.split == "train" else [])
        self._check_settings()
        if self.check_only:
            return
        corpora = self._open_sources()
        packings = [self._pack(number, corpus) for number, corpus in enumerate(corpora)]
        if self.split == "validation":  # in proportion to their rows, so that all sources end together
            interleave = PhasedInterleave([[packed.num_rows or 0 for packed in packings]], [0])
        else:
            interleave = self._interleave([packed.rows_per_epoch for packed in packings])
        repeats, first = [self._repeats(source) for source in self._sources], max(self.first_step, 0)
        starts = [first, *(step for step in self.weight_changes if step > first)]
        self._source_mix = SourceMix(
            corpora, packings, repeats, interleave, starts, self.seq_len, self._layout.batch, self.first_step
        )
        if self.split == "train" and self.steps is not None:
            end = self._skipper.advance(0, self._rows_before(self.steps))
            until = self._layout.batch.steps_for(self._layout.batch.rows_before(self.first_step) + end)
            self._source_mix.check_enough_data(until)
            for sentence in self._source_mix.sources_without_rows(until):
                warn_once(sentence)
        for corpus in corpora if self.split == "train" else ():
            if 0 < corpus.num_tokens < self.seq_len:
                warn_once(
                    f"the source {corpus.label} has {corpus.num_tokens:,} tokens, fewer than one row of "
                    f"{self.seq_len:,}: lower training.seq_len, or add data."
                )
        self.num_rows = sum(packed.num_rows or 0 for packed in packings) if self.split == "validation" else None
        """Number of global rows; None if they never end."""
        self._batches: Iterator[Batch | PackedRows | ConfigError] | None = None
        self.seek(0)

    @property
    def row(self) -> int:
        whole = self._layout.batch.whole_steps(self._step, self._taken * self._layout.rows_at_once)
        return self._skipper.advance(self._first_row, whole)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._batches is None:
            self._batches = start_workers(self._data_loader())
        try:
            found = next(self._batches)
        except RuntimeError as error:
            if not is_worker_death(error):
                raise
            logger.warning("%s; starting new ones. Killed for memory? Then lower data.num_workers.", error)
            found = self._restart_workers()
        if isinstance(found, ConfigError):
            raise found
        self._taken += 1
        return found if isinstance(found, Batch) else found.to_batch()  # the pinning thread yields batches

    def _restart_workers(self) -> Batch | PackedRows | ConfigError:
        """Returns the next micro-batch from new workers; a second death in a row is an error."""
        read = self._taken * self._layout.rows_at_once
        whole = self._layout.batch.whole_steps(self._step, read)
        taken = (read - whole) // self._layout.rows_at_once
        self.seek(self.row, self._layout.batch.step_at(self._layout.batch.rows_before(self._step) + whole))
        self._batches = start_workers(self._data_loader())
        while self._taken < taken:  # those of this step that were read before
            next(self._batches)
            self._taken += 1
        return next(self._batches)

    def seek(self, row: int, step: int = 0) -> None:
        """Continues at a global row, which becomes the first one of a step; a negative one is a ConfigError."""
        require(row >= 0, f"there is no row {row}: rows are counted from 0.")
        self._first_row, self._step = row, step
        self._taken = 0
        self._batches = None  # workers start with the first batch, not before

    def add_skip_rows(self, rows: Sequence[tuple[int, int]]) -> None:
        """Adds ranges of rows to skip, first and last inclusive. Takes effect with the next ``seek``."""
        self._skipper = RowSkipper([*self._skipper.ranges, *rows])

    def fingerprints(self) -> dict[str, str]:
        """Returns what the rows depend on, by content: the same after files move, for any ranks and workers."""
        keys = ("packing", "labels_across_documents", "shuffle", "seed", "seq_len")
        interleave = self._source_mix.interleave
        weights, *later = (", ".join(map(str, phase)) for phase in interleave.proportions)
        phases = [f"row {first}: {phase}" for first, phase in zip(interleave.first_rows[1:], later, strict=True)]
        return {
            "sources": ", ".join(corpus.fingerprint()[:16] for corpus in self._source_mix.corpora),
            "weights": weights,
            "phases": "; ".join(phases),
            "repeat": ", ".join(map(str, self._source_mix.repeats)),
            "first_step": str(self.first_step),
            **{key: str(getattr(self, key)) for key in keys},
            "tokenizer": self.tokenizer.fingerprint if self.tokenizer else "none",
        }

    def resume_row(self, step: int, row: int, saved: Mapping[str, str], moved: bool) -> int:
        history = SourceHistory(saved, self.fingerprints(), step, row, self._layout.batch)
        if step == self.first_step:
            return 0
        history.check_first_step(moved)
        if saved:
            mix, titles = self._source_mix, [source.title for source in self._sources]
            proportions = mix.interleave.proportions[mix.interleave.phase(row)]
            shares = dict(zip(titles, map(float, proportions), strict=True))
            history.check(titles, mix.interleave.counts(row), [shares.get(one.title, 0.0) for one in self.sources])
        return row

    def source_of(self, row: int) -> str:
        return self._source_mix.corpora[self._source_mix.interleave(row)[0]].label

    def document_lengths(self) -> dict[str, np.ndarray]:
        return {corpus.label: corpus.lengths for corpus in self._source_mix.corpora}

    def boundary_shares(self) -> dict[str, float]:
        return self._source_mix.boundary_shares()

    def describe(self) -> list[str]:
        """Returns a line on all data, and lines on each source and on the epochs of each phase."""
        order = f"shuffled with seed {self.seed}" if self.shuffle else "in order"
        order = order if self.num_rows is None else "in the same order in every run"
        total = "" if self.num_rows is None else f", {self.num_rows:,} rows"
        tokens = sum(corpus.num_tokens for corpus in self._source_mix.corpora)
        summary = f"{self.split}: {self.packing}, {order}, {tokens:,} tokens{total}"
        lines = self._source_mix.describe()
        if self.split == "train" and self.steps is not None:
            lines += self._source_mix.describe_epochs(self.steps)
        if unknown := [corpus.label for corpus in self._source_mix.corpora if not corpus.tokenizer_known]:
            lines.append(f"the tokenizer of {', '.join(unknown)} is unknown and cannot be verified")
        first = self._dataset().pack(self._skipper.take(self._first_row, 1))
        lines.append(preview_row(first.to_batch(), self.tokenizer))
        return [summary, *(f"  {line}" for line in lines)]

    def steps_for(self, epochs: float) -> int:
        return self._source_mix.steps_for(epochs)

    def usage(self) -> list[SourceUsage]:
        if self.steps is None:
            raise ConfigError("usage needs the steps of the run: build the loader with steps.")
        return self._source_mix.usage(self.steps)

    def _check_settings(self) -> None:
        """Checks everything that is known before text is tokenized, which may take a long time."""
        require(bool(self.sources), 'data.sources is empty. For a first run: sources = [{ name = "python-stdlib" }].')
        batch = self.batch_schedule or BatchSchedule.constant(self.global_batch_size)
        self._layout = BatchLayout(self.seq_len, self.dp_rank, self.dp_degree, self.local_batch_size, batch)
        require(self.split in ("train", "validation"), f"split is {self.split!r}. Known: train, validation.")
        for name in ("seed", "num_workers"):
            require(getattr(self, name) >= 0, f"data.{name} = {getattr(self, name)}: must be 0 or more.")
        require(
            self.prefetch_factor is None or (self.num_workers > 0 and self.prefetch_factor > 0),
            f"data.prefetch_factor = {self.prefetch_factor}: must be 1 or more, and needs data.num_workers above 0.",
        )
        check_max_unknown_fraction(self.max_unknown_fraction, "data.max_unknown_fraction")
        begins = self.steps is None or self.first_step < self.steps
        require(begins, f"data.first_step = {self.first_step}: the run has {self.steps} steps, counted from 0.")
        packings.registry.get(self.packing)
        self._sources = [source for source in self.sources if source.title not in self.exclude]
        require(bool(self._sources), "data.exclude leaves no source.")
        check_validation_fraction(self.validation_fraction)
        held_out = self.validation_fraction > 0 and not all(source.is_tokens for source in self._sources)
        held_out |= any([holds_out(source) for source in self._sources])  # checks each
        require(
            self.split == "train" or bool(self.validation_sources) or held_out,
            "no documents are held out for validation: set data.validation_sources, use raw text sources with a "
            "data.validation_fraction above 0, set split in a source of .bin/.idx pairs, or set "
            "validation.enable = false.",
        )
        self._mixture_weights = MixtureWeights(self.domains, self.languages, self.temperature)
        self._mixture_weights.validate(self._sources)
        self._interleave([Fraction(1)] * len(self._sources))
        named = {source.title for source in self.sources}
        for source in (*self._sources, *self.validation_sources):
            named |= source.check(self.exclude)
        for pattern in self.exclude:
            if pattern not in named:
                raise unknown_name("entry", pattern, named, "data.exclude")
        if self.split == "train":
            whole = [source for source in self.validation_sources if not holds_out(source)]
            warn_of_shared_files(self._sources, whole, self.exclude)

    def _open_sources(self) -> list[Corpus]:
        """Returns the documents of this split for each source."""
        fraction = 0.0 if self.validation_sources else self.validation_fraction
        loader = SourceLoader(
            self.tokenizer,
            cache_path(self.cache_folder),
            fraction,
            self.bos,
            self.exclude,
            self.vocab_size,
            check_tokenizer=self.check_tokenizer,
            max_unknown_fraction=self.max_unknown_fraction,
        )
        if self.split == "train" or self.validation_sources:
            chosen = self._sources if self.split == "train" else self.validation_sources
            opened = self.validation_sources and self.split == "validation"
            corpora = [loader.open(one, "validation" if opened and holds_out(one) else "train") for one in chosen]
        else:
            held_out = [source for source in self._sources if not source.is_tokens or holds_out(source)]
            corpora = [loader.open(source, "validation") for source in held_out]
            # A small source may have no documents held out; the others still do.
            corpora = [corpus for corpus in corpora if corpus.num_tokens > 1]
        require(
            bool(corpora),
            "no documents are held out for validation: set data.validation_sources, or a data.validation_fraction "
            f"above {fraction}.",
        )
        for corpus in corpora:
            count = corpus.num_tokens
            require(count >= 2, f"the source {corpus.label} has {count} tokens; a row needs at least 2.")
        return corpora

    def _pack(self, number: int, corpus: Corpus) -> Packing:
        validation = self.split == "validation"
        once = validation or not self._repeats(self._sources[number])
        packing_class = packings.registry.get(self.packing)
        arguments = {
            "lengths": corpus.lengths,
            "seq_len": self.seq_len,
            "order": DocumentOrder(len(corpus.lengths), self.seed, number, shuffle=self.shuffle and not validation),
            "epochs": 1 if once else None,
            "cache": cache_path(self.cache_folder),
        }
        declared = inspect.signature(packing_class).parameters
        return packing_class(**{key: value for key, value in arguments.items() if key in declared})

    def _row_order(self, number: int, packed: Packing) -> Callable[[int], int]:
        """Returns the function from a row of the source to the row of its packing.

        Validation rows are shuffled, too, in the same order in every run: the first few then represent all.
        """
        if self.split == "train" and not self.shuffle:
            return int
        return RowOrder(packed.rows_per_epoch, self.seed if self.split == "train" else 0, number)

    def _repeats(self, source: SourceConfig) -> bool:
        return self.repeat if source.repeat is None else source.repeat

    def _interleave(self, rows_per_epoch: Sequence[Fraction]) -> PhasedInterleave:
        """Returns the source of every training row, by the sizes of the sources and the weights of each phase."""
        weights_from: dict[int, Sequence[float | Fraction]] = {
            0: self._mixture_weights.proportions(self._sources, rows_per_epoch)
        }
        labels = [source.title for source in self.sources]
        for step, weights in self.weight_changes.items():
            if weights is not None:
                listed = zip(labels, in_order(weights, labels), strict=True)
                kept = [weight for label, weight in listed if label not in self.exclude]
                weights_from[max(self._rows_before(step), 0)] = kept
        for source, of_source in zip(self._sources, zip(*weights_from.values(), strict=True), strict=True):
            require(any(of_source), f"the source {source.title} is never read: its weight is above 0 in no phase.")
        return PhasedInterleave(list(weights_from.values()), list(weights_from))

    def _rows_before(self, step: int) -> int:
        """Returns the rows of the steps before ``step``, without skipped ones, from ``first_step`` on."""
        return self._layout.batch.rows_before(step) - self._layout.batch.rows_before(self.first_step)

    def _dataset(self) -> RowDataset:
        mix = self._source_mix
        row_orders = [self._row_order(number, packed) for number, packed in enumerate(mix.packings)]
        return RowDataset(mix, row_orders, self.labels_across_documents, self.num_rows)

    def _data_loader(self) -> StatefulDataLoader:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="'set_vital' is deprecated")  # torchdata's own call
            return StatefulDataLoader(
                self._dataset(),
                batch_size=None,  # the sampler yields whole micro-batches
                sampler=RankBatchSampler(self._layout, self.num_rows, self._first_row, self._skipper, self._step),
                num_workers=self.num_workers,
                worker_init_fn=ignore_run_signals,
                prefetch_factor=self.prefetch_factor,
                snapshot_every_n_steps=1 << 62,  # the row is the whole state: workers need not send theirs
                pin_memory=self.pin_memory and torch.accelerator.is_available(),
                # A separate generator: each start would advance the default one, and change dropout.
                generator=torch.Generator(),
            )
