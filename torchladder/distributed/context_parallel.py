"""Context parallelism: ranks share rows, each holds a stretch of their tokens and gets the keys that those reach.

The mask says how far a stretch reaches: its first query begins at ``start``, and no later one begins before. All ranks
that share a row have its whole mask on the host, so each knows what every other one needs without asking. Under a
ladder whose chunks end where stretches end nothing is exchanged at all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from torchladder.distributed.mesh import Mesh

Attend = Callable[[Tensor, Tensor, Tensor, Any], Tensor]
"""``(q (B, H, t, K), k (B, G, S, K), v (B, G, S, K), form) -> (B, H, t, K)``; queries are the last t of S tokens."""


class ContextShard:
    """The stretch of every row that this rank holds.

    Args:
        mesh: the layout of the ranks.
        seq_len: tokens in a row.

    Attributes:
        tokens: how many of them each rank holds.
        first: the first one that this rank holds.
    """

    def __init__(self, mesh: Mesh, seq_len: int) -> None:
        self.group = mesh.context
        self.part, self.parts = mesh.part, mesh.degrees.context
        self.tokens = seq_len // self.parts
        self.first = self.part * self.tokens

    def __call__(self, rows: Tensor) -> Tensor:
        """Returns this rank's stretch of rows (B, T)."""
        return rows if self.group is None else rows[:, self.first : self.first + self.tokens]

    def form(self, derive: Callable[..., Any], start: Tensor, device: torch.device) -> Any:
        """Returns what attention needs: the kernel's form of a mask and, with shared rows, the keys that ranks need.

        Args:
            derive: the kernel's, ``(start, device, first query) -> form``.
            start: (B, T) int32 on the CPU, the mask of whole rows.
            device: where attention runs.
        """
        if self.group is None:
            return derive(start, device)
        return derive(start[:, : self.first + self.tokens], device, self.first), self.needs(start)

    def needs(self, start: Tensor) -> Tensor:
        """Returns the first key that each rank's stretch reaches in any row of the batch (ranks), on the CPU."""
        return start[:, :: self.tokens].amin(dim=0).to(torch.int64)

    def attend(self, attend: Attend) -> Attend:
        """Returns a kernel's attention over the keys of all ranks."""
        if self.group is None:
            return attend
        name, part = self.group.group_name, self.part

        def attend_shared(q: Tensor, k: Tensor, v: Tensor, form: tuple[Any, Tensor]) -> Tensor:
            own, needs = form
            keys, values = _exchange(torch.cat([k, v], dim=1), needs, part, name).chunk(2, dim=1)
            return attend(q, keys, values, own)

        return attend_shared


# --- the exchange, as an operator that the compiler takes as a whole --------------------------------------------------


@torch.library.custom_op("torchladder::exchange", mutates_args=())
def _exchange(own: Tensor, needs: Tensor, part: int, group: str) -> Tensor:
    """Returns keys from token 0 to the end of this rank's stretch (B, G, S, K), zeros before those that it needs."""
    tokens, first = own.shape[2], part * own.shape[2]
    keys = own.new_zeros(*own.shape[:2], first + tokens, own.shape[3])
    keys[:, :, first:] = own
    get, give = _plan(needs.tolist(), tokens, part)
    if get is None or give is None:
        return keys
    sent = [own[:, :, max(tokens - count, 0) :] for count in give]
    keys[:, :, first - sum(get) : first] = _swap(sent, get, own, group)
    return keys


@torch.library.custom_op("torchladder::exchange_backward", mutates_args=())
def _exchange_backward(grad: Tensor, needs: Tensor, part: int, group: str) -> Tensor:
    """Returns the gradient of this rank's keys (B, G, t, K): its own, and those of the ranks that they went to."""
    tokens = grad.shape[2] // (part + 1)
    first = part * tokens
    own = grad[:, :, first:].clone()
    get, give = _plan(needs.tolist(), tokens, part)
    if get is None or give is None:
        return own
    bounds = [first - sum(get[rank:]) for rank in range(part + 1)]
    sent = [grad[:, :, bounds[rank] : bounds[rank + 1]] for rank in range(part)]
    sent += [grad[:, :, :0]] * (len(give) - part)
    total = own.to(torch.promote_types(own.dtype, torch.float32))
    for count, there in zip(give, _swap(sent, give, own, group).split(give, dim=2), strict=True):
        total[:, :, tokens - count :] += there
    return total.to(own.dtype)


def _plan(needs: list[int], tokens: int, part: int) -> tuple[list[int], list[int]] | tuple[None, None]:
    """Returns how many tokens this rank gets from each rank and gives to each, or Nones if no rank needs any.

    Args:
        needs: the first key that each rank needs.
        tokens: tokens that each rank holds.
        part: this rank among them.
    """
    if all(need >= rank * tokens for rank, need in enumerate(needs)):
        return None, None

    def moves(owner: int, to: int) -> int:
        return min(max((owner + 1) * tokens - needs[to], 0), tokens) if owner < to else 0

    ranks = range(len(needs))
    return [moves(owner, part) for owner in ranks], [moves(part, to) for to in ranks]


def _swap(sent: list[Tensor], get: list[int], like: Tensor, group: str) -> Tensor:
    """Sends tokens of (B, G, n, K) to each rank, and returns those that come, in the order of ranks."""
    give = [part.shape[2] for part in sent]
    out = torch.cat(sent, dim=2).permute(2, 0, 1, 3).contiguous()  # (n, B, G, K): tokens are what is split
    come = out.new_empty(sum(get), *out.shape[1:])
    dist.all_to_all_single(come, out, get, give, group=_resolve_process_group(cast(Any, group)))
    return come.permute(1, 2, 0, 3)


@_exchange.register_fake
def _(own: Tensor, needs: Tensor, part: int, group: str) -> Tensor:
    return own.new_empty(*own.shape[:2], (part + 1) * own.shape[2], own.shape[3])


@_exchange_backward.register_fake
def _(grad: Tensor, needs: Tensor, part: int, group: str) -> Tensor:
    return grad.new_empty(*grad.shape[:2], grad.shape[2] // (part + 1), grad.shape[3])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, needs, ctx.part, ctx.group = inputs
    ctx.save_for_backward(needs)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    (needs,) = ctx.saved_tensors
    return _exchange_backward(grad, needs, ctx.part, ctx.group), None, None, None


_exchange.register_autograd(_differentiate, setup_context=_setup)
