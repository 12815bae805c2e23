"""The head under tensor parallelism: ranks share the vocabulary of its logits, or the tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard


@dataclass(frozen=True)
class VocabShard:
    """The tokens of the vocabulary whose logits this rank makes.

    Attributes:
        first: the first of them.
        mesh: the ranks that have the others, one dimension.
    """

    first: int
    mesh: DeviceMesh

    def logsumexp(self, own: Tensor) -> Tensor:
        """Returns the logarithm of the sum over all ranks, from this rank's (n)."""
        every = DTensor.from_local(own[None], self.mesh, [Shard(0)], run_check=False)  # (ranks, n)
        return every.full_tensor().logsumexp(0)

    def sum(self, own: Tensor) -> Tensor:
        """Returns the sum over all ranks."""
        return DTensor.from_local(own, self.mesh, [Partial()], run_check=False).full_tensor().clone()


ChunkedLoss = Callable[[Tensor, Tensor, Tensor, VocabShard | None], Tensor]
"""``(hidden, weight, labels, share of the vocabulary) -> summed loss``"""


def loss(chunked: ChunkedLoss, hidden: DTensor, weight: DTensor, labels: Tensor) -> Tensor:
    """Returns the summed cross entropy, the same on every rank that shares the head.

    Args:
        chunked: the loss of plain tensors.
        hidden: (B, T, d): replicated, for a share of the vocabulary on each rank, or sharded by tokens.
        weight: (V, d), sharded by rows in the first case.
        labels: (B, T), all of them on every rank.
    """
    mesh = weight.device_mesh
    if hidden.placements == (Replicate(),):
        weight = weight.redistribute(placements=[Shard(0)])
        states = hidden.to_local(grad_placements=[Partial()])  # each rank knows the gradient of its share alone
        return chunked(states, weight.to_local(), labels, VocabShard(_first(weight.shape[0], mesh), mesh))
    head = weight.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
    states, first = hidden.to_local(), _first(labels.shape[1], mesh)
    own = chunked(states, head, labels[:, first : first + states.shape[1]], None)
    # A copy: what FSDP2 hangs its backward pass on should not be a view.
    return DTensor.from_local(own, mesh, [Partial()], run_check=False).full_tensor().clone()


def logits(hidden: DTensor, weight: DTensor) -> Tensor:
    """Returns all logits (B, T, V) on every rank."""
    states = hidden.redistribute(placements=[Replicate()])
    own = F.linear(states, weight.redistribute(placements=[Shard(0)]))
    assert isinstance(own, DTensor)
    return own.full_tensor().clone()


def _first(size: int, mesh: DeviceMesh) -> int:
    """Returns the first of that many places that this rank holds: ``Shard`` cuts them evenly, the last part shorter."""
    return min(-(-size // mesh.size()) * mesh.get_local_rank(), size)
