"""Fused causal attention over the pieces that a mask falls into: fast on any device, and the way to train on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from torchladder import mask
from torchladder.models.attention import attention_pieces
from torchladder.models.attention.kernel import UNIFORM, AttentionKernel, register
from torchladder.models.attention.piecewise import operator

_fold = operator("fold", lambda width, batch, tokens: attention_pieces.uniform(batch, tokens[1], int(width)))
_sdpa = operator("sdpa", lambda start, batch, tokens: attention_pieces.of(start, tokens[1] - tokens[0]))


@register("fold")
class FoldKernel(AttentionKernel):
    """Chunks of one width: ``(B, T)`` folds to ``(B * T / w, w)`` and is plain causal attention there."""

    name = "fold"
    expresses = UNIFORM

    def derive(self, start: Tensor, device: torch.device, first: int = 0) -> Tensor:
        return torch.tensor(mask.fold(start))  # stays on the CPU, where the operator reads it

    @staticmethod
    def attend(q: Tensor, k: Tensor, v: Tensor, form: Tensor) -> Tensor:
        return _fold(q, k, v, form)


@register("sdpa")
class SdpaKernel(AttentionKernel):
    """Any mask: plain causal attention per segment where there are segments, masked blocks of queries elsewhere."""

    name = "sdpa"

    def check_context_parallel(self, tokens: int) -> None:
        """Any stretch of a row will do."""

    def derive(self, start: Tensor, device: torch.device, first: int = 0) -> Tensor:
        return start.cpu().to(torch.int32)  # the operator reads it to lay out its pieces

    @staticmethod
    def attend(q: Tensor, k: Tensor, v: Tensor, form: Tensor) -> Tensor:
        return _sdpa(q, k, v, form)
