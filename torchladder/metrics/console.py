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
        begin = Text.assemble((f"[{clock}] ", "dim"), rank)
        fields: list[Text] = getattr(record, "fields", [])
        message = level + self.format(record)
        if console.is_terminal and "\n" not in message:  # a log file has one line per message
            pieces = fields or [Text(word, style) for word in message.split(" ")]
            line = wrap(begin, pieces, "  " if fields else " ", console.width)
        else:
            line = Text.assemble(begin, Text("  ").join(fields) if fields else Text(message, style))
        with suppress(OSError):  # a log on a full disk does not end the run
            console.print(line, soft_wrap=True)


def wrap(begin: Text, pieces: list[Text], separator: str, width: int) -> Text:
    """Returns ``begin`` and the pieces on as many lines as it takes; breaks only between pieces, and indents."""
    text, indent = begin.copy(), len(begin)
    column = indent
    for number, piece in enumerate(pieces):
        if column + len(separator) + len(piece) > width and column > indent:
            text.append("\n" + " " * indent)
            column = indent
        elif number:
            text.append(separator)
            column += len(separator)
        text.append_text(piece)
        column += len(piece)
    return text
