"""Parquet with a column of token ids: a document per row, or rows of one length that were packed elsewhere.

On first use the rows are written to the cache as a ``.bin/.idx`` pair, since a compressed column has no random access.
Tokens without a label (``labels`` -100, or ``attention_mask`` 0) are stored as in ``unlabeled_tokens``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from torchladder.data.dataloader import IGNORE_INDEX
from torchladder.data.disk_cache import build_once, files_key
from torchladder.data.formats.eos_documents import divide_at_eos
from torchladder.data.formats.indexed import IndexedTokens, IndexedWriter
from torchladder.data.sources import TokenShard, register_tokens
from torchladder.data.text.document_parsers import open_parquet
from torchladder.data.unlabeled_tokens import mark_unlabeled
from torchladder.registry import ConfigError, unknown_name

FORMAT_VERSION = 1
"""Part of the cache key: raise it when the same rows are written differently."""
BATCH_ROWS = 1000
"""Rows that are read at once."""
COLUMNS = ("input_ids", "labels", "attention_mask")


def holds_tokens(file: Path) -> bool:
    """Returns whether a Parquet file has a column of token ids; otherwise it is text."""
    return COLUMNS[0] in open_parquet(file)[1].schema_arrow.names


class ParquetTokens(IndexedTokens):
    """The rows of Parquet files, read from the pair in the cache.

    Args:
        files: the rows come from, in order.
        path: the pair's prefix.
    """

    def __init__(self, files: list[Path], path: Path) -> None:
        super().__init__(path)
        self.files = files

    def __reduce__(self) -> tuple[Any, ...]:
        return ParquetTokens, (self.files, self.prefix)

    def locate(self, document: int) -> str:
        for file in self.files:
            rows = open_parquet(file)[1].metadata.num_rows
            if document < rows:
                return f"{file}, row {document}"
            document -= rows
        raise IndexError(document)


@register_tokens("parquet", suffixes=(".parquet",), recognize=holds_tokens, unlabeled=True)
def parquet(files: list[Path], eos: int | None, cache: Path, documents_by_eos: bool = False) -> Sequence[TokenShard]:
    """Parquet with ``input_ids``, and optionally ``labels`` and ``attention_mask`` as in Hugging Face datasets.

    A label is at the index of its own token, not of the one before, and is that token or -100.

    Args:
        documents_by_eos: End documents at the tokenizer's eos, too: for rows that were packed elsewhere.

    Raises:
        ConfigError: a file is damaged, lacks the column, or has labels that are not its tokens.
    """

    def build(folder: Path) -> None:
        with IndexedWriter(folder / "tokens", np.dtype(np.int32)) as writer:
            for file in files:
                for document in _documents(file):
                    writer.add(document)

    folder = build_once(cache / "parquet" / files_key(files, FORMAT_VERSION), build)
    rows = [ParquetTokens(files, folder / "tokens")]
    return divide_at_eos(rows, eos, cache) if documents_by_eos else rows


def _documents(file: Path) -> Iterator[np.ndarray]:
    """Yields the tokens of each row, those without a label marked."""
    _, opened = open_parquet(file)
    schema = opened.schema_arrow
    names = [name for name in COLUMNS if name in schema.names]
    if COLUMNS[0] not in names:
        raise unknown_name("column", COLUMNS[0], schema.names, str(file))
    for name in names:
        item = getattr(schema.field(name).type, "value_type", None)
        if item is None or not str(item).startswith(("int", "uint")):
            raise ConfigError(f"{file}: {name} holds {schema.field(name).type}, not lists of integers.")
    row = 0
    for batch in opened.iter_batches(BATCH_ROWS, columns=names):
        columns = [_lists(batch.column(name), f"{file}, {name}") for name in names]
        for values in zip(*columns, strict=True):
            yield _mark_row(dict(zip(names, values, strict=True)), f"{file}, row {row}")
            row += 1


def _lists(column: Any, where: str) -> list[np.ndarray]:
    if column.null_count or column.flatten().null_count:
        raise ConfigError(f"{where}: a row, or a number in it, is missing (null).")
    lengths = column.value_lengths().to_numpy(zero_copy_only=False)
    return np.split(column.flatten().to_numpy().astype(np.int64), np.cumsum(lengths)[:-1])


def _mark_row(values: dict[str, np.ndarray], where: str) -> np.ndarray:
    tokens = values["input_ids"]
    if tokens.min(initial=0) < 0:
        raise ConfigError(f"{where} holds token {tokens.min()}; tokens must be 0 or more.")
    unlabeled = np.zeros(len(tokens), bool)
    for name in ("labels", "attention_mask"):
        if name in values and len(values[name]) != len(tokens):
            raise ConfigError(f"{where} has {len(tokens)} input_ids and {len(values[name])} {name}.")
    if "labels" in values:
        unlabeled = values["labels"] == IGNORE_INDEX
        unlabeled[:1] = True  # no position predicts the first token
        if (values["labels"] != tokens)[~unlabeled].any():
            raise ConfigError(f"{where} has labels that are neither its tokens nor {IGNORE_INDEX}.")
    if "attention_mask" in values:
        unlabeled |= values["attention_mask"] == 0
    return np.where(unlabeled, mark_unlabeled(tokens), tokens)
