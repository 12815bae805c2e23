"""Which ranks have died: after a collective has failed, the surviving ranks register in the store."""

from __future__ import annotations

import logging
import time

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

logger = logging.getLogger(__name__)

GRACE_SECONDS = 5.0
"""How long other ranks may take to notice the same failure."""


def is_rank_failure(error: BaseException) -> bool:
    """Whether an error is about another rank: a collective that timed out, or whose peer is gone."""
    # Gloo has no exception type: it raises a plain RuntimeError that begins with a path in its source.
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)


def log_missing_ranks(rank: int, size: int) -> None:
    """Logs the ranks that do not register within ``GRACE_SECONDS``: dead, hung, or stopped by another error.

    Every rank whose collective has failed calls this. They meet in the store, which needs no collective.
    """
    missing = set(range(size))
    deadline = time.monotonic() + GRACE_SECONDS
    try:
        store = dist.PrefixStore("missing-ranks", _get_default_store())
        store.set(str(rank), "alive")
        while missing and time.monotonic() < deadline:
            missing = {other for other in missing if not store.check([str(other)])}
            time.sleep(0.2)
    except RuntimeError:
        logger.error("a collective failed and the store is unreachable: the machine of rank 0 may be down")
        return
    if missing:
        names = ", ".join(map(str, sorted(missing)))
        logger.error("no answer from rank %s: dead, hung, or stopped by another error", names)
