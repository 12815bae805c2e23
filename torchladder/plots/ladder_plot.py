"""Plot of the windows of a run before it, and of the attention that they save."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from torchladder import mask
from torchladder.plots.style import (
    COLORS,
    FAINT,
    INK,
    draw_windows,
    plain_numbers,
    saved_figure,
    window_axis,
    window_steps,
)


@dataclass(frozen=True)
class Ladder:
    """The layers of one type: their number, the names of their masks, and their curriculum."""

    layer_type: str
    layers: int
    masks: Sequence[str]
    windows: Callable[[int], int]


def plot_curriculum(
    path: Path,
    steps: int,
    ladders: Sequence[Ladder],
    seq_len: int,
    full_context_step: int | None = None,
    saved: float | None = None,
) -> None:
    """Plots a curriculum before the run: the windows above, the cost and the saving of attention below.

    Args:
        path: file to write.
        steps: optimizer steps of the run.
        ladders: of each layer type, one in most models. Each row counts as one document, so document masks save more
            than is shown.
        seq_len: tokens in a row.
        full_context_step: the step from which the window stays the whole row, to be marked.
        saved: the fraction of all FLOPs that the windows save, to be said.
    """
    row = torch.arange(seq_len, dtype=torch.int32)[None]  # (1, T): positions of one document
    step = window_steps(steps)
    windows, attended = {}, np.zeros(len(step))
    for ladder in ladders:
        window = windows[ladder.layer_type] = np.array([ladder.windows(int(one)) for one in step])
        pairs = {one: mask.pairs(mask.from_names(ladder.masks, row, int(one))) for one in np.unique(window)}
        attended += ladder.layers * np.array([pairs[one] for one in window])
    layers = sum(ladder.layers for ladder in ladders)
    cost = 100 * attended / (layers * mask.pairs(mask.causal(row, seq_len)))
    with saved_figure(path, 8, 4.8) as figure:
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[1.5, 1])
        draw_windows(top, step, windows)
        window_axis(top, seq_len)
        top.axhline(seq_len, color=FAINT, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        text = f"full row, {seq_len:,}" + (f", from step {full_context_step:,}" if full_context_step else "")
        top.annotate(text, (steps, seq_len), (0, 3), textcoords="offset points", ha="right")
        bottom.fill_between(step, cost, 100, color=COLORS[2], alpha=0.25, linewidth=0, step="post")
        bottom.fill_between(step, 0, cost, color=FAINT, alpha=0.25, linewidth=0, step="post")
        bottom.plot(step, cost, color=INK, linewidth=1.2, drawstyle="steps-post")
        if full_context_step:
            for axes, height in ((top, seq_len), (bottom, 100)):
                axes.vlines(full_context_step, 0, height, color=FAINT, linewidth=1, linestyle=(0, (1, 2)))
        text = f"{100 - cost.mean():.0f}% of attention saved"
        text += "" if saved is None else f", {saved:.1%} of all FLOPs"
        bottom.text(0.01, 0.9, text, transform=bottom.transAxes, va="top", color="#00664b")
        bottom.set(ylim=(0, 104), xlim=(0, steps), xlabel="step", ylabel="attention FLOPs\n(% of full causal)")
        plain_numbers(bottom.xaxis)
