"""A fresh store for each attempt of a run.

When torchrun restarts the ranks of a failed run, the new ranks connect to the same store, which still has the keys that
the failed attempt wrote: addresses of dead processes, barriers that are half full. So each attempt puts its keys under
a new random prefix. Rank 0 picks the prefix, and the ranks learn it like this:

    rank 1 writes   asks/1 = 5f2c...          a random ticket, so that answers to earlier attempts do not match
    rank 0 reads    asks/1 and writes         answer/5f2c... = attempt-91ab...
    rank 1 reads    answer/5f2c... and writes attempt-91ab.../1, so that rank 0 knows that it can stop

Rank 0 of an earlier attempt is dead and cannot answer. A prefix from torchrun's restart count would not do: every node
counts its own restarts.
"""

from __future__ import annotations

import time
import uuid
from datetime import timedelta

import torch.distributed as dist

POLL_SECONDS = 0.05


def new_store(store: dist.Store, rank: int, size: int, timeout: timedelta) -> dist.Store:
    """Returns a view of the store under a prefix that only the ranks of this attempt use."""
    deadline = time.monotonic() + timeout.total_seconds()
    if rank == 0:
        prefix = _answer_ranks(store, size, deadline)
    else:
        ticket = uuid.uuid4().hex
        store.set(f"asks/{rank}", ticket)
        store.wait([f"answer/{ticket}"], timeout)
        prefix = store.get(f"answer/{ticket}").decode()
        store.set(f"{prefix}/{rank}", "")
    return dist.PrefixStore(prefix, store)


def _answer_ranks(store: dist.Store, size: int, deadline: float) -> str:
    """Sends a new prefix to every other rank, until all have confirmed it."""
    prefix = f"attempt-{uuid.uuid4().hex}"
    missing = set(range(1, size))
    while missing:
        for rank in sorted(missing):
            # Answered in every round, because a stale ticket of an earlier attempt may be there first.
            if store.check([f"asks/{rank}"]):
                store.set(f"answer/{store.get(f'asks/{rank}').decode()}", prefix)
        missing = {rank for rank in missing if not store.check([f"{prefix}/{rank}"])}
        if missing and time.monotonic() > deadline:
            raise TimeoutError(f"ranks {sorted(missing)} did not connect in time (comm.init_timeout_seconds)")
        time.sleep(POLL_SECONDS if missing else 0)
    return prefix
