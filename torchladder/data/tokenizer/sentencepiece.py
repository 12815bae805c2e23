"""SentencePiece models: from a file, or trained on the run's own texts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import sentencepiece as spm

from torchladder.data.tokenizer import tokenizer_json
from torchladder.data.tokenizer.tokenizer_json import SPACE
from torchladder.data.tokenizer.tokenizer_registry import Tokenizer, find_tokenizer_file, kind_hint, register
from torchladder.data.tokenizer.tokenizer_training import train_cached
from torchladder.registry import ConfigError, require

DEFAULT_VOCAB_SIZE = 4096
"""Tokens of a vocabulary that a run trains, unless it sets another size."""


def _recognize(content: bytes) -> bool:
    """Returns whether the first byte is the tag of a model's first field: a protobuf has no magic."""
    return content.startswith(b"\n") and not content.lstrip().startswith(b"{")


@register("sentencepiece", "tokenizer.model", _recognize)
def sentencepiece(
    texts: Callable[[], Iterator[str]], cache: Path, path: str = "", vocab_size: int | None = None
) -> Tokenizer:
    """A SentencePiece model: from a file, or trained once on the run's own texts and cached.

    A trained one is BPE with byte fallback and without normalization, so decoding an encoded text returns it exactly.

    Args:
        path: A .model file; empty trains one.
        vocab_size: Tokens of a trained vocabulary, 4096 by default; of a .model it only asserts the size.

    Raises:
        ConfigError: the file is missing, not a SentencePiece model, or of another size; or the texts are too few.
    """
    if not path:
        return SentencePiece(train_cached(texts(), cache, vocab_size or DEFAULT_VOCAB_SIZE).read_bytes())
    tokenizer = SentencePiece(find_tokenizer_file(path).read_bytes(), path)
    if vocab_size not in (None, tokenizer.vocab_size):
        raise ConfigError(f"tokenizer vocab_size is {vocab_size}, but {path} has {tokenizer.vocab_size} tokens.")
    return tokenizer


class SentencePiece(Tokenizer):
    """A SentencePiece model in memory.

    Args:
        model: content of a .model file.
        name: what errors call it.
    """

    def __init__(self, model: bytes, name: str = "the tokenizer model") -> None:
        try:
            self._model = spm.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ConfigError(f"{name} is not a SentencePiece model.{kind_hint(model, 'sentencepiece')}") from error
        require(self._model.eos_id() >= 0, f"{name} has no end-of-sentence token, which ends a document.")
        self.eos = self._model.eos_id()
        self.bos = None if self._model.bos_id() < 0 else self._model.bos_id()
        self.vocab_size = self._model.vocab_size()
        self.unk = self._model.unk_id()
        self.fingerprint = f"sentencepiece {hashlib.sha256(model).hexdigest()}"
        ids = range(self.vocab_size)
        self._special_ids = {i for i in ids if self._model.is_control(i) or self._model.is_unknown(i)}
        # The byte tokens of a literal U+2581, which pieces have for a space; empty for a model that lacks them or puts
        # a space before a text.
        space = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        adds_space = self._model.encode("a", out_type=str)[0].startswith(SPACE)
        self._literal_space = space if all(map(self._model.is_byte, space)) and not adds_space else []
        self._content = model, name

    def __reduce__(self) -> tuple[type[SentencePiece], tuple[bytes, str]]:
        return SentencePiece, self._content

    def encode(self, text: str) -> list[int]:
        if not self._literal_space or SPACE not in text:
            return self._model.encode(text)
        first, *rest = (self._model.encode(between) for between in text.split(SPACE))
        return first + [token for ids in rest for token in (*self._literal_space, *ids)]

    def decode(self, ids: list[int]) -> str:
        return self._model.decode([i for i in ids if 0 <= i < self.vocab_size and i not in self._special_ids])

    def files(self) -> dict[str, bytes]:
        return {"tokenizer.model": self._content[0]}

    def tokenizer_json(self) -> bytes:
        return tokenizer_json.from_sentencepiece(self._content[0], literal_space=bool(self._literal_space))

    def encode_batch(self, texts: list[str], threads: int = 1) -> list[np.ndarray]:
        plain = iter(self._model.encode([text for text in texts if SPACE not in text], num_threads=threads))
        encoded = (self.encode(text) if SPACE in text else next(plain) for text in texts)
        return [np.asarray(ids, dtype=np.int32) for ids in encoded]
