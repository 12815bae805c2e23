"""What the rest of the library knows of data: batches, the contracts of loader and tokenizer, the loaders by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from torchladder.registry import Registry

IGNORE_INDEX = -100
"""The label of a position that has no next token to predict."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of one micro-batch.

    Attributes:
        tokens: (B, T) int64.
        labels: (B, T) int64, the token after each token; -100 where there is none.
        positions: (B, T) int32, 0 at the first token of a document and of a row. Stays on the CPU, where masks begin.
        rows: the global row of each, where the loader knows them.
    """

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    rows: tuple[int, ...] = ()

    @cached_property
    def num_labels(self) -> int:
        """How many positions have a label; ask before moving the batch, since afterwards it waits for the device."""
        return int((self.labels != IGNORE_INDEX).sum())

    def to(self, device: torch.device | str) -> Batch:
        """Returns the batch with tokens and labels on ``device``; the copy overlaps when the memory is pinned."""
        return replace(
            self,
            tokens=self.tokens.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
        )

    def pin_memory(self) -> Batch:
        """Returns the batch with tokens and labels in pinned memory; the data loader calls this."""
        return replace(self, tokens=self.tokens.pin_memory(), labels=self.labels.pin_memory())


class BaseDataLoader(Protocol):
    """Hands one rank its micro-batches. One integer, ``row``, is the whole state."""

    @property
    def row(self) -> int:
        """The next global row: the first row of the global batch that the next micro-batch belongs to."""
        ...

    def __iter__(self) -> Iterator[Batch]: ...

    def __next__(self) -> Batch:
        """Returns this rank's next micro-batch; endless for training, finite for validation."""
        ...

    def seek(self, row: int) -> None:
        """Continues at that global row, which becomes the first of a global batch."""
        ...

    def fingerprint(self) -> dict[str, str]:
        """Returns what the order of tokens depends on, by name: equal fingerprints, equal rows."""
        ...

    def describe(self) -> list[str]:
        """Returns lines for the start-up report."""
        ...


@dataclass(frozen=True)
class SourceUsage:
    """What one phase of a run reads of one source.

    Attributes:
        step: the first optimizer step of the phase.
        steps: how many steps it has.
        source: what the source is called.
        tokens: how many of its tokens are read.
        epochs: how many times the source that is.
        epochs_before: the same of all phases before.
    """

    step: int
    steps: int
    source: str
    tokens: int
    epochs: float
    epochs_before: float


@runtime_checkable
class SizedLoader(Protocol):
    """A loader that knows how much data it has."""

    def steps_for(self, epochs: float) -> int:
        """Returns the optimizer steps that read as many tokens as all sources have together, ``epochs`` times."""
        ...

    def usage(self) -> list[SourceUsage]:
        """Returns what each phase reads of each source; the loader was told the steps of the run."""
        ...


@runtime_checkable
class SupportsSkipping(Protocol):
    """A loader that can leave rows out."""

    def leave_out(self, rows: Sequence[tuple[int, int]]) -> None:
        """Leaves out ranges of rows, first to last, beside those that already are; ask before ``seek``."""
        ...


class Tokenizer(ABC):
    """Text to token ids and back.

    Attributes:
        bos: the id that may begin a document, None where the vocabulary has none.
        eos: the id that ends a document.
        vocab_size: ids are below this number.
        fingerprint: equal for tokenizers that give equal ids.
    """

    bos: int | None
    eos: int
    vocab_size: int
    fingerprint: str

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, without special ids."""

    @abstractmethod
    def decode(self, ids: list[int]) -> str:
        """Returns the text of ids; special ids and ids outside the vocabulary leave no trace."""

    def file(self) -> dict[str, bytes]:
        """Returns what is in its files, by their usual names; nothing for one that has no file."""
        return {}

    def encode_batch(self, texts: list[str], threads: int = 1) -> list[np.ndarray]:
        """Returns the ids of each text as an integer array; override it where a library does many at once.

        Args:
            texts: any number of them.
            threads: cores to use where the library can.
        """
        return [np.asarray(self.encode(text), dtype=np.int64) for text in texts]


registry: Registry[BaseDataLoader] = Registry(
    "data loader",
    facts={
        "seq_len": "tokens in a row",
        "split": "train or validation",
        "tokenizer": "the run's tokenizer",
        "dp_rank": "this data-parallel rank",
        "dp_degree": "number of data-parallel ranks",
        "local_batch_size": "rows in a micro-batch",
        "global_batch_size": "rows in a step, over all ranks",
        "steps": "optimizer steps of the run, None where nobody knows",
    },
)
register = registry.register
