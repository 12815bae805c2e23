"""Training vocabularies on a sample of texts: SentencePiece, and byte-level BPE as a ``tokenizer.json``."""

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
from torchladder.data.extras import missing
from torchladder.data.tokenizer.tiktoken import PATTERN
from torchladder.registry import ConfigError, unknown_name

BUDGET = 16 << 20
"""Characters a vocabulary is trained on: about 5 s of work on 2 cores."""
REACH = 16 * BUDGET
"""Characters of the training texts among which those are spread evenly."""
Kind = Literal["bpe", "unigram", "byte-bpe"]
Normalization = Literal["none", "nfc", "nfkc", "nmt_nfkc"]
RULES = {"none": "identity", "nfkc": "nfkc", "nmt_nfkc": "nmt_nfkc"}
"""Normalisations of SentencePiece, under its own names."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a vocabulary is made of texts.

    Attributes:
        kind: bpe and unigram are SentencePiece's; byte-bpe is byte-level BPE behind the pattern of Llama 3.
        vocab_size: tokens, special ones included.
        special_tokens: tokens that no text is encoded to, after those for begin, end and unknown.
        character_coverage: share of the sample's characters whose kinds are tokens of their own, 0.9995 where nothing
            is said; bytes carry the rest. Not for byte-bpe.
        normalization: what is done to a text before it is encoded; "none" gives every text back exactly.
        split_digits: whether each digit is a token of its own.
    """

    kind: Kind = "bpe"
    vocab_size: int = 32_000
    special_tokens: list[str] = field(default_factory=list)
    character_coverage: float | None = None
    normalization: Normalization = "none"
    split_digits: bool = False

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise unknown_name("kind of tokenizer", self.kind, get_args(Kind))
        if self.vocab_size < 1:
            raise ConfigError(f"vocab_size is {self.vocab_size}; it is 1 at least.")
        if self.character_coverage is not None and not 0 < self.character_coverage <= 1:
            raise ConfigError(f"character_coverage is {self.character_coverage}; it is above 0 and at most 1.")
        if len(set(self.special_tokens)) < len(self.special_tokens) or "" in self.special_tokens:
            raise ConfigError(f"special_tokens is {self.special_tokens}; each is a text of its own.")
        known = sorted(RULES) if self.kind != "byte-bpe" else ["nfc", "nfkc", "none"]
        if self.normalization not in known:
            raise unknown_name(f"normalization for {self.kind}", self.normalization, known)
        if self.kind == "byte-bpe" and self.character_coverage is not None:
            raise ConfigError("character_coverage is not for byte-bpe: its bytes cover every character.")


def train(sample: list[str], settings: Training) -> dict[str, bytes]:
    """Returns the files of a tokenizer's folder, by name. The same sample and settings give the same files.

    Raises:
        ConfigError: the texts are too few for that vocabulary.
    """
    if not sample:
        raise ConfigError("there is no text to train a tokenizer on.")
    return _byte_bpe(sample, settings) if settings.kind == "byte-bpe" else _sentencepiece(sample, settings)


def sample(texts: Iterable[str], budget: int, reach: int | None = None) -> list[str]:
    """Picks every n-th text in one pass, n doubling whenever the budget is full: spread evenly, the same every time.

    Args:
        texts: in their order.
        budget: characters to pick at most.
        reach: characters after which no more is read; None reads all.
    """
    kept: list[str] = []
    size = seen = 0
    every = 1
    for number, text in enumerate(texts):
        if reach is not None and seen > reach:
            break
        seen += len(text)
        if number % every:
            continue
        kept.append(text[:budget])
        size += len(kept[-1])
        while size > budget and len(kept) > 1:
            kept, every = kept[::2], every * 2
            size = sum(map(len, kept))
    return kept


def trained(texts: Iterable[str], cache: Path, vocab_size: int) -> Path:
    """Returns the SentencePiece model in the cache that is trained on a sample of the texts, by the sample's hash."""
    picked = sample(texts, BUDGET, REACH)
    if not picked:
        raise ConfigError("there is no text to train a tokenizer on: give tokenizer.path, or a source of raw text.")
    digest = hashlib.sha256(f"{spm.__version__} bpe {vocab_size}".encode())
    for text in picked:
        digest.update(hashlib.sha256(text.encode()).digest())

    def build(target: Path) -> None:
        target.write_bytes(train(picked, Training(vocab_size=vocab_size))["tokenizer.model"])

    return build_once(cache / "tokenizers" / f"{digest.hexdigest()[:32]}.model", build)


def library(kind: Kind) -> str:
    """Returns the library that trains tokenizers of a kind, with its version, which the result may depend on."""
    name = "tokenizers" if kind == "byte-bpe" else "sentencepiece"
    return f"{name} {importlib.metadata.version(name)}"


def _sentencepiece(texts: list[str], settings: Training) -> dict[str, bytes]:
    model = io.BytesIO()
    # What is not chosen is not passed, since SentencePiece writes what it is passed into the model.
    chosen: dict[str, Any] = {
        "control_symbols": settings.special_tokens,
        "character_coverage": settings.character_coverage,
        "split_digits": settings.split_digits,
    }
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=(part for text in texts for part in _paragraphs(text)),
            model_writer=model,
            model_type=settings.kind,
            vocab_size=settings.vocab_size,
            byte_fallback=True,
            normalization_rule_name=RULES[settings.normalization],
            # A text comes back exactly: no space is added or removed.
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,  # indentation is a token, not one per space
            max_sentence_length=1 << 20,
            num_threads=4,  # fixed, since it is written into the model and so into its fingerprint
            minloglevel=2,
            **{name: value for name, value in chosen.items() if value},
        )
    except RuntimeError as error:
        raise ConfigError(
            f"no tokenizer with vocab_size {settings.vocab_size} can be trained on these texts: {error}"
        ) from error
    return {"tokenizer.model": model.getvalue()}


BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
"""Ends of a document in a byte-level vocabulary, under Llama 3's names."""


def _byte_bpe(texts: list[str], settings: Training) -> dict[str, bytes]:
    try:
        from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    except ImportError:
        raise missing("tokenizers", "hf", "a byte-level BPE") from None
    part = Tokenizer(models.BPE())
    if settings.normalization != "none":
        part.normalizer = {"nfc": normalizers.NFC, "nfkc": normalizers.NFKC}[settings.normalization]()
    digits = [pre_tokenizers.Digits(individual_digits=True)] if settings.split_digits else []
    words = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    part.pre_tokenizer = pre_tokenizers.Sequence([*digits, words, as_bytes])
    part.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size,
        special_tokens=[BOS, EOS, *settings.special_tokens],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    part.train_from_iterator(texts, trainer)
    if part.get_vocab_size() != settings.vocab_size:
        raise ConfigError(
            f"no tokenizer with vocab_size {settings.vocab_size} can be trained on these texts: "
            f"they give one of {part.get_vocab_size()} tokens."
        )
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "clean_up_tokenization_spaces": False,
    }
    return {
        "tokenizer.json": part.to_str(pretty=True).encode(),
        "tokenizer_config.json": json.dumps(config, indent=2).encode(),
    }


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
