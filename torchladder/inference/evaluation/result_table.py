"""Results as CSV or JSON Lines: several processes may append to one file, and a killed one leaves it valid."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from torchladder.registry import ConfigError, require, unknown_name

ResultRow = dict[str, Any]
"""A row of the table: a value or None for each of ``COLUMNS``."""

COLUMNS: dict[str, type] = {
    "time": str,
    "checkpoint": str,
    "step": int,
    "file": str,
    "context": int,
    "stride": int,
    "dtype": str,
    "first_position": int,
    "last_position": int,
    "tokens": int,
    "loss": float,
    "perplexity": float,
    "total_loss": float,
    "documents": int,
    "bytes": int,
    "bits_per_byte": float,
    "fingerprint": str,
}

RowKey = tuple[str, int | None]
"""Identifies a row: the fingerprint of the evaluation and the first position, None for all positions."""


def row_key(row: ResultRow) -> RowKey:
    """Returns the key of a row."""
    return row["fingerprint"], row["first_position"]


class ResultTable:
    """A file of rows; its suffix is the format.

    Args:
        path: a .csv or .jsonl; created with its folder if it does not exist.

    Raises:
        ConfigError: another suffix, or a file that cannot be written or has other content.
    """

    def __init__(self, path: Path) -> None:
        require(path.suffix in FORMATS, f"{path}: a table of results must end in {' or '.join(FORMATS)}.")
        self.path = path
        self._format = FORMATS[path.suffix]
        self.rows()  # checks the file

    def rows(self) -> list[ResultRow]:
        """Returns all complete rows.

        Raises:
            ConfigError: the file has a line that is not a row.
        """
        with self._open() as file:
            return self._read(file)[0]

    def add(self, rows: Sequence[ResultRow]) -> None:
        """Appends the rows that the file lacks: all or none, and synced to disk.

        Raises:
            ConfigError: the file cannot be written.
        """
        with self._open() as file:
            existing, end = self._read(file)
            known = set(map(row_key, existing))
            file.truncate(end)  # an incomplete line is of a killed process: others wait for the lock
            try:
                missing = [row for row in rows if row_key(row) not in known]
                remaining = memoryview(self._format.write(missing, end == 0))
                while remaining:
                    remaining = remaining[file.write(remaining) :]
                os.fsync(file.fileno())
            except OSError:
                file.truncate(end)
                raise

    @contextmanager
    def _open(self) -> Iterator[FileIO]:
        """Opens the file under an exclusive lock."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a+b", buffering=0) as file:
                fcntl.flock(file, fcntl.LOCK_EX)  # released when the file closes, even if the process dies
                yield file
        except OSError as error:
            raise ConfigError(
                f"{self.path} cannot be written: {error.strerror}. Choose another file with --output."
            ) from error

    def _read(self, file: FileIO) -> tuple[list[ResultRow], int]:
        """Returns the rows, and the bytes of all complete lines."""
        file.seek(0)
        content, prefix = file.read(), self._format.prefix
        end = content.rfind(b"\n") + 1
        try:
            require(end > 0 or content[: len(prefix)] == prefix[: len(content)], "its only line is incomplete.")
            return self._format.parse(content[:end].decode()), end
        except (ValueError, csv.Error) as error:
            raise ConfigError(
                f"{self.path} is not a table of evaluations: {error} Choose another file with --output."
            ) from None


def _to_csv(rows: Sequence[ResultRow], with_header: bool) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if with_header:
        writer.writerow(COLUMNS)
    writer.writerows([row[name] for name in COLUMNS] for row in rows)  # floats with all digits
    return text.getvalue().encode()


def _from_csv(text: str) -> list[ResultRow]:
    lines = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    if lines:
        _check_columns(lines[0], 1)
    for number, line in enumerate(lines, start=1):
        require(len(line) == len(COLUMNS), f"line {number} has {len(line)} values, not {len(COLUMNS)}.")
    return [
        {name: kind(value) if value else None for (name, kind), value in zip(COLUMNS.items(), line, strict=True)}
        for line in lines[1:]
    ]


def _to_jsonl(rows: Sequence[ResultRow], _: bool) -> bytes:
    def encode(value: Any) -> Any:
        return None if isinstance(value, float) and not math.isfinite(value) else value  # JSON has no NaN or infinity

    lines = ({name: encode(row[name]) for name in COLUMNS} for row in rows)
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()


def _from_jsonl(text: str) -> list[ResultRow]:
    rows = [json.loads(line) for line in text.split("\n")[:-1]]
    for number, row in enumerate(rows, start=1):
        require(isinstance(row, dict), f"line {number} is not an object.")
        _check_columns(list(row), number)
    return rows


def _check_columns(names: Sequence[str], line: int) -> None:
    for name in names:
        if name not in COLUMNS:
            raise ConfigError(f"line {line}: {unknown_name('column', name, COLUMNS)}")
    require(list(names) == list(COLUMNS), f"line {line} has the columns {', '.join(names)}, not {', '.join(COLUMNS)}.")


@dataclass(frozen=True)
class TableFormat:
    """A file format: ``write(rows, with_header)``, ``parse(text)``, and the first bytes of every file."""

    write: Callable[[Sequence[ResultRow], bool], bytes]
    parse: Callable[[str], list[ResultRow]]
    prefix: bytes


FORMATS = {
    ".csv": TableFormat(_to_csv, _from_csv, _to_csv([], True)),
    ".jsonl": TableFormat(_to_jsonl, _from_jsonl, b'{"time": "'),
}
"""Formats by suffix."""
