"""Applies the parallelisms to a model: float8, tensor parallelism, activation checkpointing, torch.compile, FSDP2."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard

from torchladder.distributed import float8, tensor_parallel
from torchladder.distributed.activation_checkpoint import ActivationCheckpointConfig, apply_activation_checkpoint
from torchladder.distributed.float8 import Float8Config
from torchladder.distributed.mesh import Mesh, ParallelismConfig
from torchladder.distributed.pipeline import Stage, build_stages
from torchladder.distributed.pipeline_layout import PipelineLayout
from torchladder.registry import require, unknown_name


@dataclass(frozen=True)
class CompileConfig:
    """torch.compile of each block: one graph for all blocks and all windows of the curriculum."""

    enable: bool = False
    """Compile the components."""

    components: list[Literal["model", "loss"]] = field(default_factory=lambda: ["model"])
    """model compiles each block, loss compiles the head with its cross entropy."""

    backend: str = "inductor"
    """Backend of torch.compile."""

    def __post_init__(self) -> None:
        if self.backend != "inductor":  # listing them imports the compiler, which takes seconds
            known = [name for name in torch._dynamo.list_backends(exclude_tags=()) if "TESTING" not in name]
            if self.backend not in known:
                raise unknown_name("backend", self.backend, known, "compile.backend")

    def compiles(self, component: str) -> bool:
        return self.enable and component in self.components


@dataclass(frozen=True)
class Precision:
    """Dtypes of computation and of gradient reduction; weights are float32."""

    compute: torch.dtype = torch.float32
    reduce: torch.dtype = torch.float32


@dataclass(frozen=True)
class ParallelizeConfig:
    """The sections that ``parallelize_model`` applies.

    Attributes:
        parallelism: options of FSDP2 and tensor parallelism.
        float8: which layers compute in float8.
        activation_checkpoint: which activations are recomputed.
        compile: what is compiled.
        precision: dtypes under FSDP2.
        offload: whether weights, gradients and optimizer state are in CPU memory.
    """

    parallelism: ParallelismConfig
    float8: Float8Config = field(default_factory=Float8Config)
    activation_checkpoint: ActivationCheckpointConfig = field(default_factory=ActivationCheckpointConfig)
    compile: CompileConfig = field(default_factory=CompileConfig)
    precision: Precision = field(default_factory=Precision)
    offload: bool = False


def check_parallelize_config(mesh: Mesh, config: ParallelizeConfig, device: torch.device) -> None:
    """Raises ``ConfigError`` if an option needs other hardware, another mesh or another option."""
    config.float8.check(device, config.precision.compute)
    if config.parallelism.enable_async_tensor_parallel:
        key = "parallelism.enable_async_tensor_parallel"
        require(device.type == "cuda", f"{key} needs CUDA, and this run is on {device.type}.")
        require(config.compile.compiles("model"), f"{key} is a compiler pass: set compile.enable.")
    if config.offload:
        key = "training.enable_cpu_offload"
        require(mesh.fsdp_mesh is not None, f"{key} needs FSDP2, and this run has a single rank.")
        require(device.type != "cpu", f"{key} needs an accelerator, and this run is on a CPU.")


def parallelize_model(
    model: nn.Module,
    plan: dict[str, str],
    mesh: Mesh,
    config: ParallelizeConfig,
    saved_ops: Collection[str],
    layout: PipelineLayout | None = None,
) -> dict[int, Stage]:
    """Applies all parallelisms to a model, in place. Its blocks are ``model.layers``, name → block.

    Args:
        model: on the meta device or not; in a pipeline without the blocks of other ranks.
        plan: the model's ``parallel_plan``.
        mesh: the device mesh.
        config: what to apply, checked by ``check_parallelize_config``.
        saved_ops: the kernel's operators whose results selective activation checkpointing by op saves.
        layout: of the pipeline.

    Returns:
        The stages of this rank by number; none without a pipeline.
    """
    layers = model.layers
    assert isinstance(layers, nn.ModuleDict)
    compile = config.compile
    # First, because torchao replaces the layers that all the rest is applied to.
    float8.convert_to_float8(model, config.float8, sharded=mesh.fsdp_mesh is not None)
    if config.parallelism.enable_async_tensor_parallel:
        torch._inductor.config._micro_pipeline_tp = True  # overlaps collectives with the matrix products around them
    if mesh.tp_mesh is not None:
        tensor_parallel.apply_tensor_parallel(model, plan, mesh.tp_mesh, not config.parallelism.disable_loss_parallel)
    for number, (name, block) in enumerate(list(layers.items())):
        layers[name] = apply_activation_checkpoint(block, number, config.activation_checkpoint, saved_ops)
        if compile.compiles("model"):
            layers[name].compile(backend=compile.backend, fullgraph=True)
    if compile.compiles("loss"):
        for path, style in plan.items():
            if style == "lm_head":
                model.get_submodule(path).compile(backend=compile.backend, fullgraph=True)
    stages = build_stages(model, layout, mesh.pp_rank) if layout else {}
    if mesh.fsdp_mesh is not None and not stages:
        _apply_fsdp(model, list(layers.values()), mesh.fsdp_mesh, config)
    for number, stage in stages.items():
        assert layout is not None
        assert mesh.fsdp_mesh is not None
        _apply_fsdp(stage, [layers[name] for name in layout.stages[number]], mesh.fsdp_mesh, config)
    return stages


def materialize(model: nn.Module, device: torch.device, offload: bool) -> None:
    """Allocates a meta-device model on its device; with offload, parameters on the CPU and buffers on the device."""
    model.to_empty(device="cpu" if offload else device)
    for module in model.modules() if offload else ():
        if next(module.parameters(), None) is None:
            module.to(device)


def _apply_fsdp(model: nn.Module, blocks: list[nn.Module], mesh: DeviceMesh, config: ParallelizeConfig) -> None:
    """Applies FSDP2 to each block; the parameters of a block are gathered while the previous one computes."""
    precision = config.precision
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype=precision.compute, reduce_dtype=precision.reduce),
    }
    if config.offload:
        options["offload_policy"] = CPUOffloadPolicy()
    reshard = config.parallelism.fsdp_reshard_after_forward != "never"
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
            # Sum gradients instead of averaging: each rank's loss is already divided by the label count of all ranks.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo needs this to not average
