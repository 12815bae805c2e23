"""Learning-rate schedules as pure functions of the step.

The learning rate of a step is the peak times ``LRSchedulerConfig.factor(step)``: warmup, plateau, decay.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Le

from torchladder.registry import Registry, check_bounds, require

Decay = Callable[[float, float], float]
"""``(progress in [0, 1], min_lr_factor) -> factor``: 1 at progress 0, min_lr_factor at progress 1."""

decays: Registry[float] = Registry(
    "decay type",
    runtime_args={"progress": "completed fraction of the decay", "min_lr_factor": "where the decay ends"},
)


@decays.register("constant")
def constant(progress: float, min_lr_factor: float) -> float:
    """No decay."""
    return 1.0


@decays.register("linear")
def linear(progress: float, min_lr_factor: float) -> float:
    """Linear decay."""
    return 1 - (1 - min_lr_factor) * progress


@decays.register("cosine")
def cosine(progress: float, min_lr_factor: float) -> float:
    """Cosine decay (arXiv 1608.03983)."""
    return min_lr_factor + (1 - min_lr_factor) * (1 + math.cos(math.pi * progress)) / 2


@decays.register("exponential")
def exponential(progress: float, min_lr_factor: float) -> float:
    """Exponential decay; needs min_lr_factor > 0."""
    return min_lr_factor**progress


@decays.register("sqrt")
def sqrt(progress: float, min_lr_factor: float) -> float:
    """The 1 - sqrt cooldown (arXiv 2405.18392): 1 - (1 - min_lr_factor) · sqrt(progress)."""
    return 1 - (1 - min_lr_factor) * math.sqrt(progress)


@dataclass(frozen=True, kw_only=True)
class LRSchedulerConfig:
    """Learning-rate schedule: linear warmup, plateau, decay.

    Raises:
        ConfigError: a setting is out of range.
    """

    warmup_steps: Annotated[int, Ge(0)] = 200
    """Steps of linear warmup: step s, from 0, has (s + 1) / warmup_steps of the peak."""

    total_steps: Annotated[int | None, Ge(1)] = None
    """Step at which the decay ends (default: training.steps)."""

    decay_ratio: Annotated[float | None, Ge(0), Le(1)] = None
    """Fraction of all steps that the final decay takes (default: it begins right after the warmup)."""

    decay_type: str = "linear"
    """Shape of the decay: linear, sqrt (the 1 - sqrt cooldown), cosine, exponential, constant, or a plugin's."""

    min_lr_factor: Annotated[float, Ge(0), Le(1)] = 0.0
    """Learning rate at the end of the decay, as a fraction of the peak."""

    batch_size_scaling: Literal["none", "sqrt", "seesaw"] = "none"
    """How the learning rate follows a batch that differs from training.global_batch_size: sqrt multiplies it by the
    square root of their ratio, seesaw divides by that (arXiv 2510.14717)."""

    def __post_init__(self) -> None:
        decays.get(self.decay_type)
        check_bounds(self, "lr_scheduler")
        require(
            self.decay_type != "exponential" or self.min_lr_factor > 0,
            "lr_scheduler.min_lr_factor = 0: an exponential decay never reaches 0; set a value above 0.",
        )

    def factor(self, step: int, steps: int) -> float:
        """Returns the learning rate of a step as a fraction of the peak.

        Args:
            step: optimizer step, from 0.
            steps: optimizer steps of the run, the default of total_steps.
        """
        total = self.total_steps or steps
        length = total - self.warmup_steps if self.decay_ratio is None else round(total * self.decay_ratio)
        # The decay ends at step `total`, one past the last: no step is spent at a rate of 0.
        begin = total - length
        progress = min(max(step - begin, 0) / length, 1.0) if length > 0 else 0.0
        decay: Decay = decays.get(self.decay_type)
        # A product, so that a short run may end within its warmup.
        return min((step + 1) / max(self.warmup_steps, 1), 1.0) * decay(progress, self.min_lr_factor)

    def batch_factor(self, ratio: float) -> float:
        """Returns the factor of a step whose batch is ``ratio`` times as large as ``training.global_batch_size``."""
        return float(ratio ** {"none": 0.0, "sqrt": 0.5, "seesaw": -0.5}[self.batch_size_scaling])


class LRScheduler:
    """Sets the learning rate of an optimizer; has no state but the peaks.

    Args:
        optimizer: new, so that each group's ``lr`` is its peak; loading a checkpoint later does not change the peaks.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.peaks = [group["lr"] for group in optimizer.param_groups]

    def set_factor(self, factor: float) -> float:
        """Sets the learning rate of every group to its peak times ``factor``; returns that of the first group."""
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor
        return self.optimizer.param_groups[0]["lr"]
