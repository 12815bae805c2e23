"""Tensor parallelism with sequence parallelism: layers are sharded over heads and features, norms over tokens.

The model's ``parallel_plan`` names a style for every module that has parameters:

| style | the module | input → output |
|---|---|---|
| ``embedding`` | sharded over the vocabulary | all tokens → sharded tokens |
| ``sequence`` | replicated, a norm | sharded tokens → sharded tokens |
| ``qk_norm`` | replicated, a norm of each head | sharded heads → sharded heads |
| ``joint_qk_norm`` | sharded, a norm of all heads together | sharded heads → sharded heads |
| ``sinks`` | sharded over heads | none → this rank's heads |
| ``gather`` | has no parameters itself | first input: sharded tokens → all tokens |
| ``colwise`` | linear, sharded over output features | all tokens → all tokens, sharded features |
| ``rowwise`` | linear, sharded over input features | sharded features → sharded tokens |
| ``lm_head`` | sharded over the vocabulary | sharded tokens → logits, or the loss |

Vocabulary and features may shard unevenly; the degree must divide heads and tokens. The attention mask is replicated.
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
"""Sharded over the tokens of (B, T, d)."""
HEADS = Shard(2)
"""Sharded over the heads of (B, T, H, K)."""


def apply_tensor_parallel(model: nn.Module, plan: dict[str, str], mesh: DeviceMesh, loss_parallel: bool) -> None:
    """Applies tensor parallelism to a model, in place.

    Args:
        model: on the meta device or not.
        plan: module path → style.
        mesh: one dimension.
        loss_parallel: whether the head is sharded over the vocabulary in the loss, otherwise over the tokens.
    """
    for path, style in plan.items():
        if style not in _STYLES:
            raise unknown_name("style", style, _STYLES, f"parallel_plan[{path!r}]")
        parallelize_module(model, mesh, {path: _STYLES[style](loss_parallel)}, src_data_rank=None)
    for name, parameter in model.named_parameters():
        # All parameters must be on one mesh, because gradient clipping computes their norm together.
        if not isinstance(parameter, DTensor):
            raise ConfigError(f"the model's parallel_plan has no style for the module of {name}: add one.")


class _Gather(ParallelStyle):
    """Gathers the tokens of the first input once for all layers inside."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def gather(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return _redistribute(args[0], device_mesh, Replicate()), *args[1:]

        module.register_forward_pre_hook(gather)
        return module


class _JointNorm(ParallelStyle):
    """Shards the weight like the heads that it scales; the norm itself computes on a tensor with all heads."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def join(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (DTensor.from_local(args[0], device_mesh, [HEADS], run_check=False),)

        def split(module: nn.Module, args: tuple[Any, ...], output: DTensor) -> torch.Tensor:
            return output.redistribute(placements=[HEADS]).to_local()

        _shard_parameters(module, device_mesh, Shard(0))
        module.register_forward_pre_hook(join)
        module.register_forward_hook(split)
        return module


class _Sinks(ParallelStyle):
    """Shards one number per head."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        _shard_parameters(module, device_mesh, Shard(0))
        return module


class _Embedding(RowwiseParallel):
    """Waits for the collective of its output: a compiled block gives no gradient to an async input."""

    @staticmethod
    def _prepare_output_fn(
        output_layouts: Any, use_local_output: bool, mod: nn.Module, outputs: Any, device_mesh: DeviceMesh
    ) -> torch.Tensor:
        return outputs.redistribute(placements=output_layouts, async_op=False).to_local()


class _Rowwise(RowwiseParallel):
    """Supports uneven shards: it takes the number of features from the layer instead of multiplying this rank's."""

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
    """Shards the head over the vocabulary and gathers its input, or replicates it and shards its input over tokens."""

    def __init__(self, loss_parallel: bool) -> None:
        self.loss_parallel = loss_parallel

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        _shard_parameters(module, device_mesh, Shard(0) if self.loss_parallel else Replicate())

        def place(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return _redistribute(args[0], device_mesh, Replicate() if self.loss_parallel else TOKENS), *args[1:]

        module.register_forward_pre_hook(place)
        return module


def _shard_parameters(module: nn.Module, mesh: DeviceMesh, placement: Placement) -> None:
    for name, parameter in list(module.named_parameters(recurse=False)):
        distributed = distribute_tensor(parameter, mesh, [placement], src_data_rank=None)
        module.register_parameter(name, nn.Parameter(distributed))


def _redistribute(x: torch.Tensor, mesh: DeviceMesh, placement: Placement) -> DTensor:
    """Returns ``x`` with another placement; a plain tensor is sharded over tokens."""
    if not isinstance(x, DTensor):
        x = DTensor.from_local(x, mesh, [TOKENS], run_check=False)
    return x.redistribute(placements=[placement])


_STYLES: dict[str, Callable[[bool], ParallelStyle]] = {
    "embedding": lambda _: _Embedding(input_layouts=Replicate(), output_layouts=TOKENS),
    "sequence": lambda _: SequenceParallel(use_local_output=True),
    "qk_norm": lambda _: SequenceParallel(sequence_dim=2, use_local_output=True),
    "joint_qk_norm": lambda _: _JointNorm(),
    "sinks": lambda _: _Sinks(),
    "gather": lambda _: _Gather(),
    "colwise": lambda _: ColwiseParallel(),
    "rowwise": lambda _: _Rowwise(output_layouts=TOKENS),
    "lm_head": _Head,
}
