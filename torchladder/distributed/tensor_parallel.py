"""Tensor parallelism: ranks share each layer by heads and features, and in norms and between blocks by tokens.

The model's ``parallel_plan`` names a style for every module that has parameters:

| style | the module | its input → its output |
|---|---|---|
| ``embedding`` | rows of the vocabulary on each rank | all tokens → a share of the tokens |
| ``sequence`` | whole on each rank, a norm | a share of the tokens → the same |
| ``heads`` | whole on each rank, a norm of each head | a share of the heads → the same |
| ``gather`` | has no parameters of its own | its first input: a share of the tokens → all of them |
| ``colwise`` | linear, a share of the outputs on each rank | all tokens → all tokens, a share of the features |
| ``rowwise`` | linear, a share of the inputs on each rank | a share of the features → a share of the tokens |
| ``head`` | rows of the vocabulary on each rank | a share of the tokens → logits, or the loss |

Vocabularies and features that do not divide are shared unevenly; heads and tokens have to divide. The mask goes through
untouched: every rank has all of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from torchladder.registry import ConfigError, unknown_name

TOKENS = Shard(1)
"""A share of the tokens of (B, T, d)."""


def parallelize(model: nn.Module, plan: dict[str, str], mesh: DeviceMesh, loss_parallel: bool) -> None:
    """Shares the layers of a model among the ranks of a mesh, in place.

    Args:
        model: on the meta device or not.
        plan: module path → style.
        mesh: one dimension.
        loss_parallel: whether a rank takes a share of the vocabulary in the loss, otherwise a share of the tokens.

    Raises:
        ConfigError: an unknown style, or a parameter that the plan leaves out.
    """
    for path, style in plan.items():
        if style not in _STYLES:
            raise unknown_name(f"style of {path} in the model's parallel_plan", style, _STYLES)
        parallelize_module(model, mesh, {path: _STYLES[style](loss_parallel)}, src_data_rank=None)
    for name, parameter in model.named_parameters():
        # One mesh for all: the norm of the gradients is taken over them together.
        if not isinstance(parameter, DTensor):
            raise ConfigError(f"the model's parallel_plan names no style for the module of {name}.")


def check_overlap(device: torch.device, compiled: bool) -> None:
    """Checks that collectives can overlap with products.

    Raises:
        ConfigError: there is nothing here that could.
    """
    if device.type != "cuda":
        raise ConfigError(
            f"parallelism.enable_async_tensor_parallel needs CUDA, whose ranks can reach into each other's memory; "
            f"this run is on a {device.type}."
        )
    if not compiled:
        raise ConfigError("parallelism.enable_async_tensor_parallel is the compiler's work: set compile.enable.")


def overlap() -> None:
    """Lets compiled blocks overlap their collectives with the products around them (async tensor parallelism)."""
    torch._inductor.config._micro_pipeline_tp = True


class _Gather(ParallelStyle):
    """Gathers the tokens of the first input once for all the layers inside."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def gather(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return _placed(args[0], device_mesh, Replicate()), *args[1:]

        module.register_forward_pre_hook(gather)
        return module


class _Embedding(RowwiseParallel):
    """Waits for its result: a compiled block that is handed one on its way gives it no gradient."""

    @staticmethod
    def _prepare_output_fn(
        output_layouts: Any, use_local_output: bool, mod: nn.Module, outputs: Any, device_mesh: DeviceMesh
    ) -> torch.Tensor:
        return outputs.redistribute(placements=output_layouts, async_op=False).to_local()


class _Rowwise(RowwiseParallel):
    """Takes features that do not divide as well: their number is the layer's, not twice that of this rank's share."""

    @staticmethod
    def _prepare_input_fn(
        input_layouts: Any, desired_input_layouts: Any, mod: nn.Module, inputs: Any, device_mesh: DeviceMesh
    ) -> DTensor:
        x = inputs[0].contiguous()
        assert isinstance(mod, nn.Linear)
        whole = torch.empty((*x.shape[:-1], mod.in_features), device="meta")
        return DTensor.from_local(
            x, device_mesh, [Shard(x.dim() - 1)], run_check=False, shape=whole.shape, stride=whole.stride()
        )


class _Head(ParallelStyle):
    """Hands the head all states and a share of the vocabulary, or a share of the states and the whole vocabulary."""

    def __init__(self, loss_parallel: bool) -> None:
        self.loss_parallel = loss_parallel

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        placement = Shard(0) if self.loss_parallel else Replicate()
        for name, parameter in list(module.named_parameters(recurse=False)):
            shared = distribute_tensor(parameter, device_mesh, [placement], src_data_rank=None)
            module.register_parameter(name, nn.Parameter(shared))

        def place(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return _placed(args[0], device_mesh, Replicate() if self.loss_parallel else TOKENS), *args[1:]

        module.register_forward_pre_hook(place)
        return module


def _placed(x: torch.Tensor, mesh: DeviceMesh, placement: Placement) -> DTensor:
    """Returns ``x``, a share of the tokens where it is a plain tensor, with another placement."""
    if not isinstance(x, DTensor):
        x = DTensor.from_local(x, mesh, [TOKENS], run_check=False)
    return x.redistribute(placements=[placement])


_STYLES: dict[str, Callable[[bool], ParallelStyle]] = {
    "embedding": lambda _: _Embedding(input_layouts=Replicate(), output_layouts=TOKENS),
    "sequence": lambda _: SequenceParallel(),
    "heads": lambda _: SequenceParallel(sequence_dim=2, use_local_output=True),
    "gather": lambda _: _Gather(),
    "colwise": lambda _: ColwiseParallel(),
    "rowwise": lambda _: _Rowwise(output_layouts=TOKENS),
    "head": _Head,
}
