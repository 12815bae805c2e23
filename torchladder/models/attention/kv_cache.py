"""Keys and values of the tokens read so far, so that decoding computes only the new tokens of a row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count

import torch
import torch.nn.functional as F
from torch import Tensor

from torchladder.models.attention.dense import dense_attention

PREFILL_CHUNK = 256
"""Tokens per forward pass while a prompt is read, which bounds the logits in memory; the cache grows by as many."""


@dataclass(frozen=True)
class DecodeMask:
    """The attention mask of the next tokens of each row.

    Attributes:
        slots: (B, t) int64, where the cache keeps each token.
        visible: (B, 1, t, S) bool, which of the first S slots of its row each token sees.
        written: (B, t) bool, the tokens that are not padding; None if none is.
        layers: yields the index of the layer that calls attention next.
    """

    slots: Tensor
    visible: Tensor
    written: Tensor | None = None
    layers: Iterator[int] = field(default_factory=count)


class KVCache:
    """The keys and values of the layers of one type, for the rows of one batch.

    Pass ``attention`` to a model as its ``attention_fn``, or as that of the layer type.

    The cache keeps the tokens that the mask lets later tokens see, and forgets the rest: position p is in slot
    p modulo ``capacity``. Layers are identified by the order in which they call ``attention``, the same in every
    forward pass.
    """

    def __init__(self) -> None:
        self._layers: list[tuple[Tensor, Tensor]] = []

    def clear(self) -> None:
        self._layers = []

    def attention(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: DecodeMask, sinks: Tensor | None = None) -> Tensor:
        """Returns the attention output (B, H, t, K) of the new tokens over all tokens of their rows.

        Args:
            q: (B, H, t, K).
            k: (B, G, t, K), added to the cache.
            v: (B, G, t, K), added to the cache.
            attn_mask: what ``decode_mask`` returned.
            sinks: (H,) logits of one more key per head, or None.
        """
        layer, length = next(attn_mask.layers), attn_mask.visible.shape[-1]
        if layer == len(self._layers):
            empty = (k.shape[0], k.shape[1], 0, k.shape[3])
            self._layers.append((k.new_zeros(empty), v.new_zeros(empty)))
        keys, values = (_grow(cached, length) for cached in self._layers[layer])
        self._layers[layer] = keys, values
        _write(keys, k, attn_mask)
        _write(values, v, attn_mask)
        k, v = keys[:, :, :length], values[:, :, :length]
        return dense_attention(q, k, v, attn_mask.visible, sinks)


def capacity(start: Tensor) -> int:
    """Returns the tokens of a row that the cache keeps under a mask ``start`` (T): what a token sees, and a chunk."""
    reach = int((torch.arange(len(start), device=start.device) - start).max())  # tokens before itself
    return min(-(-reach // PREFILL_CHUNK) * PREFILL_CHUNK + PREFILL_CHUNK, len(start))


def decode_mask(start: Tensor, first: Sequence[int], lengths: Sequence[int], slots: int) -> DecodeMask:
    """Returns the mask of the next tokens of each row.

    Args:
        start: (T) int32, the mask of the longest row, the first key of each query.
        first: the position of the first new token of each row.
        lengths: new tokens of each row; shorter ones are padded with any token.
        slots: tokens of a row that the cache keeps, ``capacity(start)``.
    """
    device, most = start.device, max(lengths)
    ends = [begin + length for begin, length in zip(first, lengths, strict=True)]
    new = torch.arange(most, device=device)
    positions = torch.tensor(first, device=device)[:, None] + new  # (B, t)
    last = torch.tensor(ends, device=device)[:, None] - 1
    slot = torch.arange(min(max(ends), slots), device=device)
    keys = last - (last - slot) % slots  # (B, S), the position in each slot; below 0: none yet
    seen_from = start[positions.clamp_max(len(start) - 1)].clamp_min(0)
    visible = (seen_from[..., None] <= keys[:, None]) & (keys[:, None] <= positions[..., None])  # (B, t, S)
    written = None
    if min(lengths) < most:
        written = new < torch.tensor(lengths, device=device)[:, None]
        visible |= ~written[..., None]  # padding sees anything: a softmax over nothing is NaN
    return DecodeMask(positions % slots, visible[:, None], written)


def _write(cached: Tensor, new: Tensor, attn_mask: DecodeMask) -> None:
    """Writes the new tokens (B, G, t, K) to their slots; padding would overwrite tokens that are still seen."""
    new = new.transpose(1, 2)
    if attn_mask.written is None:
        cached[torch.arange(len(new), device=new.device)[:, None], :, attn_mask.slots] = new
    else:
        row, token = attn_mask.written.nonzero(as_tuple=True)
        cached[row, :, attn_mask.slots[row, token]] = new[row, token]


def _grow(cached: Tensor, length: int) -> Tensor:
    """Returns the cache with room for at least ``length`` tokens."""
    more = -(-length // PREFILL_CHUNK) * PREFILL_CHUNK - cached.shape[2]
    return F.pad(cached, (0, 0, 0, more)) if more > 0 else cached
