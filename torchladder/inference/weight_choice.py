"""Which weights of a run to read: those of a checkpoint, their moving average (EMA), or the mean of checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from torchladder import checkpoint
from torchladder.registry import ConfigError, require

Kind = Literal["model", "ema"]


class MissingWeightsError(ConfigError):
    """A run does not have the weights that were asked for."""


@dataclass(frozen=True)
class WeightChoice:
    """Which weights to read from the checkpoints of a run.

    Attributes:
        kind: the weights, or their exponential moving average (section [ema]).
        average_last: the uniform mean over this many checkpoints, up to the one that is read.
    """

    kind: Kind = "model"
    average_last: int = 1

    @property
    def label(self) -> str:
        """What distinguishes these weights from those of the checkpoint itself; empty if they are."""
        words = ["ema"] if self.kind == "ema" else []
        words += [f"mean of {self.average_last}"] if self.average_last > 1 else []
        return f" ({', '.join(words)})" if words else ""

    def find_checkpoints(self, path: Path) -> tuple[Path, ...]:
        """Returns the checkpoints whose weights are averaged, the newest first: ``path`` and those before it.

        Raises:
            MissingWeightsError: there are too few, or one holds no moving average.
            ConfigError: a file of a checkpoint is damaged.
        """
        found = self._last_checkpoints(path) if self.average_last > 1 else (path,)
        for one in found if self.kind == "ema" else ():
            try:
                stored = dcp.FileSystemReader(one).read_metadata().state_dict_metadata
            except Exception as error:  # of unpickling anything
                raise ConfigError(f"its .metadata is damaged: {error}") from error
            if not any(key.startswith("ema.") for key in stored):
                raise MissingWeightsError(
                    f"{one} holds no moving average of the weights: ema.enable was off. Read other checkpoints, or "
                    "--weights model."
                )
        return found

    def _last_checkpoints(self, path: Path) -> tuple[Path, ...]:
        folder, steps = path.resolve().parent, checkpoint.complete_steps(path.resolve().parent)
        names = [f"step-{step}" for step in steps]
        upto = names[: names.index(path.resolve().name) + 1] if path.resolve().name in names else []
        if len(upto) < self.average_last:
            raise MissingWeightsError(
                f"--average-last {self.average_last}: the complete checkpoints up to {path} are "
                f"{', '.join(upto) or 'none, as it is not named step-N'}."
            )
        return tuple(folder / name for name in reversed(upto[-self.average_last :]))

    def require_default(self, path: Path) -> None:
        """Raises ``ConfigError`` unless these are the only weights that a Hugging Face folder has."""
        require(self == OWN_WEIGHTS, f"{path} is a Hugging Face folder: --weights and --average-last read checkpoints.")


OWN_WEIGHTS = WeightChoice()
"""The weights of a checkpoint themselves."""


@torch.no_grad()
def load_weights(model: nn.Module, checkpoints: Sequence[Path], kind: Kind) -> None:
    """Loads the mean of the weights of checkpoints into a model on one device, with one checkpoint in memory at a time.

    Args:
        model: the model.
        checkpoints: of the same model, at least one.
        kind: which weights; what has no average, such as buffers, is read from the first checkpoint.
    """
    state: dict[str, Any] = get_model_state_dict(model)
    averaged = {name: state[name] for name, _ in model.named_parameters()}
    others = {name: tensor for name, tensor in state.items() if name not in averaged}
    parts = {"ema": averaged, "model": others} if kind == "ema" else {"model": state}
    dcp.load(parts, checkpoint_id=checkpoints[0], no_dist=True)
    for path in checkpoints[1:]:
        part = {name: torch.empty_like(tensor) for name, tensor in averaged.items()}
        dcp.load({kind: part}, checkpoint_id=path, no_dist=True)
        for name, tensor in averaged.items():
            tensor += part[name]
    for tensor in averaged.values() if len(checkpoints) > 1 else ():
        tensor /= len(checkpoints)
