"""Activation checkpointing: what a block keeps of its forward pass, and what it computes again in backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from torchladder.registry import ConfigError


@dataclass(frozen=True)
class ActivationCheckpointConfig:
    """Recomputing activations in backward instead of keeping them."""

    mode: Literal["none", "full", "selective"] = "none"
    """none keeps everything; full recomputes every block; selective recomputes by selective_ac_option."""

    selective_ac_option: str = "2"
    """For selective: n, to recompute every n-th block, or op, to keep attention and every second product."""

    preserve_rng_state: bool = False
    """Recompute with the random numbers of the forward pass: for models that draw some, as by dropout."""

    def __post_init__(self) -> None:
        option = self.selective_ac_option
        if option != "op" and (not option.isdigit() or int(option) < 1):
            raise ConfigError(
                f"activation_checkpoint.selective_ac_option = {option!r}: "
                "must be a number n, to recompute every n-th block, or op."
            )

    @property
    def by_op(self) -> bool:
        """Whether each block keeps some of its operations and recomputes the rest."""
        return self.mode == "selective" and self.selective_ac_option == "op"

    def recomputes(self, layer: int) -> bool:
        """Whether block number ``layer`` is recomputed, in whole or in part."""
        if self.mode == "selective" and not self.by_op:
            return layer % int(self.selective_ac_option) == 0
        return self.mode != "none"


def wrap(block: nn.Module, layer: int, config: ActivationCheckpointConfig) -> nn.Module:
    """Returns block number ``layer`` so that it recomputes what the settings say."""
    if not config.recomputes(layer):
        return block
    context: dict[str, Any] = (
        {"context_fn": lambda: create_selective_checkpoint_contexts(policy())} if config.by_op else {}
    )
    return checkpoint_wrapper(block, preserve_rng_state=config.preserve_rng_state, **context)


PRODUCTS = {"mm", "addmm", "_scaled_mm"}
"""Names of matrix products, every second of which is kept."""

KEPT = {
    *("_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention"),
    *("_scaled_dot_product_cudnn_attention", "_scaled_dot_product_flash_attention_for_cpu"),
    *("flex_attention", "_flash_attention_forward", "_varlen_attn", "fold", "sdpa"),
    *("reduce_scatter_tensor", "exchange"),
}
"""Names of operators whose results are kept: attention, and what other ranks had to send."""


def policy() -> Callable[..., CheckpointPolicy]:
    """Returns what to keep of one block's pass; forward and recomputation count their products apart."""
    products = {False: 0, True: 0}

    def keep(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        name = op.name().split("::")[-1].split(".")[0]
        if name in PRODUCTS:
            products[context.is_recompute] += 1
        if name in KEPT or (name in PRODUCTS and products[context.is_recompute] % 2):
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    return keep
