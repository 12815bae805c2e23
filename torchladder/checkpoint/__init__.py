"""Checkpoints: model and optimizer by DCP, and the state of the run as readable text.

A checkpoint is the folder ``step-N``:

| file | holds |
|---|---|
| ``.metadata``, ``__R_0.distcp`` | model and optimizer in DCP's format: any layout and number of ranks can load them |
| ``run.json`` | the ``RunState``: step, next row, fingerprints, versions |
| ``config.toml`` | the settings of the run |
| ``tokenizer/`` | the files of its tokenizer, if it has any |
| ``SHA256SUMS`` | a checksum of every file, in the format of ``sha256sum --check`` |
"""

from torchladder.checkpoint.checkpoint_config import CheckpointConfig
from torchladder.checkpoint.checkpointer import Checkpointer
from torchladder.checkpoint.checksums import CHECKSUM_FILE
from torchladder.checkpoint.group import SaveError
from torchladder.checkpoint.run_state import RUN_STATE_FILE, RunState, check_fingerprints
from torchladder.checkpoint.step_folders import (
    CONFIG_FILE,
    RunStateCheck,
    complete_steps,
    find_corruption,
    is_complete,
    write_checksums,
)

__all__ = [
    "CHECKSUM_FILE",
    "CONFIG_FILE",
    "RUN_STATE_FILE",
    "CheckpointConfig",
    "Checkpointer",
    "RunState",
    "RunStateCheck",
    "SaveError",
    "check_fingerprints",
    "complete_steps",
    "find_corruption",
    "is_complete",
    "write_checksums",
]
