"""Tokenizer files: finding the one that a path means, and telling the formats apart by their content."""

from __future__ import annotations

import re
from pathlib import Path

from torchladder.registry import ConfigError

NAMES = ("tokenizer.json", "tokenizer.model")
"""What a folder's tokenizer is called; the first one there counts."""


def find(path: str) -> Path:
    """Returns the tokenizer file that a path means: itself, or a folder's ``tokenizer.json`` or ``tokenizer.model``.

    Raises:
        ConfigError: there is none.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        found = [place / name for name in NAMES if (place / name).is_file()]
        if not found:
            raise ConfigError(f"the folder {path!r} holds no tokenizer. Known: {', '.join(NAMES)}.")
        return found[0]
    if not place.is_file():
        raise ConfigError(f"the tokenizer {path!r} is not a file or folder.")
    return place


def content(path: str) -> bytes:
    """Returns what is in a tokenizer file.

    Raises:
        ConfigError: as ``find``.
    """
    return find(path).read_bytes()


def kind(data: bytes) -> str:
    """Returns the registered name of the tokenizer that reads a file of this content."""
    if data.lstrip().startswith(b"{"):
        return "huggingface"
    if re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", data):
        return "tiktoken"
    return "sentencepiece"


def hint(data: bytes) -> str:
    """Says which tokenizer reads such a file, where it is not SentencePiece's."""
    found = kind(data)
    return "" if found == "sentencepiece" else f' It looks like a file for tokenizer.name = "{found}".'


def names_its_own(path: str, found: str) -> ConfigError:
    """Returns the error for a bos or eos token that is named for a format which has its own."""
    return ConfigError(
        f"{path!r} is of the kind {found}, which names its own bos and eos: leave --bos-token and --eos-token."
    )
