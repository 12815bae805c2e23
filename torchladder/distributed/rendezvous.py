"""A clean store for every attempt: torchrun's restarts share one, and what died in it must not be met again."""

from __future__ import annotations

import time
import uuid
from datetime import timedelta

import torch.distributed as dist

POLL_SECONDS = 0.05


def new_store(store: dist.Store, rank: int, size: int, timeout: timedelta) -> dist.Store:
    """Returns a part of the store that only the ranks of this attempt know.

    Every rank asks under a name that nobody has used; rank 0 answers each name with its own, until all have it. An
    earlier attempt's rank 0 is gone and cannot answer. (A restart count would not do: machines count their own.)

    Raises:
        TimeoutError: a rank does not come.
    """
    until = time.monotonic() + timeout.total_seconds()
    if rank == 0:
        name = _answer(store, size, until)
    else:
        mine = uuid.uuid4().hex
        store.set(f"asks/{rank}", mine)
        store.wait([f"answer/{mine}"], timeout)
        name = store.get(f"answer/{mine}").decode()
        store.set(f"{name}/{rank}", "")
    return dist.PrefixStore(name, store)


def _answer(store: dist.Store, size: int, until: float) -> str:
    name = f"attempt-{uuid.uuid4().hex}"
    missing = set(range(1, size))
    while missing:
        for rank in sorted(missing):
            if store.check([f"asks/{rank}"]):
                store.set(f"answer/{store.get(f'asks/{rank}').decode()}", name)
        missing = {rank for rank in missing if not store.check([f"{name}/{rank}"])}
        if missing and time.monotonic() > until:
            raise TimeoutError(f"ranks {sorted(missing)} did not come (comm.init_timeout_seconds)")
        time.sleep(POLL_SECONDS if missing else 0)
    return name
