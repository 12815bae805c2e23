"""The loader ``hub``: a Hugging Face dataset, streamed, tokenized and packed while the run reads it.

Nothing is prepared and nothing is kept, and so less is promised than by the loader ``rows``. A stream has no place to
jump to:

- Resuming is exact, but reads and tokenizes again all that came before.
- It is exact for as long as the dataset gives the same documents in the same order. Of a dataset on the Hub set
  ``revision``; of files that change nobody takes notice.
- Each rank reads documents of its own, so the rows depend on the number of ranks, and a run goes on with as many.
- Documents are shuffled within a buffer. How many there are is not known: no epochs, phases or mixtures.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import count, islice
from typing import Any, Literal

import numpy as np
import torch

from torchladder.data.dataloader import Batch, register
from torchladder.data.packed_rows import PackedRows, check_division
from torchladder.data.prepare.document_encoder import DocumentEncoder
from torchladder.data.sources import held_out
from torchladder.data.streamed_rows import StreamedRows
from torchladder.data.text.hub_dataset import HubDataset, import_datasets
from torchladder.data.tokenizer import Tokenizer
from torchladder.registry import ConfigError

logger = logging.getLogger(__name__)

TOKENIZE_BATCH = 64
"""Documents that are tokenized at once."""


@register("hub")
@dataclass(kw_only=True, eq=False)
class HubLoader:
    """A Hugging Face dataset in streaming mode; resuming reads again what came before."""

    seq_len: int
    split: Literal["train", "validation"]
    tokenizer: Tokenizer | None
    dp_rank: int
    dp_degree: int
    local_batch_size: int
    global_batch_size: int

    path: str
    """Name of a dataset on the Hub, a folder with one, or a format (json, parquet, text) of data_files."""
    config: str | None = None
    """Which of the dataset's configurations."""
    data_files: str | list[str] | None = None
    """Files to read, by path or glob."""
    revision: str | None = None
    """Commit or tag of a dataset on the Hub; without one, a resumed run may read other documents."""
    train_split: str = "train"
    """Name of the split to train on."""
    validation_split: str = ""
    """Name of the split to validate on; empty: documents held out of the one to train on."""
    validation_fraction: float = 0.02
    """Share of the documents held out for validation, by a hash of the text; unused with validation_split."""
    validation_documents: int = 500
    """Of those held out, how many are read to validate on."""
    text_key: str = "text"
    """Column of the text."""
    bos: bool = False
    """Begin each document with the tokenizer's bos token."""
    labels_across_documents: bool = True
    """The last token of a document predicts the first one of the next; otherwise it predicts nothing."""
    shuffle_buffer: int = 10_000
    """Documents among which the next one is chosen; 0 reads them in order."""
    seed: int = 0
    """Decides the order of documents."""
    prefetch: bool = True
    """Read and tokenize the next batch in a thread, while the one before is trained on."""
    pin_memory: bool = False
    """Hand out batches in pinned memory, where there is an accelerator to copy them to."""

    def __post_init__(self) -> None:
        self._check()
        self._framing = DocumentEncoder(self._needed_tokenizer(), bos=self.bos)
        held_apart = self.validation_split if self.split == "validation" else ""
        split = held_apart or self.train_split
        self._documents = HubDataset(self.path, self.config, self.data_files, self.revision, split, self.text_key)
        self._dataset = self._open()
        self._accumulation = self.global_batch_size // (self.dp_degree * self.local_batch_size)
        self._pin = self.pin_memory and torch.accelerator.is_available()
        self._thread = ThreadPoolExecutor(1, "hub")
        self._ahead: Future[Batch | None] | None = None
        self.seek(0)

    @property
    def row(self) -> int:
        return self._first + self._taken // self._accumulation * self.global_batch_size

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = self._ahead.result() if self._ahead else self._make(self._stream)
        if batch is None:
            raise StopIteration
        self._taken += 1
        self._ahead = self._thread.submit(self._make, self._stream) if self.prefetch else None
        return batch

    def seek(self, row: int) -> None:
        """Continues at a global row: the next batch first reads again all that came before.

        Raises:
            ConfigError: the row is negative, or is not the first of a batch of as many rows for every rank.
        """
        if row < 0 or row % self.dp_degree:
            raise ConfigError(f"there is no row {row} to begin at: it is 0 at least, and as many for each rank.")
        if self._ahead:
            self._ahead.exception()  # waits: the dataset is read by one at a time
        self._first, self._taken = row, 0
        self._ahead, self._stream = None, self._begin()

    def fingerprint(self) -> dict[str, str]:
        """Returns what the rows depend on by name; what the documents hold is not known."""
        named = {key: getattr(self, key) for key in ("path", "config", "data_files", "revision", "train_split")}
        return {
            "dataset": ", ".join(f"{key} {value}" for key, value in named.items() if value),
            "validation_fraction": str(self._fraction),
            "text_key": self.text_key,
            "bos": str(self.bos),
            "labels_across_documents": str(self.labels_across_documents),
            "shuffle_buffer": str(self.shuffle_buffer),
            "seed": str(self.seed),
            "seq_len": str(self.seq_len),
            "ranks": str(self.dp_degree),
            "tokenizer": self._framing.tokenizer.fingerprint,
            "datasets": import_datasets().__version__,  # shuffles, and splits over ranks, in its own way
        }

    def describe(self) -> list[str]:
        order = f"shuffled within {self.shuffle_buffer:,} documents" if self.shuffle_buffer else "in order"
        if self.split == "validation":
            held = f"up to {self.validation_documents:,} documents held out of {self.train_split}"
            return [f"validation: stream of {self.path}, {self.validation_split or held}"]
        resume = "a resumed run reads again what came before"
        return [f"train: stream of {self.path}, {self.train_split}, {order}; {resume}"]

    def documents(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields the tokens of this rank's documents, some at once; for training epoch after epoch, without end.

        Raises:
            ConfigError: a document has no text, or there are none at all.
        """
        for epoch in count() if self.split == "train" else range(1):
            texts, found = self.texts(epoch), False
            while chunk := list(islice(texts, TOKENIZE_BATCH)):
                found = True
                yield self._framing(chunk, lambda _: self.path)
            if not found:
                raise ConfigError(f"the dataset {self.path} has no documents for data-parallel rank {self.dp_rank}.")

    def texts(self, epoch: int) -> Iterator[str]:
        """Yields the texts of this rank in one epoch; empty ones are no documents.

        Raises:
            ConfigError: a document has no text.
        """
        if self.split == "validation":
            return iter(self._held) if self._fraction else self._all()
        if self.shuffle_buffer:
            self._dataset.set_epoch(epoch)
        return (text for text in self._all() if not held_out(text, self._fraction))

    @cached_property
    def _held(self) -> list[str]:
        """The documents to validate on, looked for once."""
        return list(islice((text for text in self._all() if held_out(text, self._fraction)), self.validation_documents))

    @property
    def _fraction(self) -> float:
        return 0.0 if self.validation_split else self.validation_fraction

    def _all(self) -> Iterator[str]:
        return self._documents.texts(self._dataset)

    def _check(self) -> None:
        check_division(self.seq_len, self.dp_rank, self.dp_degree, self.local_batch_size, self.global_batch_size)
        for name, least in {"validation_documents": 1, "shuffle_buffer": 0, "seed": 0}.items():
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}; it is {least} at least.")
        if not 0 <= self.validation_fraction < 1:
            raise ConfigError(f"validation_fraction is {self.validation_fraction}; it is at least 0 and below 1.")
        if self.split == "validation" and not (self.validation_split or self.validation_fraction):
            raise ConfigError("nothing is held out for validation: set validation_split or validation_fraction.")

    def _needed_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ConfigError(f"the dataset {self.path} is raw text: it needs a tokenizer.")
        return self.tokenizer

    def _open(self) -> Any:
        """Returns the documents of this split, of this rank where it trains.

        Raises:
            ConfigError: there is no such dataset, split or column.
        """
        dataset = self._documents.open()
        if self.split == "validation":
            return dataset  # every rank reads all of it, so that all have equally many rows
        if self.shuffle_buffer:
            dataset = dataset.shuffle(seed=self.seed, buffer_size=self.shuffle_buffer)
        return import_datasets().distributed.split_dataset_by_node(dataset, self.dp_rank, self.dp_degree)

    def _begin(self) -> Iterator[PackedRows]:
        """Yields the micro-batches from the first row on."""
        validation = self.split == "validation"
        if self._first and not validation:
            logger.info("hub: reading again the %s rows that came before", f"{self._first:,}")
        stream = StreamedRows(
            self.documents,
            self.seq_len,
            self.local_batch_size,
            self.global_batch_size // self.dp_degree,
            (self.dp_rank, self.dp_degree) if validation else (0, 1),
            self._first if validation else self._first // self.dp_degree,
            self.labels_across_documents,
        )
        return iter(stream)

    def _make(self, stream: Iterator[PackedRows]) -> Batch | None:
        """Returns the next micro-batch, None behind the last."""
        content = next(stream, None)
        if content is None:
            return None
        return content.pin_memory() if self._pin else content.batch()
