"""The progress of ``torchladder evaluate`` on the terminal, or in a log."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from torchladder.inference.evaluation.eval_jobs import Job
from torchladder.inference.evaluation.result_table import ResultRow


class EvalProgress:
    """Prints a line per result and shows a progress bar; in a log, a line every ``interval`` seconds instead of it.

    Args:
        unit: what the jobs count: tokens, or the requests of tasks.
    """

    def __init__(self, jobs: Sequence[Job], interval: float = 30.0, unit: str = "tokens") -> None:
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
        self._unit = unit
        self._task = self._bar.add_task("", total=self._remaining, rate="")
        self._start = self._last_log = time.monotonic()

    def __enter__(self) -> EvalProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def begin(self, job: Job) -> None:
        self._current = f"{job.trained.path.name} {Path(job.subject).name}, context {job.context:,}"
        self._bar.update(self._task, description=self._current)

    def advance(self, tokens: int) -> None:
        self._read += tokens
        self._remaining -= tokens
        self._bar.update(self._task, advance=tokens, rate=self._rate())
        if not self._console.is_terminal and time.monotonic() - self._last_log > self._interval:
            seconds = (time.monotonic() - self._start) * self._remaining / self._read
            self.log(f"{self._current}: {self._remaining:,} {self._unit} left, {self._rate()}, {seconds:.0f} s left")

    def skip(self, jobs: Sequence[Job]) -> None:
        tokens = sum(job.num_tokens for job in jobs)
        self._remaining -= tokens
        self._bar.update(self._task, advance=tokens)

    def end(self, job: Job, rows: Sequence[ResultRow]) -> None:
        name = f"{rows[0]['checkpoint']} {job.subject}, context {job.context:,}"
        self.log(f"{name}: {job.summary(rows)}, {self._rate()}")

    def log(self, line: str) -> None:
        self._last_log = time.monotonic()
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _rate(self) -> str:
        return f"{self._read / max(time.monotonic() - self._start, 1e-9):,.0f} {self._unit}/s"
