"""Coordinates interruption, saving and rollback across ranks."""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import replace

from torchladder.checkpoint import Checkpointer, RunState, complete_steps
from torchladder.data.dataloader import BaseDataLoader, Batch, SupportsSkipping, TracksSources
from torchladder.distributed.ranks import Ranks
from torchladder.registry import ConfigError
from torchladder.resilience.bad_steps import BadStepDetector, BadStepError, Rollback, format_rows
from torchladder.resilience.interrupt import Interrupt, Interrupted
from torchladder.training.changed_settings import check_changes
from torchladder.training.run_plan import Plan, fingerprints

logger = logging.getLogger(__name__)


class InvalidRowError(ConfigError):
    """The rows of the next step are invalid on some rank; every rank raises it, at the same step."""


class FaultTolerance:
    """Saves, ends and rolls back on all ranks at the same step.

    Attributes:
        skipped_rows: ranges of rows, first to last, that rollbacks have removed from the run.

    Raises:
        ConfigError: rollbacks without checkpoints.
    """

    def __init__(
        self, plan: Plan, ranks: Ranks, interrupt: Interrupt, checkpointer: Checkpointer, bad_steps: BadStepDetector
    ) -> None:
        self.plan = plan
        self.ranks = ranks
        self.interrupt = interrupt
        self.checkpointer = checkpointer
        self.bad_steps = bad_steps
        self.total_steps = plan.steps
        self.skipped_rows: list[tuple[int, int]] = []
        self._overdue = False
        self._read_error: ConfigError | None = None
        if plan.config.resilience.on_bad_step == "rollback" and not checkpointer.can_save:
            raise ConfigError("resilience.on_bad_step = 'rollback' returns to checkpoints: set checkpoint.enable.")

    def read(self, loader: BaseDataLoader, count: int) -> list[Batch]:
        """Returns this rank's micro-batches of a step; none if waiting for them was interrupted or a row is invalid."""
        try:
            with suppress(Interrupted), self.interrupt.interruptible():
                return [next(loader) for _ in range(count)]
        except ConfigError as error:
            self._read_error = error  # every rank learns of it in sync_ranks, and all of them save
        return []

    def sync_ranks(
        self, num_labels: int, pairs: int, label_weight: float = 0.0, model_parallel: int = 1
    ) -> tuple[int, int, float]:
        """Sums counts over all ranks and, in the same all-reduce on the CPU, lets each rank request an end or a save.

        Args:
            num_labels: of this rank's rows in the step.
            pairs: attended (query, key) pairs of these rows.
            label_weight: of all these labels, if they are weighted.
            model_parallel: ranks that read the same rows.

        Returns:
            Labels, pairs and label weight of the whole step.

        Raises:
            Interrupted: on every rank, if one should end; the step has not begun.
            InvalidRowError: on every rank, if the rows of one are invalid; the step has not begun.
            SaveError: on every rank, if too many saves have failed.
        """
        requests = self.interrupt.requested, self.checkpointer.idle, self.checkpointer.overdue
        labels, all_pairs, weight, invalid, stop, settled, overdue = self.ranks.sums(
            num_labels, pairs, label_weight, self._read_error is not None, *requests
        )
        if invalid:
            raise InvalidRowError(str(self._read_error or "the rows of another rank are invalid; it has printed why."))
        if stop:
            raise Interrupted(self._reason)
        if settled == self.ranks.world_size:
            self.checkpointer.wait()  # returns at once: the save in flight has completed or failed on every rank
        self._overdue = overdue > 0
        return round(labels / model_parallel), round(all_pairs / model_parallel), weight / model_parallel

    def stop_if_requested(self) -> None:
        """Raises ``Interrupted`` on every rank if one of them should end; for work longer than a step."""
        if self.ranks.max(int(self.interrupt.requested)):
            raise Interrupted(self._reason)

    def save_due(self, step: int) -> bool:
        """Returns whether to save a checkpoint after ``step`` steps."""
        return step > 0 and self.checkpointer.due(step, step == self.total_steps, self._overdue)

    def save(self, state: RunState, blocking: bool = False) -> None:
        """Saves a checkpoint, unless a step since the last one was bad.

        Args:
            blocking: the process ends afterwards: retry until it succeeds or too many saves have failed.

        Raises:
            BadStepError, Rollback: a step was bad.
            SaveError: too many saves have failed.
        """
        self.bad_steps.flush()
        self.checkpointer.save(state, state.step == self.total_steps and not state.post_step_pending, blocking)
        self.bad_steps.saved()

    def save_and_exit(self, state: RunState, reason: str) -> None:
        """Saves a checkpoint before the process ends, unless there is one of this step."""
        if self.ranks.is_rank0:
            logger.warning("ending after step %d of %d: %s", state.step, self.total_steps, reason)
        self.checkpointer.wait()
        try:
            if self.checkpointer.due(state.step, last=True):
                self.save(state, blocking=True)
        except Rollback as rollback:  # the next start continues from the newest checkpoint anyway
            logger.warning("not saved: the run has to roll back, %s", rollback)

    def resume(self, loader: BaseDataLoader, newest: bool = False) -> RunState | None:
        """Loads the checkpoint to resume from and moves the loader to its row; None if the run starts from scratch.

        Args:
            newest: ignore checkpoint.load_step.

        Raises:
            ConfigError: the checkpoint is of another run.
        """

        changes: list[str] = []

        def check(state: RunState, path: str) -> None:
            data_problem = ""
            try:
                self._resume_row(state, loader)
            except ConfigError as error:
                data_problem = str(error)
            changes[:] = check_changes(self.plan, fingerprints(self.plan, loader), state, path, data_problem)

        state = self.checkpointer.load(check, newest)
        if state is None:
            self._resume_row(RunState(step=0, row=0), loader)
            return None
        for change in changes if self.ranks.is_rank0 else ():
            logger.info("changed: %s", change)
        self.bad_steps.load_state_dict(state.bad_steps)
        row = self._resume_row(state, loader)
        if row == state.row:  # otherwise they are rows of the data before this
            self._skip([rows for rows in state.skipped_rows if rows not in self.skipped_rows], loader)
        if self.plan.schedule.batch.varies:
            loader.seek(row, state.step)
        else:
            loader.seek(row)
        return replace(state, row=row)

    def roll_back(self, rollback: Rollback, loader: BaseDataLoader) -> RunState:
        """Loads the newest checkpoint; the loader then skips the rows of the bad steps.

        Raises:
            BadStepError: there is no checkpoint yet.
        """
        self.checkpointer.wait()
        if not self.checkpointer.group.broadcast(complete_steps(self.checkpointer.folder)):
            raise BadStepError(
                f"a step was bad (rows {format_rows(rollback.rows)}) and there is no checkpoint yet to roll back to: "
                "lower checkpoint.interval, or set checkpoint.enable_first_step_checkpoint"
            )
        self._skip(rollback.rows, loader)
        state = self.resume(loader, newest=True)
        assert state is not None
        if self.ranks.is_rank0:
            logger.warning("rolled back to step %d, %s", state.step, rollback)
        return state

    def _resume_row(self, state: RunState, loader: BaseDataLoader) -> int:
        """Returns the row to continue at; raises ConfigError if sources would not continue where they were."""
        excluded = set(self.plan.config.checkpoint.exclude_from_loading) - set(state.excluded)
        step = 0 if "train_state" in excluded else state.step
        row = 0 if "dataloader" in excluded else state.row
        if not isinstance(loader, TracksSources):
            return row
        saved = {name.removeprefix("data."): value for name, value in state.fingerprints.items() if "data." in name}
        return loader.resume_row(step, row, saved, moved=bool(excluded & {"train_state", "dataloader"}))

    def _skip(self, rows: list[tuple[int, int]], loader: BaseDataLoader) -> None:
        if not rows:
            return
        if not isinstance(loader, SupportsSkipping):
            raise ConfigError("resilience.on_bad_step = 'rollback' needs a data loader that can skip rows.")
        loader.add_skip_rows(rows)
        self.skipped_rows += rows

    @property
    def _reason(self) -> str:
        return self.interrupt.reason or "another rank was interrupted"
