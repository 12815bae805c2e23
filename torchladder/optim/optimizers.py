"""Optimizers: registered settings that, called with a model, return a ``torch.optim.Optimizer``."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Lt
from torch import Tensor, nn

from torchladder.optim.muon import MuonWithAdamW
from torchladder.optim.param_groups import GroupConfig, ParameterGroup, split_parameters
from torchladder.registry import Registry, check_bounds, require

logger = logging.getLogger(__name__)

OptimizerFactory = Callable[[nn.Module], torch.optim.Optimizer]

registry: Registry[OptimizerFactory] = Registry("optimizer")
register = registry.register


def build(section: Any, model: nn.Module) -> torch.optim.Optimizer:
    """Builds the optimizer of a model from the section ``[optimizer]``."""
    return registry.build(section)(model)


def parameter_groups(section: Any, model: nn.Module) -> list[ParameterGroup]:
    """Returns the groups of the optimizer that ``build`` would build; none for a plugin that does not report them."""
    factory = registry.build(section)
    return factory.parameter_groups(model) if isinstance(factory, AdamW) else []


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

    groups: list[GroupConfig] = field(default_factory=list)
    """Parameter groups, [[optimizer.groups]]: learning rate and weight decay of parameters by name."""

    def __post_init__(self) -> None:
        check_bounds(self, "optimizer")

    def __call__(self, model: nn.Module) -> torch.optim.Optimizer:
        groups = self.parameter_groups(model)
        parameters = [parameter for group in groups for parameter in group.parameters.values()]
        options = {"betas": (self.beta1, self.beta2), "eps": self.eps, **self.implementation_flags(parameters)}
        return self.make_optimizer([group.to_torch() for group in groups], lr=self.lr, **options)

    def parameter_groups(self, model: nn.Module) -> list[ParameterGroup]:
        """Returns the parameter groups of a model; sharded parameters count as whole."""
        return split_parameters(model, self.groups, self.parameter_settings)

    def parameter_settings(self, name: str, parameter: nn.Parameter) -> tuple[str, float, float]:
        """Returns the algorithm, the learning rate and the weight decay of a parameter outside of all groups."""
        decays = parameter.ndim >= 2 or not self.decay_matrices_only  # DTensor.ndim is that of the global shape
        return type(self).__name__, self.lr, self.weight_decay if decays else 0.0

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


@register("Muon")
@dataclass(frozen=True, kw_only=True)
class Muon(AdamW):
    """Muon (arXiv 2502.16982) for the matrices of the blocks, AdamW for embeddings, head and vectors.

    Raises:
        ConfigError: a setting is out of range, or the model has no matrices in its blocks.
    """

    adamw_lr: Annotated[float | None, Ge(0), Lt(math.inf)] = None
    """Peak learning rate of the parameters that AdamW takes (default: lr)."""

    momentum: Annotated[float, Ge(0), Lt(1)] = 0.95
    """Decay rate of Muon's momentum."""

    nesterov: bool = True
    """Nesterov momentum in Muon."""

    ns_steps: Annotated[int, Ge(1), Lt(100)] = 5
    """Newton-Schulz iterations that orthogonalize an update."""

    ns_coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315)
    """Coefficients a, b, c of a Newton-Schulz iteration: a X + b (X Xᵀ) X + c (X Xᵀ)² X."""

    adjust_lr_fn: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """Factor on the update of an A x B matrix: match_rms_adamw 0.2 √max(A, B), AdamW's RMS; original √max(1, A / B)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            all(map(math.isfinite, self.ns_coefficients)),
            f"optimizer.ns_coefficients = {list(self.ns_coefficients)}: must be three finite numbers.",
        )

    def parameter_settings(self, name: str, parameter: nn.Parameter) -> tuple[str, float, float]:
        _, lr, weight_decay = super().parameter_settings(name, parameter)
        if name.startswith("layers.") and parameter.ndim == 2:
            return "Muon", lr, weight_decay
        return "AdamW", lr if self.adamw_lr is None else self.adamw_lr, weight_decay

    def parameter_groups(self, model: nn.Module) -> list[ParameterGroup]:
        groups = super().parameter_groups(model)
        require(
            any(group.algorithm == "Muon" for group in groups),
            "optimizer.name = 'Muon': the model has no trainable matrices in its blocks (layers); use AdamW.",
        )
        return groups

    def make_optimizer(self, groups: list[dict[str, Any]], **options: Any) -> torch.optim.Optimizer:
        keys = ("momentum", "nesterov", "ns_steps", "ns_coefficients", "adjust_lr_fn")
        return MuonWithAdamW(groups, {key: getattr(self, key) for key in keys}, **options)


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
