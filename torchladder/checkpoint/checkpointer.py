"""When to save, what to do when that fails, and how a run begins: all that the trainer knows of checkpoints."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from torchladder.checkpoint import selection, state, step_folders
from torchladder.checkpoint.checkpoint_config import CheckpointConfig
from torchladder.checkpoint.group import CheckpointGroup, SaveError
from torchladder.checkpoint.run_state import RUN_STATE_FILE, RunState
from torchladder.checkpoint.saver import PendingSave, Saver
from torchladder.checkpoint.selection import Check
from torchladder.registry import ConfigError

logger = logging.getLogger(__name__)


class Checkpointer:
    """Saves and loads a model and its optimizer, with a small JSON of what else the run needs.

    Args:
        config: the section [checkpoint].
        folder: where checkpoints are.
        model: the model, whole or sharded.
        optimizer: its optimizer.
        files: small files of the run, name → content, kept in every checkpoint.
        steps: optimizer steps of the whole run; a finished one loads nothing.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        folder: Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        files: Mapping[str, bytes] | None = None,
        steps: int | None = None,
    ) -> None:
        self.config = config
        self.folder = folder
        self.model = model
        self.optimizer = optimizer
        self.files = files or {}
        self.steps = steps
        self.group = CheckpointGroup()
        self.saver = Saver(config, self.group, next(model.parameters()).device)
        self.saved = -1
        """The step of the last checkpoint that was begun or loaded."""
        self.failures = 0
        """Saves that have failed since the last one that did not."""
        self._since = time.monotonic()

    @property
    def saves(self) -> bool:
        """Whether this run saves at all."""
        return self.config.enable and not self.config.load_only

    @property
    def settled(self) -> bool:
        """Whether this rank has nothing left to write; when every rank says so, ``wait`` waits for nothing."""
        return self.saver.settled

    @property
    def overdue(self) -> bool:
        """Whether this rank's clock asks for a checkpoint: by interval_minutes, or to try again after a failure."""
        minutes = self.config.retry_minutes if self.failures else self.config.interval_minutes
        waits = self.failures > 0 or minutes > 0
        return self.saves and waits and self.saver.settled and time.monotonic() - self._since >= 60 * minutes

    def due(self, step: int, last: bool, asked: bool = False) -> bool:
        """Whether a checkpoint is to be saved after that many steps; ``asked``: a rank was ``overdue``."""
        config = self.config
        if not self.saves or step == self.saved:
            return False
        return last or asked or step % config.interval == 0 or (step == 1 and config.enable_first_step_checkpoint)

    def save(self, run: RunState, last: bool = False, must: bool = False) -> None:
        """Saves model, optimizer and the state of the run.

        Args:
            run: where the run stands.
            last: the run is over; last_save_model_only holds, and it must succeed.
            must: it must succeed, and be complete when this returns.

        Raises:
            SaveError: max_failures saves in a row have failed.
        """
        self.wait()
        step, run = run.step, replace(run, excluded=self.config.exclude_from_loading)
        files = {RUN_STATE_FILE: run.to_json().encode(), **self.files}
        job = PendingSave(step_folders.path_of(self.folder, step), step, files)
        self.saved, self._since = step, time.monotonic()
        if self.config.async_mode != "disabled" and not (last or must):
            self.saver.start(job, self._state(step, last))
            return
        while not self._settle(lambda: self.saver.write(job, self._state(step, last)), step) and (last or must):
            time.sleep(60 * self.config.retry_minutes)

    def wait_for_copy(self) -> None:
        """Waits until the weights may change again: a save has copied them."""
        self.saver.wait_for_copy()

    def wait(self) -> None:
        """Waits until a checkpoint that is being written is complete, or has failed.

        Raises:
            SaveError: max_failures saves in a row have failed.
        """
        if self.saver.busy:
            self._settle(self.saver.result, self.saved)

    def close(self) -> None:
        """Lets what is being written come to its end, whatever that is; ``wait`` tells more."""
        self.saver.close()

    def load(self, check: Check, newest: bool = False) -> RunState | None:
        """Loads the checkpoint to continue from and returns its run state; None if the run starts from scratch.

        Args:
            check: raises ConfigError where the ``run.json`` is of another run; asked before anything is loaded.
            newest: whatever load_step says.

        Raises:
            ConfigError: the checkpoint that the settings name is not there, not intact or of another run.
        """
        config = self.config
        if not config.enable:
            return None
        load_step = -1 if newest or selection.restarted() else config.load_step
        if load_step == -1 and not newest and self._finished():
            run = RunState.read(step_folders.path_of(self.folder, step_folders.steps(self.folder)[-1]))
            check(run)  # another run is told so, even when there is nothing to do
            return run
        path = selection.newest_intact(self.folder, load_step, check, self.group)
        if path is not None:
            run = self._restore(path, model_only=False)
            if run.step != RunState.read(path).step:
                raise ConfigError(
                    "checkpoint.exclude_from_loading = ['train_state'] begins at step 0, and this run's own folder "
                    f"{self.folder} has later ones: start in another folder, with checkpoint.initial_load_path."
                )
            self.saved = -1 if run.post_step_pending else run.step
            return run
        if not config.initial_load_path or config.initial_load_in_hf:  # the trainer knows Hugging Face's form
            return None
        path, model_only = Path(config.initial_load_path), config.initial_load_model_only
        wrong = selection.find_error(path, (lambda run: None) if model_only else check, self.group)
        if wrong is not None:
            raise ConfigError(
                f"checkpoint.initial_load_path = {str(path)!r}: no intact checkpoint is there. What is wrong: {wrong}."
            )
        run = self._restore(path, model_only)
        return None if model_only else run

    def _finished(self) -> bool:
        return self.steps is not None and self.group.broadcast(step_folders.finished(self.folder, self.steps))

    def _restore(self, path: Path, model_only: bool) -> RunState:
        """Loads what is not excluded; a checkpoint that was saved under the same exclusions is this run's own."""
        run = RunState.read(path)
        excluded = set(self.config.exclude_from_loading) - set(run.excluded)
        weights_only = model_only or run.step == 0 or "optimizer" in excluded
        state.restore(path, self.model, None if weights_only else self.optimizer, self.group)
        if self.group.rank == 0:
            logger.info("loaded %s%s", path, " (weights only)" if weights_only else "")
        if "train_state" in excluded:
            run = replace(run, step=0)
        if "dataloader" in excluded:
            run = replace(run, row=0)
        return run

    def _state(self, step: int, last: bool) -> state.State:
        exports = last and self.config.last_save_model_only
        dtype = getattr(torch, self.config.export_dtype) if exports else None
        # Before the first step an optimizer has no state.
        return state.collect(self.model, None if exports or step == 0 else self.optimizer, dtype)

    def _settle(self, finish: Callable[[], None], step: int) -> bool:
        """Sees how a save ended; returns whether it succeeded."""
        try:
            finish()
        except SaveError as error:
            self.failures += 1
            self.saved, self._since = -1, time.monotonic()
            most = self.config.max_failures
            if self.failures >= most:
                raise SaveError(f"{self.failures} saves in a row failed (checkpoint.max_failures): {error}") from error
            if self.group.rank == 0:
                logger.warning(
                    "checkpoint: step %d is not saved (failure %d of %d): %s", step, self.failures, most, error
                )
            return False
        self.failures = 0
        return True
