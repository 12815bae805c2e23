"""Compares runs: a plot of loss against tokens, time and FLOPs, and a table of their last values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from torchladder import plots
from torchladder.commands.arguments import CommandParser
from torchladder.metrics import METRICS_FILE, read_jsonl

EPILOG = """
example:
  torchladder report outputs/full outputs/ladder --output ladder.png
"""


def run(argv: list[str]) -> int:
    """Writes the plot and prints the table."""
    parser = CommandParser(prog="torchladder report", description=__doc__, epilog=EPILOG)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run (job.dump_folder), or its metrics.jsonl")
    add("--output", type=Path, default=Path("report.png"), help="plot to write (.png, .svg, .pdf)")
    arguments = parser.parse_args(argv)
    runs = read_runs(arguments.runs)
    plots.compare_runs(arguments.output, runs)
    table = Table("run", box=None, header_style="bold")
    for name in ("validation loss", "tokens", "minutes", "FLOPs"):
        table.add_column(name, justify="right")
    for curves in runs:
        table.add_row(
            curves.name,
            f"{curves.validation_loss[-1]:.3f}" if len(curves.validation_loss) else "",
            f"{curves.tokens[-1]:,.0f}",
            f"{curves.seconds[-1] / 60:.1f}",
            f"{curves.flops[-1]:.3e}",
        )
    Console().print(table)
    print(f"wrote {arguments.output}")
    return 0


def read_runs(paths: Sequence[Path]) -> list[plots.RunCurves]:
    """Reads the metrics of runs, each named after its folder, or by its path if two folders have the same name."""
    files = [path / METRICS_FILE if path.is_dir() else path for path in paths]
    folders = [file.resolve().parent for file in files]
    names = [folder.name for folder in folders]
    return [
        plots.RunCurves(folder.name if names.count(folder.name) == 1 else str(folder), read_jsonl(file))
        for file, folder in zip(files, folders, strict=True)
    ]
