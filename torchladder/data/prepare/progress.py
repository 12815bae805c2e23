"""Progress of tokenizing: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from torchladder.data.prepare.text_counts import TextCounts


class PrepareProgress:
    """Shows tokens per second and the time left: a bar on a terminal, otherwise a line every ``interval`` seconds.

    Args:
        name: what is tokenized.
        total_bytes: bytes of the input.
        done_bytes: bytes of the input that an earlier run has tokenized.
        interval: seconds between two plain lines.

    Attributes:
        counts: of all texts since the start.
    """

    def __init__(self, name: str, total_bytes: int, done_bytes: int = 0, interval: float = 15.0) -> None:
        self._console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._name, self._total, self._skipped, self._interval = name, total_bytes, done_bytes, interval
        self._documents = self._tokens = self._bytes = 0
        self.counts = TextCounts()
        self._start = self._last_line = time.monotonic()
        self._task = self._bar.add_task(f"tokenizing {name}", total=total_bytes, completed=done_bytes, rate="")

    def __enter__(self) -> PrepareProgress:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._bar.stop()
        if kind is None:
            self.print(f"{self._line()}, {time.monotonic() - self._start:.1f} s")

    @property
    def done(self) -> float:
        """The fraction of the input that has been tokenized since the start."""
        return min(self._bytes / max(self._total - self._skipped, 1), 1.0)

    def update(self, documents: int, tokens: int, num_bytes: int, counts: TextCounts) -> None:
        """Adds what has been tokenized since the last call."""
        self._documents += documents
        self._tokens += tokens
        self._bytes += num_bytes
        self.counts += counts
        self._bar.update(self._task, completed=self._skipped + self._bytes, rate=self._rate())
        if not self._console.is_terminal and time.monotonic() - self._last_line > self._interval:
            missing = max(self._total - self._skipped - self._bytes, 0)
            left = (time.monotonic() - self._start) * missing / max(self._bytes, 1)
            self.print(f"{self._line()}, {1 - missing / max(self._total, 1):.0%}, {left:.0f} s left")

    def print(self, line: str) -> None:
        """Prints a line above the bar."""
        self._last_line = time.monotonic()
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _line(self) -> str:
        return f"tokenizing {self._name}: {self._documents:,} documents, {self._tokens:,} tokens, {self._rate()}"

    def _rate(self) -> str:
        rate = f"{self._tokens / max(time.monotonic() - self._start, 1e-9):,.0f} tokens/s"
        return f"{rate}, {self.counts.describe()}" if self._tokens else rate
