"""Attention masks as one integer tensor, and everything that follows from it.

``start[b, i]`` is the first key that query ``i`` of row ``b`` may attend to: query ``q`` sees key ``k`` iff
``start[b, q] <= k <= q``. Along a row ``start`` never decreases, and ``start[b, i] <= i``. Both survive an elementwise
maximum, so masks compose by ``max``:

    start = compose(document(positions, window), chunk(positions, window))

A *window* of ``w`` counts the query itself. ``dense`` is the slow definition; the other forms are what kernels eat.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from torchladder.registry import ConfigError, Registry

Mask = Callable[[Tensor, int], Tensor]
"""``(positions (B, T) int32, window) -> start (B, T) int32``"""

registry: Registry[Tensor] = Registry("mask", facts={"positions": "(B, T) int32", "window": "tokens"})
register = registry.register


# --- masks -----------------------------------------------------------------------------------------------------------


@register("causal")
def causal(positions: Tensor, window: int) -> Tensor:
    """Every query sees all keys up to itself."""
    return torch.zeros_like(positions)


@register("document")
def document(positions: Tensor, window: int) -> Tensor:
    """A query sees the keys of its own document; ``positions`` is 0 at a document's first token."""
    return _indices(positions) - positions


@register("chunk")
def chunk(positions: Tensor, window: int) -> Tensor:
    """The row is cut every ``window`` tokens; a query sees the keys of its own chunk (SkyLadder, arXiv 2503.15450)."""
    return _indices(positions) // window * window


@register("sliding")
def sliding(positions: Tensor, window: int) -> Tensor:
    """A query sees itself and the ``window - 1`` keys before it."""
    return (_indices(positions) - (window - 1)).clamp_min(0)


def compose(*starts: Tensor) -> Tensor:
    """Returns the mask that allows what every given mask allows."""
    start = starts[0]
    for other in starts[1:]:
        start = torch.maximum(start, other)
    return start


def from_names(names: Sequence[str], positions: Tensor, window: int) -> Tensor:
    """Returns the ``start`` (B, T) int32 of registered masks, composed.

    Args:
        names: of the masks, one at least.
        positions: (B, T) int32, 0 at the first token of each document.
        window: tokens a query may attend to, itself included.
    """
    return compose(*(registry.get(name)(positions, window) for name in names))


def _indices(positions: Tensor) -> Tensor:
    length = positions.shape[-1]
    return torch.arange(length, dtype=torch.int32, device=positions.device).expand_as(positions)


# --- what follows from start -----------------------------------------------------------------------------------------


def dense(start: Tensor) -> Tensor:
    """Returns the boolean mask (B, T, T), True where query (dim 1) sees key (dim 2): the definition, T² of memory."""
    index = torch.arange(start.shape[-1], device=start.device)
    return (start[:, :, None] <= index[None, None, :]) & (index[None, None, :] <= index[None, :, None])


def pairs(start: Tensor) -> int:
    """Returns how many (query, key) pairs the mask lets attend, over the whole batch."""
    batch, length = start.shape
    # Query i sees i - start[i] + 1 keys.
    return batch * length * (length + 1) // 2 - int(start.sum(dtype=torch.int64))


@dataclass(frozen=True)
class VarlenSegments:
    """The mask as contiguous segments of the flattened batch under one sliding window.

    Attributes:
        cu_seqlens: (segments + 1,) int32, where each segment begins in the flattened (B·T) batch; ends with B·T.
        max_seqlen: tokens in the longest segment.
        window: tokens a query may see with itself, at most; ``max_seqlen`` where nothing narrows a segment.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    window: int


def varlen(start: Tensor) -> VarlenSegments:
    """Returns the mask as segments under one window.

    Raises:
        ConfigError: the mask is not of that form.
    """
    batch, length = start.shape
    index = _indices(start)
    # A segment begins where a query sees itself alone and nothing before a later query's start: under a window of one
    # token every query is such a place, and segments of one token are the same mask.
    first = start == index
    bounds = first.flatten().nonzero().flatten()
    end = torch.tensor([batch * length], device=start.device)
    lengths = torch.diff(torch.cat([bounds, end]))
    window = int((index - start).max()) + 1
    segment = torch.where(first, index, 0).cummax(dim=1).values
    if not torch.equal(start, torch.maximum(segment, index - (window - 1)).to(start.dtype)):
        raise ConfigError("this mask is not a set of segments under one window: use the kernel flex, sdpa or dense.")
    return VarlenSegments(torch.cat([bounds, end]).to(torch.int32), int(lengths.max()), window)


def fold(start: Tensor) -> int:
    """Returns the width w of uniform chunks, so that ``[B, T]`` can be folded to ``[B * ceil(T / w), w]``.

    Raises:
        ConfigError: the rows are not cut into chunks of one width.
    """
    length = start.shape[-1]
    cuts = (start[0, 1:] > 0).nonzero()
    width = int(cuts[0]) + 1 if len(cuts) else length
    if not torch.equal(start, _indices(start) // width * width):
        raise ConfigError("this mask is not made of uniform chunks: use the kernel varlen, flex, sdpa or dense.")
    return width


BLOCK = 128
"""Tokens per side of a FlexAttention block, the fewest that its GPU kernel takes."""


def block_mask(start: Tensor, block_size: int = BLOCK, first: int = 0) -> BlockMask:
    """Returns the FlexAttention ``BlockMask`` of the mask, written down without looking at tokens pairwise.

    Equal to ``create_block_mask`` of the same mask, for any length, with memory in proportion to (T / block_size)².
    The mask function reads ``start`` as a tensor, so a compiled kernel never recompiles when the window changes; keep
    ``start`` on the device where attention runs, since ``BlockMask.to`` does not move it.

    Args:
        start: (B, T) int32.
        block_size: tokens per side of a block, a multiple of 128 for the GPU kernel.
        first: the token that queries begin at, a multiple of ``block_size``; the keys are all T.
    """
    batch, length = start.shape
    blocks = -(-length // block_size)
    block = torch.arange(blocks, dtype=torch.int32, device=start.device).repeat(batch, 1)
    whole = length // block_size  # blocks without padding: only these can be full
    first_row = block[0].long() * block_size
    last_row = (first_row + block_size - 1).clamp_max(length - 1)

    # Row block I touches the key blocks [reach, I]. Those in [inner, I) are seen by all of its queries.
    reach = start[:, first_row] // block_size
    inner = (start[:, last_row] + (block_size - 1)) // block_size
    inner = torch.where(block < whole, torch.minimum(inner, block), block)
    # The same two borders seen from key block J: rows in (J, full_until) see all of it, rows below touch_until some.
    touch_until = torch.searchsorted(reach, block, right=True, out_int32=True)
    full_until = torch.searchsorted(inner, block, right=True, out_int32=True).clamp_max(whole)
    full_until = torch.maximum(torch.minimum(full_until, touch_until), block + 1)

    def kv_index_inside(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (start[b, q] <= k) & (k <= q)

    kv_num, kv_indices = _runs((reach, inner), (block, block + 1))
    full_kv_num, full_kv_indices = _runs((inner, block), None)
    q_num, q_indices = _runs((block, block + 1), (full_until, touch_until))
    full_q_num, full_q_indices = _runs((block + 1, full_until), None)
    if first:
        return _queries_from(first, start, block_size, (kv_num, kv_indices), (full_kv_num, full_kv_indices))
    return BlockMask(
        seq_lengths=(length, length),
        kv_num_blocks=kv_num,
        kv_indices=kv_indices,
        full_kv_num_blocks=full_kv_num,
        full_kv_indices=full_kv_indices,
        q_num_blocks=q_num,
        q_indices=q_indices,
        full_q_num_blocks=full_q_num,
        full_q_indices=full_q_indices,
        BLOCK_SIZE=(block_size, block_size),
        mask_mod=kv_index_inside,
    )


def _queries_from(
    first: int, start: Tensor, block_size: int, some: tuple[Tensor, Tensor], full: tuple[Tensor, Tensor]
) -> BlockMask:
    """Returns the block mask of the queries from ``first`` on, given the key blocks of all."""

    def kv_index_inside(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (start[b, q + first] <= k) & (k <= q + first)

    rows, length = first // block_size, start.shape[1]
    (kv_num, kv_indices), (full_kv_num, full_kv_indices) = some, full
    return BlockMask.from_kv_blocks(
        kv_num[:, :, rows:].contiguous(),
        kv_indices[:, :, rows:].contiguous(),
        full_kv_num[:, :, rows:].contiguous(),
        full_kv_indices[:, :, rows:].contiguous(),
        BLOCK_SIZE=(block_size, block_size),
        mask_mod=kv_index_inside,
        seq_lengths=(length - first, length),
    )


def _runs(run: tuple[Tensor, Tensor], then: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """Lists the block numbers of one or two half-open runs per row: counts (B, 1, N) and indices (B, 1, N, N)."""
    low, high = run
    count = (high - low).clamp_min(0)
    slot = torch.arange(low.shape[-1], dtype=torch.int32, device=low.device)
    indices = low[..., None] + slot  # (B, N, N)
    if then is not None:
        low, high = then
        indices = torch.where(slot < count[..., None], indices, (low - count)[..., None] + slot)
        count = count + (high - low).clamp_min(0)
    # Slots past the count are never read; zero keeps them inside the tensor.
    indices = torch.where(slot < count[..., None], indices, 0)
    return count[:, None].contiguous(), indices[:, None].contiguous()
