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
    """Loads a model, and the state of its optimizer if given, by the names of parameters.

    The optimizer keeps its own parameter groups and their hyperparameters.

    Raises:
        ConfigError: the checkpoint is of another model; or an optimizer was given, and it holds only weights, or the
            state of another optimizer.
    """
    reader = get_storage(path).reader(path)
    state, saved = collect_state(model, optimizer), reader.read_metadata().state_dict_metadata
    _check_shapes(path, state["model"], saved)
    if optimizer is None:
        dcp.load(state, storage_reader=reader, process_group=group.process_group)
        set_model_state_dict(model, state["model"])
        return
    param_groups = state["optimizer"].pop("param_groups")
    _check_optimizer_state(path, state["optimizer"]["state"], set(saved))
    dcp.load(state, storage_reader=reader, process_group=group.process_group)
    moments = {**state["optimizer"], "param_groups": param_groups}
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=moments)


def _check_optimizer_state(path: str, moments: StateDict, saved: set[str]) -> None:
    """Raises ``ConfigError`` unless a checkpoint has all ``moments`` (parameter -> name -> value) among its keys."""
    if not any(key.startswith("optimizer.") for key in saved):
        raise ConfigError(
            f"{path} holds only weights, so the run cannot continue from it. Start a new one from it with "
            "checkpoint.initial_load_path, or set checkpoint.exclude_from_loading = ['optimizer']."
        )
    for parameter, values in moments.items():
        prefix = f"optimizer.state.{parameter}."
        missing = [name for name in values if f"{prefix}{name}" not in saved]
        if missing:
            found = sorted(key.removeprefix(prefix) for key in saved if key.startswith(prefix))
            raise ConfigError(
                f"{path} was saved by another optimizer: of {parameter} it has {', '.join(found) or 'no state'}, not "
                f"{', '.join(missing)}. Set optimizer.name to that optimizer, or start this one from the weights with "
                "checkpoint.exclude_from_loading = ['optimizer']."
            )


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
