"""The stage table of a run: from a moment on, other weights, another window, learning rate or RoPE theta.

A phase begins at an optimizer step, told as a step, a number of tokens or a share of the run. What it sets holds from
there on, until a later phase sets it again; what no phase has set is as the rest of the settings say. So all of it is a
pure function of the step. The loader reads ``weights``; the rest of the table is for whoever trains.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torchladder.registry import ConfigError, unknown_name


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One entry of ``data.phases``.

    Raises:
        ConfigError: it does not say when it begins, says it twice, changes nothing, or has a value that cannot be.
    """

    from_step: int | None = None
    """Begins at this optimizer step, counted from 0."""

    from_tokens: int | None = None
    """Begins at the first step before which at least this many tokens were read."""

    from_share: float | None = None
    """Begins after this share of the run's steps, from 0 to 1."""

    weights: list[float] | dict[str, float] | None = None
    """Shares of the rows from there on: a list in the order of data.sources, or a table by label; 0 leaves one out."""

    window: int | None = None
    """Tokens a query may see from there on; the curriculum has no more say."""

    lr_factor: float | None = None
    """Multiplies the learning rate that [lr_scheduler] gives, from there on."""

    rope_theta: float | None = None
    """Base of the rotary positions from there on."""

    def __post_init__(self) -> None:
        begins = [key for key in ("from_step", "from_tokens", "from_share") if getattr(self, key) is not None]
        _require(len(begins) == 1, f"sets {begins or 'no beginning'}: set one of from_step, from_tokens, from_share.")
        at = getattr(self, begins[0])
        _require(at >= 0 and (begins != ["from_share"] or at < 1), f"begins at {begins[0]} = {at}: outside of the run.")
        settings = [self.weights, self.window, self.lr_factor, self.rope_theta]
        _require(any(value is not None for value in settings), f"{begins[0]} = {at} changes nothing.")
        _require(self.window is None or self.window >= 1, f"window = {self.window}: must be 1 or more.")
        for key in ("lr_factor", "rope_theta"):
            value = getattr(self, key)
            _require(value is None or 0 < value < math.inf, f"{key} = {value}: must be a finite number above 0.")

    def first_step(self, steps: int | None, tokens_per_step: int) -> int:
        """Returns the optimizer step at which the phase begins.

        Raises:
            ConfigError: it begins at a share of a run whose steps nobody knows.
        """
        if self.from_step is not None:
            return self.from_step
        if self.from_tokens is not None:
            return -(-self.from_tokens // tokens_per_step)
        _require(steps is not None, f"from_share = {self.from_share}: the steps of the run are not known here.")
        return math.ceil(round(self.from_share * steps, 6))  # type: ignore[operator]

    def listed(self, labels: Sequence[str]) -> list[float] | None:
        """Returns the weights in the order of the sources, None where the phase leaves them as they are.

        Raises:
            ConfigError: a source is missing, unknown or named by two, or there are too many or too few weights.
        """
        weights = self.weights
        if isinstance(weights, dict):
            for label in weights:
                if label not in labels:
                    raise unknown_name("source in the weights of a phase", label, labels)
            missing = [label for label in labels if label not in weights]
            _require(not missing, f"weights do not name {', '.join(missing)}; 0 leaves a source out.")
            _require(len(set(labels)) == len(labels), "weights by label: two sources have the same label.")
            return [weights[label] for label in labels]
        count = len(labels)
        _require(weights is None or len(weights) == count, f"weights = {weights}: there are {count} sources.")
        return weights


class Timetable:
    """What the phases set at each step of a run.

    Args:
        phases: in the order of their beginnings.
        steps: optimizer steps of the run; None where nobody knows, and then no phase begins at a share of them.
        tokens_per_step: tokens of one step over all ranks.

    Raises:
        ConfigError: two phases begin at one step, their order is another, or one begins after the last step.
    """

    def __init__(self, phases: Sequence[Phase], steps: int | None, tokens_per_step: int) -> None:
        self.phases = list(phases)
        self.starts = [phase.first_step(steps, tokens_per_step) for phase in phases]
        for start, later in pairwise(self.starts):
            _require(start < later, f"begin at steps {start} and {later}: each begins after the one before.")
        last = self.starts[-1] if self.starts else 0
        _require(steps is None or last < steps, f"begins at step {last}, but the run has {steps} steps.")

    def __call__(self, setting: str, step: int, default: Any = None) -> Any:
        """Returns the value that the phases up to ``step`` have given a setting last."""
        for phase in reversed(self.phases[: bisect.bisect_right(self.starts, step)]):
            if getattr(phase, setting) is not None:
                return getattr(phase, setting)
        return default

    def history(self, setting: str) -> dict[int, Any]:
        """Returns the steps at which a setting is given a value, and the value."""
        values = [getattr(phase, setting) for phase in self.phases]
        return {step: value for step, value in zip(self.starts, values, strict=True) if value is not None}


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(f"data.phases: {message}")
