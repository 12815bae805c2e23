"""Plots of evaluations: loss over steps, and by position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from torchladder.plots.style import COLORS, legend_above, plain_numbers, saved_figure, short_names
from torchladder.registry import ConfigError

MIN_TOKENS = 256
"""Positions of fewer tokens are not drawn, unless a curve has no others: their loss is noise of tenths of a nat."""

Row = Mapping[str, Any]
"""A row of the table that ``torchladder evaluate`` writes."""


def plot_evaluations(path: Path, rows: Sequence[Row]) -> None:
    """Plots the loss on files over the steps of runs.

    Next to it stands the loss at the last step by position, or by distance from the document's start, if known.
    If there are more curves than colors, the files of a run and a context share one curve: their mean per token.

    Raises:
        ConfigError: no row has a loss, or the suffix is not .png, .svg or .pdf.
    """
    rows = [row for row in rows if row["loss"] is not None]
    if not rows:
        raise ConfigError(f"{path}: no loss to draw; evaluate at least one file first.")
    curves = _curves(rows, per_file=True)
    if len(curves) > len(COLORS):
        curves = _curves(rows, per_file=False)
    place = _place(rows[0])
    first, last = f"first_{place}", f"last_{place}"
    is_split = any(row[first] is not None for row in rows)
    with saved_figure(path, 12 if is_split else 8, 4.5) as figure:
        few_tokens = False
        over_steps, *over_positions = figure.subplots(1, 1 + is_split, squeeze=False)[0]
        for color, (label, curve) in zip(cycle(COLORS), curves.items()):
            whole = sorted((row["step"] or 0, row["loss"]) for row in curve if row[first] is None)
            if curve[0]["step"] is None and whole:  # a Hugging Face folder has one loss and no step
                over_steps.axhline(whole[0][1], color=color, linestyle=(0, (4, 3)), label=label)
            else:
                over_steps.plot(*zip(*whole, strict=True), "o-", color=color, markersize=4, label=label)
            last_step = max(row["step"] or 0 for row in curve)
            buckets = [row for row in curve if row[first] is not None and (row["step"] or 0) == last_step]
            shown = [row for row in buckets if row["tokens"] >= MIN_TOKENS] or buckets
            few_tokens |= len(shown) < len(buckets)
            for axes in over_positions:
                shown.sort(key=lambda row: row[last])
                tokens_read = [row[last] + 1 for row in shown]
                axes.plot(tokens_read, [row["loss"] for row in shown], "o-", color=color, markersize=4)
        over_steps.set(xlabel="step", ylabel="loss (nats per token)")
        plain_numbers(over_steps.xaxis)
        for axes in over_positions:
            axes.set_xscale("log", base=2)
            of_document = " in the document" if place == "distance" else ""
            axes.set(xlabel=f"tokens before the predicted one{of_document} (at most)", ylabel="loss (nats per token)")
            axes.set_title(f"by {place}, at the last step" + few_tokens * f" (points of {MIN_TOKENS} tokens or more)")
            plain_numbers(axes.xaxis)
        legend_above(figure, *over_steps.get_legend_handles_labels())


def _curves(rows: Sequence[Row], per_file: bool) -> dict[str, list[Row]]:
    """Returns label → rows: a curve per run and context, and per file or over the mean of all files."""
    runs = _run_names(rows)
    files = sorted({row["file"] for row in rows})
    names = [Path(file).name for file in files]
    # Files of the same name are labeled by their path.
    labels = {file: name if names.count(name) == 1 else file for file, name in zip(files, names, strict=True)}
    points: dict[str, dict[tuple[Any, ...], list[Row]]] = {}
    for row in rows:
        subject = labels[row["file"]] if per_file else f"{len(files)} files"
        label = f"{subject}, context {row['context']:,}"
        label = label if len(set(runs.values())) == 1 else f"{runs[row['checkpoint']]}: {label}"
        points.setdefault(label, {}).setdefault((row["step"], row[f"first_{_place(row)}"]), []).append(row)
    return {label: [_mean_row(point) for point in curve.values()] for label, curve in points.items()}


def _place(row: Row) -> str:
    return "distance" if "first_distance" in row else "position"


def _run_names(rows: Sequence[Row]) -> dict[str, str]:
    """Returns the name of the run of each checkpoint; averaged weights (ema) are a run beside it."""
    folders, weights = {}, {}
    for row in rows:
        path = Path(row["checkpoint"])
        weights[row["checkpoint"]] = "" if row["step"] is None else path.name.removeprefix(f"step-{row['step']}")
        folder = path if row["step"] is None else path.parent
        folders[row["checkpoint"]] = folder.parent if folder.name == "checkpoint" else folder
    names = short_names(list(folders.values()))
    return {one: name + weights[one] for one, name in zip(folders, names, strict=True)}


def _mean_row(rows: Sequence[Row]) -> Row:
    """Returns one row with the sum of the tokens and the mean loss per token."""
    tokens = sum(row["tokens"] for row in rows)
    return {**rows[0], "tokens": tokens, "loss": sum(row["loss"] * row["tokens"] for row in rows) / tokens}
