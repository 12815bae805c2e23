"""The settings that change during a run, as one pure function of the optimizer step.

A ``Schedule`` combines the curriculum (the window), the learning-rate schedule and the ``[[phases]]`` of a config. Each
phase begins at a step, a number of tokens or a fraction of the run, and overrides settings until a later phase does::

    schedule(step) -> StepSettings(window, lr_factor, max_norm, rope_theta, source_weights, global_batch_size, ...)

It has no state, so a resumed run needs only the step.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from typing import Annotated, Any, NamedTuple

from annotated_types import Ge, Gt, Lt

from torchladder.batch_schedule import BatchSchedule
from torchladder.registry import check_bounds, require, unknown_name

FULL_ATTENTION = "full_attention"
"""The layer type whose window is the schedule's own; a model of one type has no other."""

SourceWeights = list[float] | dict[str, float]
"""Weights of ``data.sources``: a list in their order, or a table by label."""


@dataclass(frozen=True)
class StepSettings:
    """The settings of one optimizer step."""

    window: int  #: tokens a query may attend to, including itself; of the full_attention layers if there are others
    lr_factor: float  #: the learning rate as a fraction of its peak
    max_norm: float | None = None  #: gradients are clipped to this global norm; None: training.max_norm
    rope_theta: float | None = None  #: base of the rotary embeddings; None: the model's
    source_weights: SourceWeights | None = None  #: None: those of [data]
    global_batch_size: int = 1  #: rows over all ranks
    layer_windows: Mapping[str, int] = field(default_factory=dict)  #: windows of the other layer types

    def window_of(self, layer_type: str) -> int:
        """Returns the window of a layer type."""
        return self.layer_windows.get(layer_type, self.window)

    def get(self, setting: str) -> Any:
        """Returns a setting by its name; that of a layer type is its window, None if there is no such type."""
        return getattr(self, setting) if setting in PHASE_SETTINGS else self.layer_windows.get(setting)


PHASE_SETTINGS = ("window", "lr_factor", "max_norm", "rope_theta", "source_weights", "global_batch_size")
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

    window: int | dict[str, int] | None = None
    """Tokens a query may attend to; replaces the curriculum from here on. A table sets it by layer type."""

    lr_factor: Annotated[float | None, Gt(0), Lt(math.inf)] = None
    """Multiplies the learning rate of [lr_scheduler]."""

    max_norm: Annotated[float | None, Gt(0)] = None
    """Gradients are clipped to this global norm; replaces training.max_norm."""

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
        require(
            any(value not in (None, {}) for value in settings), f"phases: the phase at {self.start} changes nothing."
        )
        check_bounds(self, "phases")
        for name, window in self.windows.items():
            place = f"window.{name}" if isinstance(self.window, dict) else "window"
            require(window >= 1, f"phases.{place} = {window}: must be 1 or more.")

    @property
    def windows(self) -> dict[str, int]:
        """Layer type -> the window that the phase sets."""
        if self.window is None:
            return {}
        return self.window if isinstance(self.window, dict) else {FULL_ATTENTION: self.window}

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
        layer_curricula: layer type -> its curriculum, of types other than full_attention.

    Attributes:
        phase_steps: the first step of each phase.

    Raises:
        ConfigError: phases that share a first step, are out of order, begin after the last step, or set the window of
            a layer type that the model does not have.
    """

    def __init__(
        self,
        curriculum: Callable[[int], int],
        lr_factor: Callable[[int], float],
        phases: Sequence[Phase],
        steps: int,
        batch: BatchSchedule,
        layer_curricula: Mapping[str, Callable[[int], int]] | None = None,
    ) -> None:
        self.curricula = {FULL_ATTENTION: curriculum, **(layer_curricula or {})}
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
        for name in (name for phase in phases for name in phase.windows if name not in self.curricula):
            raise unknown_name("layer type", name, self.curricula, "phases.window")

    def __call__(self, step: int) -> StepSettings:
        return StepSettings(
            window=self.window(step),
            lr_factor=self.lr_factor(step) * self.override("lr_factor", step, 1.0),
            max_norm=self.override("max_norm", step),
            rope_theta=self.override("rope_theta", step),
            source_weights=self.override("source_weights", step),
            global_batch_size=self.batch(step),
            layer_windows={name: self.window(step, name) for name in self.curricula if name != FULL_ATTENTION},
        )

    def window(self, step: int, layer_type: str = FULL_ATTENTION) -> int:
        """Returns the window of a step: that of the last phase to set one, else the curriculum's.

        ``layer_type`` is one of a model with several types; any other has the window of ``full_attention``.
        """
        name = layer_type if layer_type in self.curricula else FULL_ATTENTION
        window = self.window_overrides(step).get(name)
        return self.curricula[name](step) if window is None else window

    def window_overrides(self, step: int) -> dict[str, int]:
        """Returns layer type -> window of the last phase up to ``step`` that sets it."""
        windows: dict[str, int] = {}
        for phase in self.phases[: bisect.bisect_right(self.phase_steps, step)]:
            windows |= phase.windows
        return windows

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
    """A setting in which two schedules differ, from ``step`` on; for a layer type, its window."""

    setting: str
    step: int
    saved: Any
    current: Any


def differences(saved: Schedule, current: Schedule, step: int) -> list[Difference]:
    """Returns where the schedule of a resumed run departs from the saved one: the first step for each setting.

    Window, learning rate, clipping and RoPE base count from ``step``, the next one, to the end of the shorter run; at
    least the last step counts, which exports the model. Source weights and batch sizes count from the first step, since
    what has been read of a source depends on all earlier ones.
    """
    step = min(step, current.steps - 1)
    until = min(max(saved.steps, step + 1), current.steps)
    stages = (first for schedule in (saved, current) for first, _ in schedule.batch.stages)
    phase_steps = {0, step, *saved.phase_steps, *current.phase_steps, *stages}
    found = []
    for setting in (*PHASE_SETTINGS, *(name for name in current.curricula if name != FULL_ATTENTION)):
        begin = 0 if setting in ("source_weights", "global_batch_size") else step
        by_phase = setting not in ("window", "lr_factor", *current.curricula)  # these change at any step
        for at in sorted(at for at in phase_steps if begin <= at < until) if by_phase else range(begin, until):
            before, now = saved(at).get(setting), current(at).get(setting)
            if before != now:
                found.append(Difference(setting, at, before, now))
                break
    return found
