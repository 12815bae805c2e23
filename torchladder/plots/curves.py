"""The metrics of a run as arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from torchladder.registry import ConfigError


class RunCurves:
    """A run's metrics as arrays, one per key; validation at full context only, with its own steps.

    Args:
        name: the run's name in legends and errors.
        records: of its metrics.jsonl, as ``metrics.read_jsonl`` returns them.

    Raises:
        ConfigError: no record is of a training step.
    """

    def __init__(self, name: str, records: Sequence[Mapping[str, Any]]) -> None:
        train = [record for record in records if "loss" in record]
        if not train:
            raise ConfigError(f"{name}: metrics.jsonl has no training step yet; the first is written after step 1.")
        validation = [record for record in records if "validation_loss" in record]
        full = max((record["window"] for record in validation), default=0)
        validation = [record for record in validation if record["window"] == full]
        self.name = name
        self.step, self.loss, self.window = (_column(train, key) for key in ("step", "loss", "window"))
        self.tokens, self.seconds, self.flops = (_column(train, key) for key in ("tokens", "seconds", "flops"))
        self.validation_step, self.validation_loss = (_column(validation, key) for key in ("step", "validation_loss"))

    @property
    def title(self) -> str:
        return f"{self.name}: {self.validation_loss[-1]:.3f}" if len(self.validation_loss) else self.name


def _column(records: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    return np.array([np.nan if record[key] is None else record[key] for record in records], dtype=float)


def smooth(values: np.ndarray, fraction: float = 0.02) -> np.ndarray:
    """Returns the centered running mean over a fraction of the values, over fewer of them at the ends; NaN is skipped.

    Example: with 5 values and ``fraction=0.4`` each value is averaged with one neighbor on either side.
    """
    half = int(len(values) * fraction / 2)
    total = np.r_[0, np.cumsum(np.nan_to_num(values))]
    count = np.r_[0, np.cumsum(np.isfinite(values))]
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    with np.errstate(invalid="ignore", divide="ignore"):
        return (total[high] - total[low]) / (count[high] - count[low])
