"""Pictures: the ladder of a run, runs side by side, the ladder before a run, and masks as start lines.

Each function writes one file, PNG or SVG by its suffix. matplotlib is imported where a picture is drawn, so that a run
which draws none starts without it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from torchladder import mask
from torchladder.registry import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
"""Colours that stay apart for every kind of colour vision (Okabe and Ito, 2008)."""

INK = "#24292f"
FAINT = "#8c959f"
GRID = "#e6e8eb"

STYLE: dict[Any, Any] = {
    "font.size": 11,
    "font.family": "sans-serif",
    "axes.titlesize": 11,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "lines.solid_capstyle": "round",
    "svg.hashsalt": "torchladder",
}


# --- a run -----------------------------------------------------------------------------------------------------------


def ladder(path: Path, metrics_file: Path) -> None:
    """Draws a run: training and validation loss above, the window below, against the step.

    Raises:
        ConfigError: the file is not there or holds no training step, or the suffix is not one of a picture.
    """
    run = Curves.read(metrics_file)
    with _style():
        figure = _figure(8, 5.2)
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[2.4, 1])
        top.plot(run.step, run.loss, color=COLORS[0], alpha=0.25, linewidth=1)
        top.plot(run.step, smooth(run.loss), color=COLORS[0], alpha=0.7, linewidth=1.2, label="training")
        if len(run.validation_loss):
            last = f"validation, full context: {run.validation_loss[-1]:.3f} at the end"
            top.plot(run.validation_step, run.validation_loss, "o-", color=COLORS[1], markersize=4, label=last)
        top.set_ylabel("loss (nats per token)")
        top.legend(loc="upper right")
        _zoom(top, [run])
        _draw_window(bottom, run.step, run.window, COLORS[0])
        bottom.set(xlabel="step", xlim=(0, run.step[-1] * 1.01))
        _plain_numbers(bottom.xaxis)
        _save(figure, path)


def report(runs: Sequence[Path], path: Path) -> None:
    """Draws several runs: loss against tokens, time and FLOPs, with the window below each.

    Args:
        runs: folders of runs, or their metrics.jsonl; the legend shows a folder's name.
        path: the picture.

    Raises:
        ConfigError: as ``ladder``, or no run is given.
    """
    curves = read(runs)
    units = [_unit(kind, max(getattr(run, kind)[-1] for run in curves.values())) for kind in UNITS]
    with _style():
        figure = _figure(12, 5.8)
        tops, bottoms = figure.subplots(2, 3, sharex="col", sharey="row", height_ratios=[2.6, 1])
        for top, bottom, kind, (label, scale) in zip(tops, bottoms, UNITS, units, strict=True):
            for color, (name, run) in zip(cycle(COLORS), curves.items()):
                x = getattr(run, kind) / scale
                at = np.interp(run.validation_step, np.r_[0, run.step], np.r_[0, x])
                top.plot(x, smooth(run.loss), color=color, linewidth=1, alpha=0.4)
                top.plot(at, run.validation_loss, "o-", color=color, markersize=4, linewidth=1.4, label=run.title(name))
                bottom.plot(x, run.window, color=color, drawstyle="steps-post")
            bottom.set(xlabel=label, xlim=(0, None))
        _zoom(tops[0], list(curves.values()))
        _window_axis(bottoms[0], max(run.window.max() for run in curves.values()))
        tops[0].set_ylabel("loss (nats per token)")
        handles, labels = tops[0].get_legend_handles_labels()
        legend = figure.legend(handles, labels, loc="outside upper left", ncols=min(len(labels), 4))
        legend.set_title("validation loss at full context, the last one of each run (faint: training)")
        legend.set_alignment("left")
        _save(figure, path)


def plan(path: Path, steps: int, windows: Callable[[int], int], seq_len: int, masks: Sequence[str]) -> None:
    """Draws the ladder of a run before it: the window above, below what attention costs and saves.

    Args:
        path: the picture.
        steps: optimizer steps of the run.
        windows: the curriculum, ``(step) -> window``.
        seq_len: tokens in a row.
        masks: names of the masks; documents count as if each row were one, so they save more than is shown.
    """
    row = torch.arange(seq_len, dtype=torch.int32)[None]  # (1, T): positions of one document
    allowed = [mask.registry.get(name) for name in masks]
    step = np.unique(np.linspace(0, steps - 1, 2000).astype(int))
    window = np.array([windows(int(one)) for one in step])
    pairs = {one: mask.pairs(mask.compose(*(allow(row, int(one)) for allow in allowed))) for one in np.unique(window)}
    cost = np.array([100 * pairs[one] / mask.pairs(mask.causal(row, seq_len)) for one in window])
    with _style():
        figure = _figure(8, 4.8)
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[1.5, 1])
        _draw_window(top, step, window, COLORS[0])
        _window_axis(top, seq_len)
        top.axhline(seq_len, color=FAINT, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        top.annotate(f"full row, {seq_len:,}", (steps, seq_len), (0, 3), textcoords="offset points", ha="right")
        bottom.fill_between(step, cost, 100, color=COLORS[2], alpha=0.25, linewidth=0, step="post")
        bottom.fill_between(step, 0, cost, color=FAINT, alpha=0.25, linewidth=0, step="post")
        bottom.plot(step, cost, color=INK, linewidth=1.2, drawstyle="steps-post")
        saved = f"{100 - cost.mean():.0f}% of attention saved"
        bottom.text(0.01, 0.9, saved, transform=bottom.transAxes, va="top", color="#00664b")
        bottom.set(ylim=(0, 104), xlim=(0, steps), xlabel="step", ylabel="attention FLOPs\n(% of full causal)")
        _plain_numbers(bottom.xaxis)
        _save(figure, path)


def evaluations(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws the loss on files over the steps of runs, and beside it, where it is known, by position at their last step.

    Args:
        rows: of the table that ``torchladder evaluate`` writes.
        path: the picture.

    Raises:
        ConfigError: no row has a loss, or the suffix is not one of a picture.
    """
    rows = [row for row in rows if row["loss"] is not None]
    if not rows:
        raise ConfigError(f"{path}: there is no loss to draw.")
    curves: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        run = row["checkpoint"] if row["step"] is None else str(Path(row["checkpoint"]).parent)
        curves.setdefault((run, f"{Path(row['file']).name}, context {row['context']:,}"), []).append(row)
    runs = {run for run, _ in curves}
    by_position = any(row["first_position"] is not None for row in rows)
    with _style():
        figure = _figure(12 if by_position else 8, 4.5)
        steps, *places = figure.subplots(1, 1 + by_position, squeeze=False)[0]
        for color, ((run, name), found) in zip(cycle(COLORS), curves.items()):
            whole = sorted((row["step"] or 0, row["loss"]) for row in found if row["first_position"] is None)
            label = name if len(runs) == 1 else f"{run}: {name}"
            if found[0]["step"] is None and whole:
                steps.axhline(whole[0][1], color=color, linestyle=(0, (4, 3)), label=label)
            else:
                steps.plot(*zip(*whole, strict=True), "o-", color=color, markersize=4, label=label)
            last = max(row["step"] or 0 for row in found)
            parts = [row for row in found if row["first_position"] is not None and (row["step"] or 0) == last]
            parts.sort(key=lambda row: row["first_position"])
            for axes in places:
                seen = [row["last_position"] + 1 for row in parts]
                axes.plot(seen, [row["loss"] for row in parts], "o-", color=color, markersize=4)
        steps.set(xlabel="step", ylabel="loss (nats per token)")
        _plain_numbers(steps.xaxis)
        for axes in places:
            axes.set_xscale("log", base=2)
            axes.set(xlabel="tokens read before the predicted one (at most), at the last step")
            _plain_numbers(axes.xaxis)
        figure.legend(loc="outside upper left", ncols=2)
        _save(figure, path)


# --- masks -----------------------------------------------------------------------------------------------------------

DOCUMENTS = (7, 12, 5)
WINDOW = 6


def masks(path: Path) -> None:
    """Draws the four masks and two compositions as what each query sees, with ``start`` as a line."""
    positions = torch.cat([torch.arange(length) for length in DOCUMENTS]).to(torch.int32)[None]  # (1, T)
    document, chunk, sliding = (make(positions, WINDOW) for make in (mask.document, mask.chunk, mask.sliding))
    pictures = [
        ("causal", "start = 0", "row: query i\ncolumn: key", mask.causal(positions, WINDOW)),
        ("document", "start = i − position", "colour:\ndocument", document),
        ("chunk", "start = ⌊i / w⌋ · w", f"window\nw = {WINDOW}", chunk),
        ("sliding", "start = max(0, i − w + 1)", "line: start", sliding),
        ("document + chunk", "max(document, chunk)", "", mask.compose(document, chunk)),
        ("document + sliding", "max(document, sliding)", "", mask.compose(document, sliding)),
    ]
    with _style():
        figure = _figure(12, 2.75)
        for axes, (name, formula, note, start) in zip(figure.subplots(1, len(pictures)), pictures, strict=True):
            _draw_mask(axes, start)
            axes.set_title(name, fontweight="bold", pad=6)
            axes.set_xlabel(formula, fontsize=10, labelpad=5)
            axes.text(1, 0.98, note, transform=axes.transAxes, ha="right", va="top", fontsize=10, color="#57606a")
        _save(figure, path)


def _draw_mask(axes: Axes, start: torch.Tensor) -> None:
    """Draws what each query (row) sees: keys in the colour of their document, and the line of starts."""
    from matplotlib.collections import PolyCollection

    length = start.shape[-1]
    seen = mask.dense(start)[0].numpy()
    document = np.repeat(np.arange(len(DOCUMENTS)), DOCUMENTS)
    cells = [(query, key) for query in range(length) for key in range(query + 1)]
    colors = [COLORS[document[key]] if seen[query, key] else GRID for query, key in cells]
    corners = np.array([[0.06, 0.06], [0.94, 0.06], [0.94, 0.94], [0.06, 0.94]])
    axes.add_collection(PolyCollection(corners + np.array(cells)[:, None, ::-1], facecolors=colors))
    edge = np.r_[start[0].numpy(), start[0, -1].numpy()]
    axes.step(edge, np.arange(length + 1), where="pre", color=INK, linewidth=1.8)
    axes.set(xlim=(-0.6, length + 0.2), ylim=(length + 0.2, -0.6), aspect="equal", xticks=[], yticks=[])
    axes.grid(False)
    axes.spines[:].set_visible(False)


# --- what a run left -------------------------------------------------------------------------------------------------


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


# --- drawing ---------------------------------------------------------------------------------------------------------


def _style() -> Any:
    import matplotlib

    return matplotlib.rc_context(STYLE)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=200, layout="constrained", facecolor="white")


def _draw_window(axes: Axes, step: np.ndarray, window: np.ndarray, color: str) -> None:
    axes.plot(step, window, color=color, linewidth=1.6, drawstyle="steps-post")
    axes.fill_between(step, 0, window, color=color, alpha=0.12, linewidth=0, step="post")
    _window_axis(axes, window.max())


def _window_axis(axes: Axes, longest: float) -> None:
    """Ticks at quarters of the longest window, which are powers of two where it is one."""
    axes.set(ylabel="window (tokens)", ylim=(0, longest * 1.14), yticks=np.linspace(0, longest, 5))
    _plain_numbers(axes.yaxis)


UNITS: dict[str, list[tuple[float, str]]] = {
    "tokens": [(1, "tokens"), (1e3, "thousand tokens"), (1e6, "million tokens"), (1e9, "billion tokens")],
    "seconds": [(1, "time (seconds)"), (60, "time (minutes)"), (3600, "time (hours)"), (86400, "time (days)")],
    "flops": [(10.0**power, f"compute ($10^{{{power}}}$ FLOPs)") for power in range(3, 31, 3)],
}
"""What the columns of a report show: the key, and its units from small to large."""


def _unit(kind: str, largest: float) -> tuple[str, float]:
    """Returns label and size of the unit in which the largest value is a handy number."""
    scale, label = next(((size, label) for size, label in reversed(UNITS[kind]) if largest >= 3 * size), UNITS[kind][0])
    return label, scale


def _zoom(axes: Axes, runs: Sequence[Curves]) -> None:
    """Leaves the fall of the first few steps above the frame, where it would flatten all the rest."""
    losses = np.concatenate([np.r_[run.loss, run.validation_loss] for run in runs])
    losses = losses[np.isfinite(losses)]
    if len(losses) >= 50:
        low, high = losses.min(), np.quantile(losses, 0.96)
        axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))


def _plain_numbers(axis: Axis) -> None:
    from matplotlib.ticker import StrMethodFormatter

    axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def check(path: Path) -> None:
    """Raises ConfigError for a name that no picture can have."""
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"{path}: a picture ends in .png, .svg or .pdf.")


def _save(figure: Figure, path: Path) -> None:
    check(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
