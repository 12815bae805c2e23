"""Tokenizes the raw text of a run once: later runs and other ranks find the tokens in the cache."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path

from torchladder.data.disk_cache import build_once
from torchladder.data.formats.indexed import IndexedWriter, dtype_for
from torchladder.data.prepare.document_encoder import DocumentEncoder, batch_by_chars
from torchladder.data.prepare.progress import PrepareProgress
from torchladder.data.prepare.text_counts import MAX_UNKNOWN_FRACTION, TextCounts, check_max_unknown_fraction
from torchladder.data.sources import Document, TextSource, check_validation_fraction, held_out
from torchladder.data.tokenizer import Tokenizer

CACHE_VERSION = 3
"""Increment when the same text and tokenizer produce other files: entries of older versions are then ignored."""


def tokenize_cached(
    source: TextSource,
    tokenizer: Tokenizer,
    cache: Path,
    validation_fraction: float = 0.02,
    bos: bool = False,
    max_unknown_fraction: float = MAX_UNKNOWN_FRACTION,
) -> Path:
    """Tokenizes a source on first use; returns the cache's folder with its .bin/.idx datasets train and validation.

    The cache key is a hash of the content: the same documents, tokenizer, split and ``bos`` share an entry, wherever
    the files lie and whenever they were modified. Files are read for that hash once per (name, size, time).

    Args:
        source: raw documents.
        tokenizer: the tokenizer; each document ends with its eos token.
        cache: the cache folder.
        validation_fraction: fraction of the documents held out for validation.
        bos: whether each document also begins with the tokenizer's bos token.
        max_unknown_fraction: of the tokens; more is an error. It does not change the tokens, so entries are shared.

    Raises:
        ConfigError: the tokenizer has no bos token, returns ids outside its vocabulary or does not know too much of the
            text; a fraction is out of range, or a document cannot be read.
    """
    check_validation_fraction(validation_fraction)
    check_max_unknown_fraction(max_unknown_fraction, "data.max_unknown_fraction")
    encoder = DocumentEncoder(tokenizer, bos=bos, threads=os.cpu_count() or 1)
    stamp = cache / "fingerprints" / source.stamp()
    content = build_once(stamp, lambda path: path.write_text(source.fingerprint())).read_text()
    settings = {
        "format": CACHE_VERSION,
        "source": content,
        "tokenizer": tokenizer.fingerprint,
        "validation_fraction": validation_fraction,
        "bos": bos,
    }
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]

    def build(folder: Path) -> None:
        counts = _write_splits(source, encoder, folder, validation_fraction, max_unknown_fraction)
        content = {"name": source.name, **settings, "text_counts": asdict(counts)}
        (folder / "settings.json").write_text(json.dumps(content, indent=2))

    folder = build_once(cache / "tokens" / key, build)
    known = TextCounts(**json.loads((folder / "settings.json").read_text())["text_counts"])
    known.check(source.name, max_unknown_fraction, "data.max_unknown_fraction")
    return folder


def _write_splits(
    source: TextSource, encoder: DocumentEncoder, folder: Path, validation_fraction: float, max_unknown_fraction: float
) -> TextCounts:
    """Tokenizes a source into the datasets ``train`` and ``validation`` of a folder, and shows progress."""
    dtype = dtype_for(encoder.tokenizer.vocab_size)
    with (
        IndexedWriter(folder / "train", dtype) as train,
        IndexedWriter(folder / "validation", dtype) as validation,
        PrepareProgress(source.name, source.size()) as progress,
    ):
        for documents in batch_by_chars(source.documents(), lambda document: document.text):
            split: dict[bool, list[Document]] = {False: [], True: []}
            for document in documents:
                split[held_out(document.identity, validation_fraction)].append(document)
            for writer, chosen in ((train, split[False]), (validation, split[True])):
                texts, names = [document.text for document in chosen], [document.identity for document in chosen]
                tokens, lengths, counts = encoder(texts, lambda n, names=names: f"{source.name}, {names[n]}")  # type: ignore[misc]
                writer.extend(tokens, lengths)
                progress.update(len(chosen), len(tokens), sum(document.size for document in chosen), counts)
                progress.counts.check(source.name, max_unknown_fraction, "data.max_unknown_fraction", progress.done)
        return progress.counts
