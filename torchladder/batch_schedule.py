"""The rows of every optimizer step: a global batch size that may change during a run, as a pure function of the step.

A ``BatchSchedule`` is piecewise constant. Where a step begins in the data is the sum of the sizes before it: trainer,
data loader and plan ask the same object, and a resumed run needs only the step. ``BatchSizeWarmup`` describes a ramp;
``[[phases]]`` change the size at any step.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, pairwise
from typing import Annotated

from annotated_types import Ge

from torchladder.registry import check_bounds, require

MAX_SHOWN_STAGES = 8
"""Sizes in the description of a schedule."""


class BatchSchedule:
    """Maps an optimizer step, counted from 0, to its rows over all ranks.

    Args:
        stages: (first step, rows of a step) of each stretch of steps of equal size; the first one begins at step 0.
        seq_len: tokens in a row.

    Attributes:
        stages: those whose size differs from the one before.
    """

    def __init__(self, stages: Iterable[tuple[int, int]], seq_len: int = 1) -> None:
        self.stages: list[tuple[int, int]] = []
        for step, rows in stages:
            if self.stages and self.stages[-1][0] == step:
                self.stages.pop()  # it has no step
            if not self.stages or self.stages[-1][1] != rows:
                self.stages.append((step, rows))
        self.seq_len = seq_len
        self._steps = [step for step, _ in self.stages]
        lengths = ((until - step) * rows for (step, rows), (until, _) in pairwise(self.stages))
        self._rows = list(accumulate(lengths, initial=0))  # before each stage

    @classmethod
    def constant(cls, rows: int, seq_len: int = 1) -> BatchSchedule:
        """Returns the schedule of a run whose steps all have ``rows`` rows."""
        return cls([(0, rows)], seq_len)

    @property
    def varies(self) -> bool:
        """Whether two steps have different sizes."""
        return len(self.stages) > 1

    @property
    def sizes(self) -> list[int]:
        """The different sizes, in ascending order."""
        return sorted({rows for _, rows in self.stages})

    def __str__(self) -> str:
        sizes = [f"{rows:,} from step {step:,}" for step, rows in self.stages]
        if len(sizes) > MAX_SHOWN_STAGES:
            sizes[MAX_SHOWN_STAGES - 2 : -1] = ["…"]
        return f"rows: {', '.join(sizes)}"

    def __call__(self, step: int) -> int:
        """Returns the rows of a step."""
        return self.stages[self._stage(self._steps, step)][1]

    def rows_before(self, step: int) -> int:
        """Returns the rows of all steps before ``step``; negative before step 0, at the first size."""
        stage = self._stage(self._steps, step)
        first, rows = self.stages[stage]
        return self._rows[stage] + (step - first) * rows

    def tokens_before(self, step: int) -> int:
        """Returns the tokens of all steps before ``step``."""
        return self.rows_before(step) * self.seq_len

    def step_at(self, rows: int) -> int:
        """Returns the last step that begins after at most ``rows`` rows: the inverse of ``rows_before``."""
        stage = self._stage(self._rows, rows)
        first, size = self.stages[stage]
        return first + (rows - self._rows[stage]) // size

    def steps_for(self, rows: int | Fraction) -> int:
        """Returns the fewest steps that read at least ``rows`` rows."""
        step = self.step_at(math.floor(rows))
        return step + (self.rows_before(step) < rows)

    def whole_steps(self, step: int, rows: int) -> int:
        """Returns how many of the ``rows`` rows from the first one of ``step`` on belong to steps read to their end."""
        before = self.rows_before(step)
        return self.rows_before(self.step_at(before + rows)) - before

    def changed(self, step: int, rows: int) -> BatchSchedule:
        """Returns the schedule with ``rows`` rows in every step from ``step`` on."""
        return BatchSchedule([*(stage for stage in self.stages if stage[0] < step), (step, rows)], self.seq_len)

    @staticmethod
    def _stage(firsts: list[int], at: int) -> int:
        return max(bisect.bisect_right(firsts, at) - 1, 0)


@dataclass(frozen=True)
class BatchSizeWarmup:
    """The section ``[batch_size_warmup]``: a batch that grows to ``training.global_batch_size`` in equal stages."""

    initial_batch_size: Annotated[int | None, Ge(1)] = None
    """Rows of the first optimizer step over all ranks; unset: no warmup."""

    increment: Annotated[int | None, Ge(1)] = None
    """Rows by which each stage is larger than the one before; unset: each is twice as large."""

    steps: Annotated[int | None, Ge(1)] = None
    """Steps until training.global_batch_size is reached."""

    tokens: Annotated[int | None, Ge(1)] = None
    """Or training tokens until then."""

    def __post_init__(self) -> None:
        check_bounds(self, "batch_size_warmup")
        if self.initial_batch_size is None:
            for key, value in vars(self).items():
                require(value is None, f"batch_size_warmup.{key} needs batch_size_warmup.initial_batch_size.")
            return
        require(
            (self.steps is None) != (self.tokens is None),
            "the length of the warmup is set by exactly one of steps and tokens.",
        )

    def schedule(self, global_batch_size: int, seq_len: int) -> BatchSchedule:
        """Returns the rows of every step, as Megatron-LM's ``rampup_batch_size`` counts them.

        The sizes below ``global_batch_size`` hold for equal numbers of steps or tokens. A stage in tokens begins at the
        first step that is preceded by as many.

        Raises:
            ConfigError: the first size is not below ``global_batch_size``.
        """
        rows = self.initial_batch_size
        if rows is None:
            return BatchSchedule.constant(global_batch_size, seq_len)
        require(
            rows < global_batch_size,
            f"batch_size_warmup.initial_batch_size = {rows}: must be below training.global_batch_size = "
            f"{global_batch_size}, where the warmup ends.",
        )
        sizes = [rows]
        while (rows := rows + (self.increment or rows)) < global_batch_size:
            sizes.append(rows)
        stages, before = [(0, sizes[0])], 0
        for number, size in enumerate([*sizes[1:], global_batch_size], start=1):
            first, rows = stages[-1]
            passed = Fraction(number, len(sizes)) * (self.steps or Fraction(self.tokens or 0, seq_len))  # steps or rows
            step = math.ceil(passed) if self.steps else first + max(math.ceil((passed - before) / rows), 0)
            before += (step - first) * rows
            stages.append((step, size))
        return BatchSchedule(stages, seq_len)
