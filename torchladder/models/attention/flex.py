"""FlexAttention: any mask on CUDA, one compiled graph for every window."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from torchladder import mask
from torchladder.models.attention.kernel import UNIFORM_CHUNKS, AttentionKernel, AttentionSetup, register
from torchladder.registry import ConfigError


@register("flex")
class FlexKernel(AttentionKernel):
    """Any mask on CUDA; forward only on a CPU, where FlexAttention has no backward."""

    context_parallel = True
    attention_sinks = True
    saved_ops = frozenset({"flex_attention"})
    auto_priority = 20

    def __init__(self) -> None:
        # Static shapes: rows have one length, and the window is data. Compilation happens at the first call.
        self._flex: Any = torch.compile(flex_attention, dynamic=False)

    @classmethod
    def auto_reason(cls, setup: AttentionSetup) -> str | None:
        whole_chunks = setup.tokens_per_rank is not None and UNIFORM_CHUNKS.issuperset(setup.masks)
        if setup.device.type != "cuda" or whole_chunks:  # sdpa computes whole chunks as plain causal attention
            return None
        return f"computes any mask ({' + '.join(setup.masks)}), and one compiled graph serves every window"

    @classmethod
    def check(cls, setup: AttentionSetup) -> None:
        if setup.device.type == "cpu" and setup.training:
            raise ConfigError(
                "kernel 'flex' cannot train on a CPU: FlexAttention has no backward there. Use sdpa, fold or auto."
            )
        if setup.device.type == "cpu" and setup.attention_sinks:
            raise ConfigError(
                "kernel 'flex' has no attention sinks on a CPU: FlexAttention does not return the log-sum-exp there. "
                "Use sdpa, fold or auto."
            )
        if setup.tokens_per_rank is not None and setup.tokens_per_rank % mask.BLOCK_TOKENS:
            raise ConfigError(
                f"kernel 'flex' works in blocks of {mask.BLOCK_TOKENS} tokens, and {setup.tokens_per_rank} tokens of a "
                "row are on each rank: choose training.seq_len and parallelism.context_parallel_degree so that they "
                f"are a multiple of {mask.BLOCK_TOKENS}."
            )

    def prepare(self, start: Tensor, device: torch.device, query_offset: int = 0) -> BlockMask:
        return mask.block_mask(start.to(device, non_blocking=True), query_offset=query_offset)

    def attention(  # type: ignore[override]
        self, q: Tensor, k: Tensor, v: Tensor, attn_mask: BlockMask, sinks: Tensor | None = None
    ) -> Tensor:
        grouped = q.shape[1] != k.shape[1]
        if sinks is None:
            return self._flex(q, k, v, block_mask=attn_mask, enable_gqa=grouped)
        out, lse = self._flex(q, k, v, block_mask=attn_mask, enable_gqa=grouped, return_lse=True)
        return out * torch.sigmoid(lse - sinks[:, None]).to(out.dtype)[..., None]  # the keys' share of the softmax
