"""What a tokenizer is, the place where a kind of tokenizer registers, and loading one from a file.

A kind is one module: it registers a class or function that returns a ``Tokenizer``, whose parameters are the keys of
``[tokenizer]``, with the name of its file and how that file is recognized::

    @register("mine", file_name="tokenizer.mine", recognize=lambda content: content.startswith(b"MINE"))
    def mine(path: str) -> Tokenizer: ...
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from torchladder.data.disk_cache import cache_path
from torchladder.data.file_patterns import MissingFilesError
from torchladder.registry import Component, ConfigError, Registry, require


class Tokenizer(ABC):
    """Text to token ids and back.

    Attributes:
        bos: the id that may begin a document, None if the vocabulary has none.
        eos: the id that ends a document.
        vocab_size: ids are below this number.
        fingerprint: equal for tokenizers that return equal ids.
        unk: the id of text that is not in the vocabulary; None if no text becomes such a token.
    """

    bos: int | None
    eos: int
    vocab_size: int
    fingerprint: str
    unk: int | None = None

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, without special ids."""

    @abstractmethod
    def decode(self, ids: list[int]) -> str:
        """Returns the text of ids; special ids and ids outside the vocabulary are skipped."""

    def dropped(self, text: str) -> str:
        """Returns the characters of a text, except white space, that become no token: possible only without ``unk``."""
        return ""

    def files(self) -> dict[str, bytes]:
        """Returns the content of its files by their usual names; empty for a tokenizer without files."""
        return {}

    def tokenizer_json(self) -> bytes | None:
        """Returns the content of a ``tokenizer.json`` with the same ids, for transformers; None if there is none."""
        return None

    def encode_batch(self, texts: list[str], threads: int = 1) -> list[np.ndarray]:
        """Returns the ids of each text as an integer array; override it if a library encodes many texts at once.

        Args:
            texts: any number of them.
            threads: cores to use if the library can.
        """
        return [np.asarray(self.encode(text), dtype=np.int64) for text in texts]


class TokenizerFormat(NamedTuple):
    """The file of a kind of tokenizer: its name in a folder, and what recognizes its content."""

    file_name: str
    recognize: Callable[[bytes], bool]


registry: Registry[Tokenizer] = Registry(
    "tokenizer",
    runtime_args={
        "texts": "returns an iterator over the training texts",
        "cache": "folder for files that are built once",
    },
)
tokenizer_formats: dict[str, TokenizerFormat] = {}


def register(
    name: str, file_name: str = "", recognize: Callable[[bytes], bool] | None = None
) -> Callable[[Component], Component]:
    """Returns a decorator that registers a kind of tokenizer; one without a file has no ``recognize``."""
    if recognize is not None:
        tokenizer_formats[name] = TokenizerFormat(file_name, recognize)
    return registry.register(name)


@register("none")
def none() -> None:
    """No tokenizer: for runs on tokens, without samples."""


def file_names() -> list[str]:
    """Returns the names of tokenizer files in a folder; the first one that exists is the folder's tokenizer."""
    return sorted({known.file_name for known in tokenizer_formats.values()} - {""})


def find_tokenizer_file(path: str | Path) -> Path:
    """Returns the tokenizer file of a path: itself, or the one in a folder; raises ConfigError if there is none."""
    place = Path(path).expanduser()
    if place.is_dir():
        found = [place / name for name in file_names() if (place / name).is_file()]
        require(bool(found), f"the folder {str(path)!r} holds no tokenizer. Known: {', '.join(file_names())}.")
        return found[0]
    if not place.is_file():
        raise MissingFilesError(f"the tokenizer {str(path)!r} is not a file or folder.")
    return place


def recognize_kind(content: bytes) -> str:
    """Returns the registered tokenizer that reads a file with this content, empty if none does."""
    return next((name for name, known in tokenizer_formats.items() if known.recognize(content)), "")


def kind_hint(content: bytes, kind: str) -> str:
    """Returns a sentence for the error of ``kind`` that names the tokenizer that does read the content."""
    other = recognize_kind(content)
    return f' It looks like a file for tokenizer.name = "{other}".' if other not in ("", kind) else ""


def load_tokenizer(name: str, bos_token: str = "", eos_token: str = "") -> Tokenizer:
    """Returns the tokenizer of a file or folder, whose content decides the kind, or a kind without a file (``bytes``).

    Args:
        name: a file, a folder with one, or a registered name.
        bos_token: the token that begins a document, for kinds with that key (``tokenizer.json``).
        eos_token: the token that ends a document, for kinds with that key.

    Raises:
        ConfigError: there is no such file, it is damaged or of an unknown kind, or the kind has no such key.
    """
    settings = {key: token for key, token in (("bos_token", bos_token), ("eos_token", eos_token)) if token}
    if name in registry.names() and "path" not in registry.parameters(name):
        kind = name
    else:
        kind = recognize_kind(find_tokenizer_file(name).read_bytes())
        settings["path"] = name
    known = ", ".join(sorted(tokenizer_formats))
    require(bool(kind), f"{name!r} is not a tokenizer file of a known kind. Known: {known}.")
    parameters = registry.parameters(kind)
    fits = settings.keys() <= parameters.keys()
    require(fits, f"{name!r} is a {kind} tokenizer with its own bos and eos: drop --bos-token and --eos-token.")
    defaults = {key: parameter.default for key, parameter in parameters.items()}
    section = SimpleNamespace(name=kind, **(defaults | settings))
    tokenizer = registry.build(section, texts=lambda: iter(()), cache=cache_path())
    if tokenizer is None:
        raise ConfigError(f"{name!r} is not a tokenizer: name a file, a folder or bytes.")
    return tokenizer
