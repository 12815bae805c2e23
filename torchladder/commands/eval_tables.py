"""The tables that ``torchladder evaluate`` prints."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from torchladder.inference.evaluation.result_table import ResultRow

NUMBER_FORMATS = {"context": ",", "tokens": ",", "loss": ".4f", "perplexity": ",.2f", "bits_per_byte": ".4f"}
"""Columns with numbers in the printed table -> format."""


def print_losses(rows: Sequence[ResultRow]) -> None:
    """Prints the loss on each file."""
    table = Table(box=None)
    for name in ("checkpoint", "file"):
        table.add_column(name, overflow="fold")  # the end of a path distinguishes it
    for name in NUMBER_FORMATS:
        table.add_column(name.replace("bits_per_byte", "bits/byte"), justify="right")
    for row in rows:
        figures = ["" if row[name] is None else format(row[name], spec) for name, spec in NUMBER_FORMATS.items()]
        table.add_row(Text(row["checkpoint"]), Text(row["file"]), *figures)
    _print(table)


def print_tasks(rows: Sequence[ResultRow]) -> None:
    """Prints each metric of each task with its standard error."""
    table = Table(box=None)
    for name in ("checkpoint", "task"):
        table.add_column(name, overflow="fold")
    for name in ("metric", "filter"):
        table.add_column(name)
    for name in ("documents", "shots", "value", "stderr"):
        table.add_column(name, justify="right")
    for row in rows:
        texts = [Text(row[name]) for name in ("checkpoint", "task", "metric", "filter")]
        counts = ["" if row[name] is None else f"{row[name]:,}" for name in ("documents", "num_fewshot")]
        figures = ["" if row[name] is None else f"{row[name]:.4f}" for name in ("value", "stderr")]
        table.add_row(*texts, *counts, *figures)
    _print(table)


def print_probe(title: str, rows: Sequence[ResultRow]) -> None:
    """Prints accuracy and loss by depth or distance (down) and context (across), then the mean first loss."""
    by_depth = rows[0]["depth"] is not None
    contexts = {row["context"]: row["context"] <= row["max_seq_len"] for row in rows}
    table = Table(box=None, title=Text(title), title_justify="left", title_style="bold")
    table.add_column("depth" if by_depth else "distance", justify="right")
    for context, trained in contexts.items():
        table.add_column(f"{context:,}" if trained else f"{context:,} (extrapolation)", justify="right")
    cells: dict[float, dict[int, str]] = {}
    for row in rows:
        place = row["depth"] if by_depth else row["distance"]
        cells.setdefault(place, {})[row["context"]] = f"{row['accuracy']:.1%}  loss {row['loss']:.3f}"
    for place in sorted(cells):
        label = f"{place:.0%}" if by_depth else f"{place:,}"
        table.add_row(label, *(cells[place].get(context, "") for context in contexts))
    first = [[row["first_loss"] for row in rows if row["context"] == context] for context in contexts]
    table.add_row("first occurrence", *(f"loss {sum(losses) / len(losses):.3f}" for losses in first))
    _print(table)


def _print(table: Table) -> None:
    # A file does not limit the width of lines.
    Console(width=None if Console().is_terminal else 500).print(table)
