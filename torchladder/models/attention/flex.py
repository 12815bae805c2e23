"""FlexAttention: any mask, one compiled graph for every window."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from torchladder import mask
from torchladder.models.attention.kernel import AttentionKernel, register
from torchladder.registry import ConfigError


@register("flex")
class FlexKernel(AttentionKernel):
    """Any mask on CUDA; forward only on a CPU, since FlexAttention has no CPU backward."""

    name = "flex"

    def __init__(self, masks: list[str], device: torch.device, training: bool) -> None:
        super().__init__(masks, device, training)
        # Static shapes: rows keep one length, and a window is data. Compiling happens at the first call.
        self._flex: Any = torch.compile(flex_attention, dynamic=False)

    def check(self, device: torch.device, training: bool) -> None:
        if device.type == "cpu" and training:
            raise ConfigError(
                "kernel 'flex' cannot train on a CPU: FlexAttention has no backward there. Use sdpa, fold or auto."
            )

    def check_context_parallel(self, tokens: int) -> None:
        if tokens % mask.BLOCK:
            raise ConfigError(
                f"kernel 'flex' works in blocks of {mask.BLOCK} tokens, and {tokens} of a row fall to each rank: "
                "choose training.seq_len and parallelism.context_parallel_degree so that a rank's are a multiple."
            )

    def derive(self, start: Tensor, device: torch.device, first: int = 0) -> BlockMask:
        return mask.block_mask(start.to(device, non_blocking=True), first=first)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, form: BlockMask) -> Tensor:  # type: ignore[override]
        return self._flex(q, k, v, block_mask=form, enable_gqa=q.shape[1] != k.shape[1])
