"""Raw text to tokens on disk, once: later runs and other ranks find the pair in the cache."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from torchladder.data.base import Tokenizer
from torchladder.data.cache import build_once
from torchladder.data.indexed import Writer, dtype_for
from torchladder.data.sources import Document, Source, held_out
from torchladder.registry import ConfigError

FORMAT = 1
"""Raised when the same text and tokenizer would give other files, so that older ones in a cache are left alone."""
BATCH = 1 << 22
"""Characters that are tokenized at once."""


class Prepared(NamedTuple):
    """A tokenized source: the prefixes of its two .bin/.idx pairs. Either may hold no documents."""

    train: Path
    validation: Path


def prepare(
    source: Source, tokenizer: Tokenizer, cache: Path, validation_fraction: float = 0.02, bos: bool = False
) -> Prepared:
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
        tokenize(source, tokenizer, folder, validation_fraction, bos)
        _write_text(folder / "settings.json", json.dumps({"name": source.name, **settings}, indent=2))

    folder = build_once(cache / "tokens" / name, build)
    return Prepared(folder / "train", folder / "validation")


def tokenize(
    source: Source, tokenizer: Tokenizer, folder: Path, validation_fraction: float = 0.02, bos: bool = False
) -> Prepared:
    """Writes the tokens of a source into ``folder`` as the pairs ``train`` and ``validation``, with progress.

    Raises:
        ConfigError: as ``prepare``.
    """
    _check(tokenizer, validation_fraction, bos)
    out = Prepared(folder / "train", folder / "validation")
    dtype = dtype_for(tokenizer.vocab_size)
    with (
        Writer(out.train, dtype) as train,
        Writer(out.validation, dtype) as validation,
        Report(source.name, source.size()) as report,
    ):
        for documents in _batches(source.documents()):
            encoded = tokenizer.encode_batch([document.text for document in documents])
            for document, ids in zip(documents, encoded, strict=True):
                _check_range(ids, tokenizer, f"{source.name}, {document.identity}")
                writer = validation if held_out(document.identity, validation_fraction) else train
                writer.add(np.concatenate([[tokenizer.bos] * bos, ids, [tokenizer.eos]]).astype(dtype))
            tokens = sum(len(ids) + 1 + bos for ids in encoded)
            report.add(len(documents), tokens, sum(document.size for document in documents))
    return out


def _check(tokenizer: Tokenizer, validation_fraction: float, bos: bool) -> None:
    if not 0 <= validation_fraction < 1:
        raise ConfigError(f"validation_fraction is {validation_fraction}; it is a share, at least 0 and below 1.")
    if bos and tokenizer.bos is None:
        raise ConfigError("bos is on, but the tokenizer has no bos token: leave bos off.")


def _check_range(ids: np.ndarray, tokenizer: Tokenizer, where: str) -> None:
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < tokenizer.vocab_size:
        bad = int(ids.max()) if ids.min() >= 0 else int(ids.min())
        raise ConfigError(f"{where}: the tokenizer gives token {bad}, its vocabulary has {tokenizer.vocab_size}.")


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


class Report:
    """Progress of tokenizing: a bar with tokens per second and time left on a terminal, a plain line elsewhere.

    Args:
        name: what is tokenized.
        size: bytes there are to read.
        every: seconds between two plain lines.
    """

    def __init__(self, name: str, size: int, every: float = 15.0) -> None:
        self._console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._name, self._size, self._every = name, size, every
        self._documents = self._tokens = self._done = 0
        self._start = self._said = time.monotonic()
        self._task = self._bar.add_task(f"tokenizing {name}", total=size, rate="")

    def __enter__(self) -> Report:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._bar.stop()
        if kind is None:
            self._say(f"{self._line()}, {time.monotonic() - self._start:.1f} s")

    def add(self, documents: int, tokens: int, size: int) -> None:
        """Counts what has been done since the last call."""
        self._documents += documents
        self._tokens += tokens
        self._done += size
        self._bar.update(self._task, completed=self._done, rate=self._rate())
        if not self._console.is_terminal and time.monotonic() - self._said > self._every:
            left = (time.monotonic() - self._start) * (self._size / max(self._done, 1) - 1)
            self._say(f"{self._line()}, {self._done / max(self._size, 1):.0%}, {max(left, 0):.0f} s left")

    def _line(self) -> str:
        return f"tokenizing {self._name}: {self._documents:,} documents, {self._tokens:,} tokens, {self._rate()}"

    def _rate(self) -> str:
        return f"{self._tokens / max(time.monotonic() - self._start, 1e-9):,.0f} tokens/s"

    def _say(self, line: str) -> None:
        self._said = time.monotonic()
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)
