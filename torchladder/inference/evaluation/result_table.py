"""Results on disk, as CSV or JSON Lines: many processes add to one file, and a kill spoils nothing."""

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

from torchladder.registry import ConfigError, unknown_name

Row = dict[str, Any]
"""A line of the table: a value for each of ``COLUMNS``, None for none."""

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

Key = tuple[str, int | None]
"""What a row is of: the fingerprint of an evaluation, and the first position, None for all of them."""


def key(row: Row) -> Key:
    """Returns what a row is of."""
    return row["fingerprint"], row["first_position"]


class ResultTable:
    """Rows in a file; the suffix says of which form.

    Args:
        path: a .csv or .jsonl, made with its folder where it is not there.

    Raises:
        ConfigError: another suffix, a file that cannot be written or holds something else.
    """

    def __init__(self, path: Path) -> None:
        if path.suffix not in FORMS:
            raise ConfigError(f"{path}: results go to {' or '.join(FORMS)}.")
        self.path = path
        self._form = FORMS[path.suffix]
        with self._open() as file:
            self._read(file)

    def rows(self) -> list[Row]:
        """Returns all complete rows.

        Raises:
            ConfigError: something that is no row has come into the file.
        """
        with self._open() as file:
            return self._read(file)

    def add(self, rows: Sequence[Row]) -> None:
        """Adds the rows that are not there yet, all or none, on disk when this returns.

        Raises:
            ConfigError: they cannot be written.
        """
        with self._open() as file:
            known = {key(row) for row in self._read(file)}
            missing = [row for row in rows if key(row) not in known]
            whole = _whole(_content(file))
            file.truncate(whole)  # a line without an end is of a process that was killed: the lock is held here
            try:
                text = memoryview(self._form.write(missing, whole == 0))
                while text:
                    text = text[file.write(text) :]
                os.fsync(file.fileno())
            except OSError:
                file.truncate(whole)
                raise

    @contextmanager
    def _open(self) -> Iterator[FileIO]:
        """Gives the file, which no other process has meanwhile."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a+b", buffering=0) as file:
                fcntl.flock(file, fcntl.LOCK_EX)  # released when the file closes, also when the process dies
                yield file
        except OSError as error:
            raise ConfigError(f"{self.path} cannot be written: {error.strerror}. --output names another.") from error

    def _read(self, file: FileIO) -> list[Row]:
        content = _content(file)
        whole = _whole(content)
        try:
            begins = self._form.begins
            if not whole and content[: len(begins)] != begins[: len(content)]:
                raise ConfigError("its one line has no end.")
            return self._form.parse(content[:whole].decode())
        except (ValueError, csv.Error) as error:
            raise ConfigError(f"{self.path} is no table of evaluations: {error} --output names another.") from None


def _content(file: FileIO) -> bytes:
    file.seek(0)
    return file.read()


def _whole(content: bytes) -> int:
    """Returns the bytes of all lines that have an end."""
    return content.rfind(b"\n") + 1


# --- CSV --------------------------------------------------------------------------------------------------------------


def _to_csv(rows: Sequence[Row], first: bool) -> bytes:
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    if first:
        lines.writerow(COLUMNS)
    lines.writerows([row[name] for name in COLUMNS] for row in rows)  # floats as repr gives them
    return text.getvalue().encode()


def _from_csv(text: str) -> list[Row]:
    lines = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    if lines:
        _check(lines[0], 1)
    for number, line in enumerate(lines, start=1):
        if len(line) != len(COLUMNS):
            raise ConfigError(f"line {number} has {len(line)} values, not {len(COLUMNS)}.")
    return [
        {name: kind(value) if value else None for (name, kind), value in zip(COLUMNS.items(), line, strict=True)}
        for line in lines[1:]
    ]


# --- JSON Lines -------------------------------------------------------------------------------------------------------


def _to_jsonl(rows: Sequence[Row], first: bool) -> bytes:
    # JSON has no NaN and no infinity: null.
    finite = ({name: _finite(row[name]) for name in COLUMNS} for row in rows)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in finite).encode()


def _from_jsonl(text: str) -> list[Row]:
    rows = []
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        row = json.loads(line)
        if not isinstance(row, dict):
            raise ConfigError(f"line {number} holds no object.")
        _check(list(row), number)
        rows.append(row)
    return rows


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _check(names: Sequence[str], number: int) -> None:
    for name in names:
        if name not in COLUMNS:
            raise ConfigError(f"line {number}: {unknown_name('column', name, COLUMNS)}")
    if list(names) != list(COLUMNS):
        raise ConfigError(f"line {number} has the columns {', '.join(names)}, not {', '.join(COLUMNS)}.")


@dataclass(frozen=True)
class Form:
    """How rows are a file.

    Attributes:
        write: rows, and whether they are the first of the file, as bytes.
        parse: the reverse.
        begins: what every file begins with.
    """

    write: Callable[[Sequence[Row], bool], bytes]
    parse: Callable[[str], list[Row]]
    begins: bytes


FORMS = {
    ".csv": Form(_to_csv, _from_csv, _to_csv([], True)),
    ".jsonl": Form(_to_jsonl, _from_jsonl, b'{"time": "'),
}
"""Forms by suffix."""
