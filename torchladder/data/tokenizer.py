"""Tokenizers by name. ``bytes`` needs nothing; ``sentencepiece`` loads a model or trains its own on the run's texts."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import sentencepiece as spm

from torchladder.data.base import Tokenizer
from torchladder.data.cache import build_once
from torchladder.registry import ConfigError, Registry

registry: Registry[Tokenizer] = Registry(
    "tokenizer",
    facts={"texts": "gives an iterator over the training texts", "cache": "folder for what is made once"},
)
register = registry.register

VOCAB_SIZE = 4096
"""Tokens of a vocabulary that trains itself, unless a run asks for another number."""
BUDGET = 16 << 20
"""Characters a vocabulary is trained on: about 5 s of work on 2 cores."""
REACH = 16 * BUDGET
"""Characters of the training texts among which those are spread evenly."""
SPACE = "▁"
"""How SentencePiece writes a space inside its pieces, so it cannot tell a literal U+2581 from one."""


@register("none")
def none() -> None:
    """No tokenizer: all sources are tokens already, and no text is sampled."""


@register("bytes")
class Bytes(Tokenizer):
    """UTF-8 bytes as tokens 0 to 255, and 256 to end a document."""

    bos = None
    eos = 256
    vocab_size = 257
    fingerprint = "bytes"

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", errors="replace"))

    def decode(self, ids: list[int]) -> str:
        return bytes(token for token in ids if 0 <= token < 256).decode("utf-8", errors="replace")

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode("utf-8", errors="replace"), dtype=np.uint8) for text in texts]


@register("sentencepiece")
def sentencepiece(
    texts: Callable[[], Iterator[str]], cache: Path, path: str = "", vocab_size: int | None = None
) -> Tokenizer:
    """A SentencePiece model: from a file, or trained once on the run's own texts and kept in the cache.

    A trained one is BPE with byte fallback and no normalisation, so every text comes back exactly as it went in.

    Args:
        path: a .model file; empty trains one.
        vocab_size: tokens of the vocabulary: 4096 when it trains; of a .model it only asserts the size.

    Raises:
        ConfigError: the file is missing, is no SentencePiece model or has another size; or the texts are too few.
    """
    if not path:
        return SentencePiece(_trained(texts(), cache, vocab_size or VOCAB_SIZE).read_bytes())
    file = Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(f"the tokenizer model {path!r} is not a file.")
    tokenizer = SentencePiece(file.read_bytes(), path)
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
            raise ConfigError(f"{name} is no SentencePiece model.") from error
        if self._model.eos_id() < 0:
            raise ConfigError(f"{name} has no end-of-sentence token, which ends a document.")
        self.eos = self._model.eos_id()
        self.bos = None if self._model.bos_id() < 0 else self._model.bos_id()
        self.vocab_size = self._model.vocab_size()
        self.fingerprint = f"sentencepiece {hashlib.sha256(model).hexdigest()}"
        ids = range(self.vocab_size)
        self._silent = {i for i in ids if self._model.is_control(i) or self._model.is_unknown(i)}
        self._literal_space = self._bytes_of(SPACE)

    def encode(self, text: str) -> list[int]:
        if not self._literal_space or SPACE not in text:
            return self._model.encode(text)
        first, *rest = (self._model.encode(part) for part in text.split(SPACE))
        return first + [token for ids in rest for token in (*self._literal_space, *ids)]

    def decode(self, ids: list[int]) -> str:
        return self._model.decode([i for i in ids if 0 <= i < self.vocab_size and i not in self._silent])

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        plain = iter(self._model.encode([text for text in texts if SPACE not in text], num_threads=os.cpu_count() or 1))
        encoded = (self.encode(text) if SPACE in text else next(plain) for text in texts)
        return [np.asarray(ids, dtype=np.int32) for ids in encoded]

    def _bytes_of(self, text: str) -> list[int]:
        """Returns the byte tokens of a text, or nothing for a model that lacks them or puts a space before a text."""
        ids = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in text.encode()]
        own_space = self._model.encode("a", out_type=str)[0].startswith(SPACE)
        return ids if all(map(self._model.is_byte, ids)) and not own_space else []


def _trained(texts: Iterable[str], cache: Path, vocab_size: int) -> Path:
    """Returns the model file trained on a sample of the texts, by the sample's hash."""
    sample = _sample(texts)
    if not sample:
        raise ConfigError("there is no text to train a tokenizer on: give tokenizer.path, or a source of raw text.")
    digest = hashlib.sha256(f"{spm.__version__} bpe {vocab_size}".encode())
    for text in sample:
        digest.update(hashlib.sha256(text.encode()).digest())

    def train(target: Path) -> None:
        try:
            with open(target, "wb") as model:
                _train(sample, vocab_size, model)
        except RuntimeError as error:
            raise ConfigError(
                f"no tokenizer with vocab_size {vocab_size} can be trained on these texts: {error}"
            ) from error

    return build_once(cache / "tokenizers" / f"{digest.hexdigest()[:32]}.model", train)


def _train(sample: list[str], vocab_size: int, model: object) -> None:
    spm.SentencePieceTrainer.train(
        sentence_iterator=(part for text in sample for part in _paragraphs(text)),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        # A text comes back exactly: nothing is normalised, no space is added or removed.
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,  # indentation is a token, not one per space
        max_sentence_length=1 << 20,
        num_threads=4,  # fixed, since it is written into the model and so into its fingerprint
        minloglevel=2,
    )


def _sample(texts: Iterable[str]) -> list[str]:
    """Picks every n-th text in one pass, n doubling whenever the budget is full: spread evenly, the same every time."""
    kept: list[str] = []
    size = seen = 0
    every = 1
    for number, text in enumerate(texts):
        if seen > REACH:
            break
        seen += len(text)
        if number % every:
            continue
        kept.append(text[:BUDGET])
        size += len(kept[-1])
        while size > BUDGET and len(kept) > 1:
            kept, every = kept[::2], every * 2
            size = sum(map(len, kept))
    return kept


def _paragraphs(text: str, limit: int = 2000) -> Iterator[str]:
    """Cuts a text into runs of whole lines, so that pieces may hold a line's end, as in ``":\\n"``."""
    lines: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        if size + len(line) > limit and lines:
            yield "".join(lines)
            lines, size = [], 0
        lines.append(line)
        size += len(line)
    if lines:
        yield "".join(lines)
