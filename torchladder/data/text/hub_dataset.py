"""Texts of a Hugging Face dataset in streaming mode, from the Hub or local files (extra ``hub``)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

from torchladder.data.extras import missing_package
from torchladder.registry import ConfigError, unknown_name


@dataclass(frozen=True)
class HubDataset:
    """One split of a dataset, as ``datasets.load_dataset`` names it.

    Attributes:
        path: its name on the Hub, a local folder, or the format of ``data_files``.
        config: name of its configuration.
        data_files: files to read, by path or glob.
        revision: commit or tag on the Hub.
        split: name of the split.
        text_key: column of the text.
    """

    path: str
    config: str | None
    data_files: str | list[str] | None
    revision: str | None
    split: str
    text_key: str

    def open(self) -> Any:
        """Returns the ``datasets.IterableDataset``.

        Raises:
            ConfigError: there is no such dataset, split or column.
        """
        options = {"data_files": self.data_files, "revision": self.revision, "split": self.split, "streaming": True}
        datasets = import_datasets()
        try:
            opened = datasets.load_dataset(self.path, self.config, **options)
            columns = opened.column_names or list(next(iter(opened), {}))
        except (OSError, ValueError, StopIteration, datasets.exceptions.DatasetsError) as error:
            why = str(error) or "no file"
            raise ConfigError(f"the dataset {self.path}, split {self.split!r}, cannot be read: {why}") from error
        if self.text_key not in columns:
            raise ConfigError(f"{self.path}: text_key: {unknown_name('column', self.text_key, columns)}")
        return opened

    def texts(self, opened: Any) -> Iterator[str]:
        """Yields the texts of an opened dataset, or of a part of it; empty ones are skipped.

        Raises:
            ConfigError: a document has no text.
        """
        return filter(None, map(self._text, count(), opened))

    def _text(self, number: int, document: dict[str, Any]) -> str:
        text = document.get(self.text_key)
        if not isinstance(text, str):
            kind = type(text).__name__
            raise ConfigError(f"{self.path}, document {number}: {self.text_key!r} holds {kind}, not text.")
        return text


def import_datasets() -> Any:
    """Returns the package ``datasets``.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import datasets
        import datasets.distributed
    except ImportError:
        raise missing_package("datasets", "hub", "the loader hub") from None
    return datasets
