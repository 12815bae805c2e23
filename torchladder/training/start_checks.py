"""What is checked before a run opens its data: its folder, optional packages, and the checkpoint to start from."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

from torchladder import checkpoint, metrics, models
from torchladder.config import Config
from torchladder.models.hf import hf_weights
from torchladder.models.hf.lit_gpt import is_lit_gpt_file
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
    if config.metrics.energy_country:
        metrics.check_energy_country(config.metrics.energy_country)
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
    if section.initial_load_in_hf and not own:
        with torch.device("meta"):
            model = models.registry.build(config.model, attention_fn=None, seq_len=1)
        hf_weights.match_weights(model, path or config.model.hf_assets_path)
    if not path or section.initial_load_in_hf or own or checkpoint.is_complete(path):
        return
    inside = [folder for folder in (path, f"{path}/checkpoint") if checkpoint.complete_steps(folder)]
    hint = "it is one step-N folder of a run."
    if inside:
        hint = f"did you mean {inside[0]}/step-{checkpoint.complete_steps(inside[0])[-1]}?"
    elif Path(path, "config.json").exists():
        hint = "it is a Hugging Face folder: set checkpoint.initial_load_in_hf = true."
    elif is_lit_gpt_file(path):
        hint = "it is a lit-gpt file: set checkpoint.initial_load_in_hf = true."
    require(False, f"checkpoint.initial_load_path = {path!r} is not a complete checkpoint; {hint}")
