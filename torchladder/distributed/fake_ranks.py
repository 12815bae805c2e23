"""A fake process group, to build a layout of any world size in one process on the meta device without communication."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy

from torchladder.distributed.activation_checkpoint import save_policy


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
    return sum(_local(parameter).nbytes for parameter in model.parameters())


def activation_bytes(block: nn.Module, x: Tensor, attn_mask: Any, saved_ops: Collection[str]) -> dict[str, int]:
    """Returns the bytes that one block saves for backward, by activation checkpointing mode: none, op, full.

    Args:
        block: on meta, tensor-parallel or not, without activation checkpointing.
        x: its input, this rank's shard of the tokens.
        attn_mask: the kernel's attention mask.
        saved_ops: the kernel's operators whose results ``op`` saves.
    """
    saved: dict[Any, tuple[int, Any]] = {}  # by storage; holding the storage keeps its address from being reused
    weights = {_local(parameter).untyped_storage()._cdata for parameter in block.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage: Any = _local(tensor).untyped_storage()
        if storage.device.type == "meta" and storage._cdata not in weights:
            saved[storage._cdata] = storage.nbytes(), storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        block(x, attn_mask)
    with _SavedByOp(saved_ops) as by_op, torch.no_grad():
        block(x, attn_mask)
    return {"none": sum(size for size, _ in saved.values()), "op": x.nbytes + by_op.bytes, "full": x.nbytes}


class _SavedByOp(TorchDispatchMode):
    """Counts the bytes that selective checkpointing by operator saves."""

    is_recompute = False  # read by the policy

    def __init__(self, saved_ops: Collection[str]) -> None:
        super().__init__()
        self.bytes = 0
        self._policy = save_policy(saved_ops)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self._policy(self, func) == CheckpointPolicy.MUST_SAVE:
            results = out if isinstance(out, tuple) else (out,)
            self.bytes += sum(_local(x).nbytes for x in results if isinstance(x, Tensor))
        return out


def _local(x: Tensor) -> Tensor:
    return x._local_tensor if isinstance(x, DTensor) else x
