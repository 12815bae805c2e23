"""Attention masks as one integer tensor.

``start[b, i]`` is the first key that query ``i`` of row ``b`` may attend to: query ``q`` sees key ``k`` iff
``start[b, q] <= k <= q``. Along a row ``start`` never decreases, and ``start[b, i] <= i``. An elementwise maximum
preserves both properties, so masks compose by ``max``::

    start = from_names(["document", "chunk"], positions, window)  # max(document(...), chunk(...))

A registered mask is a function ``(positions (B, T) int32, window) -> start (B, T) int32``. ``positions`` is 0 at the
first token of each document, and a *window* of ``w`` tokens includes the query itself. ``dense`` is the slow definition
of a mask; ``block_mask``, ``varlen`` and ``chunk_width`` convert it to what fast kernels take.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from torchladder.registry import ConfigError, Registry

registry: Registry[Tensor] = Registry("mask", runtime_args={"positions": "(B, T) int32", "window": "tokens"})
register = registry.register


# --- masks -----------------------------------------------------------------------------------------------------------


@register("causal")
def causal(positions: Tensor, window: int) -> Tensor:
    """Every query sees all keys up to itself."""
    return torch.zeros_like(positions)


@register("document")
def document(positions: Tensor, window: int) -> Tensor:
    """A query sees the keys of its own document."""
    return _indices(positions) - positions


@register("chunk")
def chunk(positions: Tensor, window: int) -> Tensor:
    """A query sees the keys of its own chunk; a chunk ends every ``window`` tokens (SkyLadder, arXiv 2503.15450)."""
    return _indices(positions) // window * window


@register("sliding")
def sliding(positions: Tensor, window: int) -> Tensor:
    """A query sees itself and the ``window - 1`` keys before it."""
    return (_indices(positions) - (window - 1)).clamp_min(0)


def compose(*starts: Tensor) -> Tensor:
    """Returns the intersection of masks: a query sees a key only if every mask allows it."""
    start = starts[0]
    for other in starts[1:]:
        start = torch.maximum(start, other)
    return start


def from_names(names: Iterable[str], positions: Tensor, window: int) -> Tensor:
    """Returns ``start`` (B, T) int32, the intersection of one or more registered masks."""
    return compose(*(registry.get(name)(positions, window) for name in names))


def reads_window(name: str) -> bool:
    """Returns whether a mask depends on the window."""
    row = torch.arange(64, dtype=torch.int32)[None]  # one document
    return not torch.equal(from_names([name], row, 1), from_names([name], row, 64))


def from_types(
    names: Mapping[str, Iterable[str]], positions: Tensor, window_of: Callable[[str], int]
) -> dict[str, Tensor]:
    """Returns layer type -> ``start`` (B, T) int32, of each type's masks under its window."""
    return {layer_type: from_names(own, positions, window_of(layer_type)) for layer_type, own in names.items()}


def _indices(positions: Tensor) -> Tensor:
    return torch.arange(positions.shape[-1], dtype=torch.int32, device=positions.device).expand_as(positions)


# --- conversions -----------------------------------------------------------------------------------------------------


def dense(start: Tensor) -> Tensor:
    """Returns the boolean mask (B, T, T), True where query (dim 1) sees key (dim 2): the definition, O(T²) memory."""
    index = torch.arange(start.shape[-1], device=start.device)
    return (start[:, :, None] <= index[None, None, :]) & (index[None, None, :] <= index[None, :, None])


def pairs(start: Tensor) -> int:
    """Returns the number of attended (query, key) pairs in the batch."""
    batch, length = start.shape
    # Query i sees i - start[i] + 1 keys.
    return batch * length * (length + 1) // 2 - int(start.sum(dtype=torch.int64))


def layer_pairs(starts: Mapping[str, Tensor], layers: Mapping[str, int]) -> int:
    """Returns the number of attended pairs in the batch, summed over layers.

    Args:
        starts: layer type -> ``start``.
        layers: layer type -> number of layers.
    """
    return sum(layers[layer_type] * pairs(start) for layer_type, start in starts.items())


@dataclass(frozen=True)
class VarlenSegments:
    """A mask as contiguous segments of the flattened batch under one sliding window.

    Attributes:
        cu_seqlens: (segments + 1,) int32, where each segment begins in the flattened (B·T) batch; ends with B·T.
        max_seqlen: tokens in the longest segment.
        window: maximum number of tokens a query sees, including itself; ``max_seqlen`` if no window applies.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    window: int


def varlen(start: Tensor) -> VarlenSegments:
    """Returns the mask as segments under one window.

    For example, documents of 5 and 3 tokens under ``sliding`` with a window of 4, ``start = 0 0 0 0 1 5 5 5``, are the
    segments ``cu_seqlens = 0 5 8`` with ``max_seqlen = 5`` and ``window = 4``.

    Raises:
        ConfigError: the mask has no such representation.
    """
    batch, length = start.shape
    index = _indices(start)
    # A segment begins where a query sees only itself. Under a window of one token that is every query, and segments of
    # one token are the same mask.
    first = start == index
    bounds = first.flatten().nonzero().flatten()
    end = torch.tensor([batch * length], device=start.device)
    lengths = torch.diff(torch.cat([bounds, end]))
    window = int((index - start).max()) + 1
    segment = torch.where(first, index, 0).cummax(dim=1).values
    if not torch.equal(start, torch.maximum(segment, index - (window - 1)).to(start.dtype)):
        raise ConfigError("the mask is not a set of segments under one window: use the kernel flex, sdpa or dense.")
    return VarlenSegments(torch.cat([bounds, end]).to(torch.int32), int(lengths.max()), window)


def chunk_width(start: Tensor) -> int:
    """Returns the width w of uniform chunks, which fold ``(B, T)`` into ``(B * ceil(T / w), w)``.

    For example, ``start = 0 0 0 3 3 3 6 6`` has chunks of width 3, the last one shorter.

    Raises:
        ConfigError: the rows are not cut into chunks of one width.
    """
    length = start.shape[-1]
    cuts = (start[0, 1:] > 0).nonzero()
    width = int(cuts[0]) + 1 if len(cuts) else length
    if not torch.equal(start, _indices(start) // width * width):
        raise ConfigError("the mask is not made of uniform chunks: use the kernel varlen, flex, sdpa or dense.")
    return width


# --- FlexAttention ---------------------------------------------------------------------------------------------------

BLOCK_TOKENS = 128
"""Tokens per side of a FlexAttention block, the minimum of its GPU kernel."""


def block_mask(start: Tensor, block_size: int = BLOCK_TOKENS, query_offset: int = 0) -> BlockMask:
    """Returns the FlexAttention ``BlockMask`` of the mask, computed from ``start`` without comparing token pairs.

    Equals ``create_block_mask`` of the same mask for any length, with O((T / block_size)²) memory instead of O(T²).
    ``start`` never decreases, so two numbers per query block are enough. For ``start = 0 0 0 0 0 0 3 3`` and blocks of
    2 tokens (``P`` partial, computed with the mask; ``F`` full, computed without it)::

        key block       0  1  2  3
        query block 0   P           first_kv = 0, first_full = 0
        query block 1   F  P        first_kv = 0, first_full = 0
        query block 2   F  F  P     first_kv = 0, first_full = 0
        query block 3      P  F  P  first_kv = 1, first_full = 2: queries 6 and 7 see keys from 3 on, half of block 1

    The mask function reads ``start`` as a tensor, so a compiled kernel does not recompile when the window changes. Keep
    ``start`` on the device of attention: ``BlockMask.to`` does not move it.

    Args:
        start: (B, T) int32.
        block_size: tokens per side of a block, a multiple of 128 for the GPU kernel.
        query_offset: position of the first query, a multiple of ``block_size``; there are always T keys.
    """
    batch, length = start.shape
    blocks = -(-length // block_size)
    block = torch.arange(blocks, dtype=torch.int32, device=start.device).repeat(batch, 1)
    whole = length // block_size  # blocks without padding; only these can be full
    first_query = block[0].long() * block_size
    last_query = (first_query + block_size - 1).clamp_max(length - 1)

    # Query block I sees key blocks [first_kv, I]; all of its queries see all keys of [first_full, I).
    first_kv = start[:, first_query] // block_size
    first_full = (start[:, last_query] + (block_size - 1)) // block_size
    first_full = torch.where(block < whole, torch.minimum(first_full, block), block)
    # The transpose: key block J is full in query blocks (J, full_end) and partial in J and [full_end, partial_end).
    partial_end = torch.searchsorted(first_kv, block, right=True, out_int32=True)
    full_end = torch.searchsorted(first_full, block, right=True, out_int32=True).clamp_max(whole)
    full_end = torch.maximum(torch.minimum(full_end, partial_end), block + 1)

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (start[b, q + query_offset] <= k) & (k <= q + query_offset)

    options: dict[str, Any] = {"BLOCK_SIZE": (block_size, block_size), "mask_mod": mask_mod}
    # Counts and indices of partial blocks, then of full ones.
    kv_blocks = (*_list_blocks((first_kv, first_full), (block, block + 1)), *_list_blocks((first_full, block)))
    if query_offset:
        options["seq_lengths"] = (length - query_offset, length)
        later: list[Any] = [x[:, :, query_offset // block_size :].contiguous() for x in kv_blocks]
        return BlockMask.from_kv_blocks(*later, **options)
    q_blocks = (*_list_blocks((block, block + 1), (full_end, partial_end)), *_list_blocks((block + 1, full_end)))
    return BlockMask((length, length), *kv_blocks, *q_blocks, **options)


def _list_blocks(blocks: tuple[Tensor, Tensor], more: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Lists one or two half-open ranges of block numbers per row: counts (B, 1, N) and indices (B, 1, N, N)."""
    low, high = blocks
    count = (high - low).clamp_min(0)
    slot = torch.arange(low.shape[-1], dtype=torch.int32, device=low.device)
    indices = low[..., None] + slot  # (B, N, N)
    if more is not None:
        low, high = more
        indices = torch.where(slot < count[..., None], indices, (low - count)[..., None] + slot)
        count = count + (high - low).clamp_min(0)
    # Slots beyond the count are never read; zero keeps them in bounds.
    indices = torch.where(slot < count[..., None], indices, 0)
    return count[:, None].contiguous(), indices[:, None].contiguous()
