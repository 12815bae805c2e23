"""Trains tokenizers on a sample of texts: SentencePiece, and byte-level BPE as a ``tokenizer.json``."""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import sentencepiece as spm

from torchladder.data.disk_cache import build_once
from torchladder.data.extras import import_extra
from torchladder.data.tokenizer.huggingface import PAD, UNK
from torchladder.data.tokenizer.tiktoken import LLAMA3_PATTERN
from torchladder.registry import ConfigError, require, unknown_name

SAMPLE_CHARS = 16 << 20
"""Characters that a run trains its vocabulary on: about 5 s on 2 cores."""
MAX_READ_CHARS = 16 * SAMPLE_CHARS
"""Characters of the training texts that the sample is spread over."""
TokenizerKind = Literal["bpe", "unigram", "byte-bpe"]
Normalization = Literal["none", "nfc", "nfkc", "nmt_nfkc"]
NORMALIZATION_RULES = {"none": "identity", "nfkc": "nfkc", "nmt_nfkc": "nmt_nfkc"}
"""Normalizations by the names that SentencePiece has for them."""


@dataclass(frozen=True, kw_only=True)
class TokenizerTrainingConfig:
    """How a tokenizer is trained.

    Attributes:
        kind: bpe and unigram are SentencePiece's; byte-bpe is byte-level BPE with the pattern of Llama 3.
        vocab_size: tokens, including special ones.
        special_tokens: tokens that no text is encoded to, after those for begin, end and unknown.
        character_coverage: share of the sample's characters that the vocabulary covers, 0.9995 by default; the others
            become bytes. Not for byte-bpe.
        normalization: applied to a text before it is encoded; with "none", decoding returns every text exactly.
        split_digits: whether each digit becomes a separate token.
    """

    kind: TokenizerKind = "bpe"
    vocab_size: int = 32_000
    special_tokens: list[str] = field(default_factory=list)
    character_coverage: float | None = None
    normalization: Normalization = "none"
    split_digits: bool = False

    def __post_init__(self) -> None:
        if self.kind not in get_args(TokenizerKind):
            raise unknown_name("kind of tokenizer", self.kind, get_args(TokenizerKind))
        coverage, tokens = self.character_coverage, self.special_tokens
        require(self.vocab_size >= 1, f"--vocab-size {self.vocab_size}: must be 1 or more.")
        in_range = coverage is None or 0 < coverage <= 1
        require(in_range, f"--character-coverage {coverage}: must be above 0 and at most 1.")
        different = len({"", *tokens}) == 1 + len(tokens)
        require(different, f"--special-tokens {' '.join(tokens)}: must be different and not empty.")
        known = sorted(NORMALIZATION_RULES) if self.kind != "byte-bpe" else ["nfc", "nfkc", "none"]
        if self.normalization not in known:
            raise unknown_name(f"normalization for {self.kind}", self.normalization, known)
        applies = coverage is None or self.kind != "byte-bpe"
        require(applies, "--character-coverage is not for byte-bpe: its bytes cover every character.")


def train_tokenizer(sample: list[str], settings: TokenizerTrainingConfig) -> dict[str, bytes]:
    """Returns the files of a tokenizer's folder, by name; the same sample and settings return the same files.

    Raises:
        ConfigError: the texts are too few for that vocabulary.
    """
    require(bool(sample), "there is no text to train a tokenizer on.")
    return _train_byte_bpe(sample, settings) if settings.kind == "byte-bpe" else _train_sentencepiece(sample, settings)


def sample_texts(texts: Iterable[str], max_chars: int, max_read_chars: int | None = None) -> list[str]:
    """Returns every n-th text, deterministically in one pass; n doubles whenever the sample becomes too large.

    Args:
        texts: in order.
        max_chars: characters to return at most.
        max_read_chars: characters of the texts to read; None reads all.
    """
    kept: list[str] = []
    size = seen = 0
    every = 1
    for number, text in enumerate(texts):
        if max_read_chars is not None and seen > max_read_chars:
            break
        seen += len(text)
        if number % every:
            continue
        kept.append(text[:max_chars])
        size += len(kept[-1])
        while size > max_chars and len(kept) > 1:
            kept, every = kept[::2], every * 2
            size = sum(map(len, kept))
    return kept


def train_cached(texts: Iterable[str], cache: Path, vocab_size: int) -> Path:
    """Returns a SentencePiece model trained on a sample of the texts, cached by the sample's hash."""
    picked = sample_texts(texts, SAMPLE_CHARS, MAX_READ_CHARS)
    require(bool(picked), "there is no text to train a tokenizer on: set tokenizer.path, or a source of text.")
    digest = hashlib.sha256(f"{spm.__version__} bpe {vocab_size}".encode())
    for text in picked:
        digest.update(hashlib.sha256(text.encode()).digest())

    def build(target: Path) -> None:
        target.write_bytes(train_tokenizer(picked, TokenizerTrainingConfig(vocab_size=vocab_size))["tokenizer.model"])

    return build_once(cache / "tokenizers" / f"{digest.hexdigest()[:32]}.model", build)


def training_library(kind: TokenizerKind) -> str:
    """Returns the name and version of the library that trains a kind of tokenizer."""
    name = "tokenizers" if kind == "byte-bpe" else "sentencepiece"
    return f"{name} {importlib.metadata.version(name)}"


def _train_sentencepiece(texts: list[str], settings: TokenizerTrainingConfig) -> dict[str, bytes]:
    model = io.BytesIO()
    # Defaults are not passed, since SentencePiece writes what it is passed into the model.
    chosen: dict[str, Any] = {
        "control_symbols": settings.special_tokens,
        "character_coverage": settings.character_coverage,
        "split_digits": settings.split_digits,
    }
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=(paragraph for text in texts for paragraph in _paragraphs(text)),
            model_writer=model,
            model_type=settings.kind,
            vocab_size=settings.vocab_size,
            byte_fallback=True,
            normalization_rule_name=NORMALIZATION_RULES[settings.normalization],
            # Decoding returns every text exactly: no space is added or removed.
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,  # indentation is a token, not one per space
            max_sentence_length=1 << 20,
            num_threads=4,  # fixed, since it is written into the model and changes its fingerprint
            minloglevel=2,
            **{name: value for name, value in chosen.items() if value},
        )
    except RuntimeError as error:
        raise ConfigError(
            f"no tokenizer with vocab_size {settings.vocab_size} can be trained on these texts: {error}"
        ) from error
    return {"tokenizer.model": model.getvalue()}


BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
"""Tokens that begin and end a document in a byte-level vocabulary, with Llama 3's names."""


def _train_byte_bpe(texts: list[str], settings: TokenizerTrainingConfig) -> dict[str, bytes]:
    library = import_extra("tokenizers", "hf", "a byte-level BPE")
    pre_tokenizers = library.pre_tokenizers
    tokenizer = library.Tokenizer(library.models.BPE())
    if settings.normalization != "none":
        tokenizer.normalizer = getattr(library.normalizers, settings.normalization.upper())()
    digits = [pre_tokenizers.Digits(individual_digits=True)] if settings.split_digits else []
    words = pre_tokenizers.Split(library.Regex(LLAMA3_PATTERN), behavior="isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*digits, words, as_bytes])
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=settings.vocab_size,
        special_tokens=[BOS, EOS, *settings.special_tokens],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != settings.vocab_size:
        raise ConfigError(
            f"no tokenizer with vocab_size {settings.vocab_size} can be trained on these texts: "
            f"they yield one of {tokenizer.get_vocab_size()} tokens."
        )
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "clean_up_tokenization_spaces": False,
    }
    for role, usual in (("unk_token", UNK), ("pad_token", PAD)):
        config.update((role, name) for name in usual if name in settings.special_tokens)
    return {
        "tokenizer.json": tokenizer.to_str(pretty=True).encode(),
        "tokenizer_config.json": json.dumps(config, indent=2).encode(),
    }


def _paragraphs(text: str, limit: int = 2000) -> Iterator[str]:
    """Yields a text as runs of whole lines, so that tokens may contain a line break, as in ``":\\n"``."""
    lines = ""
    for line in text.splitlines(keepends=True):
        if lines and len(lines) + len(line) > limit:
            yield lines
            lines = ""
        lines += line
    if lines:
        yield lines
