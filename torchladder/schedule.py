"""The settings that change during a run, as one pure function of the optimizer step.

A ``Schedule`` combines the curriculum (the window), the learning-rate schedule and the ``[[phases]]`` of a config. Each
phase begins at a step, a number of tokens or a fraction of the run, and overrides settings until a later phase does.

    schedule(step) -> StepSettings(window, lr_factor, rope_theta, source_weights, global_batch_size)

It has no state, so a resumed run needs only the step.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from itertools import pairwise
from typing import Annotated, Any, NamedTuple

from annotated_types import Ge, Gt, Lt

from torchladder.batch_schedule import BatchSchedule
from torchladder.registry import check_bounds, require

SourceWeights = list[float] | dict[str, float]
"""Weights of ``data.sources``: a list in their order, or a table by label."""


@dataclass(frozen=True)
class StepSettings:
    """The settings of one optimizer step."""

    window: int  # tokens a query may attend to, including itself
    lr_factor: float  # the learning rate as a fraction of its peak
    rope_theta: float | None = None  # base of the rotary embeddings; None: the model's
    source_weights: SourceWeights | None = None  # None: those of [data]
    global_batch_size: int = 1  # rows over all ranks


PHASE_SETTINGS = tuple(field.name for field in fields(StepSettings))
"""What a phase may set."""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One entry of ``[[phases]]``: a first step, and the settings that hold from there on.

    Raises:
        ConfigError: not exactly one first step, no setting, or a value out of range.
    """

    from_step: Annotated[int | None, Ge(0)] = None
    """Begin at this optimizer step, counted from 0."""

    from_tokens: Annotated[int | None, Ge(0)] = None
    """Begin at the first step that is preceded by at least this many training tokens."""

    from_fraction: Annotated[float | None, Ge(0), Lt(1)] = None
    """Begin after this fraction of the run's steps, from 0 to below 1."""

    source_weights: SourceWeights | None = None
    """Sampling weights: a list in the order of data.sources, or a table by label; 0 leaves a source out."""

    window: Annotated[int | None, Ge(1)] = None
    """Tokens a query may attend to; replaces the curriculum from here on."""

    lr_factor: Annotated[float | None, Gt(0), Lt(math.inf)] = None
    """Multiplies the learning rate of [lr_scheduler]."""

    rope_theta: Annotated[float | None, Gt(0), Lt(math.inf)] = None
    """Base of the rotary embeddings."""

    global_batch_size: Annotated[int | None, Ge(1)] = None
    """Rows of an optimizer step over all ranks."""

    def __post_init__(self) -> None:
        starts = [key for key in ("from_step", "from_tokens", "from_fraction") if getattr(self, key) is not None]
        require(
            len(starts) == 1,
            f"phases: a phase sets {' and '.join(starts) or 'no first step'}: set exactly one of from_step, "
            "from_tokens, from_fraction.",
        )
        settings = [getattr(self, key) for key in PHASE_SETTINGS]
        require(any(value is not None for value in settings), f"phases: the phase at {self.start} changes nothing.")
        check_bounds(self, "phases")

    @property
    def start(self) -> str:
        """How the phase says when it begins: ``from_step = 5``."""
        starts = {key: getattr(self, key) for key in ("from_step", "from_tokens", "from_fraction")}
        return next(f"{key} = {value}" for key, value in starts.items() if value is not None)

    def first_step(self, steps: int, batch: BatchSchedule) -> int:
        """Returns the optimizer step at which the phase begins.

        Args:
            steps: optimizer steps of the run.
            batch: rows of every step.
        """
        if self.from_step is not None:
            return self.from_step
        if self.from_tokens is not None:
            return batch.steps_for(Fraction(self.from_tokens, batch.seq_len))
        assert self.from_fraction is not None
        return math.ceil(round(self.from_fraction * steps, 6))  # 0.29 * 100 is 28.999999999999996


def change_batch(batch: BatchSchedule, phases: Sequence[Phase], steps: int) -> BatchSchedule:
    """Returns the rows of every step with those that phases set.

    Args:
        batch: rows of every step without phases.
        phases: in the order of their first steps; one in tokens counts those of the phases before it.
        steps: optimizer steps of the run.
    """
    for phase in phases:
        if phase.global_batch_size is not None:
            batch = batch.changed(phase.first_step(steps, batch), phase.global_batch_size)
    return batch


class Schedule:
    """Maps an optimizer step, counted from 0, to its settings.

    Args:
        curriculum: step -> window.
        lr_factor: step -> learning rate as a fraction of its peak.
        phases: overrides, in the order of their first steps.
        steps: optimizer steps of the run.
        batch: rows of every step, those that phases set included (``change_batch``).

    Attributes:
        phase_steps: the first step of each phase.

    Raises:
        ConfigError: phases that share a first step, are out of order, or begin after the last step.
    """

    def __init__(
        self,
        curriculum: Callable[[int], int],
        lr_factor: Callable[[int], float],
        phases: Sequence[Phase],
        steps: int,
        batch: BatchSchedule,
    ) -> None:
        self.curriculum = curriculum
        self.lr_factor = lr_factor
        self.phases = list(phases)
        self.steps = steps
        self.batch = batch
        self.phase_steps = [phase.first_step(steps, self.batch) for phase in phases]
        for start, following in pairwise(self.phase_steps):
            require(
                start < following,
                f"phases: two phases begin at steps {start} and {following}: each must begin after the one before it.",
            )
        for start in self.phase_steps[-1:]:
            require(start < steps, f"phases: a phase begins at step {start}, but the run has {steps} steps.")

    def __call__(self, step: int) -> StepSettings:
        return StepSettings(
            window=self.window(step),
            lr_factor=self.lr_factor(step) * self.override("lr_factor", step, 1.0),
            rope_theta=self.override("rope_theta", step),
            source_weights=self.override("source_weights", step),
            global_batch_size=self.batch(step),
        )

    def window(self, step: int) -> int:
        """Returns the window of a step: that of the last phase to set one, else the curriculum's."""
        window = self.override("window", step)
        return self.curriculum(step) if window is None else window

    def override(self, setting: str, step: int, default: Any = None) -> Any:
        """Returns the value of a setting in the last phase up to ``step`` that sets it, else ``default``."""
        for phase in reversed(self.phases[: bisect.bisect_right(self.phase_steps, step)]):
            value = getattr(phase, setting)
            if value is not None:
                return value
        return default

    def overrides(self, setting: str) -> dict[int, Any]:
        """Returns first step -> value of each phase that sets a setting."""
        values = {start: getattr(phase, setting) for start, phase in zip(self.phase_steps, self.phases, strict=True)}
        return {start: value for start, value in values.items() if value is not None}


class Difference(NamedTuple):
    """A setting in which two schedules differ, from ``step`` on."""

    setting: str
    step: int
    saved: Any
    current: Any


def differences(saved: Schedule, current: Schedule, step: int) -> list[Difference]:
    """Returns where the schedule of a resumed run departs from the saved one: the first step for each setting.

    Window, learning rate and RoPE base count from ``step``, the next one, to the end of the shorter run; at least the
    last step counts, which exports the model. Source weights and batch sizes count from the first step, since what has
    been read of a source depends on all earlier ones.
    """
    step = min(step, current.steps - 1)
    until = min(max(saved.steps, step + 1), current.steps)
    stages = (first for schedule in (saved, current) for first, _ in schedule.batch.stages)
    phase_steps = {0, step, *saved.phase_steps, *current.phase_steps, *stages}
    found = []
    for setting in PHASE_SETTINGS:
        begin = 0 if setting in ("source_weights", "global_batch_size") else step
        is_computed = setting in ("window", "lr_factor")  # the others change with a phase only
        for at in range(begin, until) if is_computed else sorted(at for at in phase_steps if begin <= at < until):
            before, now = getattr(saved(at), setting), getattr(current(at), setting)
            if before != now:
                found.append(Difference(setting, at, before, now))
                break
    return found
