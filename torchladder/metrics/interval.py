"""What a run is, and what it measured since the previous report: the inputs of computed metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """Constants of a run that reporting needs."""

    folder: Path  # directory of metrics.jsonl, created if missing
    steps: int  # optimizer steps of the whole run
    seq_len: int  # tokens in a row
    flops: Callable[[int, int], int]  # (tokens, pairs) -> FLOPs of the model's forward and backward pass
    device: torch.device
    rank: int = 0  # only rank 0 reports
    ranks: int = 1
    settings: dict[str, Any] = field(default_factory=dict)  # the run's config, as Weights & Biases shows it


@dataclass(frozen=True, kw_only=True)
class Interval:
    """Measurements since the previous report; tokens and attended (query, key) pairs are summed over ranks."""

    run: RunInfo
    peak_flops: float | None  # FLOP/s of one device
    step: int  # optimizer steps since the start of the run
    steps: int  # optimizer steps since the previous report
    tokens: int
    pairs: int
    seconds: float  # wall-clock time without pauses
    totals: Mapping[str, float]  # tokens, flops and seconds since the start of the run
    memory_gib: float  # peak of this rank's device
    memory_fraction: float

    def per_device(self, amount: float) -> float:
        """Returns an amount per second and device."""
        return amount / (self.seconds * self.run.ranks)

    def flop_rate(self, pairs: int) -> float:
        """Returns FLOP/s per device for a number of attended pairs."""
        return self.per_device(self.run.flops(self.tokens, pairs))

    def mfu(self, pairs: int) -> float | None:
        """Returns the model FLOPs utilization, 0 to 1, for a number of attended pairs; None if the peak is unknown."""
        return self.flop_rate(pairs) / self.peak_flops if self.peak_flops else None

    def attention_saved(self) -> float:
        """Returns the fraction of full causal attention that was not computed."""
        causal_pairs = self.tokens * (self.run.seq_len + 1) / 2
        return 1 - self.pairs / causal_pairs if self.tokens else 0.0
