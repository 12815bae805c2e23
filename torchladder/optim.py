"""What moves the weights: optimizers with parameter groups, and the learning rate as a pure function of the step.

An optimizer is a registered part: a frozen dataclass of settings that makes a ``torch.optim.Optimizer`` when called
with a model. The learning rate of a step is the peak times ``factor(step)``: warm-up, plateau, decay, nothing to save.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from torchladder.registry import ConfigError, Registry

logger = logging.getLogger(__name__)

Builder = Callable[[nn.Module], torch.optim.Optimizer]
Decay = Callable[[float, float], float]
"""``(progress in [0, 1], min_lr_factor) -> factor``, from 1 at progress 0 to min_lr_factor at progress 1"""

registry: Registry[Builder] = Registry("optimizer")
register = registry.register

schedules: Registry[float] = Registry(
    "decay type", runtime_args={"progress": "share of the decay that is behind", "floor": "lr_scheduler.min_lr_factor"}
)


def build(section: Any, model: nn.Module) -> torch.optim.Optimizer:
    """Returns the optimizer of a model, from the section ``[optimizer]``."""
    return registry.build(section)(model)


# --- optimizers ------------------------------------------------------------------------------------------------------


@register("AdamW")
@dataclass(frozen=True, kw_only=True)
class AdamW:
    """Adam with decoupled weight decay (arXiv 1711.05101).

    Raises:
        ConfigError: a setting that cannot be.
    """

    lr: float = 8e-4
    """Peak learning rate; [lr_scheduler] gives its course."""

    beta1: float = 0.9
    """How slowly the mean of the gradients forgets."""

    beta2: float = 0.95
    """How slowly the mean of the squared gradients forgets."""

    eps: float = 1e-8
    """Added to the root of the squared gradients' mean."""

    weight_decay: float = 0.1
    """Share of a weight that is taken away, times the learning rate, each step."""

    implementation: Literal["fused", "foreach", "for-loop"] = "fused"
    """One kernel for all weights, a few, or one after the other; fused where torch has it for the device."""

    decay_matrices_only: bool = True
    """Decay matrices, embeddings among them, and leave vectors (norms, biases) alone; otherwise decay everything."""

    def __post_init__(self) -> None:
        for key in ("lr", "eps", "weight_decay"):
            value = getattr(self, key)
            _require(0 <= value < math.inf, f"optimizer.{key} = {value}: must be 0 or more.")
        for key in ("beta1", "beta2"):
            value = getattr(self, key)
            _require(0 <= value < 1, f"optimizer.{key} = {value}: must be at least 0 and below 1.")

    def __call__(self, model: nn.Module) -> torch.optim.Optimizer:
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        _require(bool(parameters), "the model has no parameters to train.")
        groups = self.groups(parameters)
        options = {"lr": self.lr, "betas": (self.beta1, self.beta2), "eps": self.eps}
        return self.make(groups, **options, **self.kernel(parameters))

    def make(self, groups: list[dict[str, Any]], **options: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, **options)

    def groups(self, parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
        """Returns the parameters in groups of one weight decay each."""
        # A matrix is whatever has two dimensions or more, by its global shape where it is sharded.
        decayed = [parameter for parameter in parameters if parameter.ndim >= 2 or not self.decay_matrices_only]
        kept = [parameter for parameter in parameters if parameter.ndim < 2 and self.decay_matrices_only]
        groups = [{"params": decayed, "weight_decay": self.weight_decay}, {"params": kept, "weight_decay": 0.0}]
        return [group for group in groups if group["params"]]

    def kernel(self, parameters: list[nn.Parameter]) -> dict[str, bool]:
        """Returns torch's flags for the implementation, after a step that shows whether it runs here."""
        flags = {"fused": False, "foreach": False}
        if self.implementation == "for-loop":
            return flags
        if self.implementation == "fused":
            kinds = {(parameter.device, parameter.dtype) for parameter in parameters}
            problem = next(filter(None, (self._problem(*kind) for kind in kinds)), None)
            if problem is None:
                return flags | {"fused": True}
            logger.warning("optimizer.implementation: fused does not run here, taking foreach (%s)", problem)
        return flags | {"foreach": True}

    def _problem(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Returns why a fused step fails for such weights, None where it runs."""
        weight = nn.Parameter(torch.zeros(2, device=device, dtype=dtype))
        weight.grad = torch.zeros_like(weight)
        try:
            self.make([{"params": [weight]}], fused=True).step()
        except (RuntimeError, NotImplementedError) as error:
            return f"{device}, {dtype}: {str(error).splitlines()[0]}"
        return None


@register("Adam")
class Adam(AdamW):
    """Adam; weight decay is part of the gradient (arXiv 1412.6980)."""

    def make(self, groups: list[dict[str, Any]], **options: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(groups, **options)


# --- the learning rate -----------------------------------------------------------------------------------------------


@schedules.register("constant")
def constant(progress: float, floor: float) -> float:
    """Stays at the peak."""
    return 1.0


@schedules.register("linear")
def linear(progress: float, floor: float) -> float:
    """Falls by the same amount each step."""
    return 1 - (1 - floor) * progress


@schedules.register("cosine")
def cosine(progress: float, floor: float) -> float:
    """Falls along half a period of the cosine (arXiv 1608.03983)."""
    return floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2


@schedules.register("exponential")
def exponential(progress: float, floor: float) -> float:
    """Falls by the same factor each step; needs a min_lr_factor above 0."""
    return floor**progress


@schedules.register("sqrt")
@schedules.register("one_minus_sqrt")
def one_minus_sqrt(progress: float, floor: float) -> float:
    """Falls fast, then ever slower: lr = A - (A - B) · sqrt(x), the 1 - sqrt cool-down (arXiv 2405.18392)."""
    return 1 - (1 - floor) * math.sqrt(progress)


@dataclass(frozen=True, kw_only=True)
class LRSchedulerConfig:
    """The course of the learning rate: warm-up, plateau, decay.

    Raises:
        ConfigError: a setting that cannot be.
    """

    warmup_steps: int = 200
    """Steps of the linear climb: step s of the first ones has (s + 1) / warmup_steps of the peak."""

    total_steps: int | None = None
    """Step at which the decay is over; left out: training.steps."""

    decay_ratio: float | None = None
    """Share of all steps that the decay takes, at the end; left out: it begins right after the warm-up."""

    decay_type: str = "linear"
    """Curve of the decay: linear, sqrt or one_minus_sqrt, cosine, exponential, constant, or a plugin's."""

    min_lr_factor: float = 0.0
    """Share of the peak that the decay ends at."""

    def __post_init__(self) -> None:
        schedules.get(self.decay_type)
        for key, least in (("warmup_steps", 0), ("total_steps", 1)):
            value = getattr(self, key)
            _require(value is None or value >= least, f"lr_scheduler.{key} = {value}: must be {least} or more.")
        for key in ("decay_ratio", "min_lr_factor"):
            value = getattr(self, key)
            _require(value is None or 0 <= value <= 1, f"lr_scheduler.{key} = {value}: must be from 0 to 1.")
        _require(
            self.decay_type != "exponential" or self.min_lr_factor > 0,
            "lr_scheduler.min_lr_factor = 0: an exponential decay never gets there; set one above 0.",
        )

    def factor(self, step: int, steps: int) -> float:
        """Returns the learning rate of a step as a share of its peak.

        Args:
            step: optimizer step from 0.
            steps: optimizer steps of the whole run, the total where total_steps says nothing.
        """
        total = self.total_steps or steps
        length = total - self.warmup_steps if self.decay_ratio is None else round(total * self.decay_ratio)
        # The end of the decay belongs to step `total`, which is never taken: no step is spent at a rate of 0.
        begin = total - length
        progress = min(max(step - begin, 0) / length, 1.0) if length > 0 else 0.0
        decay: Decay = schedules.get(self.decay_type)
        # A product, so that a short trial run may lie within its warm-up.
        return min((step + 1) / max(self.warmup_steps, 1), 1.0) * decay(progress, self.min_lr_factor)


class LRSchedule:
    """Sets the learning rate of an optimizer for a step; it remembers the peaks and nothing else.

    Args:
        config: the course.
        optimizer: fresh, each group with its peak as ``lr``: a later load of old groups does not change the peaks.
        steps: optimizer steps of the whole run.
    """

    def __init__(self, config: LRSchedulerConfig, optimizer: torch.optim.Optimizer, steps: int) -> None:
        self.config = config
        self.optimizer = optimizer
        self.steps = steps
        self.peaks = [group["lr"] for group in optimizer.param_groups]

    def set(self, step: int, scale: float = 1.0) -> float:
        """Sets the rate for a step, times ``scale``, before ``optimizer.step``; returns the first group's."""
        factor = self.config.factor(step, self.steps) * scale
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor
        return self.optimizer.param_groups[0]["lr"]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)
