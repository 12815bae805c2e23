"""Files as a model reads them: text tokenized once, or tokens as they are."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torchladder import data
from torchladder.config import Config
from torchladder.data.corpus import Corpus, SourceLoader
from torchladder.data.disk_cache import DEFAULT_FOLDER, build_once
from torchladder.data.file_patterns import match_files
from torchladder.data.source_config import SourceConfig
from torchladder.data.text import file_formats
from torchladder.data.text.document_reader import DocumentReader, OnError
from torchladder.data.text.file_formats import FileSlice
from torchladder.inference.evaluation.eval_weights import EvalWeights
from torchladder.inference.trained_model import tokenizer_of
from torchladder.registry import ConfigError


@dataclass(frozen=True, eq=False)
class EvalDocuments:
    """A file as tokens.

    Attributes:
        path: the file, as it was named.
        corpus: its tokens.
        bytes: of its texts in UTF-8; None where it holds tokens.
    """

    path: Path
    corpus: Corpus
    bytes: int | None


@dataclass(frozen=True)
class EvalFiles:
    """Files to evaluate on, turned into tokens once for each tokenizer, in the cache of the runs.

    Attributes:
        paths: of text or tokens.
        text_key: the text's key or column; None takes the one of the run's sources, where they agree on one.
        on_error: what a document that cannot be read does.
        bos: whether documents of text begin with the tokenizer's bos; None does what the run did.

    Raises:
        ConfigError: a file is not there, or of no known kind.
    """

    paths: Sequence[Path]
    text_key: str | None = None
    on_error: OnError = "error"
    bos: bool | None = None
    _opened: dict[str, list[EvalDocuments]] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        for path in self.paths:
            SourceConfig(path=str(path)).check()

    def of(self, weights: EvalWeights) -> list[EvalDocuments]:
        """Returns the files as a model reads them.

        Raises:
            ConfigError: a document cannot be read, a text has no tokenizer, or not the one that the model knows.
        """
        config = weights.config
        run = repr((config.tokenizer, config.data, weights.tokenizer))
        if run not in self._opened:
            cache = data.cache_path(getattr(config.data, "cache_folder", DEFAULT_FOLDER))
            bos = getattr(config.data, "bos", False) if self.bos is None else self.bos
            opener = SourceLoader(self._tokenizer(weights), cache, validation_fraction=0.0, bos=bos)
            self._opened[run] = [self._open(path, opener, weights) for path in self.paths]
        return self._opened[run]

    def _tokenizer(self, weights: EvalWeights) -> data.Tokenizer | None:
        """Returns the tokenizer; none where there is none and all files are tokens."""
        try:
            return tokenizer_of(weights.path, weights.config)
        except ConfigError:
            if all(SourceConfig(path=str(path)).is_tokens for path in self.paths):
                return None
            raise

    def _key(self, config: Config) -> str:
        if self.text_key is not None:
            return self.text_key
        sources = getattr(config.data, "sources", [])
        keys = {getattr(source, "text_key", "text") for source in sources if not source.is_tokens}
        return keys.pop() if len(keys) == 1 else "text"

    def _open(self, path: Path, opener: SourceLoader, weights: EvalWeights) -> EvalDocuments:
        source = SourceConfig(path=str(path))
        if source.is_tokens:
            return EvalDocuments(path, opener.open(source, "train"), None)
        text_key = self._key(weights.config)
        source = SourceConfig(path=str(path), text_key=text_key, on_error=self.on_error)
        corpus = opener.open(source, "train")

        def count(target: Path) -> None:
            texts = DocumentReader(text_key, self.on_error).read(FileSlice.whole(path))
            target.write_text(str(sum(len(text.encode()) for _, text in texts)))

        size = build_once(opener.cache / "sizes" / source.text_source().stamp(), count)
        return EvalDocuments(path, corpus, int(size.read_text()))


def expand_paths(patterns: Sequence[str]) -> list[Path]:
    """Returns the files that paths, folders (to the bottom) and globs name, each once, a pair of tokens by its .bin.

    Raises:
        ConfigError: a pattern names none.
    """
    found: dict[str, Path] = {}
    for pattern in patterns:
        for file in match_files(pattern, _is_readable, file_formats.TEXT_FILES):
            one = file.with_suffix(".bin") if file.suffix == ".idx" else file
            found.setdefault(os.path.abspath(one), Path(os.path.normpath(one)))
    return list(found.values())


def _is_readable(file: Path) -> bool:
    return file_formats.is_text_file(file) or file.suffix in (".bin", ".idx")
