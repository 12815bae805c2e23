"""Curricula: how many tokens a query may see, as a pure function of the optimizer step.

A curriculum is a callable ``part(step) -> window``. It knows no tensors, holds no state and counts optimizer steps,
never samples: the window of a step is the same after a restart, on any number of ranks and for any batch size.

The ramps climb from ``initial_window`` to ``final_window`` and stay there; x in [0, 1) is the share of the ramp behind
(SkyLadder, arXiv 2503.15450, table 20). ``skyladder`` makes one from a name of that paper's code, such as ``dm8``.
"""

from __future__ import annotations

import bisect
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, pairwise

from torchladder.registry import ConfigError, Registry, unknown_name

Curriculum = Callable[[int], int]
"""``(step) -> window``; the step counts optimizer steps from 0."""

registry: Registry[Curriculum] = Registry(
    "curriculum", runtime_args={"steps": "optimizer steps of the whole run", "seq_len": "tokens in a row"}
)
register = registry.register

DEFAULT_RAMP = 0.64
"""Share of the run that a ramp takes where nothing is said: the best of SkyLadder's ablations (tables 21 and 24)."""


# --- ramps -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Ramp:
    """A window that moves from ``initial_window`` to ``final_window`` and stays there; a subclass draws the curve.

    Raises:
        ConfigError: a setting that cannot be.
    """

    steps: int
    """Optimizer steps of the whole run."""

    seq_len: int
    """Tokens in a row."""

    initial_window: int = 32
    """Tokens a query may see at step 0, with itself."""

    final_window: int | None = None
    """Tokens a query may see once the ramp is over; left out: the whole row."""

    every: int | None = None
    """Steps per token of growth: the ramp takes (final_window - initial_window) * every steps. Not with ramp."""

    ramp: float | None = None
    """Share of the run that the ramp takes, above 0 and at most 1; left out, and every too: 0.64."""

    multiple_of: int = 1
    """Windows on the ramp are rounded down to a multiple of this, but never below initial_window."""

    def __post_init__(self) -> None:
        _require(self.initial_window >= 1, f"initial_window = {self.initial_window}: must be 1 or more.")
        _require(
            self.final <= self.seq_len,
            f"final_window = {self.final}: a row has {self.seq_len} tokens (training.seq_len), no window is longer.",
        )
        _require(
            self.initial_window <= self.final,
            f"initial_window = {self.initial_window}: must not exceed the final window, {self.final} tokens.",
        )
        _require(self.multiple_of >= 1, f"multiple_of = {self.multiple_of}: must be 1 or more.")
        _require(self.every is None or self.every >= 1, f"every = {self.every}: must be 1 or more steps per token.")
        _require(self.ramp is None or 0 < self.ramp <= 1, f"ramp = {self.ramp}: must be above 0 and at most 1.")
        _require(
            self.every is None or self.ramp is None,
            f"every = {self.every} and ramp = {self.ramp}: set one, both say how long the ramp takes.",
        )

    @cached_property
    def final(self) -> int:
        """The window in tokens once the ramp is over."""
        return self.seq_len if self.final_window is None else self.final_window

    @cached_property
    def length(self) -> int:
        """Steps that the ramp takes; it may be longer than the run, see ``full_at``."""
        if self.every is not None:
            return (self.final - self.initial_window) * self.every
        share = DEFAULT_RAMP if self.ramp is None else self.ramp
        # Rounded before the floor: 0.29 * 100 is 28.999999999999996.
        return max(1, math.floor(round(share * self.steps, 6)))

    def __call__(self, step: int) -> int:
        if step >= self.length:
            return self.final
        window = self.curve(step) // self.multiple_of * self.multiple_of
        return min(max(window, self.initial_window), self.final)

    def curve(self, step: int) -> int:
        """Returns the window at a step of the ramp, before rounding."""
        raise NotImplementedError


@register("linear")
class Linear(Ramp):
    """Grows by the same number of tokens each step: SkyLadder's default."""

    def curve(self, step: int) -> int:
        return self.initial_window + (self.final - self.initial_window) * step // self.length


@register("sine")
class Sine(Ramp):
    """Grows fast, then ever slower: sin(π/2 · x)."""

    def curve(self, step: int) -> int:
        share = math.sin(math.pi / 2 * step / self.length)
        return self.initial_window + int((self.final - self.initial_window) * share)


@register("cosine")
class Cosine(Ramp):
    """Grows slowly, then fast, then slowly: (1 - cos(π · x)) / 2."""

    def curve(self, step: int) -> int:
        share = (1 - math.cos(math.pi * step / self.length)) / 2
        return self.initial_window + int((self.final - self.initial_window) * share)


@register("exponential")
class Exponential(Ramp):
    """Grows by the same factor each step: short for long, which saves the most attention."""

    def curve(self, step: int) -> int:
        return int(self.initial_window * (self.final / self.initial_window) ** (step / self.length))


@register("logarithmic")
class Logarithmic(Ramp):
    """Grows exponentially in log(1 + step): long within the first few steps of the ramp, then ever slower."""

    def curve(self, step: int) -> int:
        share = math.log(1 + step) / math.log(1 + self.length)
        return int(self.initial_window * (self.final / self.initial_window) ** share)


@register("inverse")
class Inverse(Ramp):
    """Shrinks from the final window to the initial one, then jumps back: a control, long to short."""

    def curve(self, step: int) -> int:
        return self.final - (self.final - self.initial_window) * step // self.length


# --- tables ----------------------------------------------------------------------------------------------------------


@register("constant")
@dataclass(frozen=True, kw_only=True)
class Constant:
    """The same window at every step.

    Raises:
        ConfigError: the window is not within the row.
    """

    seq_len: int
    """Tokens in a row."""

    window: int | None = None
    """Tokens a query may see, with itself; left out: the whole row."""

    def __post_init__(self) -> None:
        _require_window("window", self(0), self.seq_len)

    def __call__(self, step: int) -> int:
        return self.seq_len if self.window is None else self.window


@register("stages")
@dataclass(frozen=True, kw_only=True)
class Stages:
    """A table of windows, each from its step on until the next one.

    Raises:
        ConfigError: the table is empty, its steps do not increase from 0, or a window is not within the row.
    """

    seq_len: int
    """Tokens in a row."""

    stages: list[tuple[int, int]]
    """Pairs [first step, window], for example [[0, 512], [1000, 2048], [4000, 8192]]."""

    def __post_init__(self) -> None:
        _require(len(self.stages) > 0 and self.stages[0][0] == 0, "stages: the first must begin at step 0.")
        for (step, _), (later, _) in pairwise(self.stages):
            _require(step < later, f"stages: {later} comes after {step}; the steps must increase.")
        for step, window in self.stages:
            _require_window(f"stages: the window from step {step}", window, self.seq_len)

    @cached_property
    def first_steps(self) -> list[int]:
        return [step for step, _ in self.stages]

    def __call__(self, step: int) -> int:
        return self.stages[bisect.bisect_right(self.first_steps, step) - 1][1]


# --- SkyLadder's names -----------------------------------------------------------------------------------------------

SHAPES: dict[str, type[Ramp]] = {
    "dm": Linear,
    "lin": Linear,
    "sin": Sine,
    "cos": Cosine,
    "exp": Exponential,
    "log": Logarithmic,
    "inv": Inverse,
}

GRAMMAR = (
    "'constant', or a shape (dm, lin, sin, cos, exp, log, inv), then N (one token every N steps) or NNp (NN percent of "
    "the run), then optionally stX (initial window) and incR (round down to multiples of R): dm8, lin80p, exp2inc1024, "
    "dm2st128"
)

_NAME = re.compile(r"(?P<shape>[a-z]+?)(?P<rate>\d+)(?P<percent>p?)(?:st(?P<start>\d+))?(?:inc(?P<multiple>\d+))?")


@register("skyladder")
def skyladder(schedule: str, steps: int, seq_len: int) -> Curriculum:
    """Makes the curriculum that a name of SkyLadder's family stands for, with its numbers as written.

    Args:
        schedule: constant, or dm8, lin80p, sin2, cos8, exp2inc1024, log8, inv8, dm2st128, ...
        steps: optimizer steps of the whole run.
        seq_len: tokens in a row.

    Raises:
        ConfigError: no such name; the message has the grammar.
    """
    if schedule == "constant":
        return Constant(seq_len=seq_len)
    name = _NAME.fullmatch(schedule)
    if name is None or name["shape"] not in SHAPES:
        raise _not_a_schedule(schedule)
    rate = int(name["rate"])
    return SHAPES[name["shape"]](
        steps=steps,
        seq_len=seq_len,
        initial_window=int(name["start"] or 32),
        every=None if name["percent"] else rate,
        ramp=rate / 100 if name["percent"] else None,
        multiple_of=int(name["multiple"] or 1),
    )


def _not_a_schedule(schedule: str) -> ConfigError:
    if schedule.startswith("intra"):
        rest = schedule.removeprefix("intra")
        setting = f'["document", "chunk"] and schedule = {rest!r}' if _NAME.fullmatch(rest) else '["document"]'
        return ConfigError(f"schedule = {schedule!r} also says who sees whom: set [attention] masks = {setting}.")
    problem, _, _ = str(unknown_name("schedule", schedule, _EXAMPLES)).partition(" Known:")
    return ConfigError(f"{problem} A schedule is {GRAMMAR}.")


_EXAMPLES = ["constant", *(f"{shape}{rate}" for shape in SHAPES for rate in (1, 2, 4, 8, "80p"))]


# --- what a curriculum does over a run -------------------------------------------------------------------------------


def windows(curriculum: Curriculum, steps: int) -> list[tuple[int, int]]:
    """Returns the stretches of a run under one window each, as pairs (first step, window)."""
    return [(next(stretch), window) for window, stretch in groupby(range(steps), key=curriculum)]


def full_at(curriculum: Curriculum, steps: int, seq_len: int) -> int | None:
    """Returns the first step from which on every window holds the whole row; None where the run ends before that."""
    # From the end backwards: right for curricula that go up and down, too, and no longer than the stretch it finds.
    full = steps
    while full > 0 and curriculum(full - 1) >= seq_len:
        full -= 1
    return full if full < steps else None


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(f"curriculum.{message}")


def _require_window(what: str, window: int, seq_len: int) -> None:
    _require(1 <= window <= seq_len, f"{what} = {window}: must be from 1 to the {seq_len} tokens of a row (seq_len).")
