"""Notices steps that have nothing to learn from: rows whose labels are all -100."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from torchladder.data.dataloader import BaseDataLoader, TracksSources
from torchladder.registry import ConfigError

logger = logging.getLogger(__name__)


@dataclass
class LabelCheck:
    """Warns of the first step without a label; it is an error if there was none until a report.

    Attributes:
        loader: of the training data.
        report_freq: steps between reports.
        steps: of the run.
        is_rank0: whether this rank warns.
        seen: whether a step had a label, since this process started.
        warned: whether one without has been reported.
    """

    loader: BaseDataLoader
    report_freq: int
    steps: int
    is_rank0: bool
    seen: bool = False
    warned: bool = False

    def __call__(self, step: int, row: int, num_labels: int) -> None:
        """Counts a step.

        Args:
            step: from 1.
            row: first global row of the step.
            num_labels: labels of the step over all ranks.

        Raises:
            ConfigError: on every rank, if no step has had a label and this one is reported.
        """
        self.seen = self.seen or num_labels > 0
        if num_labels:
            return
        of = f" (of the source {self.loader.source_of(row)})" if isinstance(self.loader, TracksSources) else ""
        where = f"step {step}: no token of its rows, from row {row:,}{of} on, has a label"
        if not self.seen and (step % self.report_freq == 0 or step == self.steps):
            raise ConfigError(
                f"{where}, and no earlier one had: every label is -100, so there is nothing to learn. Check what masks "
                "the tokens of the data: the columns labels and attention_mask of a .parquet."
            )
        if self.is_rank0 and not self.warned:
            logger.warning("%s; further steps without labels are not reported", where)
        self.warned = True
