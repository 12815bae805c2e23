"""A trained model on disk: a checkpoint of a run, or a Hugging Face folder."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from torchladder import checkpoint, data, mask, models
from torchladder import config as settings
from torchladder.batch_schedule import BatchSizeWarmup
from torchladder.checkpoint import CHECKSUM_FILE, CONFIG_FILE, CheckpointConfig, RunState
from torchladder.config import Config, hf_defaults, toml_files
from torchladder.inference.weight_choice import OWN_WEIGHTS, MissingWeightsError, WeightChoice, load_weights
from torchladder.models import AttentionFunction, Model
from torchladder.models.hf import hf_weights
from torchladder.models.hf.hf_folder import HFFolder, is_hf_folder, lit_gpt_hint
from torchladder.registry import ConfigError, require
from torchladder.schedule import StepSettings

TOKENIZER_FOLDER = "tokenizer"
"""Folder of a checkpoint with the files of its tokenizer."""


class UnreadableCheckpointError(ConfigError):
    """A checkpoint is damaged, or was deleted in the meantime."""


class NoTokenizerError(ConfigError):
    """The files or the library of a model's tokenizer are missing."""


@dataclass(frozen=True)
class LoadedModel:
    """A model with its weights on one device.

    Attributes:
        starts: layer type -> (T) int32 on the device, the mask of one document that fills the longest row.
    """

    model: Model
    starts: dict[str, Tensor]
    device: torch.device

    @property
    def start(self) -> Tensor:
        """The mask of the only layer type, or of full_attention."""
        return next(iter(self.starts.values()))


@dataclass(frozen=True, eq=False)
class TrainedModel:
    """A trained model on disk. ``open`` and ``find_all`` read its settings; only ``load`` reads weights.

    Attributes:
        path: the checkpoint or Hugging Face folder.
        config: the settings of its run, or those derived from the Hugging Face folder.
        run_state: run.json of a checkpoint; None for a Hugging Face folder.
        weights_id: changes if the weights change.
        choice: which weights ``load`` reads.
        averaged: the other checkpoints whose weights are averaged with those at ``path``.
    """

    path: Path
    config: Config
    run_state: RunState | None = None
    weights_id: str = ""
    choice: WeightChoice = OWN_WEIGHTS
    averaged: tuple[Path, ...] = ()

    @classmethod
    def open(cls, path: Path, seq_len: int | None = None, choice: WeightChoice = OWN_WEIGHTS) -> TrainedModel:
        """Returns the model in a checkpoint ``step-N``, in the newest one of a run, or in a Hugging Face folder.

        Args:
            path: the folder.
            seq_len: tokens in the longest row to read; for a Hugging Face folder, whose default is 2,048.
            choice: which weights of a checkpoint to read.

        Raises:
            ConfigError: the folder is neither, its settings are missing or not valid, or it lacks these weights.
        """
        path = path.expanduser()
        if checkpoint.is_complete(path):
            return cls._open_checkpoint(path, _run_config(path), choice)
        if not is_hf_folder(path):
            if steps := _checkpoints(path):
                return cls.open(steps[-1], choice=choice)
            known = "a complete checkpoint (step-N), a run with one, nor a Hugging Face folder"
            raise ConfigError(f"{str(path)!r} is neither {known}.{lit_gpt_hint(path)}")
        choice.require_default(path)
        overrides: dict[str, Any] = {"model.hf_assets_path": str(path)}
        if seq_len is not None:
            overrides["training.seq_len"] = seq_len
        if not hf_defaults.tokenizer_section(path):
            overrides["tokenizer.name"] = "none"
        suffixes = (".json", ".safetensors", ".bin")
        stats = {file.name: file.stat() for file in sorted(path.iterdir()) if file.suffix in suffixes}
        weights_id = json.dumps([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()])
        config = settings.load_file(None, overrides)
        _ = HFFolder(path).tensors  # missing or damaged weights are an error before any work on the data
        return cls(path, config, weights_id=weights_id)

    @classmethod
    def find_all(
        cls, path: Path, seq_len: int | None = None, choice: WeightChoice = OWN_WEIGHTS
    ) -> tuple[list[TrainedModel], list[UnreadableCheckpointError]]:
        """Returns all models at a path, oldest first, and the errors of unreadable checkpoints.

        A mean of the last checkpoints is one model, at the newest of them.

        Args:
            path: a run's folder, its folder of checkpoints, one checkpoint, or a Hugging Face folder.
            seq_len: see ``open``.
            choice: see ``open``.

        Raises:
            ConfigError: there is no model, or one lacks these weights.
        """
        path = path.expanduser()
        if is_hf_folder(path):
            return [cls.open(path, seq_len, choice)], []
        found: list[TrainedModel] = []
        errors: list[UnreadableCheckpointError] = []
        configs: dict[str, Config] = {}  # most checkpoints of a run have the same settings
        folders = [path] if checkpoint.is_complete(path) else _checkpoints(path)
        for folder in folders[-1:] if choice.average_last > 1 else folders:
            try:
                text = (folder / CONFIG_FILE).read_text(encoding="utf-8") if (folder / CONFIG_FILE).is_file() else ""
                if text not in configs:
                    configs[text] = _run_config(folder)
                found.append(cls._open_checkpoint(folder, configs[text], choice))
            except MissingWeightsError:
                raise
            except (OSError, ValueError, KeyError) as error:  # damaged, or deleted by a run in progress
                errors.append(UnreadableCheckpointError(f"{folder} cannot be read: {error}"))
        known = "a run with a complete checkpoint, a complete checkpoint (step-N) or a Hugging Face folder"
        require(bool(found or errors), f"{str(path)!r} is not {known}.{lit_gpt_hint(path)}")
        return found, errors

    @classmethod
    def _open_checkpoint(cls, path: Path, config: Config, choice: WeightChoice) -> TrainedModel:
        checkpoints = choice.find_checkpoints(path)
        weights_id = "".join((one / CHECKSUM_FILE).read_text(encoding="utf-8") for one in checkpoints) + choice.label
        if not (path / CONFIG_FILE).is_file():
            weights_id += config.to_toml()  # the sums do not cover settings outside of the checkpoint
        return cls(path, config, RunState.read(path), weights_id, choice, checkpoints[1:])

    @property
    def checkpoints(self) -> tuple[Path, ...]:
        """The checkpoints whose weights are averaged, the newest first; usually one."""
        return self.path, *self.averaged

    @property
    def step(self) -> int | None:
        """Optimizer steps taken; None for a Hugging Face folder."""
        return None if self.run_state is None else self.run_state.step

    @property
    def run_folder(self) -> Path:
        """The folder of its run, relative to the working directory; a Hugging Face folder itself."""
        if self.run_state is None:
            return self.path
        parents = self.path.resolve().parents[:2]
        return Path(os.path.relpath(next((path for path in parents if (path / CONFIG_FILE).is_file()), parents[0])))

    @property
    def max_seq_len(self) -> int:
        """Tokens in the longest row that the model was trained for."""
        hf_config = HFFolder(self.path).config if self.run_state is None else {}
        return hf_config.get("max_position_embeddings") or self.config.training.seq_len

    @property
    def tokenizer_fingerprint(self) -> str | None:
        """Fingerprint of the tokenizer that the model was trained with, None if it is unknown."""
        return None if self.run_state is None else self.run_state.fingerprints.get("data.tokenizer")

    @property
    def rope_theta(self) -> float | None:
        """RoPE base of the checkpoint's step, None for that of the model's config."""
        return None if self.run_state is None else self.run_state.rope_theta

    @property
    def window(self) -> int:
        """Tokens a query could attend to in the checkpoint's last step; at the end of the run if it is unknown."""
        return self.final_window if self.run_state is None else self.run_state.window or self.final_window

    @property
    def final_window(self) -> int:
        """Tokens a query may attend to at the end of the run, itself included."""
        if self.run_state is not None and self.run_state.final_window is not None:
            return self.run_state.final_window
        return self._final_settings.window

    @property
    def layer_windows(self) -> Mapping[str, int]:
        """As ``window``, of each further layer type."""
        known = self.run_state.layer_windows if self.run_state is not None else {}
        return known or self.final_layer_windows

    @property
    def final_layer_windows(self) -> Mapping[str, int]:
        """As ``final_window``, of each further layer type."""
        known = self.run_state.final_layer_windows if self.run_state is not None else {}
        return known or (self._final_settings.layer_windows if self.config.attention.tables else {})

    @property
    def _final_settings(self) -> StepSettings:
        training = replace(self.config.training, steps=max(self.config.training.steps, 1))
        config = replace(self.config, training=training)
        fingerprints = self.run_state.fingerprints if self.run_state is not None else {}
        rows = int(fingerprints.get("training.global_batch_size", 0))
        if not rows:  # not saved by a run, which alone has phases and a changing batch
            config, rows = replace(config, batch_size_warmup=BatchSizeWarmup()), 1
        return config.schedule(rows)(training.steps - 1)

    def build_tokenizer(self) -> data.Tokenizer | None:
        """Returns the tokenizer, None if the model has none.

        Raises:
            NoTokenizerError: its files or its library are missing.
            ConfigError: the model was trained with another tokenizer.
        """
        try:
            tokenizer = data.build_tokenizer(self.config.tokenizer, self.config.data)
        except ConfigError as error:
            raise NoTokenizerError(f"the tokenizer of {self.path}: {error}") from error
        known = self.tokenizer_fingerprint
        if tokenizer is not None and known not in (None, tokenizer.fingerprint):
            raise ConfigError(
                f"the tokenizer of {self.path} has changed: the model was trained with {known}, and its settings now "
                f"build {tokenizer.fingerprint}."
            )
        return tokenizer

    def verify(self) -> None:
        """Raises ``UnreadableCheckpointError`` if a file of a checkpoint differs from its checksum."""
        for path in self.checkpoints if self.run_state is not None else ():
            if error := checkpoint.find_corruption(path):
                raise UnreadableCheckpointError(f"{path} is damaged: {error}.")

    def load(
        self,
        attention_fn: AttentionFunction | Mapping[str, AttentionFunction],
        seq_len: int,
        dtype: torch.dtype = torch.float32,
    ) -> LoadedModel:
        """Loads the model, with the masks and the window at the end of its run.

        Args:
            attention_fn: of a kernel or a KV cache, or that of each layer type.
            seq_len: tokens in the longest row to read; may exceed the run's.
            dtype: of the weights.

        Raises:
            UnreadableCheckpointError: the checkpoint is damaged or was deleted.
        """
        config = self.config
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        with torch.device("meta"):
            model = models.build(config.model, attention_fn=attention_fn, seq_len=seq_len)
        model.to_empty(device=device)
        model.init_weights(config.debug.seed)  # also fills the buffers, which checkpoints do not have
        if self.run_state is None:
            hf_weights.load_hf_weights(model, self.path)
        else:
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # intended here
                    load_weights(model, self.checkpoints, self.choice.kind)
            except (OSError, CheckpointException) as error:
                raise UnreadableCheckpointError(f"{self.path} cannot be read: {error}") from error
        if self.rope_theta is not None:
            model.set_rope_theta(self.rope_theta)
        positions = torch.arange(seq_len, dtype=torch.int32)[None]
        starts = mask.from_types(config.layer_masks, positions, lambda name: self._window_of(name, seq_len))
        return LoadedModel(model.to(dtype), {name: start[0].to(device) for name, start in starts.items()}, device)

    def _window_of(self, layer_type: str, seq_len: int) -> int:
        """Returns the window of a layer type at the end of the run, in rows of ``seq_len`` tokens."""
        table = self.config.attention.tables.get(layer_type)
        window = self.final_layer_windows.get(layer_type, self.final_window)
        if window >= self.config.training.seq_len and (table is None or table.window is None):
            return max(seq_len, window)  # full context: longer rows are read in full as well
        return window


def _checkpoints(path: Path) -> list[Path]:
    """Returns the complete checkpoints in a folder, or in the checkpoint folder of a run, by step."""
    folder = str(path)
    if not checkpoint.complete_steps(folder) and (path / CONFIG_FILE).is_file():
        section = toml_files.read_settings(path / CONFIG_FILE)[0].get("checkpoint", {})
        folder = CheckpointConfig(folder=section.get("folder", CheckpointConfig.folder)).folder_in(path)
        if "://" in folder:
            raise ConfigError(f"the checkpoints of {path} are at {folder}: copy one to a local folder first.")
    return [Path(folder, f"step-{step}") for step in checkpoint.complete_steps(folder)]


def _run_config(path: Path) -> Config:
    """Returns the settings in a checkpoint, or else in its run's folder, with the tokenizer in the checkpoint."""
    for folder in (path, *path.resolve().parents[:2]):
        if (folder / CONFIG_FILE).is_file():
            # The settings include those of the Hugging Face folder, which may have been deleted.
            overrides = {"model.hf_assets_path": "", "checkpoint.initial_load_in_hf": False}
            if (path / TOKENIZER_FOLDER).is_dir():
                overrides["tokenizer.path"] = str(path / TOKENIZER_FOLDER)
            return settings.load_file(folder / CONFIG_FILE, overrides)
    raise ConfigError(f"no {CONFIG_FILE} in {path} or its two parents.")
