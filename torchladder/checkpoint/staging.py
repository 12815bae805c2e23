"""Copying a state to CPU memory, so that it can be written while training continues."""

from __future__ import annotations

from typing import Literal

import torch
from torch.distributed.checkpoint._state_dict_stager import StateDictStager
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from torchladder.registry import ConfigError


class ReusingStager(DefaultStager):
    """DCP's stager with copies into the same memory every time, since allocating pinned memory is slow.

    This is safe because a save starts only after the previous one has completed.

    Args:
        async_mode: ``checkpoint.async_mode``.
        device: where the state lives.

    Raises:
        ConfigError: pinned memory without CUDA.
    """

    def __init__(self, async_mode: Literal["async", "async_with_pinned_mem"], device: torch.device) -> None:
        pinned = async_mode == "async_with_pinned_mem"
        if pinned and device.type != "cuda":
            raise ConfigError(
                f"checkpoint.async_mode = 'async_with_pinned_mem' copies from a GPU, and this run is on {device.type}: "
                "set async or disabled."
            )
        options = StagingOptions(
            use_pinned_memory=pinned, use_shared_memory=False, use_async_staging=pinned, use_non_blocking_copy=pinned
        )
        super().__init__(options)
        self._state_dict_stager = _ReusableStager(options.use_pinned_memory, options.use_shared_memory)


class _ReusableStager(StateDictStager):
    def close(self) -> None:
        """Keeps the memory: PyTorch 2.11 closes the stager after each copy and could not copy again."""
