"""Checkpoints: model and optimizer by DCP, beside them what the run needs to go on, as readable text.

A checkpoint is the folder ``step-N``. It is written as ``step-N.partial``, every file synced and read back, and then
named, so a folder with the final name is complete:

| file | holds |
|---|---|
| ``.metadata``, ``__R_0.distcp`` | model and optimizer, DCP's: any layout and number of ranks can read them |
| ``run.json`` | step, next row, fingerprints, versions |
| ``config.toml`` | the settings of the run |
| ``tokenizer/`` | the files of its tokenizer, where it has any |
| ``SHA256SUMS`` | a checksum of every file, as ``sha256sum --check`` reads it |
"""

from torchladder.checkpoint.checkpoint_config import CheckpointConfig
from torchladder.checkpoint.checkpointer import Checkpointer
from torchladder.checkpoint.checksums import find_corruption
from torchladder.checkpoint.group import SaveError
from torchladder.checkpoint.run_state import RUN_STATE_FILE, RunState, check_fingerprints
from torchladder.checkpoint.step_folders import complete, finished, steps

__all__ = [
    "RUN_STATE_FILE",
    "CheckpointConfig",
    "Checkpointer",
    "RunState",
    "SaveError",
    "check_fingerprints",
    "complete",
    "find_corruption",
    "finished",
    "steps",
]
