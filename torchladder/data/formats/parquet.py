"""Parquet with a column of token ids: a document per row, or rows of one length that were packed elsewhere.

On first use the rows are written to the cache as a ``.bin/.idx`` pair, since a compressed column has no place to jump
to. A token that has no label of its own (``labels`` -100, or ``attention_mask`` 0) is stored as ``~token``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from torchladder.data.dataloader import IGNORE_INDEX
from torchladder.data.disk_cache import build_once
from torchladder.data.extras import missing
from torchladder.data.formats.indexed import IndexedTokens, IndexedWriter
from torchladder.data.formats.token_readers import register
from torchladder.registry import ConfigError, unknown_name

FORMAT = 1
"""Raised when the same rows would give other files."""
BATCH = 1000
"""Rows that are read at once."""
COLUMNS = ("input_ids", "labels", "attention_mask")


def holds_tokens(file: Path) -> bool:
    """Tells whether a Parquet file has a column of token ids; any other is text."""
    return COLUMNS[0] in _open(file).schema_arrow.names


@register("parquet")
def parquet(files: list[Path], cache: Path) -> list[IndexedTokens]:
    """Parquet with ``input_ids``, and optionally ``labels`` and ``attention_mask`` as Hugging Face has them.

    Labels stand at their own token, not at the one before, and are that token or -100.

    Raises:
        ConfigError: a file is damaged, lacks the column, or has labels that are not its tokens.
    """
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    name = hashlib.sha256(repr((FORMAT, stats)).encode()).hexdigest()[:32]

    def build(folder: Path) -> None:
        with IndexedWriter(folder / "tokens", np.dtype(np.int32)) as writer:
            for file in files:
                for document in _documents(file):
                    writer.add(document)

    return [IndexedTokens(build_once(cache / "parquet" / name, build) / "tokens")]


def _documents(file: Path) -> Iterator[np.ndarray]:
    """Yields the tokens of each row, those without a label as ``~token``."""
    opened = _open(file)
    schema = opened.schema_arrow
    names = [name for name in COLUMNS if name in schema.names]
    if COLUMNS[0] not in names:
        raise unknown_name(f"column in {file}", COLUMNS[0], schema.names)
    for name in names:
        item = getattr(schema.field(name).type, "value_type", None)
        if item is None or not str(item).startswith(("int", "uint")):
            raise ConfigError(f"{file}: {name} holds {schema.field(name).type}, not lists of whole numbers.")
    row = 0
    for batch in opened.iter_batches(BATCH, columns=names):
        columns = [_lists(batch.column(name), f"{file}, {name}") for name in names]
        for values in zip(*columns, strict=True):
            yield _marked(dict(zip(names, values, strict=True)), f"{file}, row {row}")
            row += 1


def _lists(column: Any, where: str) -> list[np.ndarray]:
    """Returns the lists of a column as arrays."""
    if column.null_count or column.flatten().null_count:
        raise ConfigError(f"{where}: a row, or a number in it, is missing (null).")
    lengths = column.value_lengths().to_numpy(zero_copy_only=False)
    return np.split(column.flatten().to_numpy().astype(np.int64), np.cumsum(lengths)[:-1])


def _marked(values: dict[str, np.ndarray], where: str) -> np.ndarray:
    tokens = values["input_ids"]
    if tokens.min(initial=0) < 0:
        raise ConfigError(f"{where} holds token {tokens.min()}; tokens are 0 at least.")
    silent = np.zeros(len(tokens), bool)
    for name in ("labels", "attention_mask"):
        if name in values and len(values[name]) != len(tokens):
            raise ConfigError(f"{where} has {len(tokens)} input_ids and {len(values[name])} {name}.")
    if "labels" in values:
        silent = values["labels"] == IGNORE_INDEX
        silent[:1] = True  # the first label of a row is no token's: nothing stands before it
        if (values["labels"] != tokens)[~silent].any():
            raise ConfigError(f"{where} has labels that are neither its tokens nor {IGNORE_INDEX}.")
    if "attention_mask" in values:
        silent |= values["attention_mask"] == 0
    return np.where(silent, ~tokens, tokens)


def _open(file: Path) -> Any:
    try:
        from pyarrow import ArrowInvalid
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise missing("pyarrow", "parquet", f"reading {file}") from None
    try:
        return ParquetFile(file)
    except (ArrowInvalid, OSError) as error:
        raise ConfigError(f"{file} is no Parquet file, or a damaged one: {error}") from error
