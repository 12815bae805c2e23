"""Checkpoints: the folders ``step-N`` with model and optimizer in DCP's format, ``run.json``, ``config.toml``, the
tokenizer and ``SHA256SUMS``.
"""

from torchladder.checkpoint.checkpoint_config import CheckpointConfig
from torchladder.checkpoint.checkpointer import Checkpointer
from torchladder.checkpoint.checksums import CHECKSUM_FILE
from torchladder.checkpoint.group import SaveError
from torchladder.checkpoint.run_state import RUN_STATE_FILE, RunState
from torchladder.checkpoint.step_folders import (
    CONFIG_FILE,
    RunStateCheck,
    complete_steps,
    find_corruption,
    is_complete,
    write_checksums,
)
from torchladder.checkpoint.storage import get_storage

__all__ = [
    "CHECKSUM_FILE",
    "CONFIG_FILE",
    "RUN_STATE_FILE",
    "CheckpointConfig",
    "Checkpointer",
    "RunState",
    "RunStateCheck",
    "SaveError",
    "complete_steps",
    "find_corruption",
    "get_storage",
    "is_complete",
    "write_checksums",
]
