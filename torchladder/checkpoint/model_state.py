"""The state of a model, its optimizer and the average of its weights (EMA) as DCP saves and loads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_model_state_dict, set_state_dict

from torchladder.checkpoint.group import CheckpointGroup
from torchladder.checkpoint.storage import get_storage
from torchladder.registry import ConfigError

StateDict = dict[str, Any]


def collect_state(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    dtype: torch.dtype | None = None,
    ema: Mapping[str, Tensor] | None = None,
) -> StateDict:
    """Returns the weights and, if there are any, their averages and the optimizer's state.

    Args:
        model: the model.
        optimizer: its optimizer, or None to leave out its state.
        dtype: that of the weights and averages; None: their own.
        ema: parameter name -> average.
    """
    weights: StateDict
    weights, moments = cast(tuple[StateDict, StateDict], get_state_dict(model, optimizer or ()))
    state: StateDict = {"model": weights} | ({"ema": ema} if ema else {})
    if dtype is not None:
        state = {part: {name: tensor.to(dtype) for name, tensor in tensors.items()} for part, tensors in state.items()}
    return state if optimizer is None else state | {"optimizer": moments}


def load_state(
    path: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    group: CheckpointGroup,
    ema: Mapping[str, Tensor] | None = None,
) -> bool:
    """Loads a model and, if given, the state of its optimizer and the averages of its weights, by names of parameters.

    The optimizer keeps its own parameter groups and their hyperparameters. Averages that the checkpoint does not hold
    become its weights. Returns whether it holds them.

    Raises:
        ConfigError: the checkpoint is of another model; or an optimizer was given, and it holds only weights, or the
            state of another optimizer.
    """
    reader = get_storage(path).reader(path)
    saved = reader.read_metadata().state_dict_metadata
    has_ema = any(key.startswith("ema.") for key in saved)
    state = collect_state(model, optimizer, ema=ema if has_ema else None)
    _check_shapes(path, state["model"], saved)
    param_groups = None
    if optimizer is not None:
        param_groups = state["optimizer"].pop("param_groups")
        _check_optimizer_state(path, state["optimizer"]["state"], set(saved))
    dcp.load(state, storage_reader=reader, process_group=group.process_group)
    for name, average in (ema or {}).items() if not has_ema else ():
        average.copy_(state["model"][name])
    if optimizer is None:
        set_model_state_dict(model, state["model"])
    else:
        moments = {**state["optimizer"], "param_groups": param_groups}
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=moments)
    return has_ema


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
