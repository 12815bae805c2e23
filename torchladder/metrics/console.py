"""The console that the log, the reports and the progress bar share."""

from __future__ import annotations

import logging
import time
from contextlib import suppress

from rich.console import Console
from rich.text import Text

console = Console(highlight=False, markup=False, emoji=False)
"""Prints above the progress bar; print through this console, or lines break the bar."""


def init_logger(rank: int = 0) -> None:
    """Logs this package to the console: INFO and above on rank 0, WARNING and above on other ranks."""
    package = logging.getLogger("torchladder")
    package.handlers = [handler for handler in package.handlers if not isinstance(handler, ConsoleHandler)]
    package.addHandler(ConsoleHandler(rank))
    package.setLevel(logging.INFO if rank == 0 else logging.WARNING)


class ConsoleHandler(logging.Handler):
    """Prints log records as ``[time] [rank N] level: message``, rank and level only where they matter."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def emit(self, record: logging.LogRecord) -> None:
        # A log file is read on another day and needs the date; a terminal does not.
        time_format = "%H:%M:%S" if console.is_terminal else "%Y-%m-%d %H:%M:%S"
        clock = time.strftime(time_format, time.localtime(record.created))
        rank = f"[rank {self.rank}] " if self.rank else ""
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        style = "bold red" if record.levelno >= logging.ERROR else "yellow" if level else ""
        message = getattr(record, "styled", None) or Text(level + self.format(record), style)
        with suppress(OSError):  # a log on a full disk does not end the run
            console.print(Text.assemble((f"[{clock}] ", "dim"), rank, message), soft_wrap=True)
