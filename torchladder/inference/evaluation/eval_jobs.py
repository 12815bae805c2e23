"""Evaluation jobs, each of one model at one context: the loss on a file; finds those not yet run."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Literal, Protocol, TypeVar

import numpy as np
import torch

from torchladder import data, models
from torchladder.data.packing.spans import Spans
from torchladder.data.unlabeled_tokens import PADDING, split_labels
from torchladder.inference.evaluation.eval_files import EvalDocuments
from torchladder.inference.evaluation.eval_slices import EvalSlices
from torchladder.inference.evaluation.position_losses import PositionLosses, position_buckets
from torchladder.inference.evaluation.result_table import ResultRow, ResultTable, RowKey
from torchladder.inference.trained_model import LoadedModel, TrainedModel
from torchladder.models import attention
from torchladder.models.layer_types import collapse
from torchladder.registry import require

FINGERPRINT_VERSION = 1
"""Increment when the results of the same weights and documents change, so that they are evaluated again."""

SplitBy = Literal["", "position", "distance"]


class Job(Protocol):
    """What one model is measured on at one context."""

    @property
    def trained(self) -> TrainedModel: ...

    @property
    def table(self) -> ResultTable:
        """Receives the result."""
        ...

    @property
    def dtype(self) -> str:
        """Of the weights."""
        ...

    @property
    def context(self) -> int:
        """Tokens that the model reads at once, at most."""
        ...

    @property
    def subject(self) -> str:
        """What is measured, for messages: a file or a probe."""
        ...

    @property
    def num_tokens(self) -> int:
        """Tokens that the model reads in all; of a task the requests."""
        ...

    @property
    def row_keys(self) -> list[RowKey]:
        """The keys of the result's rows."""
        ...

    def compute(self, loaded: LoadedModel, batch_tokens: int, on_batch: Callable[[int], None]) -> list[ResultRow]:
        """Returns the rows of the result.

        Args:
            loaded: the model.
            batch_tokens: tokens in a batch, with padding; a single row may be longer.
            on_batch: called with the tokens of each batch.
        """
        ...

    def summary(self, rows: Sequence[ResultRow]) -> str:
        """Returns the result in a few words."""
        ...

    def notices(self) -> list[str]:
        """Returns what the user should know before the job runs."""
        ...


AnyJob = TypeVar("AnyJob", bound=Job)


@dataclass(frozen=True, eq=False)
class EvalJob:
    """The evaluation of a model on a file at a context.

    Attributes:
        slices: how its documents are cut.
        dtype: of the weights.
        split_by: report the loss by position in the slice, or by distance from the document's start, too; or neither.
        table: receives the result.
    """

    trained: TrainedModel
    documents: EvalDocuments
    slices: EvalSlices
    dtype: str
    split_by: SplitBy
    table: ResultTable

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all that determines the result, and of the file's name."""
        content = [FINGERPRINT_VERSION, self.trained.weights_id]
        content += [self.documents.path.name, self.documents.corpus.fingerprint()]
        content += [self.slices.context, self.slices.stride, self.dtype]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    @cached_property
    def num_tokens(self) -> int:
        """Tokens that the model reads."""
        return self.slices.count_tokens(self.documents.corpus.lengths)

    @property
    def context(self) -> int:
        """Tokens in a slice, at most."""
        return self.slices.context

    @property
    def subject(self) -> str:
        """The file."""
        return path_label(self.documents.path)

    def compute(self, loaded: LoadedModel, batch_tokens: int, on_batch: Callable[[int], None]) -> list[ResultRow]:
        return self.rows(compute_losses(loaded, self, batch_tokens, on_batch))

    def summary(self, rows: Sequence[ResultRow]) -> str:
        whole = rows[0]
        if whole["loss"] is None:
            return f"no token, {whole['tokens']:,} tokens"
        return f"loss {whole['loss']:.4f}, perplexity {whole['perplexity']:,.2f}, {whole['tokens']:,} tokens"

    def notices(self) -> list[str]:
        lines = []
        if not self.documents.corpus.tokenizer_known:
            lines.append(f"{self.subject}: its tokenizer is unknown and cannot be verified")
        if not self.num_tokens:
            lines.append(f"warning: {self.subject} has no token to predict: its loss stays empty")
        return lines

    @property
    def row_keys(self) -> list[RowKey]:
        """The keys of the result's rows: all tokens, then each bucket."""
        return [(self.fingerprint, first) for first in (None, *(first for first, _ in self._buckets))]

    def rows(self, losses: PositionLosses) -> list[ResultRow]:
        """Returns the rows of the result: all tokens, then each bucket."""
        common: ResultRow = model_columns(self.trained) | {
            "file": self.subject,
            "context": self.slices.context,
            "stride": self.slices.stride,
            "dtype": self.dtype,
            "documents": None,
            "bytes": None,
            "bits_per_byte": None,
            "fingerprint": self.fingerprint,
        }
        rows, place = [], self.split_by or "position"
        for first, last in [(None, None), *self._buckets]:
            total = losses.total(first or 0, last)
            rows.append(
                common
                | {f"first_{place}": first, f"last_{place}": last, "tokens": total.tokens}
                | {"loss": total.mean, "perplexity": total.perplexity}
                | {"total_loss": total.loss if total.tokens else None}
            )
        corpus, size = self.documents.corpus, self.documents.bytes
        per_byte = losses.total().bits_per_byte(size)
        rows[0] |= {"documents": len(corpus.lengths), "bytes": size, "bits_per_byte": per_byte}
        return rows

    @property
    def num_positions(self) -> int:
        """Positions in a slice; of a job by distance those of the longest document that predict a token."""
        if self.split_by != "distance":
            return self.slices.context
        return max(int(self.documents.corpus.lengths.max(initial=0)) - 1, 1)

    @property
    def _buckets(self) -> list[tuple[int, int]]:
        return position_buckets(self.num_positions) if self.split_by else []


def model_columns(trained: TrainedModel) -> ResultRow:
    """Returns the columns that say when and which model: time, checkpoint, step."""
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "checkpoint": path_label(trained.path) + trained.choice.label,
        "step": trained.step,
    }


def path_label(path: Path) -> str:
    """Returns a path as one line of valid text."""
    return os.fsencode(path).decode("utf-8", "replace").replace("\n", " ")


def unfinished(jobs: Sequence[AnyJob]) -> list[AnyJob]:
    """Returns the jobs that lack rows in their tables."""
    known = {table: set(map(table.key, table.rows())) for table in {job.table for job in jobs}}
    return [job for job in jobs if not known[job.table].issuperset(job.row_keys)]


def finished_rows(jobs: Sequence[Job]) -> list[ResultRow]:
    """Returns the rows of jobs that are in their tables, in the order of the jobs."""
    known = {table: {table.key(row): row for row in table.rows()} for table in {job.table for job in jobs}}
    rows = (known[job.table].get(key) for job in jobs for key in job.row_keys)
    return [row for row in rows if row is not None]


@torch.no_grad()
def compute_losses(
    loaded: LoadedModel, job: EvalJob, batch_tokens: int, on_batch: Callable[[int], None]
) -> PositionLosses:
    """Returns the losses of a job by position, or by distance.

    Args:
        batch_tokens: tokens in a batch, with padding.
        on_batch: called with the tokens of each finished batch.

    Raises:
        ConfigError: the file has a token outside of the model's vocabulary.
    """
    config, corpus = job.trained.config, job.documents.corpus
    kernels = {
        name: attention.build_kernel("sdpa", masks, loaded.device, training=False)
        for name, masks in config.layer_masks.items()
    }
    starts = {name: start.cpu() for name, start in loaded.starts.items()}
    vocab_size = models.resolve(config.model).vocab_size
    sums = PositionLosses(job.num_positions)
    for batch in job.slices.batches(corpus.lengths, batch_tokens):
        lengths = batch.ends - batch.begins
        rows, longest = len(lengths), int(lengths[0])
        positions = np.arange(longest + 1)
        content = np.full((rows, longest + 1), PADDING, dtype=np.int64)  # the last column has only labels
        content[positions <= lengths[:, None]] = corpus.read(Spans(batch.documents, batch.begins, batch.ends + 1))
        largest = np.maximum(content, ~content).max()
        require(
            largest < vocab_size,
            f"{job.documents.path} has token {largest}, but the model's vocab_size is {vocab_size}.",
        )
        tokens, labels = split_labels(torch.from_numpy(content))
        labels[torch.from_numpy(positions[:-1] < batch.overlaps[:, None])] = data.IGNORE_INDEX
        attn_mask = collapse(
            {
                name: kernel.prepare(starts[name][:longest].expand(rows, longest), loaded.device)
                for name, kernel in kernels.items()
            }
        )
        losses = loaded.model.per_token_loss(tokens.to(loaded.device), attn_mask, labels.to(loaded.device))
        scored = labels != data.IGNORE_INDEX
        if job.split_by == "distance":
            distances = batch.begins[:, None] + positions[:-1]
            sums.add_at(distances[scored.numpy()], losses.cpu()[scored].numpy())
        else:
            sums.add(losses.sum(0, dtype=torch.float64).cpu().numpy(), scored.sum(0).numpy())
        on_batch(int(lengths.sum()))
    return sums
