"""The bytes that a transformer block saves for backward, counted on the meta device."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy

from torchladder.distributed.activation_checkpoint import (
    ActivationCheckpointConfig,
    apply_activation_checkpoint,
    save_policy,
)
from torchladder.distributed.fake_ranks import local_tensor


def activation_bytes(block: nn.Module, x: Tensor, attn_mask: Any, saved_ops: Collection[str]) -> dict[str, int]:
    """Returns the bytes that one block saves for backward, by activation checkpointing mode: none, op, full.

    Args:
        block: on meta, tensor-parallel or not, without activation checkpointing.
        x: its input, this rank's shard of the tokens.
        attn_mask: the kernel's attention mask.
        saved_ops: the kernel's operators whose results ``op`` saves.
    """
    saved: dict[Any, tuple[int, Any]] = {}  # by storage; holding the storage keeps its address from being reused
    weights = {local_tensor(parameter).untyped_storage()._cdata for parameter in block.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage: Any = local_tensor(tensor).untyped_storage()
        if storage.device.type == "meta" and storage._cdata not in weights:
            saved[storage._cdata] = storage.nbytes(), storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        block(x, attn_mask)
    with _SavedByOp(saved_ops) as by_op, torch.no_grad():
        block(x, attn_mask)
    return {"none": sum(size for size, _ in saved.values()), "op": x.nbytes + by_op.bytes, "full": x.nbytes}


def compiled_activation_bytes(
    block: nn.Module, x: Tensor, attn_mask: Any, saved_ops: Collection[str]
) -> dict[str, int]:
    """Returns the same as ``activation_bytes`` for a block that ``torch.compile`` compiles with inductor.

    A compiled block saves less: inductor recomputes in backward what is cheap to recompute. Its partitioner decides
    that on the traced graph, before any code is generated, so this needs neither a GPU nor a compiler.
    """
    saved = {"full": x.nbytes}
    for mode in ("none", "op"):
        config = ActivationCheckpointConfig("selective", "op") if mode == "op" else ActivationCheckpointConfig()
        graphs: list[fx.GraphModule] = []

        def keep(graph: fx.GraphModule, inputs: Any, graphs: list[fx.GraphModule] = graphs) -> Any:
            graphs.append(graph)
            return graph.forward

        backend = aot_autograd(
            fw_compiler=keep,
            bw_compiler=lambda graph, inputs: graph.forward,
            partition_fn=partial(min_cut_rematerialization_partition, compiler="inductor"),
            decompositions=select_decomp_table(),
        )
        torch._dynamo.reset()
        checkpointed = apply_activation_checkpoint(block, 0, config, saved_ops)
        with _checkpoint_log_level(logging.ERROR):  # it warns of operations in place, of which there are none
            torch.compile(checkpointed, backend=backend, fullgraph=True)(x, attn_mask)
        torch._dynamo.reset()
        saved[mode] = _saved_by_graph(graphs[0], x)
    return saved


@contextmanager
def _checkpoint_log_level(level: int) -> Iterator[None]:
    """Sets the level of what PyTorch says about activation checkpointing under ``torch.compile``."""
    log = logging.getLogger("torch._higher_order_ops.wrap")
    before = log.level
    log.setLevel(level)
    try:
        yield
    finally:
        log.setLevel(before)


def _saved_by_graph(graph: fx.GraphModule, x: Tensor) -> int:
    """Returns the bytes of what a forward graph saves for backward: the input ``x`` and its outputs after the first."""
    outputs: Any = graph.graph.output_node().args[0]
    storages = {x.untyped_storage()._cdata: x.nbytes}
    for node in outputs[1:]:
        # Other inputs are weights, which exist anyway.
        value = node.meta.get("val") if isinstance(node, fx.Node) and node.op != "placeholder" else None
        if isinstance(value, Tensor):
            storages[value.untyped_storage()._cdata] = value.untyped_storage().nbytes()
    return sum(storages.values())


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
            self.bytes += sum(local_tensor(x).nbytes for x in results if isinstance(x, Tensor))
        return out
