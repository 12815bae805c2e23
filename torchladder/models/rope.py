"""RoPE, the rotary position embedding (arXiv 2104.09864): its scaling to longer contexts, and layers without it.

| setting | scaling |
|---|---|
| `rope_condense_ratio` | linear, of positions (arXiv 2306.15595) |
| `rope_scaling_factor`, `rope_scaling_type = "llama3"` | of the slow frequencies (arXiv 2407.21783) |
| `rope_scaling_factor`, `rope_scaling_type = "yarn"` | YaRN (arXiv 2309.00071): the same, and larger attention logits |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchladder.registry import require, unknown_name

SCALING_TYPES = ("llama3", "yarn")


class RoPE(nn.Module):
    """Rotary position embedding that rotates the first half of the rotated features against the second, in fp32.

    The blocks of a layer type share one instance. The table is recomputed whenever the module is moved or cast, so it
    stays fp32 in a model of any dtype and is valid after ``to_empty``.

    Args:
        config: the model's config.
        seq_len: tokens in a row; positions are 0 to ``seq_len - 1``.
        layer_type: the layer type of the blocks.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: Any, seq_len: int, layer_type: str) -> None:
        super().__init__()
        self.position_offset: int | Tensor = 0
        self.config = config
        self.is_scaled = config.rope_scaling_layer_types is None or layer_type in config.rope_scaling_layer_types
        self.rotary_dim = rotary_dim(config)
        for name in ("cos", "sin"):
            table = torch.empty(seq_len, 1, self.rotary_dim // 2, dtype=torch.float32)
            self.register_buffer(name, table, persistent=False)
        self.set_theta((config.layer_rope_theta or {}).get(layer_type, config.rope_theta))

    def set_theta(self, theta: float) -> None:
        """Recomputes the table in place, so that a schedule of theta recompiles nothing."""
        self.theta = theta
        angles, factor = rope_angles(self.config, theta, len(self.cos), self.cos.device, self.is_scaled)
        self.cos.copy_(angles.cos()[:, None] * factor)  # (T, 1, K / 2)
        self.sin.copy_(angles.sin()[:, None] * factor)

    def forward(self, x: Tensor) -> Tensor:
        """Rotates the heads of ``x`` (B, T, H, K); the result has the dtype of ``x``."""
        offset, length = self.position_offset, x.shape[1]
        positions: slice | Tensor
        if isinstance(offset, int):
            positions = slice(offset, offset + length)
        else:
            positions = offset[:, None] + torch.arange(length, device=offset.device)  # (B, T)
        cos, sin = self.cos[positions], self.sin[positions]  # (T, 1, K / 2), or (B, T, 1, K / 2)
        first, second = x[..., : self.rotary_dim].float().chunk(2, dim=-1)
        rotated = [first * cos - second * sin, second * cos + first * sin]
        if self.rotary_dim < x.shape[-1]:
            rotated.append(x[..., self.rotary_dim :].float())
        return torch.cat(rotated, dim=-1).to(x.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RoPE:
        super()._apply(fn, recurse)
        self.cos, self.sin = self.cos.float(), self.sin.float()
        self.set_theta(self.theta)
        return self


def rotary_dim(config: Any) -> int:
    """Returns the number of features of a head that are rotated."""
    return round(config.head_size * config.partial_rotary_factor)


def rope_angles(
    config: Any, theta: float, seq_len: int, device: torch.device, is_scaled: bool = True
) -> tuple[Tensor, float]:
    """Returns the rotation angle of each position and pair of features (T, K / 2) fp32, and the factor of cos and sin.

    ``is_scaled``: whether the settings that extend the context apply.
    """
    size = rotary_dim(config)
    exponent = torch.arange(0, size, 2, dtype=torch.float32, device=device) / size
    inv_freq, factor = 1.0 / theta**exponent, 1.0
    if is_scaled and config.rope_scaling_factor != 1:
        if config.rope_scaling_type == "yarn":
            kept = _yarn_kept(config, theta, device)
            factor = config.rope_attention_factor
            factor = 0.1 * math.log(config.rope_scaling_factor) + 1 if factor is None else factor
        else:
            low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
            turns = config.rope_original_seq_len * inv_freq / (2 * math.pi)
            kept = ((turns - low) / (high - low)).clamp(0, 1)
        inv_freq = inv_freq * (kept + (1 - kept) / config.rope_scaling_factor)
    position = torch.arange(seq_len, dtype=torch.float32, device=device)
    if config.rope_restart:
        position = position % config.rope_restart
    return torch.outer(position / (config.rope_condense_ratio if is_scaled else 1.0), inv_freq), factor


def _yarn_kept(config: Any, theta: float, device: torch.device) -> Tensor:
    """Returns the share of each frequency that YaRN leaves as it is (K / 2): 1 for fast ones, 0 for slow ones."""
    size = rotary_dim(config)

    def pair_of(turns: float) -> float:  # the pair of features with that many turns in the original context
        return size * math.log(config.rope_original_seq_len / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_of(config.rope_beta_fast), pair_of(config.rope_beta_slow)
    if config.rope_truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    pairs = torch.arange(size // 2, dtype=torch.float32, device=device)
    return 1 - ((pairs - low) / (high - low or 0.001)).clamp(0, 1)


def check_rope(config: Any, types: Sequence[str]) -> None:
    """Raises ``ConfigError`` for RoPE settings of a model with these layer types that are out of range."""
    for key in ("rope_theta", "rope_condense_ratio", "rope_beta_slow", "rope_original_seq_len"):
        require(getattr(config, key) > 0, f"model.{key} = {getattr(config, key)}: must be positive.")
    require(config.rope_restart >= 0, f"model.rope_restart = {config.rope_restart}: must be 0 or more.")
    require(
        config.rope_scaling_factor >= 1, f"model.rope_scaling_factor = {config.rope_scaling_factor}: must be 1 or more."
    )
    if config.rope_scaling_type not in SCALING_TYPES:
        raise unknown_name("model.rope_scaling_type", config.rope_scaling_type, SCALING_TYPES)
    for low, high in (("rope_low_freq_factor", "rope_high_freq_factor"), ("rope_beta_slow", "rope_beta_fast")):
        require(
            0 < getattr(config, low) < getattr(config, high),
            f"model.{low} = {getattr(config, low)} must be positive and below model.{high} = {getattr(config, high)}.",
        )
    is_scaled = config.rope_scaling_factor != 1
    require(
        is_scaled or config.rope_scaling_type == "llama3",
        f"model.rope_scaling_type = {config.rope_scaling_type!r} scales nothing: set model.rope_scaling_factor.",
    )
    require(
        is_scaled or config.rope_condense_ratio != 1 or config.rope_scaling_layer_types is None,
        "model.rope_scaling_layer_types scales nothing: set model.rope_scaling_factor or model.rope_condense_ratio.",
    )
    factor = config.rope_attention_factor
    require(factor is None or factor > 0, f"model.rope_attention_factor = {factor}: must be positive.")
    require(
        0 < config.partial_rotary_factor <= 1
        and config.head_size * config.partial_rotary_factor in range(2, config.head_size + 1, 2),
        f"model.partial_rotary_factor = {config.partial_rotary_factor}: must rotate an even number of a head's "
        f"{config.head_size} features, 2 or more.",
    )
    if config.positional_embedding not in ("rope", "none"):
        raise unknown_name("model.positional_embedding", config.positional_embedding, ("rope", "none"))
    by_type = {
        "layer_rope_theta": config.layer_rope_theta or {},
        "rope_scaling_layer_types": config.rope_scaling_layer_types or [],
        "nope_layer_types": config.nope_layer_types,
    }
    for key, names in by_type.items():
        for name in names:
            require(len(types) > 1, f"model.{key} has {name}, but all layers are of one type: remove it.")
            if name not in types:
                raise unknown_name("layer type", name, types, f"model.{key}")
            require(config.positional_embedding == "rope", f"model.{key}: the model has no RoPE, remove it.")
    for name, theta in (config.layer_rope_theta or {}).items():
        require(theta > 0, f"model.layer_rope_theta.{name} = {theta}: must be positive.")
    for number in config.nope_layers:
        require(
            0 <= number < config.n_layers,
            f"model.nope_layers has {number}: layers are numbered from 0 to {config.n_layers - 1}.",
        )
        require(config.positional_embedding == "rope", "model.nope_layers: the model has no RoPE, remove it.")
