"""Raw text of a run to tokens on disk, once: later runs and other ranks find the pair in the cache."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import NamedTuple

from torchladder.data.dataloader import Tokenizer
from torchladder.data.disk_cache import build_once
from torchladder.data.formats.indexed import IndexedWriter, dtype_for
from torchladder.data.prepare.document_encoder import DocumentEncoder, batch_by_chars
from torchladder.data.prepare.progress import PrepareProgress
from torchladder.data.text.sources import TextSource, held_out
from torchladder.registry import ConfigError

FORMAT = 2
"""Raised when the same text and tokenizer would give other files, so that older ones in a cache are left alone."""


class CachedTokens(NamedTuple):
    """A tokenized source: the prefixes of its two .bin/.idx pairs. Either may hold no documents."""

    train: Path
    validation: Path


def tokenize_cached(
    source: TextSource, tokenizer: Tokenizer, cache: Path, validation_fraction: float = 0.02, bos: bool = False
) -> CachedTokens:
    """Returns the tokens of a source, made on first use.

    The content decides: the same documents, tokenizer, split and framing give the same folder wherever the files lie
    and whenever they were touched. Reading all content to know that happens once per listing of names, sizes and times.

    Args:
        source: raw documents.
        tokenizer: gives their ids; each document ends with its ``eos``.
        cache: folder of the cache.
        validation_fraction: share of the documents held out.
        bos: also begin each document with the tokenizer's ``bos``.

    Raises:
        ConfigError: the tokenizer has no bos, gives ids outside its vocabulary, or a document cannot be read.
    """
    _check(tokenizer, validation_fraction, bos)
    stamp = cache / "fingerprints" / source.stamp()
    content = build_once(stamp, lambda path: _write_text(path, source.fingerprint())).read_text()
    settings = {
        "format": FORMAT,
        "source": content,
        "tokenizer": tokenizer.fingerprint,
        "validation_fraction": validation_fraction,
        "bos": bos,
    }
    name = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]

    def build(folder: Path) -> None:
        tokenize_source(source, tokenizer, folder, validation_fraction, bos)
        _write_text(folder / "settings.json", json.dumps({"name": source.name, **settings}, indent=2))

    folder = build_once(cache / "tokens" / name, build)
    return CachedTokens(folder / "train", folder / "validation")


def tokenize_source(
    source: TextSource, tokenizer: Tokenizer, folder: Path, validation_fraction: float = 0.02, bos: bool = False
) -> CachedTokens:
    """Writes the tokens of a source into ``folder`` as the pairs ``train`` and ``validation``, with progress.

    Raises:
        ConfigError: as ``prepare``.
    """
    framing = _check(tokenizer, validation_fraction, bos)
    out = CachedTokens(folder / "train", folder / "validation")
    dtype = dtype_for(tokenizer.vocab_size)
    with (
        IndexedWriter(out.train, dtype) as train,
        IndexedWriter(out.validation, dtype) as validation,
        PrepareProgress(source.name, source.size()) as report,
    ):
        for documents in batch_by_chars(source.documents(), lambda document: document.text):
            held = [held_out(document.identity, validation_fraction) for document in documents]
            for writer, wanted in ((train, False), (validation, True)):
                chosen = [document for document, is_held in zip(documents, held, strict=True) if is_held is wanted]
                texts, names = [document.text for document in chosen], [document.identity for document in chosen]
                tokens, lengths = framing(texts, lambda n, names=names: f"{source.name}, {names[n]}")  # type: ignore[misc]
                writer.extend(tokens, lengths)
                report.add(len(chosen), len(tokens), sum(document.size for document in chosen))
    return out


def _check(tokenizer: Tokenizer, validation_fraction: float, bos: bool) -> DocumentEncoder:
    if not 0 <= validation_fraction < 1:
        raise ConfigError(f"validation_fraction is {validation_fraction}; it is a share, at least 0 and below 1.")
    return DocumentEncoder(tokenizer, bos=bos, threads=os.cpu_count() or 1)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
