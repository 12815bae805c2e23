"""Optimizers, and learning-rate schedules as pure functions of the step.

An optimizer is a registered dataclass of settings that, called with a model, returns a ``torch.optim.Optimizer``. The
learning rate of a step is the peak times ``LRSchedulerConfig.factor(step)``: warmup, plateau, decay. It has no state.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Le, Lt
from torch import Tensor, nn

from torchladder.registry import Registry, check_bounds, require

logger = logging.getLogger(__name__)

OptimizerFactory = Callable[[nn.Module], torch.optim.Optimizer]
Decay = Callable[[float, float], float]
"""``(progress in [0, 1], min_lr_factor) -> factor``: 1 at progress 0, min_lr_factor at progress 1."""

registry: Registry[OptimizerFactory] = Registry("optimizer")
register = registry.register

decays: Registry[float] = Registry(
    "decay type",
    runtime_args={"progress": "completed fraction of the decay", "min_lr_factor": "where the decay ends"},
)


def build(section: Any, model: nn.Module) -> torch.optim.Optimizer:
    """Builds the optimizer of a model from the section ``[optimizer]``."""
    return registry.build(section)(model)


# --- optimizers ------------------------------------------------------------------------------------------------------


@register("AdamW")
@dataclass(frozen=True, kw_only=True)
class AdamW:
    """Adam with decoupled weight decay (arXiv 1711.05101).

    Raises:
        ConfigError: a setting is out of range.
    """

    lr: Annotated[float, Ge(0), Lt(math.inf)] = 8e-4
    """Peak learning rate; [lr_scheduler] scales it at each step."""

    beta1: Annotated[float, Ge(0), Lt(1)] = 0.9
    """Decay rate of the first moment (Adam's β₁)."""

    beta2: Annotated[float, Ge(0), Lt(1)] = 0.95
    """Decay rate of the second moment (Adam's β₂)."""

    eps: Annotated[float, Ge(0), Lt(math.inf)] = 1e-8
    """Added to the denominator for numerical stability."""

    weight_decay: Annotated[float, Ge(0), Lt(math.inf)] = 0.1
    """Decoupled weight decay."""

    implementation: Literal["fused", "foreach", "for-loop"] = "fused"
    """PyTorch's implementation of the step; fused falls back to foreach where the device has no fused kernel."""

    decay_matrices_only: bool = True
    """Apply weight decay to matrices (embeddings included) but not to vectors (norms, biases)."""

    def __post_init__(self) -> None:
        check_bounds(self, "optimizer")

    def __call__(self, model: nn.Module) -> torch.optim.Optimizer:
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        require(bool(parameters), "the model has no trainable parameters.")
        # DTensor.ndim is that of the global shape.
        decayed = [parameter for parameter in parameters if parameter.ndim >= 2 or not self.decay_matrices_only]
        others = [parameter for parameter in parameters if parameter.ndim < 2 and self.decay_matrices_only]
        groups = [{"params": decayed, "weight_decay": self.weight_decay}, {"params": others, "weight_decay": 0.0}]
        groups = [group for group in groups if group["params"]]
        options = {"lr": self.lr, "betas": (self.beta1, self.beta2), "eps": self.eps}
        return self.make_optimizer(groups, **options, **self.implementation_flags(parameters))

    def make_optimizer(self, groups: list[dict[str, Any]], **options: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, **options)

    def implementation_flags(self, parameters: list[nn.Parameter]) -> dict[str, bool]:
        """Returns torch's flags for the implementation; tries a fused step to see whether the device supports it."""
        fused = self.implementation == "fused"
        for device, dtype in {(parameter.device, parameter.dtype) for parameter in parameters} if fused else ():
            weight = nn.Parameter(torch.zeros(2, device=device, dtype=dtype))
            weight.grad = torch.zeros_like(weight)
            try:
                self.make_optimizer([{"params": [weight]}], fused=True).step()
            except (RuntimeError, NotImplementedError) as error:
                fused, reason = False, f"{device}, {dtype}: {str(error).splitlines()[0]}"
                logger.warning("optimizer.implementation: fused is not supported here, using foreach (%s)", reason)
                break
        return {"fused": fused, "foreach": not fused and self.implementation != "for-loop"}


@register("Adam")
class Adam(AdamW):
    """Adam with weight decay as L2 regularization (arXiv 1412.6980)."""

    def make_optimizer(self, groups: list[dict[str, Any]], **options: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(groups, **options)


# --- the learning rate -----------------------------------------------------------------------------------------------


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


def is_fused(optimizer: torch.optim.Optimizer) -> bool:
    """Whether every group steps in a fused kernel, which can skip a step without a device synchronization."""
    return all(group.get("fused") for group in optimizer.param_groups)


def should_step(optimizer: torch.optim.Optimizer, bad: Tensor) -> bool:
    """Returns whether to call ``optimizer.step()``, for a step that may turn out to be bad.

    A fused optimizer reads ``found_inf`` on the device, as under ``torch.amp.GradScaler``: at 1 it changes neither
    weights nor state, and the host does not wait for the value. On a CPU reading ``bad`` costs nothing. A GPU optimizer
    that is not fused always steps: ``resilience.on_bad_step`` is then stop or rollback, which discard the result.

    Args:
        optimizer: the optimizer.
        bad: () 1 for a bad step, else 0; on the device.
    """
    if is_fused(optimizer):
        optimizer.found_inf = bad  # type: ignore[attr-defined]
        return True
    return bad.device.type != "cpu" or not bad
