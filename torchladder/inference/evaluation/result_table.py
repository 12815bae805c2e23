"""Results as CSV or JSON Lines: several processes may append to one file, and a killed one leaves it valid."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import filelock

from torchladder.registry import ConfigError, require, unknown_name

ResultRow = dict[str, Any]
"""A row of a table: a value or None for each of its columns."""

RowKey = tuple[Any, ...]
"""The values of a table's key columns, which identify a row."""


class TableSchema(NamedTuple):
    """The columns of a table.

    Attributes:
        content: what errors call the rows.
        columns: name -> type, in order; "time" comes first.
        key: names of the columns that identify a row.
    """

    content: str
    columns: dict[str, type]
    key: tuple[str, ...]


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

EVALUATIONS = TableSchema("evaluations", COLUMNS, ("fingerprint", "first_position"))
"""Losses on files; the first position is None for all positions."""

DISTANCES = TableSchema(
    "losses by distance",
    {name.replace("_position", "_distance"): kind for name, kind in COLUMNS.items()},
    ("fingerprint", "first_distance"),
)
"""Losses on files; the first distance from the document's start is None for all distances."""


class ResultTable:
    """A file of rows; its suffix is the format.

    Args:
        path: a .csv or .jsonl; created with its folder if it does not exist.
        schema: its columns.

    Raises:
        ConfigError: another suffix, or a file that cannot be written or has other content.
    """

    def __init__(self, path: Path, schema: TableSchema = EVALUATIONS) -> None:
        require(path.suffix in FORMATS, f"{path}: a table of results must end in {' or '.join(FORMATS)}.")
        self.path, self.schema = path, schema
        self._format = FORMATS[path.suffix](schema.columns)
        self.rows()  # checks the file

    def key(self, row: ResultRow) -> RowKey:
        """Returns the key of a row."""
        return tuple(row[name] for name in self.schema.key)

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
            known = set(map(self.key, existing))
            file.truncate(end)  # an incomplete line is of a killed process: others wait for the lock
            try:
                missing = [row for row in rows if self.key(row) not in known]
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
                filelock.lock_descriptor(file.fileno())  # released when the file closes, even if the process dies
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
                f"{self.path} is not a table of {self.schema.content}: {error} Choose another file with --output."
            ) from None


class _CsvFormat:
    def __init__(self, columns: dict[str, type]) -> None:
        self.columns = columns
        self.prefix = self.write([], True)

    def write(self, rows: Sequence[ResultRow], with_header: bool) -> bytes:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        if with_header:
            writer.writerow(self.columns)
        writer.writerows([row[name] for name in self.columns] for row in rows)  # floats with all digits
        return text.getvalue().encode()

    def parse(self, text: str) -> list[ResultRow]:
        lines = list(csv.reader(io.StringIO(text, newline=""), strict=True))
        if lines:
            _check_columns(lines[0], 1, self.columns)
        for number, line in enumerate(lines, start=1):
            size = len(self.columns)
            require(len(line) == size, f"line {number} has {len(line)} values, not {size}.")
        return [
            {
                name: kind(value) if value else None
                for (name, kind), value in zip(self.columns.items(), line, strict=True)
            }
            for line in lines[1:]
        ]


class _JsonlFormat:
    prefix: ClassVar[bytes] = b'{"time": "'

    def __init__(self, columns: dict[str, type]) -> None:
        self.columns = columns

    def write(self, rows: Sequence[ResultRow], with_header: bool) -> bytes:
        def encode(value: Any) -> Any:
            return None if isinstance(value, float) and not math.isfinite(value) else value  # JSON has no NaN, infinity

        lines = ({name: encode(row[name]) for name in self.columns} for row in rows)
        return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()

    def parse(self, text: str) -> list[ResultRow]:
        rows = [json.loads(line) for line in text.split("\n")[:-1]]
        for number, row in enumerate(rows, start=1):
            require(isinstance(row, dict), f"line {number} is not an object.")
            _check_columns(list(row), number, self.columns)
        return rows


def _check_columns(names: Sequence[str], line: int, columns: dict[str, type]) -> None:
    for name in names:
        if name not in columns:
            raise ConfigError(f"line {line}: {unknown_name('column', name, columns)}")
    require(list(names) == list(columns), f"line {line} has the columns {', '.join(names)}, not {', '.join(columns)}.")


FORMATS: dict[str, type[_CsvFormat] | type[_JsonlFormat]] = {".csv": _CsvFormat, ".jsonl": _JsonlFormat}
"""Formats by suffix; each writes and parses rows, and has the first bytes of every file as ``prefix``."""
