"""The schedule of a pipeline: what each rank computes, and when."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from torchladder.plots.style import COLORS, legend_above, saved_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KINDS = {
    "F": ("forward", COLORS[0]),
    "B": ("backward", COLORS[4]),
    "I": ("backward for inputs", COLORS[1]),
    "W": ("backward for weights", COLORS[2]),
}
"""Kind of a pass -> its name and color."""


class TimedPass(Protocol):
    """A pass of one stage over one micro-batch, from ``begin`` to ``end``."""

    @property
    def stage(self) -> int: ...
    @property
    def kind(self) -> str: ...
    @property
    def micro_batch(self) -> int: ...
    @property
    def begin(self) -> float: ...
    @property
    def end(self) -> float: ...


def plot_pipelines(path: Path, timelines: Mapping[str, Sequence[Sequence[TimedPass]]], degree: int) -> None:
    """Plots a panel for each timeline, title -> passes of each rank: a row per rank, a bar per pass.

    A bar has the number of its micro-batch; a rank's second stage is paler.
    """
    from matplotlib.patches import Patch

    longest = max(one.end for timeline in timelines.values() for passes in timeline for one in passes)
    kinds = {one.kind for timeline in timelines.values() for passes in timeline for one in passes}
    with saved_figure(path, 12, 0.7 + len(timelines) * (0.75 + 0.32 * degree)) as figure:
        panels = figure.subplots(len(timelines), 1, squeeze=False, sharex=True)[:, 0]
        for axes, (title, timeline) in zip(panels, timelines.items(), strict=True):
            _draw(axes, timeline, longest)
            axes.set_title(title, loc="left", fontweight="bold", pad=6)
        panels[-1].set_xlabel("time, in forward passes of a stage")
        shown = [Patch(color=color, label=name) for kind, (name, color) in KINDS.items() if kind in kinds]
        legend_above(figure, shown, [str(patch.get_label()) for patch in shown])


def _draw(axes: Axes, timeline: Sequence[Sequence[TimedPass]], longest: float) -> None:
    for rank, passes in enumerate(timeline):
        first = min((one.stage for one in passes), default=0)
        for one in passes:
            length, alpha = one.end - one.begin, 1.0 if one.stage == first else 0.55
            color = KINDS[one.kind][1]
            axes.barh(rank, length, left=one.begin, height=0.86, color=color, alpha=alpha, edgecolor="white")
            if longest / length < 130:  # the number fits
                axes.text(
                    one.begin + length / 2, rank, str(one.micro_batch), ha="center", va="center_baseline", fontsize=8
                )
    axes.set(xlim=(0, longest), ylim=(len(timeline) - 0.5, -0.5), yticks=range(len(timeline)))
    axes.set_yticklabels([f"rank {rank}" for rank in range(len(timeline))])
    axes.grid(False)
    axes.spines[:].set_visible(False)
