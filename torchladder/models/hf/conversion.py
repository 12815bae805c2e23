"""Weights of a Hugging Face folder as a checkpoint and back, tensor by tensor: the model is never in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from torchladder.models.hf import hf_config
from torchladder.models.hf import hf_folder as folders
from torchladder.models.hf.hf_config import HFMetadata
from torchladder.models.hf.hf_folder import Folder
from torchladder.models.hf.hf_weights import Shape, extended, match
from torchladder.models.model import registry
from torchladder.registry import ConfigError

PREFIX = "model."
"""Of a model's tensors in a checkpoint."""


def to_checkpoint(folder: Folder, path: Path, vocab_size: int | None = None) -> None:
    """Writes a folder's weights as a checkpoint, holding one tensor at a time.

    Args:
        folder: where they are.
        path: of the checkpoint.
        vocab_size: rows of the vocabulary to write, the new ones the mean of the others; None: those there are.

    Raises:
        ConfigError: the folder's tensors are not those of its config.json, or are more rows than asked for.
    """
    model = hf_config.read(folder.config)
    rows = vocab_size or model["vocab_size"]
    if rows < model["vocab_size"]:
        raise ConfigError(f"a vocabulary of {rows} cannot hold the {model['vocab_size']} tokens of {folder.path}.")
    shapes = _shapes(model["name"], {**model, "vocab_size": rows})
    theirs = match(folder, model["name"], shapes)
    stored = {own: folder.tensors[key] for own, key in theirs.items()}
    state = {
        own: torch.empty(shapes[own], dtype=stored[own].dtype, device="meta")
        for own in sorted(theirs, key=lambda own: stored[own].file)
    }

    def read(own: str) -> Tensor:
        tensor = folder.read(theirs[own])
        return tensor if tensor.shape == shapes[own] else extended(tensor, rows)

    # A file per tensor: the writer holds all that goes into a file until the file is written.
    writer = dcp.FileSystemWriter(path, single_file_per_rank=False)
    dcp.save({PREFIX.rstrip("."): state}, storage_writer=writer, planner=_Streaming(read), no_dist=True)


def from_checkpoint(
    checkpoint: Path, path: Path, model: tuple[str, Any], facts: HFMetadata, dtype: torch.dtype | None = None
) -> None:
    """Writes a checkpoint's weights as a folder, holding one shard at a time.

    Args:
        checkpoint: a complete one.
        path: the folder, which is there.
        model: name and config of the model that it is of; a smaller vocabulary leaves out the last rows.
        facts: what config.json says beside the model's shape.
        dtype: of the written weights; None: as they are.

    Raises:
        ConfigError: the checkpoint is of another model.
    """
    name, config = model
    reader = dcp.FileSystemReader(checkpoint)
    kept = _kept(reader)
    shapes = _shapes(name, vars(config))
    form = hf_config.adapter_of(name)
    _check(checkpoint, shapes, {own: tuple(kept[own].size) for own in kept}, form.vocabulary)
    ours = {form.hf_name(own): own for own in shapes}
    types = {own: dtype or kept[own].properties.dtype for own in shapes}

    def read(key: str) -> Tensor:
        own = ours[key]
        tensor = torch.empty(kept[own].size, dtype=kept[own].properties.dtype)
        dcp.load({PREFIX + own: tensor}, storage_reader=reader, no_dist=True)
        return tensor[: shapes[own][0]].to(types[own])

    sizes = {key: torch.Size(shapes[own]).numel() * types[own].itemsize for key, own in ours.items()}
    main = max(types.values(), key=[*types.values()].count)
    folders.write(path, hf_config.write(name, config, facts, main), sizes, read)


class _Streaming(DefaultSavePlanner):
    """Gives a tensor when it is written, not before."""

    def __init__(self, read: Callable[[str], Tensor]) -> None:
        super().__init__()
        self.read = read

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.read(index.fqn.removeprefix(PREFIX))


def _kept(reader: dcp.FileSystemReader) -> dict[str, TensorStorageMetadata]:
    """Returns what a checkpoint holds of the model."""
    found = reader.read_metadata().state_dict_metadata
    return {
        key.removeprefix(PREFIX): value
        for key, value in found.items()
        if key.startswith(PREFIX) and isinstance(value, TensorStorageMetadata)
    }


def _shapes(name: str, values: dict[str, Any]) -> dict[str, Shape]:
    """Returns the shapes of the tensors of a model with such a config."""
    kind = registry.config_type(name)
    own = {field.name for field in fields(kind)}
    config = kind(**{key: value for key, value in values.items() if key in own})
    with torch.device("meta"):
        model = registry.get(name)(config=config, seq_len=1)
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


def _check(path: Path, shapes: dict[str, Shape], kept: dict[str, Shape], vocabulary: tuple[str, ...]) -> None:
    if set(shapes) != set(kept):
        other = min(set(shapes) ^ set(kept))
        raise ConfigError(f"{path} is not of this model: {other} is in only one of the two.")
    for own, shape in shapes.items():
        cut = own in vocabulary and shape[1:] == kept[own][1:] and shape[0] < kept[own][0]
        if shape != kept[own] and not cut:
            raise ConfigError(f"{path}: {own} has the shape {list(kept[own])}, the model's is {list(shape)}.")
