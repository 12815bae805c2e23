"""The section ``[checkpoint]``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torchladder.registry import ConfigError, unknown_name

EXCLUDABLE = {
    "optimizer": "the optimizer's state",
    "dataloader": "the next row: data begins anew",
    "train_state": "the step: the run begins at step 0",
}
"""What need not be taken from a checkpoint."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Saving and loading the state of a run."""

    enable: bool = False
    """Save checkpoints, and continue from the newest one that is whole."""

    folder: str = "checkpoint"
    """Folder of the checkpoints, inside job.dump_folder."""

    interval: int = 500
    """Steps between checkpoints."""

    interval_minutes: float = 0.0
    """Minutes after which one is saved in any case; 0: only interval counts."""

    enable_first_step_checkpoint: bool = False
    """Save after the first step as well, to see early that saving works."""

    keep_latest_k: int = 10
    """How many checkpoints are kept, the newest; 0 keeps all."""

    keep_every: int = 0
    """Keep the checkpoints of every so many steps beside the newest; 0 keeps no others."""

    async_mode: Literal["disabled", "async", "async_with_pinned_mem"] = "disabled"
    """async copies the state aside and writes it while training goes on; pinned memory makes the copy overlap, too."""

    load_step: int = -1
    """The step to continue from; -1: the newest. A restart by torchrun or Slurm always takes the newest."""

    initial_load_path: str = ""
    """A checkpoint folder (step-N) to start from while this run has none of its own."""

    initial_load_model_only: bool = True
    """Take only the weights from initial_load_path, not optimizer, step and rows."""

    initial_load_in_hf: bool = False
    """Start from a Hugging Face folder: initial_load_path where it is set, model.hf_assets_path otherwise."""

    exclude_from_loading: list[str] = field(default_factory=list)
    """What not to take from a checkpoint of another run: optimizer, dataloader (the row), train_state (the step)."""

    last_save_model_only: bool = False
    """Save only the weights at the end of the run."""

    export_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the weights that last_save_model_only and last_save_in_hf save."""

    last_save_in_hf: bool = False
    """Leave the weights at the end of the run as a Hugging Face folder too, step-N-hf beside the checkpoints."""

    create_seed_checkpoint: bool = False
    """Save the initial state as step-0 and stop: runs of any layout can begin with the same weights."""

    load_only: bool = False
    """Load, but never save."""

    accept_changes: list[str] = field(default_factory=list)
    """Fingerprints that may differ from the checkpoint's when continuing, for example data.weights."""

    max_failures: int = 10
    """Saves in a row that may fail (disk full, mount gone) before the run stops; it trains on between them."""

    retry_minutes: float = 1.0
    """Minutes after a failed save before the next attempt."""

    def __post_init__(self) -> None:
        for key, least in (("interval", 1), ("interval_minutes", 0), ("keep_every", 0), ("load_step", -1)):
            self._at_least(key, least)
        for key, least in (("max_failures", 1), ("retry_minutes", 0)):
            self._at_least(key, least)
        if self.create_seed_checkpoint and (not self.enable or self.load_only):
            raise ConfigError("checkpoint.create_seed_checkpoint needs checkpoint.enable, and not load_only.")
        for key in ("initial_load_in_hf", "last_save_in_hf"):
            if getattr(self, key) and (not self.enable or (key == "last_save_in_hf" and self.load_only)):
                raise ConfigError(f"checkpoint.{key} needs checkpoint.enable, and last_save_in_hf not load_only.")
        if self.keep_latest_k < 0 or self.keep_latest_k == 1:
            raise ConfigError(
                f"checkpoint.keep_latest_k = {self.keep_latest_k}: must be 0 (all) or 2 and more: "
                "should the newest be damaged one day, the one before is there."
            )
        for name in self.exclude_from_loading:
            if name == "lr_scheduler":
                raise ConfigError(
                    "checkpoint.exclude_from_loading: 'lr_scheduler' has no state: the rate is a function of the step. "
                    "Exclude 'train_state' to begin at step 0."
                )
            if name not in EXCLUDABLE:
                raise unknown_name("entry of checkpoint.exclude_from_loading", name, EXCLUDABLE)

    def _at_least(self, key: str, least: int) -> None:
        if not getattr(self, key) >= least:
            raise ConfigError(f"checkpoint.{key} = {getattr(self, key)}: must be {least} or more.")
