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
    """Loads a model and, if given, its optimizer and the averages of its weights.

    The optimizer keeps its own hyperparameters. Averages that the checkpoint does not hold become its weights. Returns
    whether it holds them.

    Raises:
        ConfigError: an optimizer was given and the checkpoint holds only weights.
    """
    reader = get_storage(path).reader(path)
    stored = {key.partition(".")[0] for key in reader.read_metadata().state_dict_metadata}
    if optimizer is not None and "optimizer" not in stored:
        raise ConfigError(
            f"{path} holds only weights, so the run cannot continue from it. Start a new one from it with "
            "checkpoint.initial_load_path, or set checkpoint.exclude_from_loading = ['optimizer']."
        )
    state = collect_state(model, optimizer, ema=ema if "ema" in stored else None)
    dcp.load(state, storage_reader=reader, process_group=group.process_group)
    for name, average in (ema or {}).items() if "ema" not in stored else ():
        average.copy_(state["model"][name])
    if optimizer is None:
        set_model_state_dict(model, state["model"])
        return "ema" in stored
    hyperparameters = [{key: group[key] for key in group if key != "params"} for group in optimizer.param_groups]
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    for param_group, own in zip(optimizer.param_groups, hyperparameters, strict=True):
        param_group.update(own)
    return "ema" in stored
