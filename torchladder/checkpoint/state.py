"""The state of a model and its optimizer, out of them and back into them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_model_state_dict, set_state_dict

from torchladder.checkpoint.group import CheckpointGroup
from torchladder.registry import ConfigError

State = dict[str, Any]


def collect(model: nn.Module, optimizer: torch.optim.Optimizer | None, dtype: torch.dtype | None = None) -> State:
    """Returns a model's weights, in another type where one is given, and its optimizer's state where there is one."""
    weights: State
    weights, moments = cast(tuple[State, State], get_state_dict(model, () if optimizer is None else optimizer))
    if dtype is not None:
        weights = {name: weight.to(dtype) for name, weight in weights.items()}
    return {"model": weights} if optimizer is None else {"model": weights, "optimizer": moments}


def has_optimizer(path: Path) -> bool:
    """Whether a checkpoint holds more than weights."""
    metadata = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    return any(key.startswith("optimizer") for key in metadata)


def restore(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None, group: CheckpointGroup) -> None:
    """Loads a model, and its optimizer where one is given; settings of the optimizer stay the run's own.

    Raises:
        ConfigError: the checkpoint holds only weights.
    """
    if optimizer is not None and not has_optimizer(path):
        raise ConfigError(
            f"{path} holds only weights, so the run cannot continue from it. Start a new one from it with "
            "checkpoint.initial_load_path, or set checkpoint.exclude_from_loading = ['optimizer']."
        )
    state = collect(model, optimizer)
    dcp.load(state, checkpoint_id=path, process_group=group.process_group)
    if optimizer is None:
        set_model_state_dict(model, state["model"])
        return
    settings = [{key: group[key] for key in group if key != "params"} for group in optimizer.param_groups]
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    for params, own in zip(optimizer.param_groups, settings, strict=True):
        params.update(own)
