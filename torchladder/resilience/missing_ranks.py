"""Who is missing: after a collective has failed or timed out, the ranks that still live say so."""

from __future__ import annotations

import time

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

GRACE_SECONDS = 5.0
"""How long others may take to notice the same failure."""


def is_rank_failure(error: BaseException) -> bool:
    """Whether an error is about other ranks: a collective that timed out, or whose peer is gone."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


def find_missing_ranks(rank: int, size: int, seconds: float = GRACE_SECONDS) -> list[int]:
    """Returns the ranks that do not answer: dead, hung, or failed by themselves. Costs nothing until it is called.

    Every rank whose collective has failed calls this; they meet in the store, which needs no collective.
    """
    store = dist.PrefixStore("roll-call", _get_default_store())
    store.set(str(rank), "here")
    missing = set(range(size))
    until = time.monotonic() + seconds
    while missing and time.monotonic() < until:
        missing = {other for other in missing if not store.check([str(other)])}
        time.sleep(0.2)
    return sorted(missing)
