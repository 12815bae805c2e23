"""Keys and values of the tokens that were read, so that a row that goes on is read from where it ended."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count

import torch
import torch.nn.functional as F
from torch import Tensor

PREFILL_CHUNK = 256
"""Tokens that a row is read by at once, and by which memory grows: few logits exist at a time."""


@dataclass(frozen=True)
class DecodeMask:
    """The next tokens of some rows, as attention sees them.

    Attributes:
        places: (B, t) int64, where each token stands in its row.
        sees: (B, 1, t, S) bool, which of the first S tokens of its row each one sees.
        layers: the number of the layer that attends next.
    """

    places: Tensor
    sees: Tensor
    layers: Iterator[int] = field(default_factory=count)


class KVCache:
    """What each layer keeps of the rows of a batch; it is given to a model as a kernel's attention is.

    Layers are told apart by the order in which they attend, which is the same in every forward pass.
    """

    def __init__(self) -> None:
        self._layers: list[tuple[Tensor, Tensor]] = []

    def clear(self) -> None:
        """Forgets the rows."""
        self._layers = []

    def attend(self, q: Tensor, k: Tensor, v: Tensor, form: DecodeMask) -> Tensor:
        """Returns attention (B, H, t, K) of a stretch over its rows so far, itself included; keeps its keys."""
        layer, length = next(form.layers), form.sees.shape[-1]
        if layer == len(self._layers):
            self._layers.append((_memory(k), _memory(v)))
        keys, values = (_room(kept, length) for kept in self._layers[layer])
        self._layers[layer] = keys, values
        rows = torch.arange(len(k), device=k.device)[:, None]
        keys[rows, :, form.places] = k.transpose(1, 2)
        values[rows, :, form.places] = v.transpose(1, 2)
        whole = keys[:, :, :length], values[:, :, :length]
        return F.scaled_dot_product_attention(q, *whole, attn_mask=form.sees, enable_gqa=q.shape[1] != k.shape[1])


def decode_mask(start: Tensor, first: Tensor, tokens: int) -> DecodeMask:
    """Returns the form of the next tokens of some rows.

    Args:
        start: (T) int32, the mask of the longest row, each query's first key.
        first: (B) int64, where the tokens begin in each row.
        tokens: how many there are. Rows that have fewer fill up with any: no token sees what comes after it.
    """
    places = first[:, None] + torch.arange(tokens, device=first.device)  # (B, t)
    keys = torch.arange(int(places.max()) + 1, device=first.device)
    sees = (start[places][..., None] <= keys) & (keys <= places[..., None])  # (B, t, S)
    return DecodeMask(places, sees[:, None])


def _memory(x: Tensor) -> Tensor:
    return x.new_zeros(*x.shape[:2], 0, x.shape[3])


def _room(kept: Tensor, length: int) -> Tensor:
    """Returns memory for so many tokens, with what was kept."""
    more = -(-length // PREFILL_CHUNK) * PREFILL_CHUNK - kept.shape[2]
    return F.pad(kept, (0, 0, 0, more)) if more > 0 else kept
