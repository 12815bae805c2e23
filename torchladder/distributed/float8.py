"""Float8 linear layers, by torchao: products of 8-bit numbers, each operand scaled as a whole or row by row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import nn

from torchladder.registry import ConfigError

MULTIPLE = 16
"""Float8 products take inputs and outputs of a multiple of this."""


@dataclass(frozen=True)
class Float8Config:
    """Float8 linear layers; weights, gradients and optimizer state stay as they are."""

    enable: bool = False
    """Compute the linear layers of the blocks in float8."""

    recipe_name: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"] = "tensorwise"
    """One scale per tensor, one per row, or rows with the weights' gradients in the compute type."""

    filter_fqns: list[str] = field(default_factory=list)
    """Layers whose path contains one of these stay in the compute type, for example attention.k_proj or layers.0."""

    min_features: int = 0
    """So do layers with fewer inputs or outputs than this: casting them costs more than their products gain."""

    enable_fsdp_float8_all_gather: bool = False
    """Gather sharded weights in float8, half as many bytes as bfloat16; tensorwise only."""

    precompute_float8_dynamic_scale_for_fsdp: bool = False
    """Find the scales of all weights together after each step, not layer by layer; with the all-gather only."""

    emulate: bool = False
    """Round to float8 and compute in float32: slow, for trying things where the hardware cannot."""

    def __post_init__(self) -> None:
        gathers = self.enable_fsdp_float8_all_gather
        if gathers and self.recipe_name != "tensorwise":
            raise ConfigError(
                f"float8.enable_fsdp_float8_all_gather works with recipe_name 'tensorwise', not {self.recipe_name!r}: "
                "a shard does not know the scales of whole rows."
            )
        if self.precompute_float8_dynamic_scale_for_fsdp and not gathers:
            raise ConfigError(
                "float8.precompute_float8_dynamic_scale_for_fsdp serves the float8 all-gather: "
                "set float8.enable_fsdp_float8_all_gather too."
            )
        if self.min_features < 0:
            raise ConfigError(f"float8.min_features = {self.min_features}: must be 0 or more.")

    def check(self, device: torch.device, compute: torch.dtype) -> None:
        """Checks that products of float8 can be computed here.

        Raises:
            ConfigError: they cannot; the message says why.
        """
        if not self.enable or self.emulate:
            return
        instead = "float8.emulate computes the same slowly anywhere"
        if device.type != "cuda":
            raise ConfigError(f"float8.enable: a {device.type} has no float8 products. {instead}.")
        least = (8, 9) if self.recipe_name == "tensorwise" else (9, 0)
        found = torch.cuda.get_device_capability(device)
        if found < least:
            raise ConfigError(
                f"float8.recipe_name = {self.recipe_name!r} needs compute capability {least[0]}.{least[1]}; this GPU "
                f"has {found[0]}.{found[1]}. {instead}."
            )
        if compute != torch.bfloat16:
            raise ConfigError(
                f"float8.enable: products of float8 give bfloat16, and training.mixed_precision_param is {compute}."
            )


def convert(model: nn.Module, config: Float8Config, sharded: bool) -> list[str]:
    """Makes float8 linear layers of a model's, in place; returns the paths of those that it made.

    Args:
        model: on the meta device or not, before anything else is done to it.
        config: which layers, and how.
        sharded: whether FSDP2 will shard the model.

    Raises:
        ConfigError: torchao is missing, no layer is left, or there is nothing to gather.
    """
    if not config.enable:
        return []
    if config.enable_fsdp_float8_all_gather and not sharded:
        raise ConfigError("float8.enable_fsdp_float8_all_gather: a single rank gathers nothing.")
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise ConfigError("float8.enable needs torchao: pip install 'torchladder[float8]'.") from error
    if config.recipe_name == "tensorwise":
        recipe = Float8LinearConfig(
            enable_fsdp_float8_all_gather=config.enable_fsdp_float8_all_gather, emulate=config.emulate
        )
    else:
        recipe = replace(Float8LinearConfig.from_recipe_name(config.recipe_name), emulate=config.emulate)
    chosen = [name for name, module in model.named_modules() if _takes(config, module, name)]
    if not chosen:
        raise ConfigError("float8.enable: float8.filter_fqns and float8.min_features leave no linear layer.")
    convert_to_float8_training(model, config=recipe, module_filter_fn=lambda module, name: name in chosen)
    return chosen


def after_step(model: nn.Module, config: Float8Config) -> Callable[..., None] | None:
    """Returns what to call after each optimizer step, None for nothing."""
    if not (config.enable and config.precompute_float8_dynamic_scale_for_fsdp):
        return None
    from torchao.float8 import precompute_float8_dynamic_scale_for_fsdp

    def precompute(*_: Any) -> None:
        precompute_float8_dynamic_scale_for_fsdp(model)

    return precompute


def _takes(config: Float8Config, module: nn.Module, name: str) -> bool:
    if not isinstance(module, nn.Linear) or any(part in name for part in config.filter_fqns):
        return False
    sizes = (module.in_features, module.out_features)
    return min(sizes) >= config.min_features and all(size % MULTIPLE == 0 for size in sizes)
