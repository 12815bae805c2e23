"""``PREFIX.json``: what a .bin/.idx dataset holds, the settings it was prepared with, and its checksums."""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torchladder.data.disk_cache import file_sha256
from torchladder.data.formats.indexed import prefix_of
from torchladder.data.prepare.text_counts import TextCounts
from torchladder.registry import ConfigError


@dataclass(frozen=True, kw_only=True)
class DatasetMetadata:
    """The content of ``PREFIX.json``.

    Attributes:
        documents, tokens: number of each in the dataset.
        dtype: type of a token on disk.
        tokenizer: ``name`` as given on the command line, ``fingerprint``, ``vocab_size``, and ``bos`` and ``eos``: the
            ids that begin and end each document, None if none is added.
        text_key: JSON key or column of the text.
        on_error: how documents that cannot be read were handled.
        skipped: number of documents skipped or repaired, by reason.
        text_counts: bytes of text, tokens and unknown tokens, as in ``TextCounts``; empty if they were not counted.
        shard: [index from 0, number of shards]; None if this is the whole dataset.
        sources: ``path`` and ``bytes`` of each input file, in order.
        validation_fraction: of the documents that is held out of ``sources``.
        split: ``train``, the documents that are not held out, or ``validation``, those that are.
        checksums: SHA-256 of the ``bin`` and ``idx`` files.
    """

    documents: int = 0
    tokens: int = 0
    dtype: str
    tokenizer: dict[str, Any] = field(default_factory=dict)
    text_key: str = "text"
    on_error: str = "error"
    skipped: dict[str, int] = field(default_factory=dict)
    text_counts: dict[str, Any] = field(default_factory=dict)
    shard: list[int] | None = None
    sources: list[dict[str, Any]] = field(default_factory=list)
    validation_fraction: float = 0.0
    split: str = "train"
    checksums: dict[str, str] = field(default_factory=dict)

    def settings(self) -> dict[str, Any]:
        """Returns everything that determines the tokens, by name."""
        keys = ("dtype", "tokenizer", "text_key", "on_error", "shard", "sources", "validation_fraction", "split")
        settings = {key: getattr(self, key) for key in keys}
        # The fingerprint identifies a tokenizer, its name on the command line does not.
        return settings | {"tokenizer": {key: value for key, value in self.tokenizer.items() if key != "name"}}


def count_skipped(parts: Iterable[Any]) -> dict[str, int]:
    """Returns the sum of ``skipped`` of several datasets or parts, sorted by reason."""
    return dict(sorted(sum((Counter(part.skipped) for part in parts), Counter[str]()).items()))


def sum_text_counts(parts: Iterable[Any]) -> dict[str, Any]:
    """Returns the sum of ``text_counts`` of several datasets or parts; empty if one of them was not counted."""
    found = [part.text_counts for part in parts]
    return dataclasses.asdict(sum((TextCounts(**counts) for counts in found), TextCounts())) if all(found) else {}


def metadata_path(prefix: str | Path) -> Path:
    """Returns the path of a dataset's metadata file."""
    return Path(f"{prefix_of(prefix)}.json")


def read_metadata(prefix: str | Path) -> DatasetMetadata | None:
    """Returns the metadata of a dataset; None if it has none, because another program wrote it.

    Raises:
        ConfigError: the file is damaged.
    """
    path = metadata_path(prefix)
    if not path.is_file():
        return None
    try:
        return DatasetMetadata(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path} is not the metadata of a token dataset: {error}.") from error


def write_metadata(prefix: str | Path, record: Any) -> None:
    """Writes a dataclass as ``PREFIX.json``, atomically and durably."""
    path = metadata_path(prefix)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with open(partial, "w", encoding="utf-8") as file:
        json.dump(dataclasses.asdict(record), file, indent=1, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def find_corrupt_file(prefix: str | Path, checksums: dict[str, str]) -> str | None:
    """Returns the first file of a dataset that is missing or differs from its checksum; None if all match."""
    for suffix, checksum in checksums.items():
        path = Path(f"{prefix_of(prefix)}.{suffix}")
        if not path.is_file() or file_sha256(path) != checksum:
            return str(path)
    return None
