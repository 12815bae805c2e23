"""Compares runs: loss against tokens, time and FLOPs, with the window below, as one picture."""

from __future__ import annotations

import argparse
from pathlib import Path

from torchladder import plots


def run(argv: list[str]) -> int:
    """Draws the picture and prints a table of the runs."""
    parser = argparse.ArgumentParser(prog="torchladder report", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder (job.dump_folder)")
    parser.add_argument("--output", type=Path, default=Path("report.png"), help="picture to write (.png, .svg, .pdf)")
    arguments = parser.parse_args(argv)
    plots.report(arguments.runs, arguments.output)
    print(f"wrote {arguments.output}")
    return 0
