"""FlashAttention 4 with a mask function and lists of blocks, as FlexAttention has them: any mask."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from torchladder import mask
from torchladder.models.attention import flash4
from torchladder.models.attention.kernel import AttentionKernel, AttentionSetup, register
from torchladder.models.attention.operator import attention_operator
from torchladder.registry import require


@register("flash_mask")
class FlashMaskKernel(AttentionKernel):
    """Any mask on Hopper and Blackwell GPUs, by the package flash-attn-4; ``start`` is data, and nothing recompiles."""

    devices = frozenset({"cuda"})
    attention_sinks = True
    saved_ops = frozenset({"torchladder::flash_mask"})
    auto_priority = 22

    @classmethod
    def auto_reason(cls, setup: AttentionSetup) -> str | None:
        # Measured on Hopper alone (docs/performance.md).
        if flash4.unavailable() is not None or setup.dtype not in flash4.DTYPES or flash4.generation() != "Hopper":
            return None
        return f"FlashAttention 4 computes any mask ({' + '.join(setup.masks)}) from lists of blocks, faster than flex"

    @classmethod
    def check(cls, setup: AttentionSetup) -> None:
        reason = flash4.unavailable()
        require(reason is None, f"kernel 'flash_mask' needs FlashAttention 4: {reason}.")
        flash4.check_dtype("flash_mask", setup.dtype)

    def prepare(self, start: Tensor, device: torch.device, query_offset: int = 0) -> list[Tensor]:
        """Returns ``start`` and the eight lists of a ``BlockMask``: partial and full blocks, by query and by key."""
        start = start.to(device, non_blocking=True)
        blocks = mask.block_mask(start)
        return [start, *(getattr(blocks, f"{which}_{name}") for which in _BY_QUERY + _BY_KEY for name in _LISTS)]

    @staticmethod
    def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: list[Tensor], sinks: Tensor | None = None) -> Tensor:
        return _flash_mask(q, k, v, attn_mask, sinks)


_BY_QUERY, _BY_KEY, _LISTS = ("kv", "full_kv"), ("q", "full_q"), ("num_blocks", "indices")


@lru_cache
def _mask_mod() -> Any:
    """Returns ``start[batch, query] <= key <= query`` in the language of the package's kernels."""
    import cutlass
    import cutlass.cute as cute
    from flash_attn.cute import utils

    @cute.jit
    def mask_mod(batch, head, query, key, seqlen_info, aux_tensors):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202
        first = utils.scalar_to_ssa(aux_tensors[0][batch[0], query[0]], cutlass.Int32)
        return (first <= key) & (key <= query)

    return mask_mod


def _mask_arguments(start: Tensor, blocks: list[Tensor]) -> dict[str, Any]:
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    block_lists = BlockSparseTensorsTorch(*blocks, block_size=(mask.BLOCK_TOKENS, mask.BLOCK_TOKENS))
    return {"mask_mod": _mask_mod(), "aux_tensors": [start], "block_sparse_tensors": block_lists}


def _forward(q: Tensor, k: Tensor, v: Tensor, attn_mask: list[Tensor]) -> tuple[Tensor, Tensor]:
    start, *lists = attn_mask
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, lse = flash4.forward(q, k, v, _mask_arguments(start, lists[:4]))
    return out.transpose(1, 2), lse


def _backward(
    grad: Tensor, qkv: tuple[Tensor, Tensor, Tensor], out: Tensor, lse: Tensor, attn_mask: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    start, *lists = attn_mask
    grad, q, k, v, out = (x.transpose(1, 2) for x in (grad, *qkv, out))
    dq, dk, dv = flash4.backward(grad, (q, k, v), out, lse, _mask_arguments(start, lists[4:]))
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


_flash_mask = attention_operator("flash_mask", _forward, _backward)
