"""Parameter groups: which parameters share a learning rate, a weight decay and an algorithm."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from annotated_types import Ge, Lt
from torch import nn

from torchladder.registry import ConfigError, check_bounds, require, unknown_name

WRAPPERS = re.compile(r"_checkpoint_wrapped_module\.|_orig_mod\.")
"""What activation checkpointing and compilation put into the names of parameters."""


@dataclass(frozen=True, kw_only=True)
class GroupConfig:
    """One entry of ``[[optimizer.groups]]``: settings of the parameters whose names a pattern matches.

    Raises:
        ConfigError: the pattern is not a regular expression, or a value is out of range.
    """

    pattern: str
    """Regular expression that is searched in the names of parameters; the first group that matches counts."""

    lr_factor: Annotated[float, Ge(0), Lt(math.inf)] = 1.0
    """Multiplies the peak learning rate."""

    weight_decay: Annotated[float | None, Ge(0), Lt(math.inf)] = None
    """Weight decay of all parameters of the group, vectors included (default: as without the group)."""

    def __post_init__(self) -> None:
        require(bool(self.pattern), "optimizer.groups: pattern is empty: it would match every parameter; write '.'.")
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ConfigError(
                f"optimizer.groups: pattern = {self.pattern!r} is not a regular expression: {error}."
            ) from None
        check_bounds(self, "optimizer.groups")


@dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """Parameters that an optimizer treats alike.

    Attributes:
        algorithm: what updates them: Muon, AdamW, Adam.
        pattern: of the ``GroupConfig`` that chose them; empty for none.
        lr: their peak learning rate.
        weight_decay: their weight decay.
        parameters: name -> parameter.
    """

    algorithm: str
    pattern: str
    lr: float
    weight_decay: float
    parameters: dict[str, nn.Parameter]

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters.values())

    @property
    def state_elements(self) -> int:
        """Numbers that the optimizer keeps: Muon's momentum, or Adam's two moments."""
        return self.num_parameters * (1 if self.algorithm == "Muon" else 2)

    def to_torch(self) -> dict[str, Any]:
        """Returns the group as ``torch.optim.Optimizer`` takes it."""
        own = {"algorithm": self.algorithm} if self.algorithm == "Muon" else {}
        return {"params": list(self.parameters.values()), "weight_decay": self.weight_decay, "lr": self.lr, **own}

    def summary(self) -> dict[str, Any]:
        """Returns the group in numbers and names, for tables and JSON."""
        own = {key: getattr(self, key) for key in ("algorithm", "pattern", "lr", "weight_decay", "num_parameters")}
        return {**own, "tensors": len(self.parameters), "names": short_names(self.parameters)}

    def __str__(self) -> str:
        found = f" matching {self.pattern!r}" if self.pattern else ""
        settings = f"{self.algorithm}, lr {self.lr:g}, weight decay {self.weight_decay:g}"
        size = f"{self.num_parameters:,} parameters in {len(self.parameters):,} tensors"
        return f"{settings}: {size}{found}: {', '.join(short_names(self.parameters))}"


def short_names(names: Iterable[str]) -> list[str]:
    """Returns names of parameters with ``*`` for the numbers of layers, each once, in order."""
    return list(dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names))


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns name -> trainable parameter, shared ones once, by the names that a checkpoint has."""
    named = {WRAPPERS.sub("", name): p for name, p in model.named_parameters() if p.requires_grad}
    require(bool(named), "the model has no trainable parameters.")
    return named


def match_groups(names: Sequence[str], groups: Sequence[GroupConfig]) -> dict[str, int]:
    """Returns name -> index of the first group whose pattern is found in it; -1 for none.

    Raises:
        ConfigError: a group takes no parameter.
    """
    patterns = [re.compile(group.pattern) for group in groups]
    found = {name: [i for i, pattern in enumerate(patterns) if pattern.search(name)] for name in names}
    taken = {name: min(indices, default=-1) for name, indices in found.items()}
    for index, group in enumerate(groups):
        matches = [name for name in names if index in found[name]]
        if not matches:
            raise unknown_name("pattern", group.pattern, short_names(names), "optimizer.groups: no parameter matches")
        if index not in taken.values():
            earlier = groups[taken[matches[0]]].pattern
            raise ConfigError(
                f"optimizer.groups: pattern = {group.pattern!r} takes no parameter: the first match wins, and groups "
                f"before it take all that it matches, such as {matches[0]} ({earlier!r}). Move it up."
            )
    return taken


def split_parameters(
    model: nn.Module, groups: Sequence[GroupConfig], settings: Callable[[str, nn.Parameter], tuple[str, float, float]]
) -> list[ParameterGroup]:
    """Returns the parameter groups of a model: those that no ``GroupConfig`` takes, then those of each, in order.

    Args:
        model: the model.
        groups: what overrides the settings.
        settings: (name, parameter) -> its algorithm, learning rate and weight decay without groups.

    Raises:
        ConfigError: the model has no trainable parameters, or a group takes none.
    """
    named = trainable_parameters(model)
    taken = match_groups(list(named), groups)
    members: dict[tuple[int, str, float, float], dict[str, nn.Parameter]] = {}
    for name, parameter in named.items():
        algorithm, lr, weight_decay = settings(name, parameter)
        if (index := taken[name]) >= 0:
            lr, own = lr * groups[index].lr_factor, groups[index].weight_decay
            weight_decay = weight_decay if own is None else own
        members.setdefault((index, algorithm, lr, weight_decay), {})[name] = parameter
    # Muon first, since the first group's learning rate is the one that is reported; decayed parameters before others.
    order = sorted(members, key=lambda key: (key[0], key[1] != "Muon", -key[3]))
    return [
        ParameterGroup(
            algorithm=algorithm,
            pattern=groups[index].pattern if index >= 0 else "",
            lr=lr,
            weight_decay=weight_decay,
            parameters=members[index, algorithm, lr, weight_decay],
        )
        for index, algorithm, lr, weight_decay in order
    ]
