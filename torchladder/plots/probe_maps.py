"""Heat maps of long-context probes: accuracy by depth or distance and by context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from torchladder.plots.style import INK, saved_figure
from torchladder.registry import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

Row = Mapping[str, Any]
"""A row of the table that ``torchladder evaluate --probes`` writes."""


def plot_probes(path: Path, rows: Sequence[Row]) -> None:
    """Plots the accuracy of probes by context: a line of maps for each run, at its last step, one for each probe.

    Contexts beyond the rows in training are right of a line.

    Raises:
        ConfigError: there is no row, or the suffix is not .png, .svg or .pdf.
    """
    if not rows:
        raise ConfigError(f"{path}: no probe to draw; measure at least one first.")
    models: dict[str, dict[str, list[Row]]] = {}
    for row in sorted(rows, key=lambda row: row["step"] or 0):
        folder = str(Path(row["checkpoint"]).parent) if row["step"] is not None else row["checkpoint"]
        latest = models.setdefault(folder, {})
        if any(other["step"] != row["step"] for others in latest.values() for other in others[:1]):
            latest.clear()
        latest.setdefault(row["probe"], []).append(row)
    names = list(dict.fromkeys(row["probe"] for row in rows))
    with saved_figure(path, 1 + 4.2 * len(names), 0.8 + 3.6 * len(models)) as figure:
        panels = figure.subplots(len(models), len(names), squeeze=False)
        for line, latest in zip(panels, models.values(), strict=True):
            for axes, name in zip(line, names, strict=True):
                if name in latest:
                    image = _draw_map(axes, latest[name])
                    axes.set_title(f"{name}: {latest[name][0]['checkpoint']}" if len(models) > 1 else name)
                else:
                    axes.set_axis_off()
        figure.colorbar(image, ax=panels, label="accuracy", shrink=0.8)


def _draw_map(axes: Axes, rows: Sequence[Row]) -> AxesImage:
    """Draws one map: contexts from left to right, depths from the start of the row down, distances from short down."""
    key = "distance" if rows[0]["depth"] is None else "depth"
    contexts, places = (sorted({row[name] for row in rows}) for name in ("context", key))
    accuracy = np.full((len(places), len(contexts)), np.nan)
    for row in rows:
        accuracy[places.index(row[key]), contexts.index(row["context"])] = row["accuracy"]
    image = axes.imshow(accuracy, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    for (y, x), value in np.ndenumerate(accuracy):
        if np.isfinite(value):
            axes.text(x, y, f"{value:.0%}", ha="center", va="center", fontsize=7, color=INK if value > 0.6 else "white")
    seen = sum(context <= rows[0]["max_seq_len"] for context in contexts)
    if seen < len(contexts):
        axes.axvline(seen - 0.5, color="#D55E00", linewidth=2)
    axes.grid(visible=False)
    axes.set_xticks(range(len(contexts)), [f"{context:,}" for context in contexts])
    axes.set_yticks(range(len(places)), [f"{place:.0%}" if key == "depth" else f"{place:,}" for place in places])
    axes.set(xlabel="context (tokens)", ylabel=key if key == "depth" else "distance (tokens)")
    return image
