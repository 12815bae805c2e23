"""How the rows of one optimizer step are divided over data-parallel ranks and micro-batches."""

from __future__ import annotations

from dataclasses import dataclass

from torchladder.config import TrainingConfig
from torchladder.registry import ConfigError


@dataclass(frozen=True)
class BatchSizes:
    """The rows of one step: ``global_batch_size = data_parallel * micro_batch_size * accumulation``."""

    global_batch_size: int
    micro_batch_size: int
    accumulation: int
    data_parallel: int


def batch_sizes(config: TrainingConfig, data_parallel: int) -> BatchSizes:
    """Divides the rows of a step.

    Raises:
        ConfigError: they do not divide; the message has the nearest sizes that do.
    """
    micro, rows = config.local_batch_size, config.global_batch_size
    at_once = micro * data_parallel
    if rows == -1:
        rows = at_once
    if rows % at_once:
        below, above = rows // at_once * at_once, -(-rows // at_once) * at_once
        raise ConfigError(
            f"training.global_batch_size = {rows} is not a multiple of training.local_batch_size {micro} x "
            f"{data_parallel} data-parallel ranks = {at_once}. Nearest: {below or above} or {above}."
        )
    return BatchSizes(rows, micro, rows // at_once, data_parallel)
