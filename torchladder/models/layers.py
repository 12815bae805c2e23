"""The layers of a Llama-like block: rotary positions, grouped-query attention, SwiGLU."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from torchladder.models import loss, loss_parallel
from torchladder.models.model import Attend


@dataclass(frozen=True)
class Rotation:
    """How positions become rotations.

    Attributes:
        theta: the base of the frequencies.
        factor: how many times longer than the original context rows may be (Llama 3.1, arXiv 2407.21783); 1: no longer.
        low_freq_factor: rotations with fewer turns than this in the original context slow down by ``factor``.
        high_freq_factor: rotations with more turns than this stay; those between are interpolated.
        original_seq_len: tokens of the original context.
        condense_ratio: positions are divided by it (position interpolation, arXiv 2306.15595).
        restart: positions start again at 0 every so many tokens; 0: never.
    """

    theta: float = 10000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_seq_len: int = 8192
    condense_ratio: float = 1.0
    restart: int = 0

    def angles(self, seq_len: int, head_dim: int, device: torch.device) -> Tensor:
        """Returns the angle of each position and pair of features (T, K / 2), fp32."""
        exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
        frequency = 1.0 / self.theta**exponent
        if self.factor != 1:
            turns = self.original_seq_len * frequency / (2 * math.pi)
            keep = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
            keep = keep.clamp(0, 1)
            frequency = frequency * (keep + (1 - keep) / self.factor)
        position = torch.arange(seq_len, dtype=torch.float32, device=device)
        if self.restart:
            position = position % self.restart
        return torch.outer(position / self.condense_ratio, frequency)


class RoPE(nn.Module):
    """Rotary position embedding (arXiv 2104.09864), first half of a head against its second half, in fp32 throughout.

    One instance serves every block. The table is made anew whenever the module is moved or cast, so it is fp32 in any
    model and never holds what ``to_empty`` left.

    Args:
        head_dim: features per head, even.
        seq_len: tokens in a row; positions run from 0 to ``seq_len - 1``.
        rotation: how positions become rotations.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, head_dim: int, seq_len: int, rotation: Rotation) -> None:
        super().__init__()
        self.first: int | Tensor = 0
        self.head_dim = head_dim
        for name in ("cos", "sin"):
            self.register_buffer(name, torch.empty(seq_len, 1, head_dim // 2, dtype=torch.float32), persistent=False)
        self.set_rope_theta(rotation)

    def set_rope_theta(self, rotation: Rotation) -> None:
        """Fills the table for another rotation, in place: a schedule of theta recompiles nothing."""
        self.rotation = rotation
        angles = rotation.angles(len(self.cos), self.head_dim, self.cos.device)[:, None]  # (T, 1, K / 2)
        self.cos.copy_(angles.cos())
        self.sin.copy_(angles.sin())

    def forward(self, x: Tensor) -> Tensor:
        """Rotates the heads of ``x`` (B, T, H, K); the result has the type of ``x``."""
        here = self._positions(x.shape[1])
        cos, sin = self.cos[here], self.sin[here]  # (T, 1, K / 2), or (B, T, 1, K / 2)
        first, second = x.float().chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)

    def set_position_offset(self, first: int | Tensor) -> None:
        """Takes the rows that come to begin at this position, or each row at its own: (B) int64."""
        self.first = first

    def _positions(self, tokens: int) -> slice | Tensor:
        if isinstance(self.first, int):
            return slice(self.first, self.first + tokens)
        return self.first[:, None] + torch.arange(tokens, device=self.first.device)  # (B, T)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RoPE:
        super()._apply(fn, recurse)
        self.cos, self.sin = self.cos.float(), self.sin.float()
        self.set_rope_theta(self.rotation)
        return self


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245) with rotary positions; the kernel does the rest.

    Args:
        dim: features per token.
        heads: query heads and key-value heads.
        head_dim: features per head.
        rope: the rotation of queries and keys, or None for attention without positions.
        attend: the kernel's attention.
        qk_norm: added to the mean square where each head's queries and keys are normalised (arXiv 2302.05442) before
            they are rotated; None leaves them as they are.
    """

    def __init__(
        self,
        dim: int,
        heads: tuple[int, int],
        head_dim: int,
        rope: RoPE | None,
        attend: Attend,
        qk_norm: float | None = None,
    ) -> None:
        super().__init__()
        n_heads, n_kv_heads = heads
        self.head_dim = head_dim
        self.rope = rope
        self.attend = attend
        self.q_proj = nn.Linear(dim, n_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(dim, n_kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(dim, n_kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(n_heads * head_dim, dim, bias=False)
        self.q_norm = None if qk_norm is None else nn.RMSNorm(head_dim, eps=qk_norm)
        self.k_norm = None if qk_norm is None else nn.RMSNorm(head_dim, eps=qk_norm)

    def forward(self, x: Tensor, attention_mask: Any) -> Tensor:
        # The number of heads is read off the projections: under tensor parallelism a rank holds a share of them.
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))  # (B, T, H, K)
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))  # (B, T, G, K)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))  # (B, T, G, K)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rope is not None:
            q, k = self.rope(q), self.rope(k)
        out = self.attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attention_mask)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202): ``down(silu(gate(x)) * up(x))``."""

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, ffn_dim, bias=False)
        self.up_proj = nn.Linear(dim, ffn_dim, bias=False)
        self.down_proj = nn.Linear(ffn_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Head(nn.Module):
    """Logits, or with labels the summed loss without them (``torchladder.models.loss``).

    Args:
        dim: features per token.
        vocab_size: tokens there are.
        tied: whether the embedding's weight serves; it is handed to ``forward`` then.
    """

    def __init__(self, dim: int, vocab_size: int, tied: bool) -> None:
        super().__init__()
        self.weight = None if tied else nn.Parameter(torch.empty(vocab_size, dim))

    def forward(self, hidden: Tensor, labels: Tensor | None = None, tied: Tensor | None = None) -> Tensor:
        weight = self.weight if tied is None else tied
        assert weight is not None
        if labels is not None:
            return loss.cross_entropy(hidden, weight, labels)
        if isinstance(hidden, DTensor) and isinstance(weight, DTensor):
            return loss_parallel.logits(hidden, weight)
        return F.linear(hidden, weight)

    def losses(self, hidden: Tensor, labels: Tensor, tied: Tensor | None = None) -> Tensor:
        """Returns the loss at each label (B, T) fp32, without gradients."""
        weight = self.weight if tied is None else tied
        assert weight is not None
        return loss.per_token_cross_entropy(hidden, weight, labels)
