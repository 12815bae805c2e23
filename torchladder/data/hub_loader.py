"""The loader ``hub``: a Hugging Face dataset in streaming mode, tokenized and packed while the run reads it.

Nothing is prepared and nothing is cached, so it guarantees less than the loader ``rows``; a stream cannot seek:

- Resuming is exact, but reads and tokenizes everything before the current row again.
- It is exact only if the dataset returns the same documents in the same order. Pin a dataset on the Hub with
  ``revision``; changes of local files go unnoticed.
- Each rank reads different documents, so the rows depend on the number of ranks; a run must resume with as many.
- Documents are shuffled within a buffer, and their number is unknown: no epochs, phases or source weights.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count, islice
from typing import Any, Literal

import numpy as np
import torch

from torchladder.batch_schedule import BatchSchedule
from torchladder.data.dataloader import Batch, register
from torchladder.data.extras import import_extra
from torchladder.data.packed_rows import BatchLayout, PackedRows, StreamedRows, preview_row
from torchladder.data.prepare.document_encoder import DocumentEncoder
from torchladder.data.prepare.text_counts import MAX_UNKNOWN_FRACTION, TextCounts, check_max_unknown_fraction
from torchladder.data.sources import check_validation_fraction, held_out
from torchladder.data.tokenizer import Tokenizer
from torchladder.registry import ConfigError, require, unknown_name

logger = logging.getLogger(__name__)

TOKENIZE_BATCH_DOCUMENTS = 64
CHECKED_TOKENS = 1 << 20
"""Tokens at the beginning of a stream whose unknown ones are counted."""


@register("hub")
@dataclass(kw_only=True, eq=False)
class HubLoader:
    """A Hugging Face dataset in streaming mode; resuming reads earlier rows again."""

    seq_len: int
    split: Literal["train", "validation"]
    tokenizer: Tokenizer | None
    dp_rank: int
    dp_degree: int
    local_batch_size: int
    global_batch_size: int
    batch_schedule: BatchSchedule | None = None

    path: str
    """Name of a dataset on the Hub, a local folder with one, or the format of data_files (json, parquet, text)."""
    config: str | None = None
    """Name of the dataset's configuration."""
    data_files: str | list[str] | None = None
    """Paths or globs of files to read."""
    revision: str | None = None
    """Commit or tag of a dataset on the Hub; without it, a resumed run may read other documents."""
    train_split: str = "train"
    """Split to train on."""
    validation_split: str = ""
    """Split to validate on; empty: documents held out of the training split."""
    validation_fraction: float = 0.02
    """Fraction of the documents held out for validation, by a hash of the text; not used with validation_split."""
    validation_documents: int = 500
    """Number of held-out documents to validate on."""
    text_key: str = "text"
    """Column of the text."""
    bos: bool = False
    """Begin each document with the tokenizer's bos token."""
    labels_across_documents: bool = True
    """The last token of a document predicts the first one of the next; otherwise it has no label."""
    max_unknown_fraction: float = MAX_UNKNOWN_FRACTION
    """Largest fraction of unknown tokens in the first million tokens of the stream; more is an error."""
    shuffle_buffer: int = 10_000
    """Documents in the shuffle buffer; 0 reads them in order."""
    seed: int = 0
    """Seed of the shuffle."""
    prefetch: bool = True
    """Read and tokenize the next batch in a thread while the current one is trained on."""
    pin_memory: bool = False
    """Return batches in pinned memory if there is an accelerator."""

    def __post_init__(self) -> None:
        batch = self.batch_schedule or BatchSchedule.constant(self.global_batch_size)
        self._layout = BatchLayout(self.seq_len, self.dp_rank, self.dp_degree, self.local_batch_size, batch)
        for name, minimum in {"validation_documents": 1, "shuffle_buffer": 0, "seed": 0}.items():
            value = getattr(self, name)
            require(value >= minimum, f"data.{name} = {value}: must be {minimum} or more.")
        check_validation_fraction(self.validation_fraction)
        check_max_unknown_fraction(self.max_unknown_fraction, "data.max_unknown_fraction")
        self._fraction = 0.0 if self.validation_split else self.validation_fraction
        if self.split == "validation" and not (self.validation_split or self._fraction):
            raise ConfigError("no documents are held out for validation: set validation_split or validation_fraction.")
        if self.tokenizer is None:
            raise ConfigError(f"the dataset {self.path} is raw text: it needs a tokenizer.")
        self._encoder = DocumentEncoder(self.tokenizer, bos=self.bos)
        self._datasets = import_extra("datasets.distributed", "hub", "the loader hub")
        self._dataset = self._open_dataset()
        self._pin = self.pin_memory and torch.accelerator.is_available()
        self._thread = ThreadPoolExecutor(1, "hub")
        self._prefetched: Future[Batch | None] | None = None
        self.seek(0)

    @property
    def row(self) -> int:
        return self._first_row + self._layout.batch.whole_steps(self._step, self._taken * self._layout.rows_at_once)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = self._prefetched.result() if self._prefetched else self._next_batch(self._stream)
        if batch is None:
            raise StopIteration
        self._taken += 1
        self._prefetched = self._thread.submit(self._next_batch, self._stream) if self.prefetch else None
        return batch

    def seek(self, row: int, step: int = 0) -> None:
        """Continues at a global row, a multiple of dp_degree; the next batch then reads all rows before it again."""
        valid = row >= 0 and row % self.dp_degree == 0
        require(valid, f"cannot resume at row {row}: must be a multiple of dp_degree {self.dp_degree}.")
        if self._prefetched:
            self._prefetched.exception()  # waits: only one thread may read the dataset
        self._first_row, self._step, self._taken, self._prefetched = row, step, 0, None
        layout, first_row = self._layout, row
        if self.split == "train":  # each rank has a separate stream; in validation the ranks share the rows of one
            first_row = row // self.dp_degree
            # A rank's micro-batches follow each other whatever the steps are.
            layout = replace(self._layout, dp_rank=0, dp_degree=1, batch=BatchSchedule.constant(self.local_batch_size))
            if row:
                logger.info("hub: reading the %s rows before the current one again", f"{row:,}")
        self._stream = iter(StreamedRows(self.documents, layout, first_row, self.labels_across_documents))

    def fingerprints(self) -> dict[str, str]:
        """Returns what the rows depend on, by name; not the documents' content, which is unknown."""
        named = {key: getattr(self, key) for key in ("path", "config", "data_files", "revision", "train_split")}
        keys = ("text_key", "bos", "labels_across_documents", "shuffle_buffer", "seed", "seq_len")
        return {
            "dataset": ", ".join(f"{key} {value}" for key, value in named.items() if value),
            "validation_fraction": str(self._fraction),
            **{key: str(getattr(self, key)) for key in keys},
            "ranks": str(self.dp_degree),
            "tokenizer": self._encoder.tokenizer.fingerprint,
            "datasets": self._datasets.__version__,  # its shuffling and splitting may change
        }

    def describe(self) -> list[str]:
        order = f"shuffled within {self.shuffle_buffer:,} documents" if self.shuffle_buffer else "in order"
        if self.split == "validation":
            held = f"up to {self.validation_documents:,} documents held out of {self.train_split}"
            return [f"validation: stream of {self.path}, {self.validation_split or held}"]
        resume = "resuming reads earlier rows again"
        self._prefetched = self._prefetched or self._thread.submit(self._next_batch, self._stream)
        first = self._prefetched.result()
        preview = [preview_row(first, self.tokenizer)] if first else []
        return [f"train: stream of {self.path}, {self.train_split}, {order}; {resume}", *preview]

    def documents(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields (tokens of several documents back to back, length of each); for training, epochs without end."""
        counts = TextCounts()
        for epoch in count() if self.split == "train" else range(1):
            texts, found = self.texts(epoch), False
            while chunk := list(islice(texts, TOKENIZE_BATCH_DOCUMENTS)):
                found = True
                encoded = self._encoder(chunk, lambda _: self.path)
                if counts.text_tokens < CHECKED_TOKENS:  # later, an error would end a run that has trained for long
                    counts += encoded.counts
                    counts.check(self.path, self.max_unknown_fraction, "data.max_unknown_fraction")
                yield encoded.tokens, encoded.lengths
            if not found:
                raise ConfigError(f"the dataset {self.path} has no documents for data-parallel rank {self.dp_rank}.")

    def texts(self, epoch: int) -> Iterator[str]:
        """Yields the texts of this rank in one epoch, without empty ones."""
        if self.split == "validation":
            return iter(self._held_out) if self._fraction else self._all_texts()
        if self.shuffle_buffer:
            self._dataset.set_epoch(epoch)
        return (text for text in self._all_texts() if not held_out(text, self._fraction))

    @cached_property
    def _held_out(self) -> list[str]:
        held = (text for text in self._all_texts() if held_out(text, self._fraction))
        return list(islice(held, self.validation_documents))

    def _all_texts(self) -> Iterator[str]:
        for number, document in enumerate(self._dataset):
            text = document.get(self.text_key)
            if not isinstance(text, str):
                kind = type(text).__name__
                raise ConfigError(f"{self.path}, document {number}: {self.text_key!r} holds {kind}, not text.")
            if text:
                yield text

    def _open_dataset(self) -> Any:
        """Returns the ``datasets.IterableDataset`` of this split; for training, this rank's part of it."""
        split = (self.split == "validation" and self.validation_split) or self.train_split
        options = {"data_files": self.data_files, "revision": self.revision, "split": split, "streaming": True}
        try:
            dataset = self._datasets.load_dataset(self.path, self.config, **options)
            columns = dataset.column_names or list(next(iter(dataset), {}))
        except (OSError, ValueError, StopIteration, self._datasets.exceptions.DatasetsError) as error:
            why = str(error) or "no file"
            raise ConfigError(f"the dataset {self.path}, split {split!r}, cannot be read: {why}") from error
        if self.text_key not in columns:
            raise ConfigError(f"{self.path}: text_key: {unknown_name('column', self.text_key, columns)}")
        if self.split == "validation":
            return dataset  # all of it on every rank, so that all ranks have as many rows
        if self.shuffle_buffer:
            dataset = dataset.shuffle(seed=self.seed, buffer_size=self.shuffle_buffer)
        return self._datasets.distributed.split_dataset_by_node(dataset, self.dp_rank, self.dp_degree)

    def _next_batch(self, stream: Iterator[PackedRows]) -> Batch | None:
        packed = next(stream, None)
        if packed is None:
            return None
        return packed.pin_memory() if self._pin else packed.to_batch()
