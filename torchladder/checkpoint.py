"""Checkpoints: model and optimizer by DCP, beside them what the run needs to go on, as readable JSON.

A checkpoint is the folder ``step-N``. It is written as ``step-N.partial`` and renamed when every rank's files are on
disk, so a folder with the final name is complete.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_model_state_dict, set_state_dict

from torchladder.registry import ConfigError, unknown

logger = logging.getLogger(__name__)

RUN = "run.json"
"""The file of a checkpoint that says where the run is: step, next row, fingerprints."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Saving and loading the state of a run."""

    enable: bool = False
    """Save checkpoints, and continue from the newest one that is complete."""

    folder: str = "checkpoint"
    """Folder of the checkpoints, inside job.dump_folder."""

    interval: int = 500
    """Steps between checkpoints."""

    enable_first_step_checkpoint: bool = False
    """Save after the first step as well, to see early that saving works."""

    keep_latest_k: int = 10
    """How many checkpoints are kept, the newest; 0 keeps all."""

    async_mode: Literal["disabled", "async"] = "disabled"
    """async copies the state aside and writes it while training goes on."""

    load_step: int = -1
    """The step to continue from; -1: the newest."""

    initial_load_path: str = ""
    """A checkpoint folder (step-N) to start from while this run has none of its own."""

    initial_load_model_only: bool = True
    """Take only the weights from initial_load_path, not optimizer, step and rows."""

    initial_load_in_hf: bool = False
    """Start from a Hugging Face folder: initial_load_path where it is set, model.hf_assets_path otherwise."""

    exclude_from_loading: list[str] = field(default_factory=list)
    """What not to take from a checkpoint: optimizer."""

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

    def __post_init__(self) -> None:
        if self.interval < 1:
            raise ConfigError(f"checkpoint.interval = {self.interval}: must be 1 or more.")
        if self.create_seed_checkpoint and (not self.enable or self.load_only):
            raise ConfigError("checkpoint.create_seed_checkpoint needs checkpoint.enable, and not load_only.")
        for key in ("initial_load_in_hf", "last_save_in_hf"):
            if getattr(self, key) and (not self.enable or (key == "last_save_in_hf" and self.load_only)):
                raise ConfigError(f"checkpoint.{key} needs checkpoint.enable, and last_save_in_hf not load_only.")
        if self.keep_latest_k < 0 or self.keep_latest_k == 1:
            raise ConfigError(
                f"checkpoint.keep_latest_k = {self.keep_latest_k}: must be 0 (all) or 2 and more; "
                "the one before is deleted only when its successor is complete."
            )
        for name in self.exclude_from_loading:
            if name != "optimizer":
                raise unknown("entry of checkpoint.exclude_from_loading", name, ["optimizer"])


class Checkpointer:
    """Saves and loads a model and its optimizer, with a small JSON of what else the run needs.

    Args:
        config: the section [checkpoint].
        folder: where checkpoints are.
        model: the model, whole or sharded.
        optimizer: its optimizer.
    """

    def __init__(
        self, config: CheckpointConfig, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> None:
        self.config = config
        self.folder = folder
        self.model = model
        self.optimizer = optimizer
        self._writing: tuple[Future[Any], Path] | None = None

    def due(self, step: int, last: bool) -> bool:
        """Whether a checkpoint is to be saved after that many steps."""
        config = self.config
        if not config.enable or config.load_only:
            return False
        return last or step % config.interval == 0 or (step == 1 and config.enable_first_step_checkpoint)

    def save(self, step: int, run: dict[str, Any], last: bool = False) -> None:
        """Saves the state after ``step`` steps; ``run`` goes into ``run.json``."""
        self.wait()
        partial = self.folder / f"step-{step}.partial"
        if _rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            (partial / RUN).write_text(json.dumps(run, indent=2) + "\n")
        dist.barrier()
        exports = last and self.config.last_save_model_only
        state = self._state(model_only=exports or step == 0)  # before the first step an optimizer has no state
        if exports:
            dtype = getattr(torch, self.config.export_dtype)
            state["model"] = {name: weight.to(dtype) for name, weight in state["model"].items()}
        if self.config.async_mode == "async" and not last:
            future = dcp.async_save(state, checkpoint_id=partial)
            assert isinstance(future, Future)
            self._writing = future, partial
        else:
            dcp.save(state, checkpoint_id=partial)
            self._finish(partial)

    def wait(self) -> None:
        """Waits until a checkpoint that is being written is complete."""
        if self._writing is not None:
            future, partial = self._writing
            future.result()
            self._writing = None
            self._finish(partial)

    def poll(self) -> None:
        """Completes a checkpoint that has been written meanwhile; never waits."""
        if self._writing is not None and self._writing[0].done():
            self.wait()

    def load(self, check: Callable[[dict[str, Any]], None]) -> dict[str, Any] | None:
        """Loads the checkpoint to continue from and returns its ``run.json``; None where the run starts anew.

        Args:
            check: raises ConfigError where the ``run.json`` is of another run; asked before anything is loaded.

        Raises:
            ConfigError: the checkpoint that the settings name is not there, not complete or of another run.
        """
        config = self.config
        if not config.enable:
            return None
        found = steps(self.folder)
        if config.load_step != -1 and config.load_step not in found:
            known = ", ".join(map(str, found)) or "none"
            raise ConfigError(f"checkpoint.load_step = {config.load_step}: {self.folder} has the steps {known}.")
        if found:
            step = config.load_step if config.load_step != -1 else found[-1]
            path = self.folder / f"step-{step}"
            check(json.loads((path / RUN).read_text()))
            return self._load(path, model_only=False)
        if config.initial_load_path and not config.initial_load_in_hf:  # the trainer knows Hugging Face's form
            path = Path(config.initial_load_path)
            if not complete(path):
                raise ConfigError(f"checkpoint.initial_load_path = {str(path)!r}: no complete checkpoint is there.")
            if config.initial_load_model_only:
                self._load(path, model_only=True)
                return None
            check(json.loads((path / RUN).read_text()))
            return self._load(path, model_only=False)
        return None

    def _load(self, path: Path, model_only: bool) -> dict[str, Any]:
        run = json.loads((path / RUN).read_text())
        metadata = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
        has_optimizer = any(key.startswith("optimizer") for key in metadata)
        model_only = model_only or run["step"] == 0 or "optimizer" in self.config.exclude_from_loading
        if not model_only and not has_optimizer:
            raise ConfigError(
                f"{path} holds only weights, so the run cannot continue from it. Start a new one from it with "
                "checkpoint.initial_load_path, or set checkpoint.exclude_from_loading = ['optimizer']."
            )
        state = self._state(model_only)
        dcp.load(state, checkpoint_id=path)
        if model_only:
            set_model_state_dict(self.model, state["model"])
        else:
            settings = [{key: group[key] for key in group if key != "params"} for group in self.optimizer.param_groups]
            set_state_dict(
                self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
            )
            for group, own in zip(self.optimizer.param_groups, settings, strict=True):
                group.update(own)  # the run's settings, not those of the run that saved
        logger.info("loaded %s%s", path, " (weights only)" if model_only else "")
        return run

    def _state(self, model_only: bool) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, () if model_only else self.optimizer)
        return {"model": model} if model_only else {"model": model, "optimizer": optimizer}

    def _finish(self, partial: Path) -> None:
        """Gives a checkpoint its name; on rank 0, whose part of DCP ends when every rank's files are written."""
        if _rank() != 0:
            return
        final, old = partial.with_suffix(""), partial.with_suffix(".old")
        for file in partial.iterdir():
            _sync(file)
        if final.exists():  # of a run that went on from an earlier step
            final.rename(old)
        partial.rename(final)
        _sync(self.folder)
        shutil.rmtree(old, ignore_errors=True)
        logger.info("saved %s", final)
        keep = self.config.keep_latest_k
        for step in steps(self.folder)[:-keep] if keep else []:
            shutil.rmtree(self.folder / f"step-{step}")


def complete(path: Path) -> bool:
    """Whether a folder is a complete checkpoint: DCP writes ``.metadata`` last."""
    return (path / ".metadata").is_file() and (path / RUN).is_file()


def steps(folder: Path) -> list[int]:
    """Returns the steps of the complete checkpoints in a folder, in order."""
    named = [(path, re.fullmatch(r"step-(\d+)", path.name)) for path in folder.glob("step-*")]
    return sorted(int(match[1]) for path, match in named if match and complete(path))


def check(saved: dict[str, str], now: dict[str, str], accepted: list[str]) -> None:
    """Compares the fingerprints of a checkpoint with the run's.

    Raises:
        ConfigError: one differs that is not accepted, or an accepted name is none of them.
    """
    for name in accepted:
        if name not in now:
            raise unknown("entry of checkpoint.accept_changes", name, now)
    for name, value in now.items():
        if saved.get(name) != value and name not in accepted:
            raise ConfigError(
                f"{name} is not what it was when the checkpoint was saved ({saved.get(name)} then, {value} now). "
                f"To continue all the same: --checkpoint.accept_changes {name}"
            )


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
