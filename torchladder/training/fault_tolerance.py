"""What keeps a run alive: asked to end, a save that is due or has failed, a bad step; all ranks act on them as one."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchladder.checkpoint import Checkpointer, steps
from torchladder.checkpoint.selection import Check
from torchladder.config import Config
from torchladder.data.dataloader import BaseDataLoader, Batch, SupportsSkipping
from torchladder.distributed.ranks import Ranks
from torchladder.registry import ConfigError
from torchladder.resilience.bad_steps import BadStepDetector, BadStepError, RollBack
from torchladder.resilience.interrupt import Interrupt, Interrupted

logger = logging.getLogger(__name__)


class FaultTolerance:
    """Saves, ends and goes back, on all ranks at the same step.

    Args:
        config: the settings of the run.
        ranks: this process among all.
        interrupt: what asks this process to end early.
        model: the model, whole or sharded.
        optimizer: its optimizer.
        files: small files that go along with every checkpoint, name → content.

    Raises:
        ConfigError: settings that cannot be on this device or together.
    """

    def __init__(
        self,
        config: Config,
        ranks: Ranks,
        interrupt: Interrupt,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        files: Mapping[str, bytes],
    ) -> None:
        self.ranks = ranks
        self.interrupt = interrupt
        self.steps = config.training.steps
        self.policy = config.resilience.on_bad_step
        folder = Path(config.job.dump_folder) / config.checkpoint.folder
        self.saves = Checkpointer(config.checkpoint, folder, model, optimizer, files, self.steps)
        self.guard = BadStepDetector(config.resilience, optimizer, ranks.device, ranks.first)
        self.left_out: list[tuple[int, int]] = []
        """Rows that this run has gone back from."""
        self._overdue = False
        if self.policy == "rollback" and not self.saves.saves:
            raise ConfigError("resilience.on_bad_step = 'rollback' goes back to checkpoints: set checkpoint.enable.")

    def read(self, loader: BaseDataLoader, count: int) -> list[Batch]:
        """Returns this rank's micro-batches of a step; none where waiting for them was broken off."""
        with suppress(Interrupted), self.interrupt.breaks():
            return [next(loader) for _ in range(count)]
        return []

    def exchange(self, num_labels: int, copies: int = 1) -> int:
        """Returns the labels of all ranks; the same exchange, on the CPU, tells each rank what the others want.

        Args:
            num_labels: of this rank's rows.
            copies: ranks that read the same rows.

        Raises:
            Interrupted: on every rank, when one was asked to end; the step has not begun.
            SaveError: on every rank, when too many saves have failed.
        """
        wants = self.interrupt.wanted, self.saves.settled, self.saves.overdue
        labels, stop, settled, overdue = self.ranks.sums(num_labels, *wants)
        if stop:
            self._end()
        if settled == self.ranks.size:
            self.saves.wait()  # for nothing: it is complete, or has failed
        self._overdue = overdue > 0
        return round(labels / copies)

    def stop_if_asked(self) -> None:
        """Ends the run on every rank when one was asked to, in the midst of what takes long.

        Raises:
            Interrupted: on every rank.
        """
        if self.ranks.max(int(self.interrupt.wanted)):
            self._end()

    def due(self, step: int) -> bool:
        """Whether a checkpoint is to be saved after that many steps."""
        return step > 0 and self.saves.due(step, step == self.steps, self._overdue)

    def save(self, state: dict[str, Any], must: bool = False) -> None:
        """Saves a run; ``state`` says at which step it stands. Nothing bad is ever saved.

        Args:
            state: what the run needs to go on.
            must: the process ends after this; tries until it succeeds or too many saves have failed.
        """
        self.guard.settle()
        extra = {"guard": self.guard.state(), "left_out": self.left_out}
        last = state["step"] == self.steps and not state["pending"]
        self.saves.save(state["step"], state | extra, last, must)
        self.guard.saved()

    def leave(self, state: dict[str, Any], why: str) -> None:
        """Saves where the run stands, unless that is saved."""
        if self.ranks.first:
            logger.warning("ending after step %d of %d: %s", state["step"], self.steps, why)
        self.saves.wait()
        try:
            if self.saves.due(state["step"], last=True):
                self.save(state, must=True)
        except RollBack as back:  # the newest checkpoint is where it would go on from anyway
            logger.warning("not saved: the run is to go back, %s", back)

    def resume(self, check: Check, loader: BaseDataLoader, newest: bool = False) -> dict[str, Any] | None:
        """Loads the checkpoint to continue from, and takes the loader to its row; None where the run starts anew.

        Args:
            check: raises ConfigError where a checkpoint is of another run.
            loader: of the training rows.
            newest: whatever load_step says.
        """
        saved = self.saves.load(check, newest)
        if saved is not None:
            self.guard.load(saved["guard"])
            ranges = [(first, last) for first, last in saved["left_out"]]
            self._leave_out([one for one in ranges if one not in self.left_out], loader)
            loader.seek(saved["row"])
        return saved

    def roll_back(self, bad: RollBack, check: Check, loader: BaseDataLoader) -> dict[str, Any]:
        """Returns to the newest checkpoint, and leaves the rows of the bad steps out from there on.

        Raises:
            BadStepError: there is none yet.
        """
        self.saves.wait()
        if not self.saves.team.broadcast(steps(self.saves.folder)):
            raise BadStepError(f"a bad step, {bad}, before the first checkpoint: there is nothing to go back to")
        self._leave_out(bad.rows, loader)
        saved = self.resume(check, loader, newest=True)
        assert saved is not None
        if self.ranks.first:
            logger.warning("went back to step %d, %s", saved["step"], bad)
        return saved

    def close(self) -> None:
        """Lets what is being written come to its end."""
        self.saves.close()

    def _leave_out(self, rows: list[tuple[int, int]], loader: BaseDataLoader) -> None:
        if rows and not isinstance(loader, SupportsSkipping):
            raise ConfigError("resilience.on_bad_step = 'rollback' needs a data loader that can leave rows out.")
        if rows and isinstance(loader, SupportsSkipping):
            loader.add_skip_rows(rows)
            self.left_out += rows

    def _end(self) -> None:
        raise Interrupted(self.interrupt.reason or "another rank was asked to end")
