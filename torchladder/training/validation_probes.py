"""Long-context probes (``torchladder.probes``) during training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import islice

import numpy as np

from torchladder import data, models
from torchladder.distributed.mesh import Mesh
from torchladder.distributed.ranks import Ranks
from torchladder.inference.evaluation.probe_scores import LogitsAt, ProbeRun, probe_tokens
from torchladder.training import data_setup
from torchladder.training.run_plan import Plan

TEXT_ROWS = 64
"""Rows of the validation data that probes are made of."""


class ValidationProbes:
    """The probes ``validation.probes`` in rows of ``training.seq_len`` tokens, the same rows each time.

    Ranks share the rows, and all of them call the model the same number of times.

    Raises:
        ConfigError: the validation data has fewer tokens than a row, or too few different ones.
    """

    def __init__(self, plan: Plan, ranks: Ranks, mesh: Mesh, tokenizer: data.Tokenizer | None) -> None:
        self.plan, self.ranks, self.mesh = plan, ranks, mesh
        config, context = plan.config, plan.config.training.seq_len
        # Every rank reads the same text, whatever its share of the validation data.
        loader = data_setup.build_loader(
            config, replace(plan.batch, dp_degree=1), plan.schedule, split="validation", tokenizer=tokenizer
        )
        text = islice((row.numpy() for batch in loader for row in batch.tokens), TEXT_ROWS)
        tokens = probe_tokens(tokenizer, models.resolve(config.model).vocab_size, text, context)
        names = dict.fromkeys(config.validation.probes)
        self.runs = [ProbeRun(name, context, config.validation.probe_rows, tokens) for name in names]

    def scores(self, logits_at: LogitsAt, stop_if_requested: Callable[[], None]) -> dict[str, float]:
        """Returns ``<probe>_accuracy`` and ``<probe>_loss``, each the mean over all depths or distances.

        Args:
            logits_at: the model; returns the logits of this rank's part of each row.
            stop_if_requested: called before each batch; may raise to interrupt the validation.
        """
        rows, degrees = self.plan.config.training.local_batch_size, self.plan.degrees
        found: dict[str, float] = {}
        for run in self.runs:
            losses = run.losses(logits_at, rows, lambda _: stop_if_requested(), self.mesh.dp_rank, degrees.dp)
            total = np.array(self.ranks.sums(*losses.ravel())).reshape(losses.shape) / degrees.tp
            scores = run.scores(total)
            for key in ("accuracy", "loss"):
                found[f"{run.name}_{key}"] = sum(getattr(score, key) for score in scores) / len(scores)
        return found
