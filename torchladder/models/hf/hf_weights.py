"""A model's weights straight from a Hugging Face folder, and straight to one, also while ranks share the model."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.tensor import DTensor, distribute_tensor

from torchladder.models.hf import hf_config
from torchladder.models.hf import hf_folder as folders
from torchladder.models.hf.hf_config import HFMetadata
from torchladder.models.hf.hf_folder import Folder
from torchladder.models.model import Model, registry
from torchladder.registry import ConfigError

Shape = tuple[int, ...]


@torch.no_grad()
def load(model: Model, path: str | Path) -> None:
    """Fills a model, whole or sharded over ranks, from a folder; each rank reads what it holds.

    Rows of the vocabulary that the folder does not have begin as the mean of those it has.

    Raises:
        ConfigError: the folder holds another model, other tensors, or tensors of other shapes.
    """
    folder = Folder(path)
    hf_config.check_compatible(hf_config.read(folder.config), model.config, str(folder.path / folders.CONFIG))
    state = _state(model)
    theirs = match(folder, _name(model), {name: tuple(tensor.shape) for name, tensor in state.items()})
    grows = [name for name in theirs if folder.tensors[theirs[name]].shape != tuple(state[name].shape)]
    whole = {theirs[name]: state[name] for name in theirs if name not in grows}
    dcp.load(whole, storage_reader=HuggingFaceStorageReader(str(folder.path)), no_dist=not dist.is_initialized())
    for name in grows:
        parameter = state[name]
        values = extended(folder.read(theirs[name]), len(parameter)).to(parameter.device, parameter.dtype)
        if isinstance(parameter, DTensor):
            values = distribute_tensor(values, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.copy_(values)


@torch.no_grad()
def save(model: Model, path: Path, facts: HFMetadata, dtype: torch.dtype, first: bool) -> None:
    """Writes a model, whole or sharded over ranks, as a folder; all ranks give their part, the first one writes.

    Args:
        model: the model.
        path: the folder, there on the first rank.
        facts: what config.json says beside the model's shape.
        dtype: of the written weights.
        first: whether this is the rank that writes.
    """
    name, state = _name(model), _state(model)
    form = hf_config.adapter_of(name)
    ours = {form.hf_name(own): own for own in state}

    def read(key: str) -> Tensor:
        tensor = state[ours[key]]
        return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).to(dtype)

    sizes = {key: state[own].numel() * dtype.itemsize for key, own in ours.items()}
    folders.write(path, hf_config.write(name, model.config, facts, dtype), sizes, read, keep=first)


def extended(tensor: Tensor, rows: int) -> Tensor:
    """Returns a tensor with as many rows; those that are new are the mean of the others."""
    mean = tensor.mean(dim=0, keepdim=True, dtype=torch.float32).to(tensor.dtype)
    return torch.cat([tensor, mean.expand(rows - len(tensor), -1)])


def match(folder: Folder, name: str, shapes: dict[str, Shape]) -> dict[str, str]:
    """Returns a model's tensors -> the folder's, once each is there in its shape and no other is left over.

    Args:
        folder: the folder.
        name: the registered model.
        shapes: of its tensors; those of the vocabulary may have more rows than the folder's.

    Raises:
        ConfigError: the two do not fit.
    """
    form = hf_config.adapter_of(name)
    theirs = {own: form.hf_name(own) for own in shapes}
    missing = [key for key in theirs.values() if key not in folder.tensors]
    if missing:
        raise ConfigError(f"{folder.path} lacks {len(missing)} tensors, {missing[0]} the first of them.")
    known = {*theirs.values(), *form.names.values()}  # a tied head may be stored all the same
    over = [key for key in folder.tensors if key not in known and "rotary_emb" not in key]
    if over:
        raise ConfigError(f"{folder.path} holds {len(over)} tensors that the model lacks, {over[0]} the first of them.")
    for own, key in theirs.items():
        shape = folder.tensors[key].shape
        grows = own in form.vocabulary and shape == (folder.config["vocab_size"], *shapes[own][1:])
        if shape != shapes[own] and not (grows and shape[0] < shapes[own][0]):
            raise ConfigError(f"{folder.path}: {key} has the shape {list(shape)}, the model's is {list(shapes[own])}.")
    return theirs


def _state(model: Model) -> dict[str, Tensor]:
    """Returns the parameters themselves, by the names that they have without wrappers."""
    return cast(dict[str, Tensor], get_model_state_dict(model))


def _name(model: Model) -> str:
    names: dict[object, str] = {registry.get(name): name for name in registry.names()}
    return next(names[kind] for kind in type(model).__mro__ if kind in names)  # FSDP2 puts a class of its own first
