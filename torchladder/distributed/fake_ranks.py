"""Ranks that do not exist, to build a layout of any size in one process on meta; nothing is sent."""

from __future__ import annotations

from collections.abc import Iterator
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

from torchladder.distributed import activation_checkpoint


@contextmanager
def ranks(size: int) -> Iterator[None]:
    """Makes this process rank 0 of so many, the rest of which is made up."""
    assert not dist.is_initialized()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()
        _clear_sharding_prop_cache()  # it remembers a mesh, whose groups are gone, for the next one like it


def local_bytes(model: nn.Module) -> int:
    """Returns the bytes of this rank's share of the parameters."""
    return sum(_nbytes(parameter) for parameter in model.parameters())


def activations(block: nn.Module, x: Tensor, form: Any) -> dict[str, int]:
    """Returns the bytes that one block keeps of its forward pass, for each way of recomputing.

    Args:
        block: on meta, shared by tensor-parallel ranks or not, not yet wrapped.
        x: its input, this rank's share of the tokens.
        form: the kernel's form of a mask.
    """
    kept: dict[Any, tuple[int, Any]] = {}  # by storage, which is held so that no other takes its place
    weights = {_storage(parameter)._cdata for parameter in block.parameters()}

    def keep(saved: Tensor) -> Tensor:
        storage = _storage(saved)
        if storage.device.type == "meta" and storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes(), storage
        return saved

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        block(x, form)
    with _ByOperation() as chosen, torch.no_grad():
        block(x, form)
    return {"none": sum(size for size, _ in kept.values()), "op": _nbytes(x) + chosen.bytes, "full": _nbytes(x)}


class _ByOperation(TorchDispatchMode):
    """Adds up what recomputing by operation keeps."""

    is_recompute = False  # what the policy asks for

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self._policy = activation_checkpoint.policy()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self._policy(self, func) == CheckpointPolicy.MUST_SAVE:
            self.bytes += sum(_nbytes(x) for x in (out if isinstance(out, tuple) else (out,)) if isinstance(x, Tensor))
        return out


def _local(x: Tensor) -> Tensor:
    return x._local_tensor if isinstance(x, DTensor) else x


def _storage(x: Tensor) -> Any:
    return _local(x).untyped_storage()


def _nbytes(x: Tensor) -> int:
    local = _local(x)
    return local.numel() * local.element_size()
