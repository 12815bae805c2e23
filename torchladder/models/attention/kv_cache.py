"""Keys and values of the tokens read so far, so that decoding computes only the new tokens of a row."""

from __future__ import annotations

from collections.abc import Iterator
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
        positions: (B, t) int64, the position of each token in its row.
        visible: (B, 1, t, S) bool, which of the first S positions of its row each token sees.
        layers: yields the index of the layer that calls attention next.
    """

    positions: Tensor
    visible: Tensor
    layers: Iterator[int] = field(default_factory=count)


class KVCache:
    """The keys and values of each layer, for the rows of one batch.

    Pass ``attention`` to a model as its ``attention_fn``.

    Layers are identified by the order in which they call ``attention``, the same in every forward pass.
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
        rows = torch.arange(len(k), device=k.device)[:, None]
        keys[rows, :, attn_mask.positions] = k.transpose(1, 2)
        values[rows, :, attn_mask.positions] = v.transpose(1, 2)
        k, v = keys[:, :, :length], values[:, :, :length]
        return dense_attention(q, k, v, attn_mask.visible, sinks)


def decode_mask(start: Tensor, first: Tensor, tokens: int) -> DecodeMask:
    """Returns the mask of the next ``tokens`` tokens of each row.

    Args:
        start: (T) int32, the mask of the longest row, the first key of each query.
        first: (B) int64, the position of the first new token of each row.
        tokens: new tokens per row. Pad rows that have fewer with any token: no token sees later ones.
    """
    positions = first[:, None] + torch.arange(tokens, device=first.device)  # (B, t)
    keys = torch.arange(int(positions.max()) + 1, device=first.device)
    visible = (start[positions][..., None] <= keys) & (keys <= positions[..., None])  # (B, t, S)
    return DecodeMask(positions, visible[:, None])


def _grow(cached: Tensor, length: int) -> Tensor:
    """Returns the cache with room for at least ``length`` tokens."""
    more = -(-length // PREFILL_CHUNK) * PREFILL_CHUNK - cached.shape[2]
    return F.pad(cached, (0, 0, 0, more)) if more > 0 else cached
