"""Progress of tokenizing, on a terminal and in a log."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn


class PrepareProgress:
    """A bar with tokens per second and time left on a terminal, a plain line now and then elsewhere.

    Args:
        name: what is tokenized.
        size: bytes there are to read.
        already: bytes of them that an earlier process has done.
        every: seconds between two plain lines.
    """

    def __init__(self, name: str, size: int, already: int = 0, every: float = 15.0) -> None:
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
        self._name, self._size, self._already, self._every = name, size, already, every
        self._documents = self._tokens = self._done = 0
        self._start = self._said = time.monotonic()
        self._task = self._bar.add_task(f"tokenizing {name}", total=size, completed=already, rate="")

    def __enter__(self) -> PrepareProgress:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._bar.stop()
        if kind is None:
            self.say(f"{self._line()}, {time.monotonic() - self._start:.1f} s")

    def add(self, documents: int, tokens: int, size: int) -> None:
        """Counts what has been done since the last call."""
        self._documents += documents
        self._tokens += tokens
        self._done += size
        self._bar.update(self._task, completed=self._already + self._done, rate=self._rate())
        if not self._console.is_terminal and time.monotonic() - self._said > self._every:
            missing = max(self._size - self._already - self._done, 0)
            left = (time.monotonic() - self._start) * missing / max(self._done, 1)
            self.say(f"{self._line()}, {1 - missing / max(self._size, 1):.0%}, {left:.0f} s left")

    def say(self, line: str) -> None:
        """Prints a line; a bar stays below it."""
        self._said = time.monotonic()
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _line(self) -> str:
        return f"tokenizing {self._name}: {self._documents:,} documents, {self._tokens:,} tokens, {self._rate()}"

    def _rate(self) -> str:
        return f"{self._tokens / max(time.monotonic() - self._start, 1e-9):,.0f} tokens/s"
