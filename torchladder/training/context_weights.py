"""Weights of labels by the context that predicts them, so that packed short documents do not outweigh long contexts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from torchladder.data import IGNORE_INDEX


@dataclass(frozen=True, eq=False)
class LabelWeights:
    """The weights of the labels of a micro-batch.

    Attributes:
        weights: (B, T) fp32.
        total: sum over the labels that are not -100.
    """

    weights: Tensor
    total: float


@dataclass(frozen=True)
class ContextWeights:
    """Weights a label at position i by ``(2 ** floor(log2(i - start[i] + 1))) ** exponent``, as in EXACT (2026).

    Weights are rounded to bfloat16: FSDP2 casts the inputs of a model to the dtype of the computation, and so changes
    none of them.

    Attributes:
        exponent: 0 for no weights.
    """

    exponent: float

    def __call__(self, labels: Tensor, start: Mapping[str, Tensor]) -> LabelWeights | None:
        """Returns the weights of ``labels`` (B, T) under the mask of full_attention, or of the only layer type."""
        if not self.exponent:
            return None
        first_keys = next(iter(start.values()))  # full_attention comes first
        context = torch.arange(1, first_keys.shape[1] + 1) - first_keys
        power = torch.frexp(context.to(torch.float64)).exponent - 1  # floor(log2(context))
        weights = torch.exp2(power * self.exponent).to(torch.bfloat16).to(torch.float32)
        return LabelWeights(weights, float(weights.where(labels != IGNORE_INDEX, 0).sum(dtype=torch.float64)))
