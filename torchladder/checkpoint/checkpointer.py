"""The checkpointer of a run: when to save, what to do when a save fails, and what to load."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace

import torch
from torch import Tensor, nn

from torchladder.checkpoint import model_state, step_folders
from torchladder.checkpoint.checkpoint_config import CheckpointConfig
from torchladder.checkpoint.group import CheckpointGroup, SaveError
from torchladder.checkpoint.run_state import RUN_STATE_FILE, RunState
from torchladder.checkpoint.staging import ReusingStager
from torchladder.checkpoint.step_folders import RunStateCheck
from torchladder.checkpoint.storage import get_storage
from torchladder.registry import ConfigError, require

logger = logging.getLogger(__name__)


class Checkpointer:
    """Saves and loads a model, its optimizer and the state of the run, on all ranks together.

    Args:
        config: the section [checkpoint].
        folder: local path or URL of the checkpoints, ``config.folder_in(dump_folder)``.
        model: the model, sharded or not.
        optimizer: its optimizer.
        assets: small files to keep in every checkpoint, name -> content.
        total_steps: optimizer steps of the whole run; the tensors of a finished run are not loaded.
        ema: parameter name -> average of the weights, saved and loaded with the model; None for no averages.

    Attributes:
        consecutive_failures: failed saves since the last successful one.

    Raises:
        ConfigError: nothing can be stored at the URL, or the device does not support ``async_mode``.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        folder: str,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        assets: Mapping[str, bytes] | None = None,
        total_steps: int | None = None,
        ema: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.config = config
        self.folder = folder
        self.model = model
        self.optimizer = optimizer
        self.assets = assets or {}
        self.total_steps = total_steps
        self.ema = ema
        self.group = CheckpointGroup()
        self.consecutive_failures = 0
        if config.enable:
            get_storage(folder)  # fails here rather than at the first save
        self._last_step = -1  # of the last checkpoint that was started or loaded
        self._last_attempt = time.monotonic()
        self._stager: ReusingStager | None = None
        if config.async_mode != "disabled":
            self._stager = ReusingStager(config.async_mode, next(model.parameters()).device)
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._copy: Future[model_state.StateDict] | None = None
        self._save: Future[None] | None = None

    @property
    def can_save(self) -> bool:
        """Whether this run saves checkpoints."""
        return self.config.enable and not self.config.load_only

    @property
    def idle(self) -> bool:
        """Whether no save is running on this rank; ``wait`` returns at once if all ranks are idle."""
        return self._save is None or self._save.done()

    @property
    def overdue(self) -> bool:
        """Whether this rank's clock requires a save: ``interval_minutes`` have passed, or a failed save is retried."""
        minutes = self.config.retry_minutes if self.consecutive_failures else self.config.interval_minutes
        timed = self.consecutive_failures > 0 or minutes > 0
        return self.can_save and timed and self.idle and time.monotonic() - self._last_attempt >= 60 * minutes

    def due(self, step: int, last: bool, overdue: bool = False) -> bool:
        """Whether to save a checkpoint of ``step``.

        Args:
            step: optimizer steps taken.
            last: no step follows.
            overdue: whether any rank is ``overdue``.
        """
        config = self.config
        if not self.can_save or step == self._last_step:
            return False
        return last or overdue or step % config.interval == 0 or (step == 1 and config.enable_first_step_checkpoint)

    def save(self, run_state: RunState, last: bool = False, blocking: bool = False) -> None:
        """Saves model, optimizer and run state; a failed save is logged and retried later.

        Args:
            run_state: the state of the run at this step.
            last: the run has finished: ``last_save_model_only`` applies. Implies ``blocking``.
            blocking: return only when the checkpoint is complete, and retry until it is.

        Raises:
            SaveError: ``max_failures`` saves in a row have failed.
        """
        self.wait()
        step, blocking = run_state.step, blocking or last
        run_state = replace(run_state, excluded=self.config.exclude_from_loading)
        files = {RUN_STATE_FILE: run_state.to_json().encode(), **self.assets}

        def write(state: model_state.StateDict) -> None:
            path = f"{self.folder}/step-{step}"
            step_folders.write_checkpoint(path, state, files, self.group)
            if self.group.rank == 0:
                logger.info("saved %s", path)
                step_folders.prune(self.folder, step, self.config.keep_latest_k, self.config.keep_every)

        self._last_step, self._last_attempt = step, time.monotonic()
        if self._stager is not None and not blocking:
            copy = self._stager.stage(self._collect(step, last))
            if isinstance(copy, Future):  # a copy from pinned memory, still running
                self._copy, self._save = copy, self._executor.submit(lambda: write(copy.result()))
            else:
                self._save = self._executor.submit(write, copy)
            return
        while not self._succeeds(lambda: write(self._collect(step, last)), step) and blocking:
            time.sleep(60 * self.config.retry_minutes)

    def wait_for_staging(self) -> None:
        """Waits until the running save has copied the weights, which may change from then on."""
        if self._copy is not None:
            self._copy.result()
            self._copy = None

    def wait(self) -> None:
        """Waits until the running save has completed or failed.

        Raises:
            SaveError: ``max_failures`` saves in a row have failed.
        """
        if self._save is not None:
            save, self._save = self._save, None
            self.wait_for_staging()
            self._succeeds(save.result, self._last_step)

    def close(self) -> None:
        """Waits for the running save and ignores its result."""
        if self._save is not None:
            wait([self._save])

    def load(self, check: RunStateCheck, newest: bool = False) -> RunState | None:
        """Loads the checkpoint to continue from and returns its run state; None if the run starts from scratch.

        Args:
            check: raises ConfigError if the checkpoint is of another run; called before anything is loaded.
            newest: load the newest checkpoint even if ``load_step`` is set.

        Raises:
            ConfigError: the requested checkpoint does not exist, is damaged or is of another run.
        """
        config = self.config
        if not config.enable:
            require(
                not config.initial_load_path,
                "checkpoint.initial_load_path needs checkpoint.enable; checkpoint.load_only loads and never saves.",
            )
            return None
        load_step = -1 if newest or step_folders.is_restart() else config.load_step
        if load_step == -1 and not newest and (finished := self._finished_run()):
            check(finished, f"{self.folder}/step-{finished.step}")
            return finished
        path = step_folders.find_newest_intact(self.folder, load_step, check, self.group)
        if path is not None:
            state = self._restore(path)
            if state.step != RunState.read(path).step:
                raise ConfigError(
                    "checkpoint.exclude_from_loading = ['train_state'] restarts at step 0, but this run's own folder "
                    f"{self.folder} has later checkpoints: use another folder, with checkpoint.initial_load_path."
                )
            self._last_step = -1 if state.post_step_pending else state.step
            return state
        if config.initial_load_in_hf:  # the trainer loads Hugging Face folders
            return None
        if not config.initial_load_path:
            require(
                config.initial_load_model_only,
                "checkpoint.initial_load_model_only = false: set checkpoint.initial_load_path to the step-N of a run.",
            )
            return None
        path, model_only = config.initial_load_path.rstrip("/"), config.initial_load_model_only

        def check_branch(state: RunState, path: str) -> None:
            step = 0 if "train_state" in config.exclude_from_loading else state.step
            require(
                self.total_steps is None or step < self.total_steps,
                f"checkpoint.initial_load_path = {path!r} has taken {step:,} steps, so none of training.steps = "
                f"{self.total_steps} is left: set more steps, counted from the start of that run.",
            )
            check(state, path)

        error = step_folders.find_load_error(path, None if model_only else check_branch, self.group)
        if error is not None:
            raise ConfigError(f"checkpoint.initial_load_path = {path!r} is not an intact checkpoint: {error}.")
        if model_only:
            self._load_tensors(path, weights_only=True, ema=None)
            return None
        return self._restore(path)

    def _finished_run(self) -> RunState | None:
        """Returns the newest run state if it is that of the last step and nothing is left to do after it."""
        steps = self.group.broadcast(step_folders.complete_steps(self.folder))
        if self.total_steps is None or not steps or steps[-1] < self.total_steps:
            return None
        try:
            state = RunState.read(f"{self.folder}/step-{steps[-1]}")
        except (OSError, ConfigError):  # damaged: another one is loaded
            state = None
        state = self.group.broadcast(state)
        return None if state is None or state.post_step_pending else state

    def _restore(self, path: str) -> RunState:
        """Loads what is not excluded; everything if the checkpoint was saved under the same exclusions."""
        state = RunState.read(path)
        excluded = set(self.config.exclude_from_loading) - set(state.excluded)
        has_ema = self._load_tensors(path, weights_only=state.step == 0 or "optimizer" in excluded, ema=self.ema)
        if self.ema and not has_ema and self.group.rank == 0:
            logger.warning("%s holds no averaged weights: the average starts as its weights", path)
        if has_ema and not self.ema and self.group.rank == 0:
            logger.warning("the averaged weights in %s end here: ema.enable continues them", path)
        if "train_state" in excluded:
            state = replace(state, step=0, totals={})
        if "dataloader" in excluded:
            state = replace(state, row=0)
        return state

    def _load_tensors(self, path: str, weights_only: bool, ema: Mapping[str, Tensor] | None) -> bool:
        has_ema = model_state.load_state(path, self.model, None if weights_only else self.optimizer, self.group, ema)
        if self.group.rank == 0:
            logger.info("loaded %s%s", path, " (weights only)" if weights_only else "")
        return has_ema

    def _collect(self, step: int, last: bool) -> model_state.StateDict:
        weights_only = last and self.config.last_save_model_only
        dtype = getattr(torch, self.config.export_dtype) if weights_only else None
        # Before the first step an optimizer has no state.
        optimizer = None if weights_only or step == 0 else self.optimizer
        return model_state.collect_state(self.model, optimizer, dtype, self.ema)

    def _succeeds(self, save: Callable[[], None], step: int) -> bool:
        """Returns whether a save succeeds, and counts its failure."""
        try:
            save()
        except SaveError as error:
            self.consecutive_failures += 1
            self._last_step, self._last_attempt = -1, time.monotonic()
            failures, allowed = self.consecutive_failures, self.config.max_failures
            if failures >= allowed:
                raise SaveError(f"{failures} saves in a row failed (checkpoint.max_failures): {error}") from error
            if self.group.rank == 0:
                message = "checkpoint: step %d is not saved (failure %d of %d): %s"
                logger.warning(message, step, failures, allowed, error)
            return False
        self.consecutive_failures = 0
        return True
