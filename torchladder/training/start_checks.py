"""What is checked before a run opens its data: its folder, optional packages, and the checkpoint to start from."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from torchladder import checkpoint
from torchladder.config import Config
from torchladder.registry import require


def check_start(config: Config) -> None:
    """Raises ``ConfigError`` if the run would end, or overwrite another one, when its data has been read."""
    wandb = not config.metrics.enable_wandb or importlib.util.find_spec("wandb") is not None
    require(wandb, "metrics.enable_wandb needs the package wandb: pip install wandb, or --metrics.no_enable_wandb.")
    wants_trackio = any(output.name == "trackio" for output in config.metrics.outputs)
    require(
        not wants_trackio or importlib.util.find_spec("trackio") is not None,
        "the metrics output 'trackio' needs the package trackio: pip install 'torchladder[trackio]', or remove it from "
        "metrics.outputs.",
    )
    _check_folder(config)
    _check_initial_checkpoint(config)


def _check_folder(config: Config) -> None:
    """Refuses the folder of a run with checkpoints that this run does not continue."""
    folder, section = Path(config.job.dump_folder), config.checkpoint
    if section.enable:
        return
    steps = checkpoint.complete_steps(section.folder_in(folder))
    require(
        not steps,
        f"job.dump_folder = {str(folder)!r} holds a run with checkpoints up to step {max(steps, default=0):,}, which "
        "this run would not continue, because checkpoint.enable is off, and whose metrics it would overwrite. Set "
        "--checkpoint.enable to continue it, or another --job.dump_folder.",
    )


def _check_initial_checkpoint(config: Config) -> None:
    section = config.checkpoint
    path = section.initial_load_path.rstrip("/")
    own = section.enable and checkpoint.complete_steps(section.folder_in(config.job.dump_folder))
    if not path or section.initial_load_in_hf or own or checkpoint.is_complete(path):
        return
    inside = [folder for folder in (path, f"{path}/checkpoint") if checkpoint.complete_steps(folder)]
    hint = "it is one step-N folder of a run."
    if inside:
        hint = f"did you mean {inside[0]}/step-{checkpoint.complete_steps(inside[0])[-1]}?"
    elif Path(path, "config.json").exists():
        hint = "it is a Hugging Face folder: set checkpoint.initial_load_in_hf = true."
    require(False, f"checkpoint.initial_load_path = {path!r} is not a complete checkpoint; {hint}")
