"""The style of all plots, and writing them to files."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from torchladder.disk_errors import naming_path
from torchladder.registry import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.legend import Legend

COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
"""Colors that remain distinct under every kind of color vision (Okabe and Ito, 2008)."""

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


@contextmanager
def saved_figure(path: Path, width: float, height: float) -> Iterator[Figure]:
    """Yields an empty figure, width and height in inches, and writes it to ``path`` at the end.

    Raises:
        ConfigError: the suffix is not .png, .svg or .pdf.
    """
    import matplotlib
    from matplotlib.figure import Figure

    check_plot_path(path)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), dpi=200, layout="constrained", facecolor="white")
        yield figure
        path.parent.mkdir(parents=True, exist_ok=True)
        with naming_path(path):
            figure.savefig(path)


def draw_windows(axes: Axes, step: np.ndarray, windows: Mapping[str, np.ndarray]) -> None:
    """Plots the window of each step, by layer type; with a legend if there are several."""
    for color, (layer_type, window) in zip(cycle(COLORS), windows.items()):
        axes.plot(step, window, color=color, linewidth=1.6, drawstyle="steps-post", label=layer_type)
        axes.fill_between(step, 0, window, color=color, alpha=0.12, linewidth=0, step="post")
    window_axis(axes, max(np.nanmax(window) for window in windows.values()))
    if len(windows) > 1:
        axes.legend(loc="center right")


def legend_above(figure: Figure, handles: Sequence[Any], labels: Sequence[str]) -> Legend:
    """Adds a legend above the plots, with as many columns as fit; a label longer than the figure is broken."""
    width = figure.get_size_inches()[0]
    labels = [textwrap.fill(label, int((width - 1) * LETTERS_PER_INCH)) for label in labels]
    longest = max((len(line) for label in labels for line in label.splitlines()), default=0)
    ncols = max(1, min(len(labels), int(width / (longest / LETTERS_PER_INCH + 0.7))))
    return figure.legend(handles, labels, loc="outside upper left", ncols=ncols, alignment="left")


LETTERS_PER_INCH = 11
"""Letters of a legend that surely fit in an inch."""


def window_steps(steps: int) -> np.ndarray:
    """Returns the steps at which the windows of a run are drawn: all of them, or 2,000 from the first to the last."""
    return np.unique(np.linspace(0, steps - 1, 2000).astype(int))


def window_axis(axes: Axes, longest: float) -> None:
    """Sets ticks at quarters of the longest window: powers of two if it is one."""
    axes.set(ylabel="window (tokens)", ylim=(0, longest * 1.14), yticks=np.linspace(0, longest, 5))
    plain_numbers(axes.yaxis)


def plain_numbers(axis: Axis) -> None:
    """Formats ticks with thousands separators; those that matplotlib chooses are integers."""
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    axis.set_major_formatter(StrMethodFormatter("{x:,.10g}"))
    locator = axis.get_major_locator()
    if isinstance(locator, MaxNLocator):
        locator.set_params(integer=True)


def check_plot_path(path: Path) -> None:
    """Raises ConfigError if the suffix is not .png, .svg or .pdf."""
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"{path}: unknown image format: the file name must end in .png, .svg or .pdf.")


def short_names(paths: Sequence[Path]) -> list[str]:
    """Returns the last parts of each path, as many as tell it apart from the other paths.

    Example: ``a/full/run``, ``a/ladder/run`` and ``a/other`` are ``full/run``, ``ladder/run`` and ``other``.
    """

    def name(path: Path) -> str:
        others = {other.parts for other in paths if other != path}
        lengths = range(1, len(path.parts) + 1)
        endings = (path.parts[-length:] for length in lengths)
        return str(Path(*next((end for end in endings if all(one[-len(end) :] != end for one in others)), path.parts)))

    return [name(path) for path in paths]
