"""A Hugging Face folder: its config.json and its tensors, read one by one from safetensors shards and written so."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from torchladder.registry import ConfigError

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"

ASSETS = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
"""Files that go along with a model as they are."""

SHARD_BYTES = 2 << 30
"""Bytes of a shard, unless a single tensor is larger."""


@dataclass(frozen=True)
class Stored:
    """A tensor on disk: where, and of what kind."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


class Folder:
    """A model as Hugging Face keeps it.

    Args:
        path: the folder.

    Raises:
        ConfigError: it is no such folder, or a file is damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        file = self.path / CONFIG
        if not file.is_file():
            raise ConfigError(f"{str(path)!r} is no Hugging Face folder: there is no {CONFIG} in it.")
        self.config: dict[str, Any] = _json(file)
        self._open: tuple[Path, Any] | None = None

    @cached_property
    def tensors(self) -> dict[str, Stored]:
        """Name -> what is stored, file by file."""
        found = {}
        for file in self._files():
            with _opened(file) as content:
                for name in content.keys():  # noqa: SIM118 - not a dict
                    kept = content.get_slice(name)
                    dtype = _DTYPES.get(kept.get_dtype())
                    if dtype is None:
                        raise ConfigError(f"{file}: {name} is of type {kept.get_dtype()}, known: {', '.join(_DTYPES)}.")
                    found[name] = Stored(file, tuple(kept.get_shape()), dtype)
        return found

    def read(self, name: str) -> Tensor:
        """Returns a tensor; its file stays open until one of another file is read."""
        file = self.tensors[name].file
        if self._open is None or self._open[0] != file:
            self._open = None  # closed before the next is opened: pages of both would count as memory
            self._open = file, _opened(file)
        return self._open[1].get_tensor(name)

    def assets(self) -> list[Path]:
        """Returns the files of the tokenizer and of generation."""
        return [self.path / name for name in ASSETS if (self.path / name).is_file()]

    def _files(self) -> list[Path]:
        index = self.path / INDEX
        names = ["model.safetensors"]
        if index.is_file():
            where = _json(index).get("weight_map")
            if not isinstance(where, dict):
                raise ConfigError(f"{index} has no weight_map.")
            names = sorted(set(where.values()))
        for name in names:
            if not (self.path / name).is_file():
                raise ConfigError(f"{self.path}: {name} is not there; weights are read from safetensors only.")
        return [self.path / name for name in names]


def write(
    path: Path, config: dict[str, Any], stored: dict[str, int], read: Callable[[str], Tensor], keep: bool = True
) -> None:
    """Writes the config.json and the shards of a model, holding one shard at a time.

    Args:
        path: a folder that is there.
        config: of the config.json.
        stored: name -> bytes, in the order of the shards.
        read: gives a tensor.
        keep: whether this process writes; one that does not takes part in reading all the same.
    """
    files = list(shards(stored, SHARD_BYTES))
    where: dict[str, str] = {}
    for number, names in enumerate(files, start=1):
        single = len(files) == 1
        file = "model.safetensors" if single else f"model-{number:05}-of-{len(files):05}.safetensors"
        tensors = {}
        for name in names:
            tensor = read(name)
            if keep:
                tensors[name] = tensor.contiguous().cpu()
        where.update(dict.fromkeys(names, file))
        if keep:
            _library(path / file).torch.save_file(tensors, path / file, metadata={"format": "pt"})
    if keep:
        (path / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    if keep and len(files) > 1:
        index = {"metadata": {"total_size": sum(stored.values())}, "weight_map": where}
        (path / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def shards(stored: dict[str, int], limit: int) -> Iterator[list[str]]:
    """Cuts names, with their bytes, into runs of at most ``limit`` bytes, or of a single larger one."""
    names: list[str] = []
    held = 0
    for name, size in stored.items():
        if names and held + size > limit:
            yield names
            names, held = [], 0
        names.append(name)
        held += size
    yield names


def _json(file: Path) -> dict[str, Any]:
    try:
        loaded = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: {error}") from None
    if not isinstance(loaded, dict):
        raise ConfigError(f"{file} holds no JSON object.")
    return loaded


def _opened(file: Path) -> Any:
    library = _library(file)
    try:
        return library.safe_open(file, framework="pt")
    except library.SafetensorError as error:
        raise ConfigError(f"{file} is damaged: {error}.") from None


def _library(file: Path) -> ModuleType:
    try:
        import safetensors.torch
    except ImportError:
        raise ConfigError(f"{file} needs the package safetensors: pip install 'torchladder[hf]'.") from None
    return safetensors


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
