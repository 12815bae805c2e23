"""Which weights a path means: all checkpoints of a run, one, or a Hugging Face folder."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.checkpoint.api import CheckpointException

from torchladder import checkpoint
from torchladder.checkpoint import CheckpointConfig
from torchladder.config import Config, toml_files
from torchladder.inference.trained_model import LoadedModel, settings_of
from torchladder.models.attention.sdpa import SdpaKernel
from torchladder.models.hf.hf_folder import CONFIG
from torchladder.registry import ConfigError


class UnreadableWeightsError(Exception):
    """Weights that cannot be read; the message says which and why."""


@dataclass(frozen=True, eq=False)
class EvalWeights:
    """A checkpoint or a Hugging Face folder.

    Attributes:
        path: its folder.
        step: of the run; None of a Hugging Face folder.
        config: the settings that belong to it.
        stamp: another one for other weights.
        home: the folder of its run, or its own.
        tokenizer: fingerprint of the one that it was trained with; None where nobody knows.
    """

    path: Path
    step: int | None
    config: Config
    stamp: str
    home: Path
    tokenizer: str | None = None

    @property
    def trained(self) -> int:
        """Tokens of the longest row that the model was made for."""
        if self.step is not None:
            return self.config.training.seq_len
        told: int | None = json.loads((self.path / CONFIG).read_text()).get("max_position_embeddings")
        return told or self.config.training.seq_len

    def load(self, seq_len: int, dtype: torch.dtype) -> LoadedModel:
        """Returns the model, for rows of up to ``seq_len`` tokens.

        Raises:
            DamageError: a file of the checkpoint is not what was saved.
        """
        if self.step is None:
            return LoadedModel.load(self.config, self.path, SdpaKernel.attend, seq_len, dtype)
        wrong = checkpoint.find_corruption(self.path)
        if wrong is not None:
            raise UnreadableWeightsError(f"{self.path} is damaged and passed over: {wrong}")
        try:
            return LoadedModel.load(self.config, self.path, SdpaKernel.attend, seq_len, dtype)
        except (OSError, CheckpointException) as error:  # a run that goes on deletes its older ones
            raise UnreadableWeightsError(f"{self.path} cannot be read and is passed over: {error}") from error


def find(path: Path, seq_len: int | None = None) -> tuple[list[EvalWeights], list[UnreadableWeightsError]]:
    """Returns all weights that a path means, oldest first, and what is wrong with others.

    Args:
        path: a run's folder (or that of its checkpoints), a checkpoint, or a Hugging Face folder.
        seq_len: tokens of the longest row that will be read.

    Raises:
        ConfigError: it is none of them, or has no complete checkpoint yet.
    """
    path = path.expanduser()
    if (path / CONFIG).is_file():
        return [_weights(path, settings_of(path, seq_len))], []
    found: list[EvalWeights] = []
    damaged: list[UnreadableWeightsError] = []
    known: dict[str, Config] = {}
    for one in [path] if checkpoint.is_complete(path) else _checkpoints(path):
        try:
            found.append(_weights(one, _config(one, known)))
        except (OSError, ValueError, KeyError) as error:  # ConfigError is a ValueError
            damaged.append(UnreadableWeightsError(f"{one} cannot be read and is passed over: {error}"))
    if not found and not damaged:
        raise ConfigError(
            f"{str(path)!r} is no run with a complete checkpoint, no complete checkpoint (step-N) and no Hugging Face "
            "folder."
        )
    return found, damaged


def _checkpoints(path: Path) -> list[Path]:
    """Returns the complete checkpoints in a folder, or in that of the run whose folder it is."""
    folder = path
    if not checkpoint.complete_steps(path) and (path / "config.toml").is_file():
        section = toml_files.read(path / "config.toml")[0].get("checkpoint", {})
        folder = path / section.get("folder", CheckpointConfig.folder)
    return [folder / f"step-{step}" for step in checkpoint.complete_steps(folder)]


def _config(path: Path, known: dict[str, Config]) -> Config:
    """Returns the settings of a checkpoint; those of a run's checkpoints are the same mostly, and read once."""
    file = path / checkpoint.CONFIG_FILE
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    if text not in known:
        known[text] = settings_of(path)
    return known[text]


def _weights(path: Path, config: Config) -> EvalWeights:
    if (path / CONFIG).is_file():
        stats = {file.name: file.stat() for file in sorted(path.iterdir()) if file.suffix in (".json", ".safetensors")}
        stamp = json.dumps([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()])
        return EvalWeights(path, None, config, stamp, path)
    above = path.resolve().parents[:2]
    home = next((folder for folder in above if (folder / "config.toml").is_file()), above[0])
    stamp = (path / checkpoint.CHECKSUM_FILE).read_text(encoding="utf-8")
    if not (path / checkpoint.CONFIG_FILE).is_file():
        stamp += config.to_toml()  # they lie elsewhere, and may change
    run = checkpoint.RunState.read(path)
    tokenizer = run.fingerprints.get("data.tokenizer")
    return EvalWeights(path, run.step, config, stamp, Path(os.path.relpath(home)), tokenizer)
