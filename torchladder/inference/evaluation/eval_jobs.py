"""What there is to evaluate, what of it is done, and the doing."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from torchladder import data, models
from torchladder.data.packing.spans import Spans
from torchladder.inference.evaluation.eval_files import EvalDocuments
from torchladder.inference.evaluation.eval_slices import EvalSlices
from torchladder.inference.evaluation.eval_weights import EvalWeights
from torchladder.inference.evaluation.result_table import Key, ResultTable, Row, key
from torchladder.inference.evaluation.scores import Scores, Total, buckets
from torchladder.inference.trained_model import LoadedModel
from torchladder.models import attention
from torchladder.registry import ConfigError

FORMAT = 1
"""Raised when the same weights and documents would give other numbers, so that they are evaluated again."""

NOBODY = ~0
"""Stands where a row has ended: token 0, which nobody is to predict."""


@dataclass(frozen=True, eq=False)
class EvalJob:
    """Some weights on one file at one context.

    Attributes:
        weights: the weights.
        documents: the file.
        windows: how its documents are cut.
        dtype: of the weights, as the model computes with them.
        by_position: whether the result says what tokens cost by position.
        table: where the result goes.
    """

    weights: EvalWeights
    documents: EvalDocuments
    windows: EvalSlices
    dtype: str
    by_position: bool
    table: ResultTable

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all that the result follows from, and of the file's name."""
        of = [FORMAT, self.weights.stamp, self.documents.path.name, self.documents.corpus.fingerprint()]
        of += [self.windows.context, self.windows.stride, self.dtype]
        return hashlib.sha256(json.dumps(of).encode()).hexdigest()[:16]

    @cached_property
    def tokens(self) -> int:
        """Tokens that the model reads."""
        return self.windows.tokens(self.documents.corpus.lengths)

    @property
    def keys(self) -> list[Key]:
        """What the rows of the result are of."""
        return [(self.fingerprint, first) for first in (None, *(first for first, _ in self._buckets))]

    def rows(self, scores: Scores) -> list[Row]:
        """Returns the rows of the result: of all positions, and of each bucket."""
        about: Row = {
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "checkpoint": label(self.weights.path),
            "step": self.weights.step,
            "file": label(self.documents.path),
            "context": self.windows.context,
            "stride": self.windows.stride,
            "dtype": self.dtype,
            "fingerprint": self.fingerprint,
        }
        size, whole = self.documents.bytes, scores.total()
        of_all = {
            "documents": len(self.documents.corpus.lengths),
            "bytes": size,
            "bits_per_byte": whole.bits_per_byte(size),
        }
        rows = [about | _place(None, None) | _figures(whole) | of_all]
        for place in self._buckets:
            rows.append(about | _place(*place) | _figures(scores.total(*place)) | dict.fromkeys(of_all))
        return rows

    @property
    def _buckets(self) -> list[tuple[int, int]]:
        return buckets(self.windows.context) if self.by_position else []


def _place(first: int | None, last: int | None) -> Row:
    return {"first_position": first, "last_position": last}


def _figures(total: Total) -> Row:
    return {
        "tokens": total.tokens,
        "loss": total.mean,
        "perplexity": total.perplexity,
        "total_loss": total.loss if total.tokens else None,
    }


def label(path: Path) -> str:
    """Returns a path as one line of text."""
    return os.fsencode(path).decode("utf-8", "replace").replace("\n", " ")


def unfinished(jobs: Sequence[EvalJob]) -> list[EvalJob]:
    """Returns the jobs whose tables do not hold all of their rows."""
    known = {table: {key(row) for row in table.rows()} for table in {job.table for job in jobs}}
    return [job for job in jobs if not known[job.table].issuperset(job.keys)]


def finished_rows(jobs: Sequence[EvalJob]) -> list[Row]:
    """Returns the rows of jobs that their tables hold, in the order of the jobs."""
    known = {table: {key(row): row for row in table.rows()} for table in {job.table for job in jobs}}
    rows = (known[job.table].get(one) for job in jobs for one in job.keys)
    return [row for row in rows if row is not None]


@torch.no_grad()
def score(restored: LoadedModel, job: EvalJob, budget: int, read: Callable[[int], None]) -> Scores:
    """Reads all windows of a job and adds up what each token costs.

    Args:
        restored: the job's model.
        job: what to read.
        budget: places in a batch.
        read: told the tokens of each batch that has been read.

    Raises:
        ConfigError: the file holds a token that the model does not have.
    """
    config, corpus = job.weights.config, job.documents.corpus
    kernel = attention.build_kernel("sdpa", config.attention.masks, restored.device, training=False)
    start, vocab_size = restored.start.cpu(), models.resolve(config.model).vocab_size
    scores = Scores(job.windows.context)
    for batch in job.windows.batches(corpus.lengths, budget):
        lengths = batch.ends - batch.begins
        rows, longest = len(lengths), int(lengths[0])
        places = np.arange(longest + 1)
        content = np.full((rows, longest + 1), NOBODY, dtype=np.int64)  # the last one only a label
        content[places <= lengths[:, None]] = corpus.read(Spans(batch.documents, batch.begins, batch.ends + 1))
        tokens = content ^ (content >> 63)  # one that nobody is to predict is ~token
        if tokens.max() >= vocab_size:
            raise ConfigError(f"{job.documents.path} holds token {tokens.max()}, the model has {vocab_size}.")
        labels = content[:, 1:].copy()
        labels[(labels < 0) | (places[:-1] < batch.seen[:, None])] = data.IGNORE_INDEX
        form = kernel.derive(start[:longest].expand(rows, longest), restored.device)
        inputs, wanted = (torch.from_numpy(x).to(restored.device) for x in (tokens[:, :-1].copy(), labels))
        losses = restored.model.losses(inputs, form, wanted)  # (rows, longest)
        scores.add(losses.sum(0, dtype=torch.float64).cpu().numpy(), (labels != data.IGNORE_INDEX).sum(0))
        read(int(lengths.sum()))
    return scores
