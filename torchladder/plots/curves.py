"""What runs left: their metrics as arrays."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from torchladder.registry import ConfigError


def read(runs: Sequence[Path]) -> dict[str, Curves]:
    """Returns what runs reported, by the names of their folders.

    Args:
        runs: folders of runs, or their metrics.jsonl.

    Raises:
        ConfigError: as ``Curves.read``, or no run is given.
    """
    if not runs:
        raise ConfigError("no runs to draw: name at least one.")
    files = [run / "metrics.jsonl" if run.is_dir() else run for run in runs]
    folders = [file.resolve().parent for file in files]
    # The whole path where two folders have one name.
    names = [one.name if [other.name for other in folders].count(one.name) == 1 else str(one) for one in folders]
    return {name: Curves.read(file) for name, file in zip(names, files, strict=True)}


class Curves:
    """A metrics.jsonl as arrays, one per key; those of validation at full context with their own steps."""

    def __init__(self, lines: Sequence[Mapping[str, Any]]) -> None:
        trained = [line for line in lines if "loss" in line]
        validated = [line for line in lines if "validation_loss" in line]
        full = max((line["window"] for line in validated), default=0)
        validated = [line for line in validated if line["window"] == full]
        self.step, self.loss, self.window = (_column(trained, key) for key in ("step", "loss", "window"))
        self.tokens, self.seconds, self.flops = (_column(trained, key) for key in ("tokens", "seconds", "flops"))
        self.validation_step, self.validation_loss = (_column(validated, key) for key in ("step", "validation_loss"))

    @classmethod
    def read(cls, path: Path) -> Curves:
        """Reads a metrics.jsonl.

        Raises:
            ConfigError: it is not there or holds no training step.
        """
        if not path.is_file():
            raise ConfigError(f"{path}: no such file; a run leaves its metrics.jsonl in job.dump_folder.")
        lines = []
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:  # the run is writing it
                continue
        if not any("loss" in line for line in lines):
            raise ConfigError(f"{path}: no training step in it yet.")
        return cls(lines)

    def title(self, name: str) -> str:
        if not len(self.validation_loss):
            return name
        return f"{name}: {self.validation_loss[-1]:.3f}"


def _column(lines: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    return np.array([np.nan if line[key] is None else line[key] for line in lines], dtype=float)


def smooth(values: np.ndarray, share: float = 0.02) -> np.ndarray:
    """Returns the running mean over that share of the values, centred, and over fewer of them at the ends."""
    half = int(len(values) * share / 2)
    total = np.r_[0, np.cumsum(np.nan_to_num(values))]
    count = np.r_[0, np.cumsum(np.isfinite(values))]
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    with np.errstate(invalid="ignore", divide="ignore"):
        return (total[high] - total[low]) / (count[high] - count[low])
