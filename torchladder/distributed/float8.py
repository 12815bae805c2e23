"""Float8 training with torchao: linear layers with 8-bit matrix products, scaled per tensor or per row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import nn

from torchladder.registry import ConfigError, require

FEATURE_MULTIPLE = 16
"""Float8 matrix products need input and output features of a multiple of this."""


@dataclass(frozen=True)
class Float8Config:
    """Float8 linear layers. Weights, gradients and optimizer state keep their dtype."""

    enable: bool = False
    """Compute the linear layers of the transformer blocks in float8."""

    recipe_name: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"] = "tensorwise"
    """One scale per tensor, one per row, or one per row with weight gradients in bfloat16."""

    filter_fqns: list[str] = field(default_factory=list)
    """Skip layers whose name contains one of these, for example attention.k_proj or layers.0."""

    min_features: int = 0
    """Skip layers with fewer input or output features, where casting costs more than float8 saves."""

    enable_fsdp_float8_all_gather: bool = False
    """All-gather weights in float8, half the bytes of bfloat16; tensorwise only."""

    precompute_float8_dynamic_scale_for_fsdp: bool = False
    """Compute the scales of all weights at once after each step; needs enable_fsdp_float8_all_gather."""

    emulate: bool = False
    """Round to float8 and compute in float32: slow, for tests without float8 hardware."""

    def __post_init__(self) -> None:
        gathers = self.enable_fsdp_float8_all_gather
        require(
            self.recipe_name == "tensorwise" or not gathers,
            f"float8.enable_fsdp_float8_all_gather needs recipe_name 'tensorwise', not {self.recipe_name!r}.",
        )
        require(
            gathers or not self.precompute_float8_dynamic_scale_for_fsdp,
            "float8.precompute_float8_dynamic_scale_for_fsdp needs float8.enable_fsdp_float8_all_gather: set both.",
        )
        require(self.min_features >= 0, f"float8.min_features = {self.min_features}: must be 0 or more.")

    def check(self, device: torch.device, compute: torch.dtype) -> None:
        """Raises ``ConfigError`` unless the device supports float8 and the compute dtype is bfloat16."""
        if not self.enable or self.emulate:
            return
        instead = "Set float8.emulate to emulate float8 in float32 (slow)"
        require(device.type == "cuda", f"float8.enable: {device.type} does not support float8. {instead}.")
        required = (8, 9) if self.recipe_name == "tensorwise" else (9, 0)
        found = torch.cuda.get_device_capability(device)
        require(
            found >= required,
            f"float8.recipe_name = {self.recipe_name!r} needs compute capability {required[0]}.{required[1]}; this "
            f"GPU has {found[0]}.{found[1]}. {instead}.",
        )
        require(
            compute == torch.bfloat16,
            f"float8.enable needs training.mixed_precision_param = 'bfloat16', not {str(compute)[6:]!r}.",
        )


def convert_to_float8(model: nn.Module, config: Float8Config, sharded: bool) -> list[str]:
    """Replaces linear layers by float8 ones, in place; returns the names of the replaced layers.

    Args:
        model: on the meta device or not, before any other parallelism is applied.
        config: which layers, and how.
        sharded: whether FSDP2 will shard the model.
    """
    if not config.enable:
        return []
    gathers = config.enable_fsdp_float8_all_gather
    require(sharded or not gathers, "float8.enable_fsdp_float8_all_gather needs FSDP, and this run has a single rank.")
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise ConfigError("float8.enable needs the package torchao: pip install torchao.") from error
    if config.recipe_name == "tensorwise":
        recipe = Float8LinearConfig(enable_fsdp_float8_all_gather=gathers, emulate=config.emulate)
    else:
        recipe = replace(Float8LinearConfig.from_recipe_name(config.recipe_name), emulate=config.emulate)
    chosen = [name for name, module in model.named_modules() if _qualifies(config, module, name)]
    require(bool(chosen), "float8.enable: float8.filter_fqns and float8.min_features skip all linear layers.")
    convert_to_float8_training(model, config=recipe, module_filter_fn=lambda module, name: name in chosen)
    return chosen


def post_optimizer_hook(model: nn.Module, config: Float8Config) -> Callable[..., None] | None:
    """Returns the hook to run after each optimizer step, or None."""
    if not (config.enable and config.precompute_float8_dynamic_scale_for_fsdp):
        return None
    from torchao.float8 import precompute_float8_dynamic_scale_for_fsdp

    return lambda *_: precompute_float8_dynamic_scale_for_fsdp(model)


def _qualifies(config: Float8Config, module: nn.Module, name: str) -> bool:
    if not isinstance(module, nn.Linear) or any(part in name for part in config.filter_fqns):
        return False
    sizes = (module.in_features, module.out_features)
    return min(sizes) >= config.min_features and all(size % FEATURE_MULTIPLE == 0 for size in sizes)
