"""Opens files to evaluate on: text is tokenized once into the cache, token files are read directly."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torchladder import data, models
from torchladder.config import Config
from torchladder.data.corpus import Corpus, SourceLoader
from torchladder.data.disk_cache import DEFAULT_FOLDER, build_once
from torchladder.data.file_patterns import match_files
from torchladder.data.prepare.text_counts import MAX_UNKNOWN_FRACTION
from torchladder.data.source_config import SourceConfig
from torchladder.data.text import file_formats
from torchladder.data.text.document_parsers import FileSlice
from torchladder.data.text.document_reader import DocumentReader, OnError
from torchladder.inference.trained_model import NoTokenizerError, TrainedModel


@dataclass(frozen=True, eq=False)
class EvalDocuments:
    """The documents of a file as tokens.

    Attributes:
        bytes: of its text in UTF-8; None for a file of tokens.
    """

    path: Path
    corpus: Corpus
    bytes: int | None


@dataclass(frozen=True)
class EvalFiles:
    """Files of text or tokens to evaluate on, tokenized once per tokenizer.

    Attributes:
        text_key: key or column of the text; None: that of the run's sources if all have the same.
        on_error: how to handle an unreadable document.
        bos: whether documents of text begin with the tokenizer's bos; None: as in the run.
        check_tokenizer: refuse tokens that another tokenizer has written; None: as in the run.
        max_unknown_fraction: of the tokens of a text; None: as in the run.

    Raises:
        ConfigError: a file is missing or of an unknown kind.
    """

    paths: Sequence[Path]
    text_key: str | None = None
    on_error: OnError = "error"
    bos: bool | None = None
    check_tokenizer: bool | None = None
    max_unknown_fraction: float | None = None
    _opened: dict[str, list[EvalDocuments]] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        for path in self.paths:
            SourceConfig(path=str(path)).check()

    def open_for(self, trained: TrainedModel) -> list[EvalDocuments]:
        """Returns the files as tokens of a model's tokenizer.

        Raises:
            ConfigError: a document is unreadable, a file is text and there is no tokenizer, or the tokenizer differs
                from the one that the model was trained with.
        """
        config = trained.config
        vocab_size, fingerprint = models.resolve(config.model).vocab_size, trained.tokenizer_fingerprint
        key = repr((config.tokenizer, config.data, fingerprint, vocab_size))
        if key not in self._opened:
            cache = data.cache_path(getattr(config.data, "cache_folder", DEFAULT_FOLDER))
            try:
                tokenizer = trained.build_tokenizer()
            except NoTokenizerError:
                if not all(SourceConfig(path=str(path)).is_tokens for path in self.paths):
                    raise
                tokenizer = None  # tokens can be read without one
            loader = SourceLoader(
                tokenizer,
                cache,
                validation_fraction=0.0,
                bos=self._setting("bos", config, False),
                vocab_size=vocab_size,
                tokenizer_fingerprint=fingerprint,
                check_tokenizer=self._setting("check_tokenizer", config, True),
                max_unknown_fraction=self._setting("max_unknown_fraction", config, MAX_UNKNOWN_FRACTION),
            )
            self._opened[key] = [self._open(path, loader, config) for path in self.paths]
        return self._opened[key]

    def _setting(self, name: str, config: Config, default: Any) -> Any:
        """Returns a setting of these files, or else of the run's data."""
        given = getattr(self, name)
        return getattr(config.data, name, default) if given is None else given

    def _open(self, path: Path, loader: SourceLoader, config: Config) -> EvalDocuments:
        source = SourceConfig(path=str(path))
        if source.is_tokens:
            return EvalDocuments(path, loader.open(source, "train"), None)
        text_key = self.text_key
        if text_key is None:
            texts = [source for source in getattr(config.data, "sources", []) if not source.is_tokens]
            keys = {getattr(source, "text_key", "text") for source in texts}
            text_key = keys.pop() if len(keys) == 1 else "text"
        source = SourceConfig(path=str(path), text_key=text_key, on_error=self.on_error)
        corpus = loader.open(source, "train")

        def count_bytes(target: Path) -> None:
            texts = DocumentReader(text_key, self.on_error).read(FileSlice.whole(path))
            target.write_text(str(sum(len(text.encode()) for _, text in texts)))

        size = build_once(loader.cache / "sizes" / source.text_source().stamp(), count_bytes)
        return EvalDocuments(path, corpus, int(size.read_text()))


def expand_paths(patterns: Sequence[str]) -> list[Path]:
    """Returns the files that paths, folders (recursively) and globs name, each once; a .idx stands for its .bin.

    Raises:
        ConfigError: a pattern matches no file.
    """

    def is_readable(file: Path) -> bool:
        return file_formats.is_text_file(file) or file.suffix in (".bin", ".idx")

    found: dict[str, Path] = {}
    for file in match_files(patterns, is_readable, file_formats.TEXT_FILES):
        file = file.with_suffix(".bin") if file.suffix == ".idx" else file
        found.setdefault(os.path.abspath(file), Path(os.path.normpath(file)))
    return list(found.values())
