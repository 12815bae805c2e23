"""Pictures of masks: what each query sees, with ``start`` as a line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from torchladder import mask
from torchladder.plots.style import COLORS, GRID, INK, figure, save, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DOCUMENTS = (7, 12, 5)
WINDOW = 6


def masks(path: Path) -> None:
    """Draws the four masks and two compositions as what each query sees, with ``start`` as a line."""
    positions = torch.cat([torch.arange(length) for length in DOCUMENTS]).to(torch.int32)[None]  # (1, T)
    pictures = [
        (["causal"], "start = 0", "row: query i\ncolumn: key"),
        (["document"], "start = i − position", "colour:\ndocument"),
        (["chunk"], "start = ⌊i / w⌋ · w", f"window\nw = {WINDOW}"),
        (["sliding"], "start = max(0, i − w + 1)", "line: start"),
        (["document", "chunk"], "max(document, chunk)", ""),
        (["document", "sliding"], "max(document, sliding)", ""),
    ]
    with style():
        canvas = figure(12, 2.75)
        for axes, (names, formula, note) in zip(canvas.subplots(1, len(pictures)), pictures, strict=True):
            _draw_mask(axes, mask.from_names(names, positions, WINDOW))
            axes.set_title(" + ".join(names), fontweight="bold", pad=6)
            axes.set_xlabel(formula, fontsize=10, labelpad=5)
            axes.text(1, 0.98, note, transform=axes.transAxes, ha="right", va="top", fontsize=10, color="#57606a")
        save(canvas, path)


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
