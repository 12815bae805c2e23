"""The head under tensor parallelism: sharded over the vocabulary (loss parallel), or over the tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard


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


ChunkedLoss = Callable[[Tensor, Tensor, Tensor, VocabShard | None], Tensor]
"""``(hidden, weight, labels, vocab_shard) -> summed loss``"""


def parallel_cross_entropy(chunked_loss: ChunkedLoss, hidden: DTensor, weight: DTensor, labels: Tensor) -> Tensor:
    """Returns the summed cross entropy, the same on every rank that shares the head.

    Args:
        chunked_loss: the loss of local tensors.
        hidden: (B, T, d), replicated to shard over the vocabulary, or sharded by tokens.
        weight: (V, d), sharded by rows in the first case.
        labels: (B, T), the same on every rank.
    """
    mesh = weight.device_mesh
    if hidden.placements == (Replicate(),):
        weight = weight.redistribute(placements=[Shard(0)])
        states = hidden.to_local(grad_placements=[Partial()])  # a rank's gradient covers only its vocabulary
        return chunked_loss(states, weight.to_local(), labels, VocabShard(_shard_start(weight.shape[0], mesh), mesh))
    head = weight.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
    states, first = hidden.to_local(), _shard_start(labels.shape[1], mesh)
    local = chunked_loss(states, head, labels[:, first : first + states.shape[1]], None)
    # Clone, because FSDP2 registers its backward hook on this tensor, which must not be a view.
    return DTensor.from_local(local, mesh, [Partial()], run_check=False).full_tensor().clone()


def full_logits(hidden: DTensor, weight: DTensor) -> Tensor:
    """Returns the logits (B, T, V) of the whole vocabulary on every rank."""
    states = hidden.redistribute(placements=[Replicate()])
    local = F.linear(states, weight.redistribute(placements=[Shard(0)]))
    assert isinstance(local, DTensor)
    return local.full_tensor().clone()


def _shard_start(size: int, mesh: DeviceMesh) -> int:
    """Returns the first index of this rank's shard: ``Shard`` cuts a dimension into equal parts, the last shorter."""
    return min(-(-size // mesh.size()) * mesh.get_local_rank(), size)
