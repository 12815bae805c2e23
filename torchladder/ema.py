"""An exponential moving average of the weights (EMA), which often has a lower loss than the weights themselves."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Lt
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from torchladder.registry import check_bounds

_WRAPPERS = re.compile(r"_checkpoint_wrapped_module\.|_orig_mod\.")


@dataclass(frozen=True)
class EMAConfig:
    """Exponential moving average of the weights; checkpoints hold it beside the weights."""

    enable: bool = False
    """Keep an average of the weights, in float32, and validate it beside the weights."""

    decay: Annotated[float, Ge(0), Lt(1)] = 0.999
    """An update makes the average decay * average + (1 - decay) * weights."""

    every_n_steps: Annotated[int, Ge(1)] = 1
    """Steps between updates."""

    start_step: Annotated[int, Ge(0)] = 0
    """Up to this step an update copies the weights, so that the average forgets the initial ones."""

    def __post_init__(self) -> None:
        check_bounds(self, "ema")


class WeightEMA:
    """The average of a model's parameters, each sharded like its parameter.

    Args:
        config: the section [ema].
        model: the model, sharded or not; the average begins as its weights.

    Attributes:
        averages: parameter name, as in checkpoints -> average, fp32.
    """

    def __init__(self, config: EMAConfig, model: nn.Module) -> None:
        self.config = config
        self.model = model
        self.averages = {
            _WRAPPERS.sub("", name): parameter.detach().to(torch.float32, copy=True)
            for name, parameter in model.named_parameters()
        }

    def restart(self) -> None:
        """Makes the average the current weights."""
        with torch.no_grad():
            torch._foreach_copy_(self._local_averages(), self._local_weights())

    @torch.no_grad()
    def update(self, step: int, bad: Tensor) -> None:
        """Updates the average after an optimizer step, without a device synchronization.

        Args:
            step: optimizer steps taken.
            bad: () 1 for a bad step, which changes nothing, else 0; on the device.
        """
        if step % self.config.every_n_steps:
            return
        rate = (1.0 if step <= self.config.start_step else 1 - self.config.decay) * (1 - bad)
        averages = self._local_averages()
        weights = [weight.to(torch.float32) for weight in self._local_weights()]
        torch._foreach_lerp_(averages, weights, [rate.to(averages[0].device)] * len(averages))

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """Puts the averages into the model, and the weights back afterwards; holds a copy of the weights meanwhile."""
        with torch.no_grad():
            weights = [weight.clone() for weight in self._local_weights()]
            torch._foreach_copy_(self._local_weights(), self._local_averages())
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self._local_weights(), weights)

    def _local_averages(self) -> list[Tensor]:
        return [_local(average) for average in self.averages.values()]

    def _local_weights(self) -> list[Tensor]:
        """Returns this rank's shards of the parameters; a forward pass without a backward pass leaves some gathered."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        return [_local(parameter) for parameter in self.model.parameters()]


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
