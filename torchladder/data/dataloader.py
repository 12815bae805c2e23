"""The interface of data loaders: batches, the protocol of a loader, and the registry of loaders."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from torchladder.registry import Registry

IGNORE_INDEX = -100
"""Label of a position without a target."""


@dataclass(frozen=True, eq=False)
class Batch:
    """A micro-batch.

    Attributes:
        tokens: (B, T) int64.
        labels: (B, T) int64, the next token of each token, or ``IGNORE_INDEX``.
        positions: (B, T) int32, 0 at the first token of a document and of a row; on the CPU, where masks are made.
        rows: (B,) global row of each; empty if the loader does not number rows.
    """

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    rows: tuple[int, ...] = ()

    @cached_property
    def num_labels(self) -> int:
        """Number of labels. Read it before the batch is moved: afterwards it synchronizes with the device."""
        return int((self.labels != IGNORE_INDEX).sum())

    def to(self, device: torch.device | str) -> Batch:
        """Returns the batch with tokens and labels on ``device``; the copy is asynchronous from pinned memory."""
        tokens, labels = (tensor.to(device, non_blocking=True) for tensor in (self.tokens, self.labels))
        return replace(self, tokens=tokens, labels=labels)

    def pin_memory(self) -> Batch:
        """Returns the batch with tokens and labels in pinned memory; called by the data loader."""
        return replace(self, tokens=self.tokens.pin_memory(), labels=self.labels.pin_memory())


class BaseDataLoader(Protocol):
    """Iterates over the micro-batches of one rank. Its whole state is one integer, ``row``."""

    @property
    def row(self) -> int:
        """First global row of the step that the next micro-batch belongs to."""
        ...

    def __iter__(self) -> Iterator[Batch]: ...

    def __next__(self) -> Batch:
        """Returns this rank's next micro-batch; endless for training, finite for validation."""
        ...

    def seek(self, row: int, step: int = 0) -> None:
        """Continues at a global row, which becomes the first one of a step.

        Args:
            row: number of the row.
            step: which step that is; passed only if ``batch_schedule`` varies, so other loaders need no such argument.
        """
        ...

    def fingerprints(self) -> dict[str, str]:
        """Returns what the rows depend on, by name: loaders with equal fingerprints yield equal rows."""
        ...

    def describe(self) -> list[str]:
        """Returns lines for the log at start-up."""
        ...


@dataclass(frozen=True)
class SourceUsage:
    """What one phase of a run reads of one source.

    Attributes:
        step: first optimizer step of the phase.
        steps: number of steps of the phase.
        source: label of the source.
        tokens: tokens read.
        epochs: the same in epochs of the source.
        epochs_before: epochs read by all earlier phases.
    """

    step: int
    steps: int
    source: str
    tokens: int
    epochs: float
    epochs_before: float


@runtime_checkable
class SizedLoader(Protocol):
    """A loader that knows the size of its data."""

    def steps_for(self, epochs: float) -> int:
        """Returns the optimizer steps that read as many rows as all sources have together, ``epochs`` times."""
        ...

    def usage(self) -> list[SourceUsage]:
        """Returns what each phase reads of each source; the loader must have been built with ``steps``."""
        ...


@runtime_checkable
class KnowsDocuments(Protocol):
    """A loader that knows the lengths of its documents."""

    def document_lengths(self) -> dict[str, np.ndarray]:
        """Returns the label of each source -> (documents,) tokens in each of its documents."""
        ...


@runtime_checkable
class SupportsSkipping(Protocol):
    """A loader that can skip rows."""

    def add_skip_rows(self, rows: Sequence[tuple[int, int]]) -> None:
        """Adds ranges of rows to skip, first and last inclusive. Takes effect with the next ``seek``."""
        ...


@runtime_checkable
class TracksSources(Protocol):
    """A loader that knows how much of each source has been read at a row."""

    def resume_row(self, step: int, row: int, saved: Mapping[str, str], moved: bool) -> int:
        """Returns the row that a run continues at, and checks that every source continues where it was.

        Args:
            step: optimizer steps taken.
            row: the row of the checkpoint.
            saved: the loader's fingerprints in the checkpoint; empty without a checkpoint.
            moved: whether the step or the row is not that of the checkpoint.

        Raises:
            ConfigError: with the settings of this run, other rows would have been read before.
        """
        ...

    def source_of(self, row: int) -> str:
        """Returns the label of the source that a global row comes from."""
        ...

    def boundary_shares(self) -> dict[str, float]:
        """Returns the share of each source's rows inside which a document begins, in a fixed sample of them."""
        ...


registry: Registry[BaseDataLoader] = Registry(
    "data loader",
    runtime_args={
        "seq_len": "tokens in a row",
        "split": "train or validation",
        "tokenizer": "the run's tokenizer",
        "vocab_size": "tokens in the model's vocabulary, None if unknown",
        "dp_rank": "this data-parallel rank",
        "dp_degree": "number of data-parallel ranks",
        "local_batch_size": "rows in a micro-batch",
        "global_batch_size": "rows in a step, over all ranks, unless batch_schedule says otherwise",
        "batch_schedule": "step -> rows over all ranks in training, None for global_batch_size in every step",
        "steps": "optimizer steps of the run, None if unknown",
        "check_only": "whether to check the settings and look for the files, and read nothing",
        "weight_changes": "first step of each phase of the run -> weights of the sources, None for no change",
    },
)
register = registry.register
