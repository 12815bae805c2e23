"""Context parallelism: each rank holds a slice of every row and receives the keys and values that it attends to.

The mask says how far a slice reaches: no query sees keys before ``start`` of the first query. All ranks of a row have
its whole mask on the host, so each knows what every other needs without communication. For rows of 64 tokens on 4 ranks
(16 each), ``start`` of the first queries, 0, 16, 32 and 48, is:

    chunk, window 16   0 16 32 48   nothing is exchanged
    chunk, window 24   0  0 24 48   rank 1 needs 16 keys of rank 0, and rank 2 needs 8 keys of rank 1
    causal             0  0  0  0   ranks 1, 2 and 3 need all keys before theirs
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from torchladder.distributed.mesh import Mesh


class ContextShard:
    """The slice of every row on this rank: tokens ``offset`` to ``offset + tokens_per_rank - 1``.

    Attributes:
        tokens_per_rank: tokens of a row on each rank.
        offset: position of this rank's first token.
    """

    def __init__(self, mesh: Mesh, seq_len: int) -> None:
        self.group = mesh.cp_group
        self.rank = mesh.cp_rank
        self.tokens_per_rank = seq_len // mesh.degrees.cp
        self.offset = self.rank * self.tokens_per_rank

    def __call__(self, rows: Tensor) -> Tensor:
        """Returns this rank's slice of rows (B, T)."""
        return rows if self.group is None else rows[:, self.offset : self.offset + self.tokens_per_rank]

    def prepare_mask(self, prepare: Callable[..., Any], start: Tensor, device: torch.device) -> Any:
        """Returns the attention mask of this rank's queries, for the function that ``wrap_attention`` returned.

        Args:
            prepare: the kernel's, ``(start, device, query_offset) -> attn_mask``.
            start: (B, T) int32 on the CPU, the mask of whole rows.
            device: where attention runs.
        """
        if self.group is None:
            return prepare(start, device)
        # The first key that each rank needs in any row of the batch (ranks), on the CPU.
        first_keys = start[:, :: self.tokens_per_rank].amin(dim=0).to(torch.int64)
        return prepare(start[:, : self.offset + self.tokens_per_rank], device, self.offset), first_keys

    def wrap_attention(self, attention_fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Returns a kernel's attention, ``(q, k, v, attn_mask[, sinks]) -> out``, over the keys of all ranks."""
        if self.group is None:
            return attention_fn
        name, rank = self.group.group_name, self.rank

        def context_parallel_attention(
            q: Tensor, k: Tensor, v: Tensor, attn_mask: tuple[Any, Tensor], *sinks: Tensor
        ) -> Tensor:
            local_mask, first_keys = attn_mask
            keys, values = _exchange(torch.cat([k, v], dim=1), first_keys, rank, name).chunk(2, dim=1)
            return attention_fn(q, keys, values, local_mask, *sinks)

        return context_parallel_attention


# --- the exchange, a custom operator that the compiler does not trace into -------------------------------------------


@torch.library.custom_op("torchladder::exchange", mutates_args=())
def _exchange(local: Tensor, first_keys: Tensor, rank: int, group: str) -> Tensor:
    """Returns the keys from position 0 to the end of this rank's slice (B, G, S, K), zeros before those it needs."""
    tokens, offset = local.shape[2], rank * local.shape[2]
    keys = local.new_zeros(*local.shape[:2], offset + tokens, local.shape[3])
    keys[:, :, offset:] = local
    counts = _exchange_counts(first_keys.tolist(), tokens)
    if any(map(any, counts)):
        receive, send = [row[rank] for row in counts], counts[rank]
        outgoing = [local[:, :, tokens - count :] for count in send]
        keys[:, :, offset - sum(receive) : offset] = _all_to_all(outgoing, receive, group)
    return keys


@torch.library.custom_op("torchladder::exchange_backward", mutates_args=())
def _exchange_backward(grad: Tensor, first_keys: Tensor, rank: int, group: str) -> Tensor:
    """Returns the gradient of this rank's keys (B, G, t, K), including that from the ranks that received them."""
    tokens = grad.shape[2] // (rank + 1)
    offset = rank * tokens
    local = grad[:, :, offset:].clone()
    counts = _exchange_counts(first_keys.tolist(), tokens)
    if not any(map(any, counts)):
        return local
    received, sent = [row[rank] for row in counts], counts[rank]
    outgoing = list(grad[:, :, offset - sum(received) : offset].split(received, dim=2))
    total = local.to(torch.promote_types(local.dtype, torch.float32))
    for count, remote in zip(sent, _all_to_all(outgoing, sent, group).split(sent, dim=2), strict=True):
        total[:, :, tokens - count :] += remote
    return total.to(local.dtype)


def _exchange_counts(first_keys: list[int], tokens: int) -> list[list[int]]:
    """Returns ``counts[source][target]``, how many of its last keys each rank of ``tokens`` tokens sends to each."""
    ranks = range(len(first_keys))
    return [
        [min(max((source + 1) * tokens - first_keys[target], 0), tokens) if source < target else 0 for target in ranks]
        for source in ranks
    ]


def _all_to_all(outgoing: list[Tensor], receive: list[int], group: str) -> Tensor:
    """Sends (B, G, n, K) to each rank; returns what is received, concatenated over tokens in rank order."""
    send = [x.shape[2] for x in outgoing]
    tensor = torch.cat(outgoing, dim=2).permute(2, 0, 1, 3).contiguous()  # (n, B, G, K), split along tokens
    received = tensor.new_empty(sum(receive), *tensor.shape[1:])
    dist.all_to_all_single(received, tensor, receive, send, group=_resolve_process_group(cast(Any, group)))
    return received.permute(1, 2, 0, 3)


@_exchange.register_fake
def _(local: Tensor, first_keys: Tensor, rank: int, group: str) -> Tensor:
    return local.new_empty(*local.shape[:2], (rank + 1) * local.shape[2], local.shape[3])


@_exchange_backward.register_fake
def _(grad: Tensor, first_keys: Tensor, rank: int, group: str) -> Tensor:
    return grad.new_empty(*grad.shape[:2], grad.shape[2] // (rank + 1), grad.shape[3])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, first_keys, ctx.rank, ctx.group = inputs
    ctx.save_for_backward(first_keys)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    (first_keys,) = ctx.saved_tensors
    return _exchange_backward(grad, first_keys, ctx.rank, ctx.group), None, None, None


_exchange.register_autograd(_differentiate, setup_context=_setup_context)
