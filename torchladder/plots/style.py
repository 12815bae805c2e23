"""How all pictures look, and how they become files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

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


def style() -> Any:
    """Returns a context in which figures look like all others."""
    import matplotlib

    return matplotlib.rc_context(STYLE)


def figure(width: float, height: float) -> Figure:
    """Returns an empty figure of so many inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=200, layout="constrained", facecolor="white")


def draw_window(axes: Axes, step: np.ndarray, window: np.ndarray, color: str) -> None:
    """Draws the window of each step, with its axis."""
    axes.plot(step, window, color=color, linewidth=1.6, drawstyle="steps-post")
    axes.fill_between(step, 0, window, color=color, alpha=0.12, linewidth=0, step="post")
    window_axis(axes, window.max())


def window_axis(axes: Axes, longest: float) -> None:
    """Ticks at quarters of the longest window, which are powers of two where it is one."""
    axes.set(ylabel="window (tokens)", ylim=(0, longest * 1.14), yticks=np.linspace(0, longest, 5))
    plain_numbers(axes.yaxis)


def plain_numbers(axis: Axis) -> None:
    """Writes numbers out, with commas."""
    from matplotlib.ticker import StrMethodFormatter

    axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def check(path: Path) -> None:
    """Raises ConfigError for a name that no picture can have."""
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"{path}: a picture ends in .png, .svg or .pdf.")


def save(figure: Figure, path: Path) -> None:
    """Writes a figure to a file.

    Raises:
        ConfigError: the suffix is not one of a picture.
    """
    check(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
