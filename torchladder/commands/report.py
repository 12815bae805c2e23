"""Compares runs: loss against tokens, time and FLOPs, with the window below, as one picture."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from torchladder import plots


def run(argv: list[str]) -> int:
    """Draws the picture and prints a table of the runs."""
    parser = argparse.ArgumentParser(prog="torchladder report", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder (job.dump_folder)")
    parser.add_argument("--output", type=Path, default=Path("report.png"), help="picture to write (.png, .svg, .pdf)")
    arguments = parser.parse_args(argv)
    plots.report(arguments.runs, arguments.output)
    table = Table("run", "validation loss", "tokens", "minutes", "FLOPs", box=None, header_style="bold")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, curves in plots.read(arguments.runs).items():
        table.add_row(
            name,
            f"{curves.validation_loss[-1]:.3f}" if len(curves.validation_loss) else "",
            f"{curves.tokens[-1]:,.0f}",
            f"{curves.seconds[-1] / 60:.1f}",
            f"{curves.flops[-1]:.3e}",
        )
    Console().print(table)
    print(f"wrote {arguments.output}")
    return 0
