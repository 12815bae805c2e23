"""Compares runs: a table of their last values, and curves as a plot or as one HTML page that opens offline."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from torchladder import plots
from torchladder.commands.arguments import CommandParser
from torchladder.config.toml_files import NESTED, read_settings
from torchladder.metrics import METRICS_FILE, read_jsonl
from torchladder.registry import ConfigError

EPILOG = """
examples:
  torchladder report outputs/full outputs/ladder --html report.html
  torchladder report outputs/full outputs/ladder --output ladder.png

The first run is what the others are compared with. A page needs: pip install 'torchladder[report]'
"""

COLUMNS = ("validation loss", "difference", "tokens", "minutes", "time saved", "FLOPs", "FLOPs saved", "kWh", "kg CO2")
"""What the printed table has of the values that a page shows."""


def run(argv: list[str]) -> int:
    """Writes the plot or the page, and prints the table."""
    parser = CommandParser(prog="torchladder report", description=__doc__, epilog=EPILOG)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run (job.dump_folder), or its metrics.jsonl")
    add("--html", type=Path, metavar="FILE", help="page to write (.html)")
    add("--output", type=Path, metavar="FILE", help="plot to write (.png, .svg, .pdf; default: report.png, or --html)")
    arguments = parser.parse_args(argv)
    plot = arguments.output or (None if arguments.html else Path("report.png"))
    if plot:
        plots.check_plot_path(plot)
    if arguments.html:
        plots.check_page_path(arguments.html)
    runs = read_runs(arguments.runs)
    _print_table(runs)
    if plot:
        plots.compare_runs(plot, [run.curves for run in runs])
        print(f"wrote {plot}")
    if arguments.html:
        plots.write_report_page(arguments.html, runs)
        print(f"wrote {arguments.html}")
    return 0


def read_runs(paths: Sequence[Path]) -> list[plots.ReportedRun]:
    """Reads runs, each named after the last parts of its path that tell it apart.

    Args:
        paths: folders of runs, or files of metrics; settings of a file that is not metrics.jsonl are those of a .toml
            file beside it of the same name.

    Raises:
        ConfigError: a file is missing, has no training step, or is given twice.
    """
    files = [(path / METRICS_FILE if path.is_dir() else path).resolve() for path in paths]
    for number, file in enumerate(files):
        if file in files[:number]:
            raise ConfigError(f"{paths[number]}: the run is given twice.")
    names = plots.short_names([file.parent if file.name == METRICS_FILE else file.with_suffix("") for file in files])
    runs = []
    for file, name in zip(files, names, strict=True):
        in_folder = file.name == METRICS_FILE
        settings = _read_settings(file.with_name("config.toml") if in_folder else file.with_suffix(".toml"))
        samples = _read_samples(file.with_name("samples.txt")) if in_folder else []
        runs.append(plots.ReportedRun(plots.RunCurves(name, read_jsonl(file)), settings, samples))
    return runs


def _read_settings(path: Path) -> dict[str, Any]:
    """Returns the settings as ``section.key`` -> value; none if there is no file."""
    if not path.is_file():
        return {}
    settings: dict[str, Any] = {}
    for name, section in read_settings(path)[0].items():
        for key, value in section.items() if isinstance(section, dict) else [("", section)]:
            inner = value.items() if name in NESTED and isinstance(value, dict) else [("", value)]
            settings |= {f"{name}.{key}.{last}".rstrip("."): one for last, one in inner}
    return settings


def _read_samples(path: Path) -> list[tuple[int, str]]:
    """Returns step and text of each sample; none if there is no file."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    _, *parts = re.split(r"(?m)^--- step (\d+)\n", text)
    return [(int(step), sample.rstrip("\n")) for step, sample in zip(parts[::2], parts[1::2], strict=True)]


def _print_table(runs: Sequence[plots.ReportedRun]) -> None:
    table = Table(box=None, header_style="bold", pad_edge=False, collapse_padding=True)
    table.add_column("run", overflow="fold")
    rows = [plots.finals(run, runs[0]) for run in runs]
    columns = [name for name in COLUMNS if any(row[name] for row in rows)]
    for name in columns:
        # Numbers are whole; a long name, of which the end tells most, is folded.
        table.add_column("\n".join(name.split(" ", 1)), justify="right", no_wrap=True)
    for run, row in zip(runs, rows, strict=True):
        table.add_row(Text(run.name), *(row[name] for name in columns))
    Console(width=None if Console().is_terminal else 500).print(table)  # a file does not limit the width of lines
