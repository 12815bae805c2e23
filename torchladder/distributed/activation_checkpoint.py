"""Activation checkpointing: which activations of a block are saved, and which are recomputed in backward."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from torchladder.registry import require


@dataclass(frozen=True)
class ActivationCheckpointConfig:
    """Activation checkpointing: recompute activations in backward to save memory."""

    mode: Literal["none", "full", "selective"] = "none"
    """none saves all activations, full recomputes every block, selective follows selective_ac_option."""

    selective_ac_option: str = "2"
    """For selective: n, to recompute every n-th block, or op, to save attention and every second matrix product."""

    preserve_rng_state: bool = False
    """Restore the RNG state for recomputation, for models with random operators such as dropout."""

    def __post_init__(self) -> None:
        option = self.selective_ac_option
        require(
            option == "op" or (option.isdigit() and int(option) >= 1),
            f"activation_checkpoint.selective_ac_option = {option!r}: must be op, or n to recompute every n-th block.",
        )

    @property
    def by_op(self) -> bool:
        """Whether each block saves the results of some operators and recomputes the rest."""
        return self.mode == "selective" and self.selective_ac_option == "op"

    def recomputes(self, layer: int) -> bool:
        """Whether block ``layer`` is recomputed, entirely or in part."""
        if self.mode == "selective" and not self.by_op:
            return layer % int(self.selective_ac_option) == 0
        return self.mode != "none"


def apply_activation_checkpoint(
    block: nn.Module, layer: int, config: ActivationCheckpointConfig, saved_ops: Collection[str]
) -> nn.Module:
    """Returns block ``layer``, wrapped if the config recomputes it.

    ``saved_ops`` are the kernel's operators whose results ``op`` saves, as ``namespace::name``.
    """
    if not config.recomputes(layer):
        return block
    context: dict[str, Any] = {}
    if config.by_op:
        context = {"context_fn": lambda: create_selective_checkpoint_contexts(save_policy(saved_ops))}
    return checkpoint_wrapper(block, preserve_rng_state=config.preserve_rng_state, **context)


MATMUL_OPS = frozenset({"aten::mm", "aten::addmm", "aten::_scaled_mm"})
"""Matrix products, of which every second result is saved."""

COMMUNICATION_OPS = frozenset({"_c10d_functional::reduce_scatter_tensor", "torchladder::exchange"})
"""Collectives whose results are saved, because recomputing them would communicate again."""


def save_policy(saved_ops: Collection[str]) -> Callable[..., CheckpointPolicy]:
    """Returns the policy of selective checkpointing by operator for one block.

    Forward and recomputation count matrix products separately, so that both choose the same ones.
    """
    matmuls = {False: 0, True: 0}
    always = COMMUNICATION_OPS.union(saved_ops)

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        name = op.name().split(".")[0]
        if name in MATMUL_OPS:
            matmuls[context.is_recompute] += 1
        if name in always or (name in MATMUL_OPS and matmuls[context.is_recompute] % 2):
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    return policy
