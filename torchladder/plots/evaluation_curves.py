"""Pictures of evaluations: loss on files over steps, and by position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from torchladder.plots.style import COLORS, figure, plain_numbers, save, style
from torchladder.registry import ConfigError

Row = Mapping[str, Any]


def evaluations(rows: Sequence[Row], path: Path) -> None:
    """Draws the loss on files over the steps of runs, and beside it, where it is known, by position at their last step.

    More curves than there are colours become one for all files of a run and a context.

    Args:
        rows: of the table that ``torchladder evaluate`` writes.
        path: the picture.

    Raises:
        ConfigError: no row has a loss, or the suffix is not one of a picture.
    """
    rows = [row for row in rows if row["loss"] is not None]
    if not rows:
        raise ConfigError(f"{path}: there is no loss to draw.")
    curves = _curves(rows, each=True)
    if len(curves) > len(COLORS):
        curves = _curves(rows, each=False)
    by_position = any(row["first_position"] is not None for row in rows)
    with style():
        canvas = figure(12 if by_position else 8, 4.5)
        steps, *places = canvas.subplots(1, 1 + by_position, squeeze=False)[0]
        for color, (label, found) in zip(cycle(COLORS), curves.items()):
            whole = sorted((row["step"] or 0, row["loss"]) for row in found if row["first_position"] is None)
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
        plain_numbers(steps.xaxis)
        for axes in places:
            axes.set_xscale("log", base=2)
            axes.set(xlabel="tokens read before the predicted one (at most), at the last step")
            plain_numbers(axes.xaxis)
        canvas.legend(loc="outside upper left", ncols=2)
        save(canvas, path)


def _curves(rows: Sequence[Row], each: bool) -> dict[str, list[Row]]:
    """Returns label → rows: a curve for each file of a run at a context, or one for all of its files together."""
    runs = {_run(row) for row in rows}
    files = sorted({row["file"] for row in rows})
    names = [Path(file).name for file in files]
    # The whole path where two files have one name.
    called = {file: name if names.count(name) == 1 else file for file, name in zip(files, names, strict=True)}
    points: dict[str, dict[tuple[Any, ...], list[Row]]] = {}
    for row in rows:
        what = called[row["file"]] if each else f"{len(files)} files"
        label = f"{what}, context {row['context']:,}"
        label = label if len(runs) == 1 else f"{_run(row)}: {label}"
        points.setdefault(label, {}).setdefault((row["step"], row["first_position"]), []).append(row)
    return {label: [_together(some) for some in found.values()] for label, found in points.items()}


def _run(row: Row) -> str:
    return str(row["checkpoint"] if row["step"] is None else Path(row["checkpoint"]).parent)


def _together(rows: Sequence[Row]) -> Row:
    """Returns the row of all tokens of some rows."""
    tokens = sum(row["tokens"] for row in rows)
    return {**rows[0], "tokens": tokens, "loss": sum(row["loss"] * row["tokens"] for row in rows) / tokens}
