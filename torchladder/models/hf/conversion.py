"""Converts between Hugging Face folders and checkpoints tensor by tensor: the model is never in memory as a whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from torchladder.models.hf import hf_config
from torchladder.models.hf.adapter import HFMetadata
from torchladder.models.hf.hf_folder import HFFolder, write_hf_folder
from torchladder.models.hf.hf_weights import Shape, extend_rows, match_tensors
from torchladder.models.model import registry
from torchladder.registry import ConfigError

MODEL_PREFIX = "model."
"""Prefix of the model's tensors in a checkpoint."""


def hf_to_checkpoint(folder: HFFolder, path: Path, vocab_size: int | None = None) -> None:
    """Writes the weights of a folder as a checkpoint, with one tensor in memory at a time.

    Args:
        folder: the Hugging Face folder.
        path: of the checkpoint.
        vocab_size: rows of the vocabulary; additional ones are the mean of the others. None: those of the folder.
    """
    model = hf_config.model_section(folder.config, folder.config_file)
    rows = vocab_size or model["vocab_size"]
    if rows < model["vocab_size"]:
        raise ConfigError(
            f"a vocabulary of {rows} is too small for {folder.path}: it must be at least {model['vocab_size']}."
        )
    shapes = _tensor_shapes(model["name"], {**model, "vocab_size": rows})
    hf_names = match_tensors(folder, hf_config.adapter_for(model["name"]), shapes)
    stored = {name: folder.tensors[hf_name] for name, hf_name in hf_names.items()}
    state = {
        name: torch.empty(shapes[name], dtype=stored[name].dtype, device="meta")
        for name in sorted(hf_names, key=lambda name: stored[name].file)
    }

    def read_tensor(name: str) -> Tensor:
        tensor = folder.read_tensor(hf_names[name])
        return tensor if tensor.shape == shapes[name] else extend_rows(tensor, rows)

    # One file per tensor: the writer keeps the content of a file in memory until the file is complete.
    writer = dcp.FileSystemWriter(path, single_file_per_rank=False)
    planner = _StreamingPlanner(read_tensor)
    dcp.save({MODEL_PREFIX.rstrip("."): state}, storage_writer=writer, planner=planner, no_dist=True)


def checkpoint_to_hf(
    checkpoint: Path,
    path: Path,
    model: tuple[str, Any],
    metadata: HFMetadata,
    dtype: torch.dtype | None = None,
    prefix: str = MODEL_PREFIX,
    averaged: Sequence[Path] = (),
) -> None:
    """Writes the weights of a checkpoint as a Hugging Face folder, with one shard in memory at a time.

    Args:
        checkpoint: a complete checkpoint.
        path: an existing folder.
        model: name and config of the model; a smaller vocabulary than the checkpoint's leaves out the last rows.
        metadata: entries of config.json in addition to the model's shape.
        dtype: of the written weights; None: as stored.
        prefix: of the weights in the checkpoint.
        averaged: other checkpoints of the same model; the mean of the weights of all is written.
    """
    name, config = model
    readers = [dcp.FileSystemReader(one) for one in (checkpoint, *averaged)]
    stored = {
        key.removeprefix(prefix): tensor
        for key, tensor in readers[0].read_metadata().state_dict_metadata.items()
        if key.startswith(prefix) and isinstance(tensor, TensorStorageMetadata)
    }
    shapes = _tensor_shapes(name, vars(config))
    adapter = hf_config.adapter_for(name)
    _check_shapes(checkpoint, shapes, {key: tuple(stored[key].size) for key in stored}, adapter.vocab_tensors)
    dtypes = {key: dtype or stored[key].properties.dtype for key in shapes}
    most_common = max(dtypes.values(), key=[*dtypes.values()].count)
    hf_entries = adapter.to_hf(config, metadata, most_common)  # refuses what Hugging Face's model does not have
    names = {adapter.hf_name(key): key for key in shapes}

    def read_tensor(hf_name: str) -> Tensor:
        key = names[hf_name]
        tensor = torch.empty(stored[key].size, dtype=stored[key].properties.dtype)
        total = torch.zeros(tensor.shape) if len(readers) > 1 else None
        for reader in readers:
            dcp.load({prefix + key: tensor}, storage_reader=reader, no_dist=True)
            total = None if total is None else total.add_(tensor)
        mean = tensor if total is None else total / len(readers)
        return mean[: shapes[key][0]].to(dtypes[key])

    sizes = {hf_name: torch.Size(shapes[key]).numel() * dtypes[key].itemsize for hf_name, key in names.items()}
    write_hf_folder(path, hf_entries, sizes, read_tensor)


class _StreamingPlanner(DefaultSavePlanner):
    """Reads each tensor only when it is written."""

    def __init__(self, read_tensor: Callable[[str], Tensor]) -> None:
        super().__init__()
        self.read_tensor = read_tensor

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.read_tensor(index.fqn.removeprefix(MODEL_PREFIX))


def _tensor_shapes(name: str, values: dict[str, Any]) -> dict[str, Shape]:
    """Returns the shapes of all tensors of a model; ``values`` may have more keys than the model's config."""
    config_type = registry.config_type(name)
    keys = {field.name for field in fields(config_type)}
    config = config_type(**{key: value for key, value in values.items() if key in keys})
    with torch.device("meta"):
        model = registry.get(name)(config=config, seq_len=1)
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


def _check_shapes(
    path: Path, shapes: dict[str, Shape], stored: dict[str, Shape], vocab_tensors: tuple[str, ...]
) -> None:
    if differing := set(shapes) ^ set(stored):
        name = min(differing)
        only = "model" if name in shapes else "checkpoint"
        raise ConfigError(f"{path} does not hold this model: {name} is only in the {only}.")
    for name, shape in shapes.items():
        cuts = name in vocab_tensors and shape[1:] == stored[name][1:] and shape[0] < stored[name][0]
        if shape != stored[name] and not cuts:
            raise ConfigError(f"{path}: {name} has shape {list(stored[name])}, the model's is {list(shape)}.")
