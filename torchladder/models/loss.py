"""Cross entropy of the language-model head, computed in chunks of tokens so that all logits never exist at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

IGNORE_INDEX = -100
"""The label of tokens that do not count in the loss, as in ``torch.nn.functional.cross_entropy``."""

MAX_LOGITS_CPU, MAX_LOGITS_GPU = 2**21, 2**27
"""Logits that exist at a time: 8 MiB of fp32, near a CPU's cache; 0.5 GiB on a GPU."""

MIN_CHUNK_TOKENS = 256
"""In smaller chunks, accumulating the gradient of the head costs more than the matrix products."""


def cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, logit_softcap: float = 0.0) -> Tensor:
    """Returns the cross entropy summed over all labels that are not -100, an fp32 scalar.

    The forward pass computes logits and, if needed, gradients for one chunk of tokens at a time; the backward pass only
    scales the gradients. Matrix products run in the dtype of ``hidden`` or of autocast, everything else in fp32.

    Args:
        hidden: (..., d) hidden states.
        weight: (V, d), of the head.
        labels: (...) int64.
        logit_softcap: s; logits become s * tanh(logits / s), as in Gemma 2 (arXiv 2408.00118). 0: they do not.
    """
    (loss,) = _summed_loss(hidden, weight, labels, None, logit_softcap, 0.0)
    return loss


def cross_entropy_with_z_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, z_loss_multiplier: float, logit_softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Returns the cross entropy plus the z-loss, and the z-loss by itself without a gradient: two fp32 scalars.

    The z-loss, ``z_loss_multiplier * logsumexp(logits)**2`` for each label, keeps the normalizer of the softmax near 1
    (PaLM, arXiv 2204.02311). The other arguments are those of ``cross_entropy``.
    """
    loss, z_loss = _summed_loss(hidden, weight, labels, None, logit_softcap, z_loss_multiplier)
    return loss, z_loss.detach()


def weighted_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    label_weights: Tensor,
    z_loss_multiplier: float = 0.0,
    logit_softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the sum over labels of weight x (cross entropy + z-loss), then the cross entropy and the z-loss by
    themselves without weights and without a gradient: three fp32 scalars.

    ``label_weights`` (...) has the weight of each label. The other arguments are those of
    ``cross_entropy_with_z_loss``; with a multiplier of 0 the z-loss is 0.
    """
    total, loss, z_loss = _summed_loss(hidden, weight, labels, label_weights, logit_softcap, z_loss_multiplier)
    return total, loss.detach(), z_loss.detach()


@torch.no_grad()
def per_token_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, logit_softcap: float = 0.0) -> Tensor:
    """Returns the cross entropy of each label (...) in fp32, 0 where the label is -100; without gradients.

    The arguments are those of ``cross_entropy``, not sharded.
    """
    size = _chunk_tokens(hidden.device.type, len(weight))
    chunks = zip(hidden.flatten(0, -2).split(size), labels.flatten().split(size), strict=True)
    losses = [logits_cross_entropy(softcap(F.linear(chunk, weight), logit_softcap), label) for chunk, label in chunks]
    return torch.cat(losses).view(labels.shape)


def logits_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the cross entropy (n) of logits (n, V), computed in fp32, 0 where the label is -100."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(dtype), labels, ignore_index=IGNORE_INDEX, reduction="none")


def take_tokens(hidden: Tensor, positions: Tensor | None) -> Tensor:
    """Returns the hidden states (B, n, d) at positions (B, n) of each row; None: all of them."""
    return hidden if positions is None else hidden.take_along_dim(positions[..., None], dim=1)


def _chunk_tokens(device_type: str, vocab_size: int) -> int:
    return max((MAX_LOGITS_CPU if device_type == "cpu" else MAX_LOGITS_GPU) // vocab_size, MIN_CHUNK_TOKENS)


def softcap(logits: Tensor, cap: float) -> Tensor:
    """Returns ``cap * tanh(logits / cap)``, in fp32 if the logits have fewer bits; with a cap of 0 the logits."""
    return _scaled_tanh(logits, cap) * cap if cap else logits


def _scaled_tanh(logits: Tensor, cap: float) -> Tensor:
    return (logits.to(torch.promote_types(logits.dtype, torch.float32)) / cap).tanh()


def _summed_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    label_weights: Tensor | None,
    logit_softcap: float,
    z_loss_multiplier: float,
) -> tuple[Tensor, ...]:
    """Returns the loss and, unless the multiplier is 0, the z-loss in it; with weights the weighted sum of both, the
    cross entropy and the z-loss.
    """
    terms = logit_softcap, z_loss_multiplier
    if isinstance(hidden, DTensor) and isinstance(weight, DTensor):
        return _parallel_loss(hidden, weight, labels, label_weights, *terms)
    return _chunked_loss(hidden, weight, labels, label_weights, None, *terms)


def _chunked_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    label_weights: Tensor | None,
    vocab_shard: VocabShard | None,
    *terms: float,
) -> tuple[Tensor, ...]:
    hidden, labels = hidden.flatten(0, -2), labels.flatten()
    label_weights = None if label_weights is None else label_weights.flatten()
    differentiate = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _ChunkedCrossEntropy.apply(hidden, weight, labels, label_weights, differentiate, vocab_shard, *terms)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        label_weights: Tensor | None,
        differentiate: bool,
        vocab_shard: VocabShard | None,
        logit_softcap: float,
        z_loss_multiplier: float,
    ) -> tuple[Tensor, ...]:
        device, dtype = hidden.device.type, hidden.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        accumulate = torch.promote_types(dtype, torch.float32)
        head = weight.to(dtype)
        sums = () if label_weights is None else (2,)  # plain and weighted
        loss = torch.zeros(sums, dtype=accumulate, device=hidden.device)
        z_loss = torch.zeros_like(loss) if z_loss_multiplier else None
        grad_hidden = torch.empty_like(hidden) if differentiate else None
        grad_weight = torch.zeros_like(weight, dtype=accumulate) if differentiate else None

        size = _chunk_tokens(device, len(weight))
        first = vocab_shard.first if vocab_shard else 0
        for i in range(0, len(hidden), size):
            chunk = slice(i, i + size)
            counts = labels[chunk, None] != IGNORE_INDEX  # (n, 1)
            label = labels[chunk, None] - first
            in_shard = counts & (label >= 0) & (label < len(weight))
            label = label.where(in_shard, 0)
            row_weights = None if label_weights is None else label_weights[chunk, None].to(accumulate)  # (n, 1)
            states = hidden[chunk].to(dtype).where(counts, 0)
            logits, tanh = states @ head.t(), None  # (n, V)
            if logit_softcap:
                tanh = _scaled_tanh(logits, logit_softcap)
                logits = tanh * logit_softcap
            log_p, normalizer = _log_softmax(logits, accumulate, vocab_shard)  # (n, V), (n, 1)
            del logits
            # Not in place: PyTorch 2.11 compiles an in-place sum to gradients of 0.
            loss = loss - _sum(log_p.gather(1, label).where(in_shard, 0), row_weights)
            if z_loss is not None:
                z_loss = z_loss + z_loss_multiplier * _sum(normalizer.square().where(counts, 0), row_weights)
            if grad_hidden is not None and grad_weight is not None:
                grad_logits = log_p.exp_()
                if z_loss is not None:
                    grad_logits *= 1 + 2 * z_loss_multiplier * normalizer
                grad_logits.scatter_add_(1, label, -in_shard.to(accumulate))
                if tanh is not None:
                    grad_logits *= 1 - tanh.square()
                if row_weights is not None:
                    grad_logits *= row_weights
                grad_logits = grad_logits.to(dtype)
                grad_hidden[chunk] = (grad_logits @ head).where(counts, 0)
                if dtype == accumulate:
                    grad_weight.addmm_(grad_logits.t(), states)
                else:
                    grad_weight += grad_logits.t() @ states
        if grad_hidden is not None and grad_weight is not None:
            ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
        loss = vocab_shard.sum(loss) if vocab_shard else loss
        if label_weights is None:
            return (loss,) if z_loss is None else (loss + z_loss, z_loss)
        z_loss = torch.zeros_like(loss) if z_loss is None else z_loss
        return loss[1] + z_loss[1], loss[0].clone(), z_loss[0].clone()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors  # type: ignore[attr-defined]
        return grad_hidden * grad.to(grad_hidden.dtype), grad_weight * grad.to(grad_weight.dtype), *(None,) * 6


def _sum(terms: Tensor, weights: Tensor | None) -> Tensor:
    """Returns the sum of terms (n, 1); with weights (n, 1) the plain and the weighted sum (2)."""
    return terms.sum() if weights is None else torch.cat([terms, terms * weights], dim=1).sum(0)


def _log_softmax(logits: Tensor, dtype: torch.dtype, vocab_shard: VocabShard | None) -> tuple[Tensor, Tensor]:
    """Returns log probabilities (n, V) and their normalizer (n, 1), the log-sum-exp over all ranks' vocabulary."""
    if vocab_shard is None:
        log_p = torch.log_softmax(logits, dim=-1, dtype=dtype)
        return log_p, logits[:, :1] - log_p[:, :1]  # the same in every column
    logits = logits.to(dtype)
    normalizer = vocab_shard.logsumexp(logits.logsumexp(-1))[:, None]
    return logits - normalizer, normalizer


# --- tensor parallelism: the head is sharded over the vocabulary (loss parallel), or over the tokens ------------------


@dataclass(frozen=True)
class VocabShard:
    """The slice of the vocabulary whose logits this rank computes.

    Attributes:
        first: the first token id of the slice.
        mesh: the ranks that share the vocabulary, one dimension.
    """

    first: int
    mesh: DeviceMesh

    def logsumexp(self, local: Tensor) -> Tensor:
        """Returns the log-sum-exp (n) over all ranks from this rank's (n)."""
        gathered = DTensor.from_local(local[None], self.mesh, [Shard(0)], run_check=False)  # (ranks, n)
        return gathered.full_tensor().logsumexp(0)

    def sum(self, local: Tensor) -> Tensor:
        """Returns the sum over all ranks."""
        return DTensor.from_local(local, self.mesh, [Partial()], run_check=False).full_tensor().clone()


def _parallel_loss(
    hidden: DTensor, weight: DTensor, labels: Tensor, label_weights: Tensor | None, *terms: float
) -> tuple[Tensor, ...]:
    """Returns what ``_summed_loss`` does, the same on every rank that shares the head.

    ``hidden`` (B, T, d) is replicated to shard over the vocabulary, as ``weight`` (V, d) is then; or it is sharded by
    tokens. ``labels`` (B, T) and their weights are the same on every rank.
    """
    mesh = weight.device_mesh
    if hidden.placements == (Replicate(),):
        weight = weight.redistribute(placements=[Shard(0)])
        states = hidden.to_local(grad_placements=[Partial()])  # a rank's gradient covers only its vocabulary
        vocab_shard = VocabShard(_shard_start(weight.shape[0], mesh), mesh)
        return _chunked_loss(states, weight.to_local(), labels, label_weights, vocab_shard, *terms)
    head = weight.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
    states, first = hidden.to_local(), _shard_start(labels.shape[1], mesh)
    mine = slice(first, first + states.shape[1])
    label_weights = None if label_weights is None else label_weights[:, mine]
    local = _chunked_loss(states, head, labels[:, mine], label_weights, None, *terms)
    # Clone, because FSDP2 registers its backward hook on this tensor, which must not be a view.
    return tuple(DTensor.from_local(term, mesh, [Partial()], run_check=False).full_tensor().clone() for term in local)


def full_logits(hidden: DTensor, weight: DTensor, positions: Tensor | None = None) -> Tensor:
    """Returns the logits (B, T, V) of the whole vocabulary on every rank, or those at ``positions``."""
    states = hidden.redistribute(placements=[Replicate()])
    if positions is not None:
        local = take_tokens(states.to_local(), positions)
        states = DTensor.from_local(local, states.device_mesh, states.placements, run_check=False)
    logits = F.linear(states, weight.redistribute(placements=[Shard(0)]))
    assert isinstance(logits, DTensor)
    return logits.full_tensor().clone()


def _shard_start(size: int, mesh: DeviceMesh) -> int:
    """Returns the first index of this rank's shard: ``Shard`` cuts a dimension into equal parts, the last shorter."""
    return min(-(-size // mesh.size()) * mesh.get_local_rank(), size)
