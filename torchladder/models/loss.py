"""Cross entropy of a language model's head, whose logits never exist as a whole."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from torchladder.models import loss_parallel
from torchladder.models.loss_parallel import VocabShard

IGNORED = -100
"""The label of a place where nothing is to be predicted."""

LOGITS_ON_CPU, LOGITS_ON_GPU = 2**21, 2**27
"""Logits that exist at a time: 8 MiB of fp32 near a CPU's cache, 0.5 GiB on a GPU."""

MIN_CHUNK = 256
"""Tokens of a chunk at least: below, adding up the gradient of the head costs more than the products."""


def cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Returns the cross entropy summed over all labels that are not -100, an fp32 scalar.

    Logits are made for a chunk of tokens at a time, and where gradients are needed they are computed on the spot: the
    backward pass only scales them. Products run in the type of ``hidden``, or of autocast; the rest in fp32.

    Args:
        hidden: (..., d) states, one per token.
        weight: (V, d) of the head.
        labels: (...) int64.
    """
    if isinstance(hidden, DTensor) and isinstance(weight, DTensor):
        return loss_parallel.loss(_chunked, hidden, weight, labels)
    return _chunked(hidden, weight, labels, None)


@torch.no_grad()
def per_token_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Returns the cross entropy at each label (...) in fp32, 0 where it is -100; without gradients.

    Args:
        hidden: (..., d) states, one per token.
        weight: (V, d) of the head.
        labels: (...) int64.
    """
    size = chunk_size(hidden.device.type, len(weight))
    chunks = zip(hidden.flatten(0, -2).split(size), labels.flatten().split(size), strict=True)
    return torch.cat([of_logits(F.linear(some, weight), label) for some, label in chunks]).view(labels.shape)


def of_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the cross entropy (n) of logits (n, V) at each label, computed in fp32, 0 where it is -100."""
    exact = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(exact), labels, ignore_index=IGNORED, reduction="none")


def chunk_size(device: str, vocabulary: int) -> int:
    """Returns how many tokens have logits at a time."""
    return max((LOGITS_ON_CPU if device == "cpu" else LOGITS_ON_GPU) // vocabulary, MIN_CHUNK)


def _chunked(hidden: Tensor, weight: Tensor, labels: Tensor, share: VocabShard | None) -> Tensor:
    hidden, labels = hidden.flatten(0, -2), labels.flatten()
    differentiate = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _CrossEntropy.apply(hidden, weight, labels, differentiate, share)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        differentiate: bool,
        share: VocabShard | None,
    ) -> Tensor:
        device, dtype = hidden.device.type, hidden.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        exact = torch.promote_types(dtype, torch.float32)
        head = weight.to(dtype)
        loss = torch.zeros((), dtype=exact, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if differentiate else None
        grad_weight = torch.zeros_like(weight, dtype=exact) if differentiate else None

        size = chunk_size(device, len(weight))
        first = share.first if share else 0
        for chunk in range(0, len(hidden), size):
            some = slice(chunk, chunk + size)
            counts = labels[some, None] != IGNORED  # (n, 1)
            label = labels[some, None] - first
            own = counts & (label >= 0) & (label < len(weight))
            label = label.where(own, 0)
            states = hidden[some].to(dtype).where(counts, 0)
            log_p = _log_softmax(states @ head.t(), exact, share)  # (n, V)
            loss = loss - log_p.gather(1, label).where(own, 0).sum()  # in place, PyTorch 2.11 compiles gradients of 0
            if grad_hidden is not None and grad_weight is not None:
                grad_logits = log_p.exp_().scatter_add_(1, label, -own.to(exact)).to(dtype)
                grad_hidden[some] = (grad_logits @ head).where(counts, 0)
                if dtype == exact:
                    grad_weight.addmm_(grad_logits.t(), states)
                else:
                    grad_weight += grad_logits.t() @ states
        if grad_hidden is not None and grad_weight is not None:
            ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
        return share.sum(loss) if share else loss

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors  # type: ignore[attr-defined]
        return grad_hidden * grad.to(grad_hidden.dtype), grad_weight * grad.to(grad_weight.dtype), None, None, None


def _log_softmax(logits: Tensor, dtype: torch.dtype, share: VocabShard | None) -> Tensor:
    """Returns log probabilities (n, V), of this rank's share of the vocabulary where it has one."""
    if share is None:
        return torch.log_softmax(logits, dim=-1, dtype=dtype)
    logits = logits.to(dtype)
    return logits - share.logsumexp(logits.logsumexp(-1))[:, None]
