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
from torchladder.checkpoint.identity import check
from torchladder.checkpoint.step_folders import RUN, complete, finished, read_run, steps

__all__ = [
    "RUN",
    "CheckpointConfig",
    "Checkpointer",
    "SaveError",
    "check",
    "complete",
    "find_corruption",
    "finished",
    "read_run",
    "steps",
]
