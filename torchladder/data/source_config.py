"""Entries of ``data.sources``: the keys of every source, and those of the source that the entry names."""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from torchladder.data import sources
from torchladder.data.file_patterns import as_list, match_files, warn_once
from torchladder.data.text.text_files import TextFiles
from torchladder.registry import ConfigError, require, unknown_name

PATH_HELP = "A file, folder or glob, or a list of those. All files are one source, each glob in sorted order."


@dataclass(frozen=True, init=False)
class SourceConfig:
    """One entry of ``data.sources``.

    ``SourceConfig(name="text", path="a.txt")`` is an instance of a subclass that also has the parameters of the source
    as fields. Without a name, the path decides which source it is.

    Attributes:
        kind: the registered name of the source.

    Raises:
        ConfigError: no source has that name, or the source has no such key.
    """

    name: str = ""
    """The registered source; empty: detected from the path."""
    label: str = ""
    """What reports and tables of weights call the source; empty: its name and path."""
    weight: float = 1.0
    """Share of the rows, relative to the other sources."""
    language: str = ""
    """Its language, if data.domains, data.languages or data.temperature decide the shares."""
    domain: str = ""
    """Its domain, if data.domains decides the shares."""
    repeat: bool | None = None
    """Start over when the source is exhausted; unset: as data.repeat."""

    kind: ClassVar[str] = ""

    def __new__(cls, **settings: Any) -> SourceConfig:
        return object.__new__(cls if cls.kind else cls.subclass_for(settings))

    @staticmethod
    def subclass_for(settings: Mapping[str, Any]) -> type[SourceConfig]:
        """Returns the subclass for an entry with these keys."""
        name, paths = settings.get("name"), as_list(settings.get("path") or [])
        kind = str(name or sources.detect_source([path for path in paths if isinstance(path, str)]))
        made = _subclass(kind, sources.registry.get(kind))
        known = [field.name for field in dataclasses.fields(made)]
        for key in settings:
            if key not in known:
                raise unknown_name("key", key, known, f"source {kind!r}")
        require(bool(name or paths), 'a source needs a path, or a name such as "python-stdlib".')
        return made

    @staticmethod
    def subclasses() -> dict[str, type[SourceConfig]]:
        """Returns the subclasses of all registered sources by name."""
        return {kind: _subclass(kind, sources.registry.get(kind)) for kind in sources.registry.names()}

    @property
    def title(self) -> str:
        """What reports and tables of weights call the source."""
        return self.label or " ".join(filter(None, (self.name, *as_list(getattr(self, "path", "")))))

    @property
    def is_tokens(self) -> bool:
        """Whether the source is tokens already, and not text."""
        return self.kind in sources.token_formats

    def files(self, exclude: Iterable[str] = ()) -> list[Path]:
        """Returns the files of a source of tokens, except those that a pattern of ``exclude`` names.

        Raises:
            ConfigError: no file is found, or all are excluded.
        """
        found = self._all_files()
        kept = [file for file in found if not any(matches_file(pattern, file) for pattern in exclude)]
        require(bool(kept or not found), f"data.exclude leaves no file of the source {self.title}.")
        return kept

    def real_files(self, exclude: Iterable[str] = ()) -> list[str]:
        """Returns the real paths of the files that the source reads; a .bin stands for its pair."""
        if self.is_tokens:
            files = [file.with_suffix(".bin") if file.suffix == ".idx" else file for file in self.files(exclude)]
        else:
            read = self.text_source()
            files = [file for _, file in read.files] if isinstance(read, TextFiles) else []
        return list(map(os.path.realpath, files))

    def text_source(self) -> sources.TextSource:
        """Returns the documents of a source of text."""
        return sources.registry.build(dataclasses.replace(self, name=self.kind))

    def check(self, exclude: Iterable[str] = ()) -> set[str]:
        """Looks for the source's files without reading them; returns the patterns of ``exclude`` that name one.

        Raises:
            ConfigError: as ``files`` and ``text_source``.
        """
        if not self.is_tokens:
            self.text_source()
            return set()
        self.files(exclude)
        found = self._all_files()
        return {pattern for pattern in exclude if any(matches_file(pattern, file) for file in found)}

    def _all_files(self) -> list[Path]:
        suffixes = sources.token_formats[self.kind].suffixes
        patterns = [sources.token_path(path) for path in as_list(getattr(self, "path", []))]
        what = "token file" + (f". Known: {', '.join(suffixes)}" if suffixes else "")
        return list(match_files(patterns, lambda file: not suffixes or file.suffix.lower() in suffixes, what))


@cache
def _subclass(kind: str, component: Any) -> type[SourceConfig]:
    fields, parameters = sources.registry.config_fields(kind), inspect.signature(component).parameters
    runtime = () if kind in sources.token_formats else sources.registry.runtime_args
    for key in parameters:
        if key in SourceConfig.__dataclass_fields__ or key in runtime:
            raise ConfigError(f"data source {kind!r}: the parameter name {key!r} is reserved. Rename it.")
    if "files" in parameters:
        fields.insert(0, ("path", str | list[str], dataclasses.field(metadata={"help": PATH_HELP})))
    return dataclasses.make_dataclass(
        "SourceConfig", fields, bases=(SourceConfig,), frozen=True, kw_only=True, namespace={"kind": kind}
    )


def warn_of_shared_files(
    training: Sequence[SourceConfig], validation: Sequence[SourceConfig], exclude: Sequence[str] = ()
) -> None:
    """Warns of files that two sources read: training reads them for each, validation measures what was trained on."""
    first_readers: dict[str, SourceConfig] = {}
    for number, source in enumerate((*training, *validation)):
        shared = []
        for file in source.real_files(exclude):
            first = first_readers.setdefault(file, source)
            shared += [(file, first)] if first is not source else []
        if shared:
            (file, first), more = shared[0], len(shared) - 1
            trained = number < len(training)
            effect = "its share of the rows is that of both" if trained else "validation reads what the run trains on"
            files = f"{file}{f' and {more:,} other files' if more else ''}"
            warn_once(f"the sources {first.title} and {source.title} both read {files}: {effect}")


def matches_file(pattern: str, file: Path) -> bool:
    """Returns whether a pattern names a file: by its path, its name, or its name without the suffix."""
    return any(fnmatch(name, pattern) for name in (str(file), file.name, file.stem))
