"""What stands beside a pair of tokens: ``PREFIX.json`` says what is in it, how it came to be, and its checksums."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torchladder.data.disk_cache import sha256
from torchladder.data.formats.indexed import prefix_of
from torchladder.registry import ConfigError


@dataclass(frozen=True, kw_only=True)
class DatasetMetadata:
    """The content of ``PREFIX.json``.

    Attributes:
        documents, tokens: how many the pair holds.
        dtype: type of a token on disk.
        tokenizer: ``name`` as it was given, ``fingerprint``, ``vocab_size``, and ``bos`` and ``eos``, the ids that
            begin and end each document or None.
        text_key: the text's key or column.
        on_error: what a document that could not be read did.
        skipped: documents left out or repaired, by reason.
        shard: which part of the sources this is, as [number from 0, how many]; None is all.
        sources: ``path`` and ``bytes`` of each file, in order.
        checksums: SHA-256 of ``bin`` and ``idx``.
    """

    documents: int = 0
    tokens: int = 0
    dtype: str
    tokenizer: dict[str, Any] = field(default_factory=dict)
    text_key: str = "text"
    on_error: str = "error"
    skipped: dict[str, int] = field(default_factory=dict)
    shard: list[int] | None = None
    sources: list[dict[str, Any]] = field(default_factory=list)
    checksums: dict[str, str] = field(default_factory=dict)

    def settings(self) -> dict[str, Any]:
        """Returns what the content of the pair follows from, by name."""
        known = ("dtype", "tokenizer", "text_key", "on_error", "shard", "sources")
        settings = {name: getattr(self, name) for name in known}
        # A tokenizer is what it does, not what it was called.
        return settings | {"tokenizer": {key: value for key, value in self.tokenizer.items() if key != "name"}}


def metadata_path(prefix: str | Path) -> Path:
    """Returns the file that stands beside a pair."""
    return Path(f"{prefix_of(prefix)}.json")


def read_metadata(prefix: str | Path) -> DatasetMetadata | None:
    """Returns what is known of a pair; None for one that another program wrote.

    Raises:
        ConfigError: the file is damaged.
    """
    path = metadata_path(prefix)
    if not path.is_file():
        return None
    try:
        return DatasetMetadata(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path} is not the metadata of a pair of tokens: {error}.") from error


def write_metadata(prefix: str | Path, metadata: Any) -> None:
    """Writes a dataclass beside a pair; it appears under its name only when it is on the disk."""
    path = metadata_path(prefix)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with open(partial, "w", encoding="utf-8") as file:
        json.dump(dataclasses.asdict(metadata), file, indent=1, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def find_corruption(prefix: str | Path, checksums: dict[str, str]) -> str | None:
    """Returns the first file of a pair that is not what its checksum says; None when all is well."""
    for suffix, checksum in checksums.items():
        path = Path(f"{prefix_of(prefix)}.{suffix}")
        if not path.is_file() or sha256(path) != checksum:
            return str(path)
    return None
