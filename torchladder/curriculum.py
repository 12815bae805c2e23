"""Curricula: the number of tokens a query may see (the window), as a pure function of the optimizer step.

A curriculum is a callable ``curriculum(step) -> window`` without state. It counts optimizer steps rather than samples,
so the windows are the same after a restart, on any number of ranks and at any batch size.

Ramps move the window from ``initial_window`` to ``final_window`` (SkyLadder, arXiv 2503.15450, table 20). ``skyladder``
builds one from a schedule name of that paper's code, such as ``dm8``.
"""

from __future__ import annotations

import bisect
import hashlib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby, pairwise
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le

from torchladder.registry import ConfigError, Registry, check_bounds, require, unknown_name

Curriculum = Callable[[int], int]
"""``(step) -> window``; optimizer steps count from 0."""

registry: Registry[Curriculum] = Registry(
    "curriculum", runtime_args={"steps": "optimizer steps of the whole run", "seq_len": "tokens in a row"}
)
register = registry.register

DEFAULT_RAMP_FRACTION = 0.64
"""The best ramp length in SkyLadder's ablations, as a fraction of the run (tables 21 and 24)."""


# --- ramps -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Ramp:
    """Moves the window from ``initial_window`` to ``final_window`` and keeps it there; subclasses define the curve.

    Raises:
        ConfigError: a value is out of range, or both ``every`` and ``ramp`` are set.
    """

    steps: int
    """Optimizer steps of the whole run."""

    seq_len: int
    """Tokens in a row."""

    initial_window: Annotated[int, Ge(1)] = 32
    """Window at step 0, in tokens, including the query itself."""

    final_window: int | None = None
    """Window after the ramp, in tokens; default: the whole row."""

    every: Annotated[int | None, Ge(1)] = None
    """Steps per token of growth: the ramp takes (final_window - initial_window) * every steps.
    Cannot be combined with ramp."""

    ramp: Annotated[float | None, Gt(0), Le(1)] = None
    """Length of the ramp as a fraction of the run, above 0 and at most 1; default: 0.64, unless every is set."""

    multiple_of: Annotated[int, Ge(1)] = 1
    """Round the window down to a multiple of this during the ramp, but not below initial_window."""

    def __post_init__(self) -> None:
        check_bounds(self, "curriculum")
        _require_window("final_window", self.end_window, self.seq_len)
        require(
            self.initial_window <= self.end_window,
            f"curriculum.initial_window = {self.initial_window}: must be at most the final window, {self.end_window}.",
        )
        require(
            self.every is None or self.ramp is None,
            f"curriculum.every = {self.every} and ramp = {self.ramp}: both set the length of the ramp; remove one.",
        )

    @property
    def end_window(self) -> int:
        """The window after the ramp, in tokens."""
        return self.seq_len if self.final_window is None else self.final_window

    @cached_property
    def ramp_steps(self) -> int:
        """Steps that the ramp takes; more than the run has if the window does not reach its end."""
        if self.every is not None:
            return (self.end_window - self.initial_window) * self.every
        fraction = DEFAULT_RAMP_FRACTION if self.ramp is None else self.ramp
        # Rounded before the floor: 0.29 * 100 is 28.999999999999996.
        return max(1, math.floor(round(fraction * self.steps, 6)))

    def __call__(self, step: int) -> int:
        if step >= self.ramp_steps:
            return self.end_window
        window = self.curve(step) // self.multiple_of * self.multiple_of
        return min(max(window, self.initial_window), self.end_window)

    def curve(self, step: int) -> int:
        """Returns the window at a step of the ramp, before rounding to ``multiple_of``."""
        raise NotImplementedError


@register("linear")
class Linear(Ramp):
    """Grows the window by the same number of tokens each step: SkyLadder's default."""

    def curve(self, step: int) -> int:
        return self.initial_window + (self.end_window - self.initial_window) * step // self.ramp_steps


@register("sine")
class Sine(Ramp):
    """Grows the window fast at first, then slower and slower: sin(π/2 · x), x the fraction of the ramp."""

    def curve(self, step: int) -> int:
        fraction = math.sin(math.pi / 2 * step / self.ramp_steps)
        return self.initial_window + int((self.end_window - self.initial_window) * fraction)


@register("cosine")
class Cosine(Ramp):
    """Grows the window slowly, then fast, then slowly: (1 - cos(π · x)) / 2, x the fraction of the ramp."""

    def curve(self, step: int) -> int:
        fraction = (1 - math.cos(math.pi * step / self.ramp_steps)) / 2
        return self.initial_window + int((self.end_window - self.initial_window) * fraction)


@register("exponential")
class Exponential(Ramp):
    """Multiplies the window by the same factor each step: it stays short longest and saves the most attention."""

    def curve(self, step: int) -> int:
        return int(self.initial_window * (self.end_window / self.initial_window) ** (step / self.ramp_steps))


@register("logarithmic")
class Logarithmic(Ramp):
    """Grows the window exponentially in log(1 + step): long after a few steps, then slower and slower."""

    def curve(self, step: int) -> int:
        fraction = math.log(1 + step) / math.log(1 + self.ramp_steps)
        return int(self.initial_window * (self.end_window / self.initial_window) ** fraction)


@register("inverse")
class Inverse(Ramp):
    """Shrinks the window linearly to initial_window, then jumps to final_window: long to short, as a control."""

    def curve(self, step: int) -> int:
        return self.end_window - (self.end_window - self.initial_window) * step // self.ramp_steps


# --- tables ----------------------------------------------------------------------------------------------------------


@register("constant")
@dataclass(frozen=True, kw_only=True)
class Constant:
    """Uses the same window at every step.

    Raises:
        ConfigError: the window is below 1 or longer than the row.
    """

    seq_len: int
    """Tokens in a row."""

    window: int | None = None
    """Tokens a query may see, including itself; default: the whole row."""

    def __post_init__(self) -> None:
        _require_window("window", self(0), self.seq_len)

    def __call__(self, step: int) -> int:
        return self.seq_len if self.window is None else self.window


@register("stages")
@dataclass(frozen=True, kw_only=True)
class Stages:
    """Switches between windows at given steps.

    Raises:
        ConfigError: the steps do not increase from 0, or a window is below 1 or longer than the row.
    """

    seq_len: int
    """Tokens in a row."""

    stages: list[tuple[int, int]]
    """Pairs [first step, window], for example [[0, 512], [1000, 2048], [4000, 8192]]."""

    def __post_init__(self) -> None:
        starts_at_0 = bool(self.stages) and self.stages[0][0] == 0
        require(starts_at_0, "curriculum.stages: the first stage must begin at step 0.")
        for (step, _), (next_step, _) in pairwise(self.stages):
            require(step < next_step, f"curriculum.stages: step {next_step} follows step {step}; steps must increase.")
        for step, window in self.stages:
            _require_window(f"stages: window at step {step}", window, self.seq_len)

    def __call__(self, step: int) -> int:
        return self.stages[bisect.bisect_right(self.stages, step, key=lambda stage: stage[0]) - 1][1]


# --- random windows --------------------------------------------------------------------------------------------------


@register("random")
@dataclass(frozen=True, kw_only=True)
class Random:
    """Draws a window at random every ``hold`` steps, from a list or a range (stochastic windows, arXiv 2509.24552).

    A draw is a hash of the seed and its number, so it is the same on every rank and after a restart. The last step has
    the longest window, because evaluation, generation and export use the window of the last step.

    Raises:
        ConfigError: neither a list nor a range, both, or a window below 1 or longer than the row.
    """

    steps: int
    """Optimizer steps of the whole run."""

    seq_len: int
    """Tokens in a row."""

    windows: list[int] = field(default_factory=list)
    """Windows to draw from, each with the same probability; a window that is listed twice is twice as likely.
    Cannot be combined with min_window."""

    min_window: int | None = None
    """Shortest window of the range to draw from, in tokens, including the query itself."""

    max_window: int | None = None
    """Longest window of the range, in tokens; default: the whole row."""

    distribution: Literal["log_uniform", "uniform"] | None = None
    """Distribution over the range: log_uniform (default), where each doubling is as likely as another, or uniform."""

    multiple_of: Annotated[int, Ge(1)] = 1
    """Round windows of the range down to a multiple of this, but not below min_window."""

    hold: Annotated[int, Ge(1)] = 1
    """Steps that a drawn window is kept."""

    seed: int = 0
    """Seed of the draws."""

    def __post_init__(self) -> None:
        check_bounds(self, "curriculum")
        if self.windows:
            of_range = {"min_window": None, "max_window": None, "distribution": None, "multiple_of": 1}
            for key, default in of_range.items():
                value = getattr(self, key)
                require(value == default, f"curriculum.windows and {key} = {value!r}: a list has no range; remove one.")
        else:
            require(self.min_window is not None, "curriculum 'random': set curriculum.windows or min_window.")
            require(
                self.shortest <= self.longest,
                f"curriculum.min_window = {self.min_window}: must be at most max_window, {self.longest}.",
            )
        for window in self.windows or (self.shortest, self.longest):
            _require_window("windows" if self.windows else "min_window and max_window", window, self.seq_len)

    @property
    def shortest(self) -> int:
        """The shortest window that can be drawn."""
        return min(self.windows) if self.windows else self.min_window or 0

    @property
    def longest(self) -> int:
        """The longest window that can be drawn, and that of the last step."""
        return max(self.windows) if self.windows else self.max_window or self.seq_len

    def __call__(self, step: int) -> int:
        if step >= self.steps - 1:
            return self.longest
        digest = hashlib.blake2b(f"{self.seed}/{step // self.hold}".encode(), digest_size=6).digest()
        fraction = int.from_bytes(digest, "little") / 2**48  # 0 to below 1, exact
        if self.windows:
            return self.windows[int(fraction * len(self.windows))]
        low, high = self.shortest, self.longest
        if self.distribution == "uniform":
            window = low + int(fraction * (high + 1 - low))
        else:
            window = min(int(low * ((high + 1) / low) ** fraction), high)
        return max(window // self.multiple_of * self.multiple_of, low)


# --- SkyLadder's schedule names --------------------------------------------------------------------------------------

SKYLADDER_CURVES: dict[str, type[Ramp]] = {
    "dm": Linear,
    "lin": Linear,
    "sin": Sine,
    "cos": Cosine,
    "exp": Exponential,
    "log": Logarithmic,
    "inv": Inverse,
}

SKYLADDER_GRAMMAR = (
    "'constant', or a curve (dm, lin, sin, cos, exp, log, inv), then N (one token every N steps) or NNp (a ramp of NN "
    "percent of the run), then optionally stX (initial window) and incR (round down to multiples of R): dm8, lin80p, "
    "exp2inc1024, dm2st128"
)

_SCHEDULE = re.compile(r"(?P<curve>[a-z]+?)(?P<rate>\d+)(?P<percent>p?)(?:st(?P<start>\d+))?(?:inc(?P<multiple>\d+))?")


@register("skyladder")
def skyladder(schedule: str, steps: int, seq_len: int) -> Curriculum:
    """Builds a curriculum from a schedule name of SkyLadder's code.

    Args:
        schedule: constant, or dm8, lin80p, sin2, cos8, exp2inc1024, log8, inv8, dm2st128, ...
        steps: optimizer steps of the whole run.
        seq_len: tokens in a row.

    Raises:
        ConfigError: the name does not follow the grammar, which the message explains.
    """
    if schedule == "constant":
        return Constant(seq_len=seq_len)
    name = _SCHEDULE.fullmatch(schedule)
    if name is None or name["curve"] not in SKYLADDER_CURVES:
        raise _unknown_schedule(schedule)
    rate = int(name["rate"])
    return SKYLADDER_CURVES[name["curve"]](
        steps=steps,
        seq_len=seq_len,
        initial_window=int(name["start"] or 32),
        every=None if name["percent"] else rate,
        ramp=rate / 100 if name["percent"] else None,
        multiple_of=int(name["multiple"] or 1),
    )


def _unknown_schedule(schedule: str) -> ConfigError:
    if schedule.startswith("intra"):
        rest = schedule.removeprefix("intra")
        setting = f'["document", "chunk"] and schedule = {rest!r}' if _SCHEDULE.fullmatch(rest) else '["document"]'
        return ConfigError(f"schedule = {schedule!r} includes a document mask: set [attention] masks = {setting}.")
    examples = ["constant", *(f"{curve}{rate}" for curve in SKYLADDER_CURVES for rate in (1, 2, 4, 8, "80p"))]
    error, _, _ = str(unknown_name("schedule", schedule, examples)).partition(" Known:")
    return ConfigError(f"{error} A schedule is {SKYLADDER_GRAMMAR}.")


# --- a curriculum over a run -----------------------------------------------------------------------------------------


def to_stages(curriculum: Curriculum, steps: int) -> list[tuple[int, int]]:
    """Returns the windows of a run as pairs (first step, window), one for each change of the window."""
    return [(next(stage), window) for window, stage in groupby(range(steps), key=curriculum)]


def full_context_step(curriculum: Curriculum, steps: int, seq_len: int) -> int | None:
    """Returns the first step from which the window stays the whole row; None if the last step's window is shorter."""
    # Scanned from the end: also right for curricula that go up and down, and no longer than the full-context stage.
    full = steps
    while full > 0 and curriculum(full - 1) >= seq_len:
        full -= 1
    return full if full < steps else None


def _require_window(key: str, window: int, seq_len: int) -> None:
    valid = 1 <= window <= seq_len
    require(valid, f"curriculum.{key} = {window}: must be from 1 to training.seq_len = {seq_len}.")
