"""Measures loss and perplexity on files for all checkpoints of runs; finished evaluations are skipped."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from torchladder import plots
from torchladder.commands.arguments import (
    CommandParser,
    add_on_error_option,
    add_weight_options,
    check_positive,
    weights_from_args,
)
from torchladder.inference.evaluation import eval_jobs
from torchladder.inference.evaluation.eval_files import EvalFiles, expand_paths
from torchladder.inference.evaluation.eval_jobs import EvalJob, path_label
from torchladder.inference.evaluation.eval_slices import EvalSlices
from torchladder.inference.evaluation.result_table import ResultRow, ResultTable
from torchladder.inference.trained_model import TrainedModel, UnreadableCheckpointError
from torchladder.models.attention.sdpa import SdpaKernel
from torchladder.registry import ConfigError

EPILOG = """
examples:
  torchladder evaluate outputs/run --files val/en.jsonl val/de.jsonl
      evaluates all checkpoints of the run and adds the results to outputs/run/evaluation.csv
  torchladder evaluate outputs/run models/exported --files val --context 512 2048 --stride 256 --output results.csv

files: .txt, .md and .py are one document each, .jsonl and .json have one per line, .csv and .parquet one per row; each
may be compressed (.gz, .zst, .bz2, .xz). Token files are .bin (with .idx beside it) or .parquet.

exit code: 1 if a checkpoint is damaged; the others are evaluated anyway.
"""

NUMBER_FORMATS = {"context": ",", "tokens": ",", "loss": ".4f", "perplexity": ",.2f", "bits_per_byte": ".4f"}
"""Columns with numbers in the printed table -> format."""


def run(argv: list[str]) -> int:
    """Evaluates; returns 1 if a checkpoint is damaged and 130 after Ctrl-C."""
    parser = CommandParser(prog="torchladder evaluate", description=__doc__, epilog=EPILOG)
    add = parser.add_argument
    add("models", nargs="+", type=Path, metavar="MODEL", help="run folder, checkpoint step-N, or Hugging Face folder")
    add("--files", nargs="+", required=True, metavar="PATH", help="files, folders or globs to evaluate on")
    add("--context", nargs="+", type=int, metavar="N", help="maximum tokens read at once (default: training.seq_len)")
    add("--stride", type=int, metavar="N", help="tokens from one slice of a document to the next (default: --context)")
    add("--by-position", action="store_true", help="also report loss by position")
    add("--batch-tokens", type=int, default=16384, metavar="N", help="tokens per batch (default: %(default)s)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights (default: %(default)s)")
    add_weight_options(parser)
    add("--text-key", metavar="KEY", help="key or column of the text (default: as in the run)")
    add_on_error_option(parser)
    add("--bos", action=argparse.BooleanOptionalAction, help="begin documents with bos (default: as in the run)")
    text = "refuse tokens that another tokenizer has written (default: as in the run)"
    add("--check-tokenizer", action=argparse.BooleanOptionalAction, help=text)
    text = "fraction of a text's tokens that may be unknown (default: as in the run)"
    add("--max-unknown-fraction", type=float, metavar="F", help=text)
    add("--output", type=Path, metavar="FILE", help=".csv or .jsonl to add to (default: evaluation.csv in MODEL's run)")
    add("--plot", type=Path, metavar="FILE", help="also plot the results (.png, .svg, .pdf)")
    arguments = parser.parse_args(argv)
    _slices(arguments.context or [], arguments.stride)  # refuses invalid ones before anything is read
    check_positive(arguments, "batch_tokens")
    if arguments.plot:
        plots.check_plot_path(arguments.plot)
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to continue", file=sys.stderr)
        return 130


def _run(arguments: argparse.Namespace) -> int:
    keys = ("text_key", "on_error", "bos", "check_tokenizer", "max_unknown_fraction")
    files = EvalFiles(expand_paths(arguments.files), **{key: getattr(arguments, key) for key in keys})
    choice = weights_from_args(arguments)
    models: list[TrainedModel] = []
    errors: list[UnreadableCheckpointError] = []
    for path in dict.fromkeys(arguments.models):
        readable, unreadable = TrainedModel.find_all(path, max(arguments.context or [0]) or None, choice)
        models += readable
        errors += unreadable
    outputs = [arguments.output or trained.run_folder / "evaluation.csv" for trained in models]
    tables = {path: ResultTable(path) for path in dict.fromkeys(outputs)}
    jobs: list[EvalJob] = []
    for trained, output in zip(models, outputs, strict=True):
        contexts = arguments.context or [min(trained.max_seq_len, trained.config.training.seq_len)]
        options = arguments.dtype, arguments.by_position, tables[output]
        for documents in files.open_for(trained):
            jobs += [EvalJob(trained, documents, slices, *options) for slices in _slices(contexts, arguments.stride)]
    errors += _evaluate(jobs, arguments.batch_tokens)
    rows = eval_jobs.finished_rows(jobs)
    if errors and not rows:
        raise errors[0]
    for error in errors:
        print(f"warning: skipped a checkpoint: {error}", file=sys.stderr)
    _print_table([row for row in rows if row["first_position"] is None])
    print(f"details: {', '.join(map(str, tables))}")
    if arguments.plot:
        plots.plot_evaluations(arguments.plot, rows)
        print(f"wrote {arguments.plot}")
    return 1 if errors else 0


def _slices(contexts: Sequence[int], stride: int | None) -> list[EvalSlices]:
    return [EvalSlices(context, context if stride is None else stride) for context in dict.fromkeys(contexts)]


def _evaluate(jobs: Sequence[EvalJob], batch_tokens: int) -> list[UnreadableCheckpointError]:
    """Runs the unfinished jobs; returns the errors of unreadable checkpoints."""
    remaining, errors = eval_jobs.unfinished(jobs), []
    with _EvalProgress(remaining) as progress:
        if len(remaining) < len(jobs):
            progress.log(f"{len(jobs) - len(remaining)} of {len(jobs)} evaluations are already finished")
        for line in _warnings(remaining):
            progress.log(line)
        for trained, group in groupby(remaining, key=lambda job: job.trained):
            model_jobs = list(group)
            try:
                trained.verify()
                max_context = max(job.slices.context for job in model_jobs)
                loaded = trained.load(SdpaKernel.attention, max_context, getattr(torch, model_jobs[0].dtype))
            except UnreadableCheckpointError as error:
                errors.append(error)
                progress.skip(model_jobs)
                continue
            for job in model_jobs:
                if not eval_jobs.unfinished([job]):  # another process has finished it in the meantime
                    progress.skip([job])
                    continue
                progress.begin(job)
                try:
                    losses = eval_jobs.compute_losses(loaded, job, batch_tokens, progress.advance)
                except torch.OutOfMemoryError:
                    raise ConfigError(
                        f"--batch-tokens {batch_tokens} and a context of {job.slices.context} need more memory than "
                        f"{loaded.device} has. Reduce one of them, or use --dtype bfloat16."
                    ) from None
                rows = job.rows(losses)
                job.table.add(rows)
                progress.end(rows[0])
            del loaded  # so that memory holds one model at a time
    return errors


def _warnings(jobs: Sequence[EvalJob]) -> list[str]:
    lines = []
    for job in jobs:
        if job.slices.context > job.trained.max_seq_len:
            lines.append(
                f"context {job.slices.context:,}: longer than the rows in training ({job.trained.max_seq_len:,}); "
                "the model has not seen the positions beyond"
            )
        if not job.documents.corpus.tokenizer_known:
            lines.append(f"{path_label(job.documents.path)}: its tokenizer is unknown and cannot be verified")
        if not job.num_tokens:
            lines.append(f"warning: {path_label(job.documents.path)} has no token to predict: its loss stays empty")
    return list(dict.fromkeys(lines))


class _EvalProgress:
    """Prints a line per result and shows a progress bar; in a log, a line every ``interval`` seconds instead of it."""

    def __init__(self, jobs: Sequence[EvalJob], interval: float = 30.0) -> None:
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
        self._remaining, self._read, self._interval = sum(job.num_tokens for job in jobs), 0, interval
        self._task = self._bar.add_task("", total=self._remaining, rate="")
        self._start = self._last_log = time.monotonic()

    def __enter__(self) -> _EvalProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def begin(self, job: EvalJob) -> None:
        self._current = f"{job.trained.path.name} {job.documents.path.name}, context {job.slices.context:,}"
        self._bar.update(self._task, description=self._current)

    def advance(self, tokens: int) -> None:
        self._read += tokens
        self._remaining -= tokens
        self._bar.update(self._task, advance=tokens, rate=self._rate())
        if not self._console.is_terminal and time.monotonic() - self._last_log > self._interval:
            seconds = (time.monotonic() - self._start) * self._remaining / self._read
            self.log(f"{self._current}: {self._remaining:,} tokens left, {self._rate()}, {seconds:.0f} s left")

    def skip(self, jobs: Sequence[EvalJob]) -> None:
        tokens = sum(job.num_tokens for job in jobs)
        self._remaining -= tokens
        self._bar.update(self._task, advance=tokens)

    def end(self, row: ResultRow) -> None:
        result = "no token" if row["loss"] is None else f"loss {row['loss']:.4f}, perplexity {row['perplexity']:,.2f}"
        name = f"{row['checkpoint']} {row['file']}, context {row['context']:,}"
        self.log(f"{name}: {result}, {row['tokens']:,} tokens, {self._rate()}")

    def log(self, line: str) -> None:
        self._last_log = time.monotonic()
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _rate(self) -> str:
        return f"{self._read / max(time.monotonic() - self._start, 1e-9):,.0f} tokens/s"


def _print_table(rows: Sequence[ResultRow]) -> None:
    table = Table(box=None)
    for name in ("checkpoint", "file"):
        table.add_column(name, overflow="fold")  # the end of a path distinguishes it
    for name in NUMBER_FORMATS:
        table.add_column(name.replace("bits_per_byte", "bits/byte"), justify="right")
    for row in rows:
        figures = ["" if row[name] is None else format(row[name], spec) for name, spec in NUMBER_FORMATS.items()]
        table.add_row(Text(row["checkpoint"]), Text(row["file"]), *figures)
    # A file does not limit the width of lines.
    Console(width=None if Console().is_terminal else 500).print(table)
