"""Spreads a model over ranks: checkpointed activations, then compilation, then FSDP2, block by block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from torchladder.registry import ConfigError


@dataclass(frozen=True)
class ActivationCheckpointConfig:
    """Recomputing activations in backward instead of keeping them."""

    mode: Literal["none", "full", "selective"] = "none"
    """none keeps everything; full recomputes every block; selective recomputes every n-th block."""

    selective_ac_option: str = "2"
    """For selective: recompute every n-th block, n as a number."""

    def __post_init__(self) -> None:
        if not self.selective_ac_option.isdigit() or int(self.selective_ac_option) < 1:
            raise ConfigError(
                f"activation_checkpoint.selective_ac_option = {self.selective_ac_option!r}: "
                "must be a number n, to recompute every n-th block."
            )

    def recomputes(self, layer: int) -> bool:
        """Whether block number ``layer`` is recomputed."""
        return self.mode == "full" or (self.mode == "selective" and layer % int(self.selective_ac_option) == 0)


@dataclass(frozen=True)
class CompileConfig:
    """torch.compile, one graph per block: all blocks share it, and the ladder never recompiles it."""

    enable: bool = False
    """Compile the model's blocks."""

    backend: str = "inductor"
    """The compiler behind torch.compile."""


@dataclass(frozen=True)
class Precision:
    """What a model computes in; its weights stay float32."""

    compute: torch.dtype
    reduce: torch.dtype


def parallelize(
    model: nn.Module,
    mesh: DeviceMesh | None,
    recompute: ActivationCheckpointConfig,
    compile: CompileConfig,
    precision: Precision,
    reshard_after_forward: bool = True,
) -> None:
    """Prepares a model in place; its blocks are ``model.layers``, name → block.

    Args:
        model: on the meta device or not.
        mesh: the data-parallel mesh, or None to leave the model whole.
        recompute: which blocks recompute their activations.
        compile: whether blocks are compiled.
        precision: compute and gradient reduction types under FSDP2.
        reshard_after_forward: whether a block frees its gathered parameters after forward.
    """
    layers = model.layers
    assert isinstance(layers, nn.ModuleDict)
    for number, (name, block) in enumerate(list(layers.items())):
        if recompute.recomputes(number):
            block = checkpoint_wrapper(block, preserve_rng_state=False)
        if compile.enable:
            block.compile(backend=compile.backend, fullgraph=True)
        layers[name] = block
    if mesh is not None:
        policy = MixedPrecisionPolicy(param_dtype=precision.compute, reduce_dtype=precision.reduce)
        for block in layers.values():
            fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                # FSDP2 averages over ranks. The loss here is a sum divided by the label count of all ranks: add up.
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)  # gloo has no other way to leave the average out
