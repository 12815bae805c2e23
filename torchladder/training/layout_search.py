"""Looks for layouts of the same ranks that need less memory than the run's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from itertools import product

from torchladder.distributed.mesh import Degrees
from torchladder.registry import ConfigError
from torchladder.training.memory_estimate import CandidateLayout, MemoryEstimator, RankMemory


def find_fitting(estimator: MemoryEstimator, limit: int) -> list[tuple[CandidateLayout, RankMemory]]:
    """Returns up to three layouts of at most ``limit`` bytes per rank, those with the fewest changes first."""
    fitting = []
    for layout in _candidates(estimator):
        with suppress(ConfigError):  # the model cannot be divided into these stages
            memory = estimator.memory(layout)
            if memory.total <= limit:
                fitting.append((layout, memory))
    fitting.sort(key=lambda x: (len(changes(estimator, x[0])), x[0].degrees.model_parallel, -x[0].local_batch_size))
    return fitting[:3]


def changes(estimator: MemoryEstimator, layout: CandidateLayout) -> dict[str, int | str]:
    """Returns the settings that turn the run's own layout into another: key -> value."""
    own = _settings(estimator, estimator.layout)
    return {key: value for key, value in _settings(estimator, layout).items() if own.get(key) != value}


def _settings(estimator: MemoryEstimator, layout: CandidateLayout) -> dict[str, int | str]:
    degrees, selective = layout.degrees, layout.ac_mode not in ("none", "full")
    settings: dict[str, int | str] = {
        "parallelism.data_parallel_replicate_degree": degrees.dp_replicate,
        "parallelism.tensor_parallel_degree": degrees.tp,
        "parallelism.context_parallel_degree": degrees.cp,
        "parallelism.pipeline_parallel_degree": degrees.pp,
        "training.local_batch_size": layout.local_batch_size,
        "activation_checkpoint.mode": "selective" if selective else layout.ac_mode,
    }
    if estimator.config.parallelism.data_parallel_shard_degree != -1:
        settings["parallelism.data_parallel_shard_degree"] = degrees.dp_shard
    return settings | ({"activation_checkpoint.selective_ac_option": layout.ac_mode} if selective else {})


def _candidates(estimator: MemoryEstimator) -> Iterator[CandidateLayout]:
    """Yields the layouts of the same ranks whose degrees divide ranks, heads, tokens and rows."""
    own = estimator.layout
    ranks = own.degrees.dp * own.degrees.model_parallel
    heads, sizes = estimator.plan.model.head_counts(), estimator.plan.schedule.batch.sizes
    local_batch_sizes = {own.local_batch_size >> shift for shift in range(own.local_batch_size.bit_length())}
    pipelines = sorted({1, own.degrees.pp, *((2, 4, 8) if own.degrees.pp > 1 else ())})
    for replicate, tensor, context, pipeline, local_batch_size in product(
        {own.degrees.dp_replicate, 1}, (1, 2, 4, 8), (1, 2, 4, 8, 16), pipelines, local_batch_sizes
    ):
        shard = ranks // (replicate * tensor * context * pipeline)
        degrees = Degrees(replicate, shard, context, tensor, pipeline)
        if (
            degrees.dp * degrees.model_parallel == ranks
            and not any(number % tensor for number in heads)
            and estimator.seq_len % (context * tensor) == 0
            and not any(rows % (local_batch_size * degrees.dp) for rows in sizes)
        ):
            for ac_mode in dict.fromkeys((own.ac_mode, "op", "full")):
                yield CandidateLayout(degrees, local_batch_size, ac_mode)
