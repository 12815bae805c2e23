"""Spreads a model over ranks: float8 and shared layers, then recomputed activations, compilation, FSDP2."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard

from torchladder.distributed import activation_checkpoint, float8, tensor_parallel
from torchladder.distributed.activation_checkpoint import ActivationCheckpointConfig
from torchladder.distributed.float8 import Float8Config
from torchladder.distributed.mesh import Mesh, ParallelismConfig
from torchladder.registry import ConfigError


@dataclass(frozen=True)
class CompileConfig:
    """torch.compile, one graph per block: all blocks share it, and the ladder never recompiles it."""

    enable: bool = False
    """Compile what components names."""

    components: list[Literal["model", "loss"]] = field(default_factory=lambda: ["model"])
    """What is compiled: model, block by block; loss, the head and its cross entropy."""

    backend: str = "inductor"
    """The compiler behind torch.compile."""

    def compiles(self, component: str) -> bool:
        """Whether a component is compiled."""
        return self.enable and component in self.components


@dataclass(frozen=True)
class Precision:
    """What a model computes in; its weights stay float32."""

    compute: torch.dtype = torch.float32
    reduce: torch.dtype = torch.float32


@dataclass(frozen=True)
class ParallelizeConfig:
    """All that decides how a model is spread.

    Attributes:
        parallelism: the degrees, and how FSDP2 and tensor parallelism go about it.
        float8: which layers compute in float8.
        recompute: which activations are recomputed.
        compile: what is compiled.
        precision: compute and gradient reduction types under FSDP2.
        offload: whether weights, gradients and optimizer state stay in the host's memory.
    """

    parallelism: ParallelismConfig
    float8: Float8Config = field(default_factory=Float8Config)
    recompute: ActivationCheckpointConfig = field(default_factory=ActivationCheckpointConfig)
    compile: CompileConfig = field(default_factory=CompileConfig)
    precision: Precision = field(default_factory=Precision)
    offload: bool = False


def check(mesh: Mesh, settings: ParallelizeConfig, device: torch.device) -> None:
    """Checks that the settings can work here, before anything is built.

    Raises:
        ConfigError: one cannot; the message says why.
    """
    settings.float8.check(device, settings.precision.compute)
    if settings.parallelism.enable_async_tensor_parallel:
        tensor_parallel.check_overlap(device, settings.compile.compiles("model"))
    if settings.offload and (mesh.data is None or device.type == "cpu"):
        why = "this run has a single rank" if mesh.data is None else "a CPU's weights are in the host's memory already"
        raise ConfigError(f"training.enable_cpu_offload is for FSDP2 on accelerators: {why}.")


def parallelize(model: nn.Module, plan: dict[str, str], mesh: Mesh, settings: ParallelizeConfig) -> None:
    """Prepares a model in place; its blocks are ``model.layers``, name → block.

    Args:
        model: on the meta device or not.
        plan: the model's own, module path → style of tensor parallelism.
        mesh: the layout of the ranks.
        settings: what to do; ``check`` has passed them.

    Raises:
        ConfigError: the model's plan leaves something out, or float8 has no layer to compute.
    """
    layers = model.layers
    assert isinstance(layers, nn.ModuleDict)
    compile = settings.compile
    # torchao puts layers of its own in the place of linear ones, so it comes before what is tied to a layer.
    float8.convert(model, settings.float8, sharded=mesh.data is not None)
    if settings.parallelism.enable_async_tensor_parallel:
        tensor_parallel.overlap()
    if mesh.tensor is not None:
        tensor_parallel.parallelize(model, plan, mesh.tensor, not settings.parallelism.disable_loss_parallel)
    for number, (name, block) in enumerate(list(layers.items())):
        layers[name] = activation_checkpoint.wrap(block, number, settings.recompute)
        if compile.compiles("model"):
            layers[name].compile(backend=compile.backend, fullgraph=True)
    if compile.compiles("loss"):
        for path, style in plan.items():
            if style == "head":
                model.get_submodule(path).compile(backend=compile.backend, fullgraph=True)
    if mesh.data is not None:
        _shard(model, list(layers.values()), mesh.data, settings)


def materialize(model: nn.Module, device: torch.device, offload: bool) -> None:
    """Gives a model on meta its memory: on the device, or what can be offloaded on the host."""
    model.to_empty(device="cpu" if offload else device)
    for module in model.modules() if offload else ():
        if next(module.parameters(), None) is None:
            module.to(device)  # buffers serve where the activations are


def _shard(model: nn.Module, blocks: list[nn.Module], mesh: DeviceMesh, settings: ParallelizeConfig) -> None:
    """Shards block by block with FSDP2; a block's parameters are gathered while the one before it computes."""
    precision = settings.precision
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype=precision.compute, reduce_dtype=precision.reduce),
    }
    if settings.offload:
        options["offload_policy"] = CPUOffloadPolicy()
    reshard = settings.parallelism.fsdp_reshard_after_forward != "never"
    for block in blocks:
        fully_shard(block, reshard_after_forward=reshard, **options)
    fully_shard(model, **options)
    for block, following in pairwise(blocks):
        assert isinstance(block, FSDPModule)
        assert isinstance(following, FSDPModule)
        block.set_modules_to_forward_prefetch([following])
        following.set_modules_to_backward_prefetch([block])
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # FSDP2 averages over ranks. The loss here is a sum divided by the label count of all ranks: add up.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other way to leave the average out
