"""Probe jobs, each of one model with one long-context probe at one context."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from torchladder import models, probes
from torchladder.data.packing.spans import Spans
from torchladder.inference.evaluation.eval_files import EvalDocuments, EvalFiles
from torchladder.inference.evaluation.eval_jobs import model_columns, path_label
from torchladder.inference.evaluation.probe_scores import ProbeRun, probe_tokens
from torchladder.inference.evaluation.result_table import ResultRow, ResultTable, RowKey, TableSchema
from torchladder.inference.trained_model import LoadedModel, NoTokenizerError, TrainedModel
from torchladder.models import attention
from torchladder.models.layer_types import collapse
from torchladder.probes import ProbeTokens

PROBE_COLUMNS: dict[str, type] = {
    "time": str,
    "checkpoint": str,
    "step": int,
    "probe": str,
    "files": str,
    "context": int,
    "max_seq_len": int,
    "depth": float,
    "distance": int,
    "dtype": str,
    "rows": int,
    "loss": float,
    "first_loss": float,
    "accuracy": float,
    "exact_match": float,
    "fingerprint": str,
}

PROBES = TableSchema("probes", PROBE_COLUMNS, ("fingerprint", "distance"))
"""Scores of probes, a row per depth or distance."""

MAX_LOGITS = 1 << 27
"""Logits of a batch: 0.5 GiB of fp32."""

PROBE_VERSION = 1
"""Increment when the results of the same weights and settings change, so that they are measured again."""


@dataclass(frozen=True)
class ProbeInput:
    """What the rows of probes are made of, for each model.

    Attributes:
        files: text of the user; None for random tokens.
        max_context: the longest context of a row.
    """

    files: EvalFiles | None
    max_context: int
    _made: dict[str, tuple[ProbeTokens, bool]] = field(default_factory=dict, compare=False)

    def tokens_for(self, trained: TrainedModel) -> tuple[ProbeTokens, bool]:
        """Returns the tokens for a model, and whether its special tokens are known.

        Raises:
            ConfigError: the files cannot be read with its tokenizer, or are shorter than a row.
        """
        vocab_size = models.resolve(trained.config.model).vocab_size
        key = repr((trained.config.tokenizer, trained.config.data, trained.tokenizer_fingerprint, vocab_size))
        if key not in self._made:
            documents = self.files.open_for(trained) if self.files else []
            try:
                tokenizer = trained.build_tokenizer()
            except NoTokenizerError:
                tokenizer = None
            tokens = probe_tokens(tokenizer, vocab_size, _read(documents), self.max_context)
            self._made[key] = tokens, tokenizer is not None
        return self._made[key]


def _read(documents: Sequence[EvalDocuments]) -> Iterator[np.ndarray]:
    """Yields the tokens of each document, those without a label included."""
    for opened in documents:
        for number in np.flatnonzero(opened.corpus.lengths):
            length = opened.corpus.lengths[number]
            tokens = opened.corpus.read(Spans(*(np.array([value]) for value in (number, 0, length)))).astype(np.int64)
            yield np.maximum(tokens, ~tokens)


@dataclass(frozen=True, eq=False)
class ProbeJob:
    """A probe of a model at a context.

    Attributes:
        probe: the rows.
        files: the text as given on the command line; None for random tokens.
        special_known: whether special tokens could be left out.
        dtype: of the weights.
        table: receives the result.
    """

    trained: TrainedModel
    probe: ProbeRun
    files: str | None
    special_known: bool
    dtype: str
    table: ResultTable

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all that determines the result."""
        probe, tokens = self.probe, self.probe.tokens
        content = [PROBE_VERSION, self.trained.weights_id, self.dtype]
        content += [probe.name, probe.context, probe.rows, probe.seed]
        digest = hashlib.sha256(json.dumps(content).encode())
        for array in (tokens.vocabulary, tokens.text):
            digest.update(b"none" if array is None else hashlib.sha256(array.tobytes()).digest())
        return digest.hexdigest()[:16]

    @property
    def context(self) -> int:
        """Tokens that the model reads."""
        return self.probe.context

    @property
    def subject(self) -> str:
        """The probe."""
        return self.probe.name

    @property
    def num_tokens(self) -> int:
        """Tokens that the model reads in all rows."""
        return len(self.probe.points) * self.probe.rows * self.context

    @property
    def row_keys(self) -> list[RowKey]:
        """The keys of the result's rows, one for each point."""
        return [(self.fingerprint, point.distance) for point in self.probe.points]

    def compute(self, loaded: LoadedModel, batch_tokens: int, on_batch: Callable[[int], None]) -> list[ResultRow]:
        starts = {name: start[: self.context].cpu() for name, start in loaded.starts.items()}
        kernels = {
            name: attention.build_kernel("sdpa", masks, loaded.device, training=False)
            for name, masks in self.trained.config.layer_masks.items()
        }

        def logits_at(tokens: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
            attn_mask = {
                name: kernel.prepare(starts[name].expand(tokens.shape), loaded.device)
                for name, kernel in kernels.items()
            }
            inputs = tokens.to(loaded.device), collapse(attn_mask), positions.to(loaded.device)
            return loaded.model.logits_at(*inputs), torch.ones(1, 1, device=loaded.device)

        total = len(self.probe.points) * self.probe.rows
        logits_per_row = 2 * self.probe.answer * models.resolve(self.trained.config.model).vocab_size
        batches = -(-total // max(min(batch_tokens // self.context, MAX_LOGITS // logits_per_row), 1))
        scores = self.probe.scores(self.probe.losses(logits_at, -(-total // batches), on_batch))
        common = model_columns(self.trained) | {
            "probe": self.probe.name,
            "files": self.files,
            "context": self.context,
            "max_seq_len": self.trained.max_seq_len,
            "dtype": self.dtype,
            "fingerprint": self.fingerprint,
        }
        keys = ("rows", "loss", "first_loss", "accuracy", "exact_match")
        return [
            common
            | {"depth": score.point.depth, "distance": score.point.distance}
            | {key: getattr(score, key) for key in keys}
            for score in scores
        ]

    def summary(self, rows: Sequence[ResultRow]) -> str:
        accuracy, loss = (sum(row[key] for row in rows) / len(rows) for key in ("accuracy", "loss"))
        return f"accuracy {accuracy:.1%}, loss {loss:.4f}"

    def notices(self) -> list[str]:
        if self.special_known:
            return []
        return [f"{path_label(self.trained.path)} has no tokenizer: rows of probes may have special tokens"]


def default_contexts(trained: TrainedModel, names: Sequence[str]) -> list[int]:
    """Returns a quarter, a half and all of a model's row, without those that are too short for a probe."""
    row = min(trained.max_seq_len, trained.config.training.seq_len)
    shortest = max(probe.min_context for probe in probes.registry.build_all(names, []).values())
    return [context for context in (row // 4, row // 2) if context >= shortest] + [row]
