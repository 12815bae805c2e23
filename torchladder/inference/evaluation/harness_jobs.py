"""Task jobs, each of one model on one task of the lm-evaluation-harness."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from torchladder.inference.evaluation.eval_jobs import model_columns
from torchladder.inference.evaluation.harness_model import HarnessModel
from torchladder.inference.evaluation.harness_tasks import HarnessTask
from torchladder.inference.evaluation.result_table import ResultRow, ResultTable, RowKey, TableSchema
from torchladder.inference.trained_model import LoadedModel, TrainedModel
from torchladder.registry import ConfigError, require

TASK_COLUMNS: dict[str, type] = {
    "time": str,
    "checkpoint": str,
    "step": int,
    "task": str,
    "metric": str,
    "filter": str,
    "num_fewshot": int,
    "context": int,
    "dtype": str,
    "documents": int,
    "value": float,
    "stderr": float,
    "fingerprint": str,
}

TASKS = TableSchema("tasks", TASK_COLUMNS, ("fingerprint", "task", "metric", "filter"))
"""Results of tasks, a row per metric."""

HARNESS_VERSION = 1
"""Increment when the results of the same weights and requests change, so that they are measured again."""


@dataclass(frozen=True, eq=False)
class HarnessJob:
    """A task for a model.

    Attributes:
        context: tokens that the model reads at once.
        bos: whether texts begin with the tokenizer's bos; None: as in the run.
        dtype: of the weights.
        table: receives the result.

    Raises:
        ConfigError: the model has no tokenizer, or its context has no room for what a task generates.
    """

    trained: TrainedModel
    task: HarnessTask
    context: int
    bos: bool | None
    dtype: str
    table: ResultTable

    def __post_init__(self) -> None:
        most = self.task.longest_generation
        require(
            most < self.context,
            f"--context {self.context}: the task {self.subject} generates up to {most} tokens after its prompts. Use a "
            "longer --context, or reduce max_gen_toks in the generation_kwargs of a custom task.",
        )
        tokenizer = self.trained.build_tokenizer()
        if tokenizer is None:
            raise ConfigError(f"{self.trained.path} has no tokenizer for the texts of tasks.")
        require(not self.bos or tokenizer.bos is not None, "--bos: the tokenizer has no bos token.")

    @cached_property
    def _begins_with_bos(self) -> bool:
        return bool(getattr(self.trained.config.data, "bos", False) if self.bos is None else self.bos)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all that determines the result."""
        content = [HARNESS_VERSION, self.trained.weights_id, self.dtype, self.context, self._begins_with_bos]
        return hashlib.sha256(json.dumps([*content, self.task.fingerprint]).encode()).hexdigest()[:16]

    @property
    def subject(self) -> str:
        """The task."""
        return self.task.name

    @property
    def num_tokens(self) -> int:
        """Requests of the task, the unit of its progress."""
        return self.task.num_requests

    @property
    def row_keys(self) -> list[RowKey]:
        """The keys of the rows of single tasks; those of groups come before them in the table."""
        return [(self.fingerprint, *metric) for metric in self.task.metrics]

    def compute(self, loaded: LoadedModel, batch_tokens: int, on_batch: Callable[[int], None]) -> list[ResultRow]:
        tokenizer = self.trained.build_tokenizer()
        assert tokenizer is not None
        dtype = getattr(torch, self.dtype)
        model = HarnessModel(
            self.trained, loaded, tokenizer, self.context, self._begins_with_bos, dtype, batch_tokens, on_batch
        )
        results = self.task.evaluate(model)
        common = model_columns(self.trained) | {"context": self.context, "dtype": self.dtype}
        common |= {"fingerprint": self.fingerprint}
        groups = [name for name in results["results"] if name not in self.task.loaded["tasks"]]
        found = [(name, *key.split(",", 1)) for name in groups for key in results["results"][name] if "," in key]
        metrics = [one for one in found if not one[1].endswith("_stderr")] + self.task.metrics
        return [
            common
            | {"task": name, "metric": metric, "filter": chosen}
            | {"num_fewshot": results["n-shot"].get(name)}
            | {"documents": results["results"][name].get("sample_len")}
            | {"value": _number(results["results"][name].get(f"{metric},{chosen}"))}
            | {"stderr": _number(results["results"][name].get(f"{metric}_stderr,{chosen}"))}
            for name, metric, chosen in metrics
        ]

    def summary(self, rows: Sequence[ResultRow]) -> str:
        shown = [f"{row['metric']} {row['value']:.4f}" for row in rows if row["value"] is not None]
        return ", ".join(shown[:4]) + (", ..." if len(shown) > 4 else "")

    def notices(self) -> list[str]:
        return []


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None  # the harness has "N/A" for no standard error
