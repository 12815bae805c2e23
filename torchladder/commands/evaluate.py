"""Measures loss and perplexity on files, over all checkpoints of runs that have not been evaluated yet."""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import get_args

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table as Lines
from rich.text import Text

from torchladder import plots
from torchladder.data.text.document_reader import OnError
from torchladder.inference import evaluation
from torchladder.inference.evaluation import (
    EvalJob,
    EvalSlices,
    EvalWeights,
    ResultTable,
    Row,
    UnreadableWeightsError,
    label,
)
from torchladder.registry import ConfigError

EPILOG = """
Files: .txt .md .py are one document each; .jsonl one a line; .csv and .parquet one a row; each also as .gz .zst .bz2;
.bin and .parquet of tokens as they are. What the output holds already is not evaluated again. Exit code 1: a
checkpoint is damaged, and the others are evaluated.

  torchladder evaluate outputs/run --files val/en.jsonl val/de.jsonl
  torchladder evaluate outputs/run models/mine --files val --context 512 2048 --stride 256 --output results.csv
"""


def run(argv: list[str]) -> int:
    """Evaluates; returns 1 when a checkpoint is damaged, 130 when it was interrupted."""
    arguments = _parser().parse_args(argv)
    for context in arguments.context or []:
        EvalSlices(context, _stride(arguments, context))
    if arguments.batch_tokens < 1:
        raise ConfigError(f"--batch-tokens {arguments.batch_tokens}: must be 1 or more.")
    if arguments.plot:
        plots.check_picture_path(arguments.plot)
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is what is meant
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        print("interrupted; the same command continues where it was", file=sys.stderr)
        return 130


def _run(arguments: argparse.Namespace) -> int:
    files = evaluation.EvalFiles(
        evaluation.expand_paths(arguments.files), arguments.text_key, arguments.on_error, arguments.bos
    )
    found: list[EvalWeights] = []
    damaged: list[UnreadableWeightsError] = []
    for path in dict.fromkeys(arguments.models):
        intact, broken = evaluation.find(path, max(arguments.context or [0]) or None)
        found += intact
        damaged += broken
    tables = {path: ResultTable(path) for path in dict.fromkeys(_output(arguments, weights) for weights in found)}
    jobs = [
        EvalJob(weights, file, windows, arguments.dtype, arguments.by_position, tables[_output(arguments, weights)])
        for weights in found
        for file in files.of(weights)
        for windows in _windows(arguments, weights)
    ]
    damaged += _evaluate(jobs, arguments.batch_tokens)
    rows = evaluation.finished_rows(jobs)
    if damaged and not rows:
        raise ConfigError(str(damaged[0]))
    for error in damaged:
        print(f"warning: {error}", file=sys.stderr)
    _print([row for row in rows if row["first_position"] is None])
    print(f"details: {', '.join(map(str, tables))}")
    if arguments.plot:
        plots.plot_evaluations(arguments.plot, rows)
        print(f"wrote {arguments.plot}")
    return 1 if damaged else 0


def _output(arguments: argparse.Namespace, weights: EvalWeights) -> Path:
    return arguments.output or weights.home / "evaluation.csv"


def _stride(arguments: argparse.Namespace, context: int) -> int:
    return context if arguments.stride is None else arguments.stride


def _windows(arguments: argparse.Namespace, weights: EvalWeights) -> list[EvalSlices]:
    contexts = arguments.context or [min(weights.trained, weights.config.training.seq_len)]
    return [EvalSlices(context, _stride(arguments, context)) for context in dict.fromkeys(contexts)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="torchladder evaluate",
        description=__doc__,
        epilog=EPILOG,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "models", nargs="+", type=Path, metavar="MODEL", help="a run's folder, a .../step-N, or a Hugging Face folder"
    )
    parser.add_argument("--files", nargs="+", required=True, metavar="PATH", help="files, folders or globs to read")
    parser.add_argument(
        "--context", nargs="+", type=int, metavar="N", help="tokens read at once, at most (default: a row of the run)"
    )
    parser.add_argument(
        "--stride", type=int, metavar="N", help="tokens from one window of a document to the next (default: context)"
    )
    parser.add_argument("--by-position", action="store_true", help="also say what tokens cost by what is before them")
    parser.add_argument(
        "--batch-tokens", type=int, default=16384, metavar="N", help="read side by side (default: 16384)"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights")
    parser.add_argument("--text-key", metavar="KEY", help="key or column of the text (default: as in the run)")
    parser.add_argument(
        "--on-error",
        choices=get_args(OnError),
        default="error",
        help="a document that cannot be read: end with its file and line (default), skip it, or skip it unless it only "
        "has bytes that are not UTF-8, which are left out",
    )
    parser.add_argument(
        "--bos",
        action=argparse.BooleanOptionalAction,
        help="begin each document of text with the tokenizer's bos (default: as in the run)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help=".csv or .jsonl to add to (default: evaluation.csv in the folder of the run or of the Hugging Face model)",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw the results (.png, .svg, .pdf)")
    return parser


def _evaluate(jobs: Sequence[EvalJob], batch_tokens: int) -> list[UnreadableWeightsError]:
    """Evaluates what has not been yet; returns which weights could not be."""
    left, damaged = evaluation.unfinished(jobs), []
    with _Report(left) as report:
        if len(left) < len(jobs):
            report.say(f"{len(jobs) - len(left)} of {len(jobs)} evaluations are done already")
        for line in _remarks(left):
            report.say(line)
        for weights, group in groupby(left, key=lambda job: job.weights):
            some = list(group)
            try:
                restored = weights.load(max(job.windows.context for job in some), getattr(torch, some[0].dtype))
            except UnreadableWeightsError as error:
                damaged.append(error)
                report.skip(some)
                continue
            for job in some:
                if not evaluation.unfinished([job]):  # another process has done it meanwhile
                    report.skip([job])
                    continue
                report.begin(job)
                try:
                    rows = job.rows(evaluation.score(restored, job, batch_tokens, report.add))
                except torch.OutOfMemoryError:
                    raise ConfigError(
                        f"--batch-tokens {batch_tokens} and a context of {job.windows.context} need more memory than "
                        f"{restored.device} has: fewer of either, or --dtype bfloat16."
                    ) from None
                job.table.add(rows)
                report.end(rows[0])
            del restored  # before the next one: memory holds one model
    return damaged


def _remarks(jobs: Sequence[EvalJob]) -> list[str]:
    """Returns what is unusual about jobs, once for all that it holds for."""
    lines = []
    for job in jobs:
        if job.windows.context > job.weights.trained:
            lines.append(
                f"context {job.windows.context:,}: longer than the rows of the training ({job.weights.trained:,}); "
                "positions go on"
            )
        if not job.tokens:
            lines.append(f"warning: {label(job.documents.path)} has no token to predict: its loss stays empty")
    return list(dict.fromkeys(lines))


class _Report:
    """A bar with tokens per second and the time left, on a terminal; a line for each evaluation, and in a log now and
    then one in between.

    Args:
        jobs: what there is to do.
        every: seconds between two lines in a log.
    """

    def __init__(self, jobs: Sequence[EvalJob], every: float = 30.0) -> None:
        self._console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._left, self._read, self._every = sum(job.tokens for job in jobs), 0, every
        self._task = self._bar.add_task("", total=self._left, rate="")
        self._start = self._said = time.monotonic()

    def __enter__(self) -> _Report:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def begin(self, job: EvalJob) -> None:
        self._doing = f"{job.weights.path.name} {job.documents.path.name}, context {job.windows.context:,}"
        self._bar.update(self._task, description=self._doing)

    def add(self, tokens: int) -> None:
        """Counts tokens that have been read."""
        self._read += tokens
        self._left -= tokens
        self._bar.update(self._task, advance=tokens, rate=self._rate())
        if not self._console.is_terminal and time.monotonic() - self._said > self._every:
            left = (time.monotonic() - self._start) * self._left / self._read
            self.say(f"{self._doing}: {self._left:,} tokens to go, {self._rate()}, {left:.0f} s left")

    def skip(self, jobs: Sequence[EvalJob]) -> None:
        tokens = sum(job.tokens for job in jobs)
        self._left -= tokens
        self._bar.update(self._task, advance=tokens)

    def end(self, row: Row) -> None:
        found = "no token" if row["loss"] is None else f"loss {row['loss']:.4f}, perplexity {row['perplexity']:,.2f}"
        where = f"{row['checkpoint']} {row['file']}, context {row['context']:,}"
        self.say(f"{where}: {found}, {row['tokens']:,} tokens, {self._rate()}")

    def say(self, line: str) -> None:
        """Prints a line; a bar stays below it."""
        self._said = time.monotonic()
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _rate(self) -> str:
        return f"{self._read / max(time.monotonic() - self._start, 1e-9):,.0f} tokens/s"


def _print(rows: Sequence[Row]) -> None:
    """Prints a table of results."""
    table = Lines("checkpoint", "file", "context", "tokens", "loss", "perplexity", "bits/byte", box=None)
    for column in table.columns[:2]:
        column.overflow = "fold"  # a path ends with what tells it from others
    for column in table.columns[2:]:
        column.justify = "right"
    for row in rows:
        figures = [_number(row[name], form) for name, form in FIGURES.items()]
        table.add_row(Text(row["checkpoint"]), Text(row["file"]), *figures)
    console = Console()
    # Into a file whole: nobody there can make the terminal wider.
    Console(width=None if console.is_terminal else 500).print(table)


FIGURES = {"context": ",", "tokens": ",", "loss": ".4f", "perplexity": ",.2f", "bits_per_byte": ".4f"}
"""Columns of numbers in the printed table, and how they look there."""


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
