"""What a tokenizer is, and the place where a kind of tokenizer registers.

A kind is one module: it registers a class or function that returns a ``Tokenizer``, whose parameters are the keys of
``[tokenizer]``, with the name of its file and how that file is recognized::

    @register("mine", file_name="tokenizer.mine", recognize=lambda content: content.startswith(b"MINE"))
    def mine(path: str) -> Tokenizer: ...
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from torchladder.registry import Component, Registry


class Tokenizer(ABC):
    """Text to token ids and back.

    Attributes:
        bos: the id that may begin a document, None if the vocabulary has none.
        eos: the id that ends a document.
        vocab_size: ids are below this number.
        fingerprint: equal for tokenizers that return equal ids.
    """

    bos: int | None
    eos: int
    vocab_size: int
    fingerprint: str

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, without special ids."""

    @abstractmethod
    def decode(self, ids: list[int]) -> str:
        """Returns the text of ids; special ids and ids outside the vocabulary are skipped."""

    def files(self) -> dict[str, bytes]:
        """Returns the content of its files by their usual names; empty for a tokenizer without files."""
        return {}

    def encode_batch(self, texts: list[str], threads: int = 1) -> list[np.ndarray]:
        """Returns the ids of each text as an integer array; override it if a library encodes many texts at once.

        Args:
            texts: any number of them.
            threads: cores to use if the library can.
        """
        return [np.asarray(self.encode(text), dtype=np.int64) for text in texts]


class TokenizerFormat(NamedTuple):
    """The file of a kind of tokenizer: its name in a folder, and whether content is of this kind (and no other)."""

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
    """Returns a decorator that registers a kind of tokenizer; one without a file has no ``recognize``.

    Raises:
        ConfigError: the name is taken.
    """
    if recognize is not None:
        tokenizer_formats[name] = TokenizerFormat(file_name, recognize)
    return registry.register(name)


@register("none")
def none() -> None:
    """No tokenizer: for runs on tokens, without samples."""
