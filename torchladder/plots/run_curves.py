"""The metrics of runs as arrays, and plots of one run and of several."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from torchladder.plots.style import (
    COLORS,
    draw_windows,
    legend_above,
    plain_numbers,
    saved_figure,
    window_axis,
    window_steps,
)
from torchladder.registry import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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
        self.records = records
        self.step, self.loss, self.window = (_column(train, key) for key in ("step", "loss", "window"))
        others = [key for key in train[-1] if key.startswith("window_")]
        self.layer_windows = {key.removeprefix("window_"): _column(train, key) for key in others}
        self.tokens, self.seconds, self.flops = (_column(train, key) for key in ("tokens", "seconds", "flops"))
        self.validation_step, self.validation_loss = (_column(validation, key) for key in ("step", "validation_loss"))

    @property
    def title(self) -> str:
        return f"{self.name}: {self.validation_loss[-1]:.3f}" if len(self.validation_loss) else self.name

    @property
    def windows(self) -> dict[str, np.ndarray]:
        """The window of each layer type; full_attention first."""
        return {"full_attention": self.window, **self.layer_windows}

    def at_validation(self, kind: str) -> np.ndarray:
        """Returns the tokens, seconds or FLOPs at the validation steps."""
        return np.interp(self.validation_step, np.r_[0, self.step], np.r_[0, getattr(self, kind)])


def _column(records: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    values = (record.get(key) for record in records)
    return np.array([np.nan if value is None else value for value in values], dtype=float)


def smooth(values: np.ndarray, fraction: float = 0.02) -> np.ndarray:
    """Returns the centered running mean over a fraction of the values, over fewer of them at the ends; NaN is skipped.

    A curve of few values is smoothed by more: up to a tenth of them, but no more than 11 values.

    Example: with 5 values and ``fraction=0.4`` each value is averaged with one neighbor on either side.
    """
    half = int(max(len(values) * fraction / 2, min(len(values) / 20, 5)))
    total = np.r_[0, np.cumsum(np.nan_to_num(values))]
    count = np.r_[0, np.cumsum(np.isfinite(values))]
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    with np.errstate(invalid="ignore", divide="ignore"):
        return (total[high] - total[low]) / (count[high] - count[low])


def plot_run(path: Path, run: RunCurves, windows: Mapping[str, Callable[[int], int]] | None = None) -> None:
    """Plots a run against the step: training and validation loss above, the window below.

    Args:
        path: file to write.
        run: its metrics.
        windows: of each layer type, as a function of the step; None for the windows in the metrics.

    Raises:
        ConfigError: the suffix is not .png, .svg or .pdf.
    """
    with saved_figure(path, 8, 5.2) as figure:
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[2.4, 1])
        top.plot(run.step, run.loss, color=COLORS[0], alpha=0.25, linewidth=1)
        top.plot(run.step, smooth(run.loss), color=COLORS[0], alpha=0.7, linewidth=1.2, label="training, smoothed")
        if len(run.validation_loss):
            last = f"validation, full context: {run.validation_loss[-1]:.3f} at the end"
            top.plot(run.validation_step, run.validation_loss, "o-", color=COLORS[1], markersize=4, label=last)
        top.set_title(run.name, loc="left", fontweight="bold")
        top.set_ylabel("loss (nats per token)")
        top.legend(loc="upper right")
        _zoom(top, [run])
        if windows:
            step = window_steps(int(run.step[-1]))
            stairs = {name: np.array([window(int(one)) for one in step]) for name, window in windows.items()}
            draw_windows(bottom, np.r_[step, run.step[-1]], {name: np.r_[one, one[-1]] for name, one in stairs.items()})
        else:
            draw_windows(bottom, run.step, run.windows)
        bottom.set(xlabel="step", xlim=(0, run.step[-1] * 1.01))
        plain_numbers(bottom.xaxis)


def compare_runs(path: Path, runs: Sequence[RunCurves]) -> None:
    """Plots several runs: loss against tokens, time and FLOPs, with the window below each.

    What no run has recorded, such as the time in means over runs, has no column.

    Raises:
        ConfigError: there is no run, or the suffix is not .png, .svg or .pdf.
    """
    if not runs:
        raise ConfigError("no runs to compare: pass at least one.")
    kinds = [kind for kind in UNITS if any(np.isfinite(getattr(run, kind)).any() for run in runs)]
    units = [unit(kind, max(getattr(run, kind)[-1] for run in runs)) for kind in kinds]
    with saved_figure(path, 12, 5.8) as figure:
        tops, bottoms = figure.subplots(
            2, len(kinds), sharex="col", sharey="row", squeeze=False, height_ratios=[2.6, 1]
        )
        for top, bottom, kind, (label, scale) in zip(tops, bottoms, kinds, units, strict=True):
            for color, run in zip(cycle(COLORS), runs):
                x = getattr(run, kind) / scale
                val = run.at_validation(kind) / scale
                top.plot(x, smooth(run.loss), color=color, linewidth=1, alpha=0.4)
                top.plot(val, run.validation_loss, "o-", color=color, markersize=4, linewidth=1.4, label=run.title)
                bottom.plot(x, run.window, color=color, drawstyle="steps-post")
                for window in run.layer_windows.values():
                    bottom.plot(x, window, color=color, drawstyle="steps-post", linestyle=(0, (4, 2)), linewidth=1)
            bottom.set(xlabel=label, xlim=(0, None))
        _zoom(tops[0], runs)
        every = (window for run in runs for window in (run.window, *run.layer_windows.values()))
        window_axis(bottoms[0], max(np.nanmax(window) for window in every))
        tops[0].set_ylabel("loss (nats per token)")
        legend = legend_above(figure, *tops[0].get_legend_handles_labels())
        legend.set_title("last validation loss at full context (faint lines: training loss)")


UNITS: dict[str, list[tuple[float, str]]] = {
    "tokens": [(1, "tokens"), (1e3, "thousand tokens"), (1e6, "million tokens"), (1e9, "billion tokens")],
    "seconds": [(1, "time (seconds)"), (60, "time (minutes)"), (3600, "time (hours)"), (86400, "time (days)")],
    "flops": [(10.0**power, f"compute ($10^{{{power}}}$ FLOPs)") for power in range(3, 31, 3)],
}
"""Columns of ``compare_runs``: the key, and its units from small to large."""


def unit(kind: str, largest: float) -> tuple[str, float]:
    """Returns the label and the size of the largest unit that is at most a third of ``largest``."""
    scale, label = next(((size, label) for size, label in reversed(UNITS[kind]) if largest >= 3 * size), UNITS[kind][0])
    return label, scale


def _zoom(axes: Axes, runs: Sequence[RunCurves]) -> None:
    limits = loss_range(runs)
    if limits is not None:
        axes.set_ylim(*limits)


def loss_range(runs: Sequence[RunCurves]) -> tuple[float, float] | None:
    """Returns the range of the losses after the first 4% of the steps, whose steep fall would flatten the rest.

    None if they have no range.
    """
    steps = np.concatenate([np.r_[run.step, run.validation_step] / run.step[-1] for run in runs])
    losses = np.concatenate([np.r_[run.loss, run.validation_loss] for run in runs])
    losses = losses[(steps > 0.04) & np.isfinite(losses)]
    if not len(losses) or losses.min() == losses.max():
        return None
    margin = 0.05 * float(losses.max() - losses.min())
    return float(losses.min()) - margin, float(losses.max()) + margin
