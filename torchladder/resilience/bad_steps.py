"""Bad steps: a loss or gradient that is not finite, or a gradient norm far above the usual.

Whether a step is bad is one number on the device, 0 or 1, that the optimizer obeys without a device synchronization.
The host reads it when it synchronizes anyway: at the next report, and before every checkpoint.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Lt
from torch import Tensor

from torchladder.registry import check_bounds, require

logger = logging.getLogger(__name__)

HISTORY_STEPS = 128
"""Good steps whose gradient norms the mean and the standard deviation are computed over."""
MIN_HISTORY_STEPS = 32
"""Good steps before any gradient norm counts as an outlier."""

RowRange = tuple[int, int]
"""The first and the last global row of a step."""


@dataclass(frozen=True)
class ResilienceConfig:
    """Bad steps: loss or gradient norm not finite, or gradient norm an outlier."""

    on_bad_step: Literal["stop", "skip", "rollback"] = "stop"
    """stop ends the run with an error; skip leaves weights and optimizer unchanged; rollback continues from the newest
    checkpoint without the rows of the bad step. A bad state is never saved."""

    sigma_factor: Annotated[float, Ge(0), Lt(math.inf)] = 0.0
    """Standard deviations above the mean of the last 128 gradient norms at which a norm counts as bad; 0: never."""

    max_bad_steps: Annotated[int, Ge(1)] = 10
    """Bad steps between two checkpoints that skip and rollback tolerate; one more stops the run."""

    def __post_init__(self) -> None:
        check_bounds(self, "resilience")


class BadStepError(RuntimeError):
    """The run must stop because of bad steps; the message names steps and rows."""


class Rollback(Exception):  # noqa: N818
    """The run must return to its newest checkpoint and skip ``rows`` from there on."""

    def __init__(self, rows: list[RowRange]) -> None:
        super().__init__(f"skipping the rows {format_rows(rows)}")
        self.rows = rows


@dataclass(frozen=True)
class StepOutcome:
    """The outcome of a step, not read by the host yet.

    Attributes:
        step: optimizer steps taken after it.
        rows: its first and last global row.
        bad: () 0 or 1, on the device.
        grad_norm: () on the device.
        losses: this rank's micro-batches: their global rows, if known, and their loss on the device.
    """

    step: int
    rows: RowRange
    bad: Tensor
    grad_norm: Tensor
    losses: list[tuple[tuple[int, ...], Tensor]]


class BadStepDetector:
    """Detects bad steps on the device; ``flush`` reads the result on the host.

    Args:
        fused: whether the optimizer can skip a step on the device.
        is_rank0: whether this rank logs bad steps; the others log only their own losses.

    Raises:
        ConfigError: on_bad_step = "skip", with an optimizer that cannot skip a step on the device.
    """

    def __init__(self, config: ResilienceConfig, device: torch.device, fused: bool, is_rank0: bool = True) -> None:
        require(
            config.on_bad_step != "skip" or device.type == "cpu" or fused,
            "resilience.on_bad_step = 'skip' on a GPU needs optimizer.implementation = 'fused': any other "
            "implementation would have to synchronize with the GPU at every step.",
        )
        self.config = config
        self.is_rank0 = is_rank0
        self.grad_norms = torch.full((HISTORY_STEPS,), torch.nan, dtype=torch.float64, device=device)
        self._slots = torch.arange(HISTORY_STEPS, device=device)
        self.num_good = torch.zeros((), dtype=torch.int64, device=device)
        self.num_bad = 0
        """Bad steps of the run so far."""
        self._bad_since_save = 0
        self._unchecked: list[StepOutcome] = []

    def check(self, grad_norm: Tensor) -> Tensor:
        """Returns () fp32 on the device: 1 for a bad step, else 0. Never synchronizes.

        The norm suffices: gradients that contain a NaN have the norm NaN, and backward makes all of them NaN if the
        loss is not finite (``backward_seed``). So every rank gets the same result.
        """
        norm = grad_norm.detach().to(torch.float64)
        bad = ~norm.isfinite()
        if self.config.sigma_factor:
            known = ~self.grad_norms.isnan()
            count = known.sum()
            mean = self.grad_norms.nansum() / count
            squares = torch.where(known, (self.grad_norms - mean).square(), 0.0).sum()
            outlier = norm > mean + self.config.sigma_factor * (squares / count).sqrt()
            bad = bad | (outlier & (count >= MIN_HISTORY_STEPS))
            # A good norm replaces the oldest one. By mask, since indexing with a tensor would synchronize.
            slot = (self._slots == self.num_good % HISTORY_STEPS) & ~bad
            self.grad_norms = torch.where(slot, norm, self.grad_norms)
            self.num_good = self.num_good + ~bad
        return bad.to(torch.float32)

    def record(self, outcome: StepOutcome) -> None:
        """Remembers a step until the next ``flush``."""
        self._unchecked.append(outcome)

    def flush(self) -> None:
        """Checks all recorded steps; synchronizes with the device. Every rank comes to the same result.

        Raises:
            BadStepError: there was a bad step and the policy is stop, or there were too many.
            Rollback: there was one and the policy is rollback.
        """
        outcomes, self._unchecked = self._unchecked, []
        flags = torch.stack([outcome.bad for outcome in outcomes]).tolist() if outcomes else []
        bad = [outcome for outcome, flag in zip(outcomes, flags, strict=True) if flag]
        if not bad:
            return
        self.num_bad += len(bad)
        self._bad_since_save += len(bad)
        for outcome in bad:
            self._log(outcome)
        rows = [outcome.rows for outcome in bad]
        if self.config.on_bad_step == "stop":
            raise BadStepError(f"bad step {bad[0].step}: rows {format_rows(rows)} (resilience.on_bad_step = 'stop')")
        if self._bad_since_save > self.config.max_bad_steps:
            raise BadStepError(
                f"{self._bad_since_save} bad steps since the last checkpoint (resilience.max_bad_steps = "
                f"{self.config.max_bad_steps}), the latest at rows {format_rows(rows)}"
            )
        if self.config.on_bad_step == "rollback":
            raise Rollback(rows)

    def _log(self, outcome: StepOutcome) -> None:
        if self.is_rank0:
            rows, norm = format_rows([outcome.rows]), outcome.grad_norm.item()
            logger.warning("bad step %d: gradient norm %g, rows %s (%d so far)", outcome.step, norm, rows, self.num_bad)
        for own_rows, loss in outcome.losses:
            if not loss.isfinite():
                rows = ", ".join(map(str, own_rows)) or "unknown"
                logger.warning("bad step %d: the loss is %g on rows %s", outcome.step, loss.item(), rows)

    def saved(self) -> None:
        """Restarts the count against ``max_bad_steps``: a checkpoint has been saved."""
        self._bad_since_save = 0

    def state_dict(self) -> dict[str, Any]:
        """Returns the state with which a resumed run decides as an uninterrupted one would."""
        count = int(self.num_good)
        return {
            "grad_norms": self.grad_norms.tolist()[: min(count, HISTORY_STEPS)],
            "num_good": count,
            "num_bad": self.num_bad,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what ``state_dict`` returned; bad steps that a rollback undoes still count."""
        self.grad_norms.fill_(torch.nan)
        self._unchecked = []
        if state:
            self.grad_norms[: len(state["grad_norms"])] = torch.tensor(state["grad_norms"], dtype=torch.float64)
            self.num_good.fill_(state["num_good"])
            self.num_bad = max(self.num_bad, state["num_bad"])


def backward_seed(loss: Tensor) -> Tensor:
    """Returns the factor of the loss in backward: 1, or NaN if the loss is not finite.

    So a bad loss reaches every gradient and, through the reduction over ranks, every rank, without another collective.
    """
    return 1 + 0 * loss.detach()


def format_rows(rows: Sequence[RowRange]) -> str:
    """Returns ``"0 to 7, 16 to 23"``."""
    return ", ".join(f"{first} to {last}" for first, last in rows)
