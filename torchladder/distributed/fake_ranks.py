"""A fake process group, to build a layout of any world size in one process on the meta device without communication."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore


@contextmanager
def fake_process_group(world_size: int) -> Iterator[None]:
    """Makes this process rank 0 of a fake process group."""
    assert not dist.is_initialized()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()
        _clear_sharding_prop_cache()  # it caches meshes by value, and their process groups are destroyed now


def local_parameter_bytes(model: nn.Module) -> int:
    """Returns the bytes of this rank's shards of the parameters."""
    return sum(local_tensor(parameter).nbytes for parameter in model.parameters())


def local_tensor(x: Tensor) -> Tensor:
    """Returns this rank's shard of a DTensor, and any other tensor itself."""
    return x._local_tensor if isinstance(x, DTensor) else x
