"""Estimates what a rank sends in a step before it exists."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from torchladder import mask
from torchladder.training.memory_estimate import MemoryEstimator
from torchladder.training.run_plan import Plan


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends in a step, by mesh dimension."""

    shard: int
    replicate: int
    tensor: int
    context: int
    pipeline: int


def estimate_traffic(estimator: MemoryEstimator) -> Traffic:
    """Returns the bytes that a rank of the run's own layout sends in its largest step, under its widest window; in a
    pipeline those of the rank with the largest part of the model, and most of what any sends to other stages.
    """
    plan, layout = estimator.plan, estimator.layout
    degrees, passes = layout.degrees, plan.batch.micro_batches(max(plan.schedule.batch.sizes))
    share = max(estimator.rank_shares(layout), key=lambda share: share.parameters)
    itemsize, layers = estimator.dtype.itemsize, len(share.block_sizes)
    # In a pipeline a block is gathered for each forward pass, and once for all backward passes.
    all_gathers = 1 if estimator.keeps_gathered else 1 + share.passes
    n, r, t, c = degrees.dp_shard * degrees.cp, degrees.dp_replicate, degrees.tp, degrees.cp
    parameters = share.parameters // t
    tokens = layout.local_batch_size * estimator.seq_len // c
    # A block all-gathers and reduce-scatters tokens twice each, forward and backward; embedding and head once.
    collectives = (8 + (4 if layout.ac_mode == "full" else 0)) * layers + 4
    _, kv_bytes = estimator.measure_block(layout, layout.local_batch_size)
    # Muon exchanges its matrices in bfloat16 before and after it orthogonalizes them.
    groups = plan.optimizer_groups
    matrices = 2 * sum(group.num_parameters for group in groups if group.algorithm == "Muon") // (n * t * degrees.pp)
    hidden = tokens * estimator.dim * itemsize
    return Traffic(
        shard=passes * (all_gathers * itemsize + estimator.reduce_bytes) * parameters * (n - 1) // n
        + 2 * matrices * (n - 1) // n,
        replicate=passes * 2 * estimator.reduce_bytes * parameters // n * (r - 1) // r + matrices * (r - 1) // r,
        tensor=passes * collectives * hidden * (t - 1) // t + 2 * matrices * (t - 1) // t,
        context=passes
        * 2
        * kv_bytes
        * _max_sent_keys(plan, estimator.seq_len, c)
        // (estimator.seq_len // c)
        // degrees.pp,
        pipeline=passes * hidden // t * _max_neighbors(plan),
    )


def _max_neighbors(plan: Plan) -> int:
    """Returns the most stages on other ranks that the stages of one rank send to: outputs, or their gradients."""
    layout = plan.pipeline
    if layout is None:
        return 0
    sends = [0] * layout.degree
    for stage in range(len(layout.stages) - 1):
        here, there = layout.rank_of(stage), layout.rank_of(stage + 1)
        for rank in (here, there) if here != there else ():
            sends[rank] += 1
    return max(sends)


def _max_sent_keys(plan: Plan, seq_len: int, context: int) -> int:
    """Returns the most keys per row that a rank sends to later ranks in all layers, under their widest windows."""
    tokens = seq_len // context
    sent = [0] * context  # by rank
    for one in plan.layer_types:
        row = torch.arange(seq_len, dtype=torch.int32)[None]
        first_keys = mask.from_names(one.masks, row, one.window_range[1])[0, ::tokens].tolist()  # of each rank
        for rank in range(context):
            keys = sum(min(max((rank + 1) * tokens - first, 0), tokens) for first in first_keys[rank + 1 :])
            sent[rank] += one.layers * keys
    return max(sent)
