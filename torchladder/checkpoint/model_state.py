"""The state of a model and its optimizer as DCP saves and loads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_model_state_dict, set_state_dict

from torchladder.checkpoint.group import CheckpointGroup
from torchladder.checkpoint.storage import get_storage
from torchladder.registry import ConfigError

StateDict = dict[str, Any]


def collect_state(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, dtype: torch.dtype | None = None
) -> StateDict:
    """Returns the weights, converted to ``dtype`` if given, and the optimizer's state if there is an optimizer."""
    weights: StateDict
    weights, moments = cast(tuple[StateDict, StateDict], get_state_dict(model, optimizer or ()))
    if dtype is not None:
        weights = {name: weight.to(dtype) for name, weight in weights.items()}
    return {"model": weights} if optimizer is None else {"model": weights, "optimizer": moments}


def load_state(path: str, model: nn.Module, optimizer: torch.optim.Optimizer | None, group: CheckpointGroup) -> None:
    """Loads a model, and its optimizer if given; the optimizer keeps its own hyperparameters.

    Raises:
        ConfigError: an optimizer was given and the checkpoint holds only weights.
    """
    reader = get_storage(path).reader(path)
    if optimizer is not None and not any(
        key.startswith("optimizer") for key in reader.read_metadata().state_dict_metadata
    ):
        raise ConfigError(
            f"{path} holds only weights, so the run cannot continue from it. Start a new one from it with "
            "checkpoint.initial_load_path, or set checkpoint.exclude_from_loading = ['optimizer']."
        )
    state = collect_state(model, optimizer)
    _check_shapes(path, state["model"], reader.read_metadata().state_dict_metadata)
    dcp.load(state, storage_reader=reader, process_group=group.process_group)
    if optimizer is None:
        set_model_state_dict(model, state["model"])
        return
    hyperparameters = [{key: group[key] for key in group if key != "params"} for group in optimizer.param_groups]
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    for param_group, own in zip(optimizer.param_groups, hyperparameters, strict=True):
        param_group.update(own)


def _check_shapes(path: str, weights: StateDict, saved: Mapping[str, Any]) -> None:
    """Raises ``ConfigError`` if a weight of the model is not in the checkpoint, or has another shape there."""
    for name, weight in weights.items():
        size = getattr(saved.get(f"model.{name}"), "size", None)
        found = "is missing" if size is None else f"has the shape {list(size)}"
        if size != weight.shape:
            raise ConfigError(
                f"{path} is of another model: {name} {found}, and here it has {list(weight.shape)}. Use the [model] "
                "settings that it was trained with."
            )
