"""The console of a run: one place to print, for the log, the reports and the progress bar."""

from __future__ import annotations

import logging
import time

from rich.console import Console
from rich.text import Text

console = Console(highlight=False, markup=False, emoji=False)
"""Where a run speaks. Everything goes through this one, so that lines appear above the progress bar, not inside it."""


def init_logger(rank: int = 0) -> None:
    """Sends this package's log to the console: all of it from rank 0, from other ranks only what went wrong."""
    package = logging.getLogger("torchladder")
    package.handlers = [handler for handler in package.handlers if not isinstance(handler, _Handler)]
    package.addHandler(_Handler(rank))
    package.setLevel(logging.INFO if rank == 0 else logging.WARNING)


class _Handler(logging.Handler):
    """Prints records: the time, the rank where it is not the first, the message."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def emit(self, record: logging.LogRecord) -> None:
        # People at a terminal know the day; a log file is read later.
        clock = time.strftime(
            "%H:%M:%S" if console.is_terminal else "%Y-%m-%d %H:%M:%S", time.localtime(record.created)
        )
        rank = f"[rank {self.rank}] " if self.rank else ""
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        style = "bold red" if record.levelno >= logging.ERROR else "yellow" if level else ""
        message = getattr(record, "styled", None) or Text(level + self.format(record), style)
        console.print(Text.assemble((f"[{clock}] ", "dim"), rank, message), soft_wrap=True)
