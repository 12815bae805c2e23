"""Loads a model's weights from a Hugging Face folder or a lit-gpt file and saves them to a folder, also on ranks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.tensor import DTensor, distribute_tensor

from torchladder.models.hf import hf_config
from torchladder.models.hf.adapter import HFAdapter, HFMetadata
from torchladder.models.hf.hf_config import adapter_for
from torchladder.models.hf.hf_folder import HFFolder, write_hf_folder
from torchladder.models.hf.lit_gpt import LitGptFile, is_lit_gpt_file
from torchladder.models.model import Model
from torchladder.registry import ConfigError

Shape = tuple[int, ...]


def match_weights(model: Model, path: str | Path) -> tuple[HFFolder | LitGptFile, dict[str, str]]:
    """Returns the folder, or the lit-gpt file, and parameter name -> tensor name; the model may be on meta.

    Raises ``ConfigError`` if the path holds another model.
    """
    source: HFFolder | LitGptFile
    if is_lit_gpt_file(path):
        source = LitGptFile(path, model.config)
    else:
        source = HFFolder(path)
        section = hf_config.model_section(source.config, source.config_file)
        hf_config.check_compatible(section, model.config, str(source.config_file))
    state: dict[str, Any] = get_model_state_dict(model)  # names without wrappers
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    return source, match_tensors(source, adapter_for(model), shapes)


@torch.no_grad()
def load_hf_weights(model: Model, path: str | Path, whole: Model | None = None) -> None:
    """Loads the weights of a folder or lit-gpt file into a model, whole or sharded; each rank reads its own shard.

    ``whole`` is the same model with all blocks, such as one on the meta device, if ``model`` is a stage of a pipeline.
    If the model's vocabulary is larger than the stored one, the additional rows become the mean of the others. Raises
    ``ConfigError`` if the path holds another model.
    """
    folder, hf_names = match_weights(whole or model, path)
    state: dict[str, Any] = get_model_state_dict(model)
    hf_names = {name: hf_name for name, hf_name in hf_names.items() if name in state}
    extended = {name for name in hf_names if folder.tensors[hf_names[name]].shape != tuple(state[name].shape)}
    # The reader of shards takes every safetensors file in the folder, and no other file.
    read_whole = extended if isinstance(folder, HFFolder) and not folder.holds_other_weights else hf_names.keys()
    prefix = folder.prefix if isinstance(folder, HFFolder) else ""
    if by_shard := {prefix + hf_names[name]: state[name] for name in hf_names if name not in read_whole}:
        reader = HuggingFaceStorageReader(str(folder.path))
        dcp.load(by_shard, storage_reader=reader, no_dist=not dist.is_initialized())
    for name in read_whole:
        parameter, values = state[name], folder.read_tensor(hf_names[name])
        values = extend_rows(values, len(parameter)) if name in extended else values
        values = values.to(parameter.device, parameter.dtype)
        if isinstance(parameter, DTensor):
            values = distribute_tensor(values, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.copy_(values)


@torch.no_grad()
def save_hf_weights(model: Model, path: Path, metadata: HFMetadata, dtype: torch.dtype, is_writer: bool) -> None:
    """Saves a model, whole or sharded, as a folder. All ranks take part; one of them writes.

    Args:
        model: the model.
        path: the folder; it exists on the rank that writes.
        metadata: entries of config.json in addition to the model's shape.
        dtype: of the saved weights.
        is_writer: whether this rank writes.
    """
    adapter = adapter_for(model)
    state: dict[str, Any] = get_model_state_dict(model)  # names without wrappers
    names = {adapter.hf_name(name): name for name in state}

    def read_tensor(hf_name: str) -> Tensor:
        tensor = state[names[hf_name]]
        return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).to(dtype)

    sizes = {hf_name: state[name].numel() * dtype.itemsize for hf_name, name in names.items()}
    write_hf_folder(path, adapter.to_hf(model.config, metadata, dtype), sizes, read_tensor, is_writer)


def extend_rows(tensor: Tensor, rows: int) -> Tensor:
    """Returns the tensor with ``rows`` rows; the additional ones are the mean of the others."""
    mean = tensor.mean(dim=0, keepdim=True, dtype=torch.float32).to(tensor.dtype)
    return torch.cat([tensor, mean.expand(rows - len(tensor), -1)])


def match_tensors(folder: HFFolder | LitGptFile, adapter: HFAdapter, shapes: Mapping[str, Shape]) -> dict[str, str]:
    """Returns parameter name -> tensor name in the folder.

    Raises ``ConfigError`` if a tensor is missing, unexpected, or not of its parameter's shape (``shapes``); parameters
    with one row per token may have more rows than the folder's.
    """
    hf_names = {name: adapter.hf_name(name) for name in shapes}
    missing = [hf_name for hf_name in hf_names.values() if hf_name not in folder.tensors]
    if missing:
        raise ConfigError(f"{folder.path}: {len(missing)} tensors are missing, such as {missing[0]}.")
    known = {*hf_names.values(), *adapter.tensor_names.values()}  # some folders store a tied head, too
    unexpected = [hf_name for hf_name in folder.tensors if hf_name not in known and "rotary_emb" not in hf_name]
    if unexpected:
        raise ConfigError(f"{folder.path}: {len(unexpected)} unexpected tensors, such as {unexpected[0]}.")
    for name, hf_name in hf_names.items():
        stored, expected = folder.tensors[hf_name].shape, shapes[name]
        extends = name in adapter.vocab_tensors and stored == (folder.config["vocab_size"], *expected[1:])
        if stored != expected and not (extends and stored[0] < expected[0]):
            raise ConfigError(f"{folder.path}: {hf_name} has shape {list(stored)}, the model's is {list(expected)}.")
    return hf_names
