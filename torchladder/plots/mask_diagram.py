"""Diagram of the attention masks: the keys each query attends to, with ``start`` as a line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from torchladder import mask
from torchladder.plots.style import COLORS, GRID, INK, saved_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DOCUMENT_TOKENS = (7, 12, 5)
WINDOW = 6
SLIDING_WINDOW = 4


def plot_masks(path: Path) -> None:
    """Plots the four masks and two compositions."""
    positions = torch.cat([torch.arange(length) for length in DOCUMENT_TOKENS]).to(torch.int32)[None]  # (1, T)
    document, chunk, sliding = (make(positions, WINDOW) for make in (mask.document, mask.chunk, mask.sliding))
    diagrams = [
        ("causal", "start = 0", mask.causal(positions, WINDOW)),
        ("document", "start = i − position", document),
        ("chunk", "start = ⌊i / w⌋ · w", chunk),
        ("sliding", "start = max(0, i − w + 1)", sliding),
        ("document + chunk", "max(document, chunk)", mask.compose(document, chunk)),
        ("document + sliding", "max(document, sliding)", mask.compose(document, sliding)),
    ]
    with saved_figure(path, 12, 2.95) as figure:
        for axes, (name, formula, start) in zip(figure.subplots(1, len(diagrams)), diagrams, strict=True):
            _draw_mask(axes, start)
            axes.set_title(name, fontweight="bold", pad=6)
            axes.set_xlabel(formula, fontsize=10, labelpad=5)
        _caption(figure, f"    window: w = {WINDOW}")


def plot_layer_masks(path: Path) -> None:
    """Plots the masks of a 5:1 model at three steps: the full layer climbs, the sliding ones keep their window."""
    positions = torch.cat([torch.arange(length) for length in DOCUMENT_TOKENS]).to(torch.int32)[None]  # (1, T)
    document, length = mask.document(positions, 0), positions.shape[1]
    sliding = mask.compose(document, mask.sliding(positions, SLIDING_WINDOW))
    with saved_figure(path, 12, 6.6) as figure:
        rows: Any = figure.subplots(3, 6)
        for row, when, window in zip(rows, ("first step", "halfway", "last step"), (3, 8, length), strict=True):
            full = mask.compose(document, mask.chunk(positions, window))
            for axes, start in zip(row, [sliding] * 5 + [full], strict=True):
                _draw_mask(axes, start)
            row[0].set_ylabel(when, fontsize=11, fontweight="bold")
            row[-1].set_xlabel(f"document, chunk of {window}", fontsize=10)
        for number, axes in enumerate(rows[0]):
            axes.set_title(f"{number}: {'sliding' if number < 5 else 'full'}_attention", fontsize=10, pad=6)
        rows[-1][2].set_xlabel(f"document and sliding, window {SLIDING_WINDOW} at every step", fontsize=10)
        _caption(figure)


def _caption(figure: Figure, window: str = "") -> None:
    """Says once what rows, columns, colors and lines are."""
    text = f"row: query i    column: key    color: document    line: start, the first key attended to{window}"
    figure.supxlabel(text, fontsize=10, color="#57606a")


def _draw_mask(axes: Axes, start: torch.Tensor) -> None:
    """Draws a cell per (query, key) pair, colored if attended, and ``start`` (1, T) as a line."""
    from matplotlib.collections import PolyCollection

    length = start.shape[-1]
    seen = mask.dense(start)[0].numpy()
    document = np.repeat(np.arange(len(DOCUMENT_TOKENS)), DOCUMENT_TOKENS)
    cells = [(query, key) for query in range(length) for key in range(query + 1)]
    colors = [COLORS[document[key]] if seen[query, key] else GRID for query, key in cells]
    corners = np.array([[0.06, 0.06], [0.94, 0.06], [0.94, 0.94], [0.06, 0.94]])
    axes.add_collection(PolyCollection(corners + np.array(cells)[:, None, ::-1], facecolors=colors))
    edge = np.r_[start[0].numpy(), start[0, -1].numpy()]
    axes.step(edge, np.arange(length + 1), where="pre", color=INK, linewidth=1.8)
    axes.set(xlim=(-0.6, length + 0.2), ylim=(length + 0.2, -0.6), aspect="equal", xticks=[], yticks=[])
    axes.grid(False)
    axes.spines[:].set_visible(False)
