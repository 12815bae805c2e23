"""Reads and writes Hugging Face folders: config.json and shards of weights, one tensor or one shard at a time."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from torchladder.registry import ConfigError

HF_CONFIG_FILE = "config.json"
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
"""Files of weights that are not sharded, the preferred one first; an index has the suffix ``.index.json``."""
INDEX_FILE = "model.safetensors.index.json"

ASSET_FILES = (
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
"""Files of the tokenizer and of generation, copied unchanged."""

TEXT_MODELS = {"gemma3": "gemma3_text"}
"""``model_type`` of a model with images -> that of its text model."""
TEXT_PREFIX = "language_model."
"""Prefix of the tensors of the text model in a model with images."""

MAX_SHARD_BYTES = 2 << 30
"""Maximum size of a shard: 2 GiB, unless a single tensor is larger."""

LIT_GPT_SUFFIX = ".pth"
"""Suffix of a lit-gpt checkpoint: weights without the settings of their model."""

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types of weights by their name in safetensors."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor on disk."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


class HFFolder:
    """A Hugging Face folder, opened for reading. Of a model with images it is the folder of its text model.

    Attributes:
        config: the content of config.json.
        config_file: its path, which errors name.
        prefix: of the names of tensors in the files of weights.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        if not is_hf_folder(self.path):
            hint = lit_gpt_hint(self.path)
            raise ConfigError(f"{str(path)!r} is not a Hugging Face folder: it has no {HF_CONFIG_FILE}.{hint}")
        self.config_file = self.path / HF_CONFIG_FILE
        self.config = _read_json(self.config_file)
        self.prefix = ""
        if (model_type := str(self.config.get("model_type"))) in TEXT_MODELS:
            text_config = self.config.get("text_config", {})
            if not isinstance(text_config, dict):
                raise ConfigError(f"{self.config_file}: text_config = {json.dumps(text_config)}: must be an object.")
            is_tied = self.config.get("tie_word_embeddings", True)
            self.config = {**text_config, "model_type": TEXT_MODELS[model_type], "tie_word_embeddings": is_tied}
            self.prefix = TEXT_PREFIX
        self._open: tuple[Path, Any] | None = None

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """All tensors by name, file by file, without the prefix."""
        tensors = {}
        for file in self._weight_files():
            for full_name, shape, dtype in _entries(file):
                if not full_name.startswith(self.prefix):
                    continue
                name = full_name.removeprefix(self.prefix)
                tensors[name] = StoredTensor(file, shape, check_dtype(file, name, dtype))
        return tensors

    @property
    def holds_other_weights(self) -> bool:
        """Whether the folder has safetensors files that are not its weights."""
        return {*self.path.glob("*.safetensors")} != {stored.file for stored in self.tensors.values()}

    def read_tensor(self, name: str) -> Tensor:
        """Returns a tensor. Its file stays open until a tensor of another file is read."""
        file = self.tensors[name].file
        if self._open is None or self._open[0] != file:
            self._open = None  # close first: the mapped pages of both files would count as memory
            self._open = file, read_pickled(file) if file.suffix == ".bin" else _open_safetensors(file)
        content, name = self._open[1], self.prefix + name
        return content[name] if isinstance(content, dict) else content.get_tensor(name)

    def asset_files(self) -> list[Path]:
        """Returns the files of the tokenizer and of generation."""
        return [self.path / name for name in ASSET_FILES if (self.path / name).is_file()]

    def _weight_files(self) -> list[Path]:
        """Returns the files of the weights that transformers reads."""
        for name in WEIGHT_FILES:
            index = self.path / f"{name}.index.json"
            if (self.path / name).is_file():
                return [self.path / name]
            if not index.is_file():
                continue
            weight_map = _read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
                raise ConfigError(f"{index} has no weight_map of tensors to files.")
            files = [self.path / file for file in sorted({*weight_map.values()})]
            if missing := [file.name for file in files if not file.is_file()]:
                raise ConfigError(f"{self.path}: {missing[0]} is missing, which {index.name} names.")
            return files
        raise ConfigError(f"{self.path} has no weights: neither {' nor '.join(WEIGHT_FILES)}, whole or sharded.")


def is_hf_folder(path: Path) -> bool:
    """Whether a folder has a config.json."""
    return (path / HF_CONFIG_FILE).is_file()


def lit_gpt_hint(path: Path) -> str:
    """Returns how a lit-gpt checkpoint becomes a model for evaluation, generation and conversion; else nothing."""
    if path.suffix != LIT_GPT_SUFFIX:
        return ""
    return (
        " A lit-gpt file has no settings of its model: write it as step 0 of a run, with "
        f"--checkpoint.initial_load_in_hf --checkpoint.initial_load_path {path} --checkpoint.create_seed_checkpoint."
    )


def read_pickled(file: Path, key: str = "") -> dict[str, Tensor]:
    """Returns the tensors by name that ``torch.save`` wrote, or those under ``key`` if it wrote more than tensors.

    No code in the file is run, and tensors are mapped where possible.
    """
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # torch raises no narrower type
        raise ConfigError(f"{file} is damaged or holds more than tensors ({type(error).__name__}).") from None
    if isinstance(content, dict):
        content = content.get(key, content)
    if not isinstance(content, dict) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise ConfigError(f"{file} does not hold tensors by name.")
    return content


def check_dtype(file: Path, name: str, dtype: torch.dtype | str) -> torch.dtype:
    """Returns the type of a tensor if it is one of weights, else raises ``ConfigError``."""
    if not isinstance(dtype, torch.dtype) or dtype not in DTYPES.values():
        raise ConfigError(f"{file}: {name} has the type {dtype}. Known: {', '.join(DTYPES)}.")
    return dtype


def write_hf_folder(
    path: Path,
    config: dict[str, Any],
    sizes: Mapping[str, int],
    read_tensor: Callable[[str], Tensor],
    is_writer: bool = True,
) -> None:
    """Writes config.json, the shards and their index, with one shard in memory at a time.

    Args:
        path: an existing folder.
        config: the content of config.json.
        sizes: tensor name -> bytes, in the order of the shards.
        read_tensor: returns a tensor by name.
        is_writer: whether this rank writes; the others only call ``read_tensor``, which may be a collective.
    """
    shards = list(split_into_shards(sizes, MAX_SHARD_BYTES))
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {}
        for name in names:
            tensor = read_tensor(name)
            if is_writer:
                tensors[name] = tensor.contiguous().cpu()
        weight_map.update(dict.fromkeys(names, file))
        if is_writer:
            _safetensors(path / file).torch.save_file(tensors, path / file, metadata={"format": "pt"})
    if is_writer:
        (path / HF_CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
        if len(shards) > 1:
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
            (path / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def split_into_shards(sizes: Mapping[str, int], max_bytes: int) -> Iterator[list[str]]:
    """Yields the names of each shard: in order, at most ``max_bytes`` together, or a single larger tensor."""
    names: list[str] = []
    total = 0
    for name, size in sizes.items():
        if names and total + size > max_bytes:
            yield names
            names, total = [], 0
        names.append(name)
        total += size
    yield names


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file} is not a JSON object.")
    return content


def _entries(file: Path) -> Iterator[tuple[str, tuple[int, ...], torch.dtype | str]]:
    """Yields the name, the shape and the type of each tensor in a file of weights."""
    if file.suffix == ".bin":
        yield from ((name, tuple(tensor.shape), tensor.dtype) for name, tensor in read_pickled(file).items())
        return
    with _open_safetensors(file) as content:
        for name in content.keys():  # noqa: SIM118 - not a dict
            tensor = content.get_slice(name)
            yield name, tuple(tensor.get_shape()), DTYPES.get(tensor.get_dtype(), tensor.get_dtype())


def _open_safetensors(file: Path) -> Any:
    library = _safetensors(file)
    try:
        return library.safe_open(file, framework="pt")
    except library.SafetensorError as error:
        raise ConfigError(f"{file} is damaged: {error}.") from None


def _safetensors(file: Path) -> ModuleType:
    try:
        import safetensors.torch
    except ImportError:
        raise ConfigError(
            f"{file} needs the package safetensors: pip install safetensors, of the extra torchladder[hf]."
        ) from None
    return safetensors
