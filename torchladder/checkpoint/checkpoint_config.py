"""The section ``[checkpoint]``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge

from torchladder.registry import ConfigError, check_bounds, unknown_name

EXCLUDABLE = ("optimizer", "dataloader", "train_state")
"""What ``exclude_from_loading`` can name."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Saving and loading the state of a run."""

    enable: bool = False
    """Save checkpoints, and resume from the newest intact one."""

    folder: str = "checkpoint"
    """Folder of the checkpoints: a path inside job.dump_folder, an absolute path, or a URL such as s3://bucket/run."""

    interval: Annotated[int, Ge(1)] = 500
    """Steps between checkpoints."""

    interval_minutes: Annotated[float, Ge(0)] = 0.0
    """Save at the latest after this many minutes; 0: only interval counts."""

    enable_first_step_checkpoint: bool = False
    """Also save after the first step, to see early that saving works."""

    keep_latest_k: int = 10
    """How many of the newest checkpoints to keep; 0 keeps all."""

    keep_every: Annotated[int, Ge(0)] = 0
    """Also keep the checkpoints whose step is a multiple of this; 0 keeps no others."""

    async_mode: Literal["disabled", "async", "async_with_pinned_mem"] = "disabled"
    """async copies the state and writes it while training continues; pinned memory also overlaps the copy."""

    load_step: Annotated[int, Ge(0)] = -1
    """The step to resume from; -1: the newest. A restart by torchrun or Slurm always takes the newest."""

    initial_load_path: str = ""
    """A checkpoint (step-N) to start from while this run has none, a path or a URL."""

    initial_load_model_only: bool = True
    """Load only the weights from initial_load_path, not optimizer, step and row."""

    initial_load_in_hf: bool = False
    """Start from a Hugging Face folder or a lit-gpt .pth: initial_load_path if set, else model.hf_assets_path."""

    exclude_from_loading: list[str] = field(default_factory=list)
    """What not to load from a checkpoint of another run: optimizer, dataloader (the row), train_state (the step)."""

    last_save_model_only: bool = False
    """Save only the weights at the end of the run."""

    export_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of the weights that last_save_model_only and last_save_in_hf save."""

    last_save_in_hf: bool = False
    """Also save the weights at the end of the run as a Hugging Face folder, step-N-hf next to the checkpoints."""

    create_seed_checkpoint: bool = False
    """Save the initial state as step-0 and stop, so that runs of any layout can start from the same weights."""

    load_only: bool = False
    """Load checkpoints but save none."""

    accept_changes: list[str] = field(default_factory=list)
    """Settings that may differ from the checkpoint's when resuming, for example attention.masks."""

    max_failures: Annotated[int, Ge(1)] = 10
    """Saves in a row that may fail (disk full, mount gone) before the run stops; training continues between them."""

    retry_minutes: Annotated[float, Ge(0)] = 1.0
    """Minutes between a failed save and the next attempt."""

    def __post_init__(self) -> None:
        check_bounds(self, "checkpoint")
        saving = self.enable and not self.load_only
        for key in ("create_seed_checkpoint", "last_save_in_hf"):
            if getattr(self, key) and not saving:
                raise ConfigError(f"checkpoint.{key} needs checkpoint.enable without checkpoint.load_only.")
        for key in ("initial_load_in_hf", "initial_load_path"):
            if getattr(self, key) and not self.enable:
                raise ConfigError(f"checkpoint.{key} needs checkpoint.enable; load_only loads and saves none.")
        if self.last_save_in_hf and "://" in self.folder:
            raise ConfigError(
                f"checkpoint.last_save_in_hf writes next to the checkpoints and needs a local checkpoint.folder, not "
                f"{self.folder}. Convert the last checkpoint afterwards: torchladder convert to-hf."
            )
        if self.keep_latest_k < 0 or self.keep_latest_k == 1:
            raise ConfigError(
                f"checkpoint.keep_latest_k = {self.keep_latest_k}: must be 0 (all) or 2 or more, so that one is left "
                "if the newest is damaged."
            )
        for name in self.exclude_from_loading:
            if name == "lr_scheduler":
                raise ConfigError(
                    "checkpoint.exclude_from_loading: 'lr_scheduler' has no state, since the learning rate is a "
                    "function of the step. Exclude 'train_state' to start at step 0."
                )
            if name not in EXCLUDABLE:
                raise unknown_name("entry", name, EXCLUDABLE, "checkpoint.exclude_from_loading")

    def folder_in(self, dump_folder: str | Path) -> str:
        """Returns the local path or the URL of the checkpoints of a run."""
        return self.folder.rstrip("/") if "://" in self.folder else str(Path(dump_folder) / self.folder)
