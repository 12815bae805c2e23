"""Bad steps: a loss or gradient that is not finite, or a gradient norm far out; found on the device, told later.

Whether a step is bad is one number on the device, 0 or 1, that the optimizer obeys without anyone waiting for it. The
host learns of it when it waits for the device anyway, at the next report and before every checkpoint.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from torchladder.registry import ConfigError

logger = logging.getLogger(__name__)

HISTORY = 128
"""Norms of good steps that mean and standard deviation are taken over."""
MIN_HISTORY = 32
"""Norms that there must be before any counts as far out."""


@dataclass(frozen=True)
class ResilienceConfig:
    """What happens when a step goes wrong."""

    on_bad_step: Literal["stop", "skip", "rollback"] = "stop"
    """stop ends the run with an error; skip leaves weights and optimizer as they were; rollback continues from the
    newest checkpoint without the rows of the bad step. None of them saves a bad state."""

    norm_deviations: float = 0.0
    """A gradient norm is bad if it is this many standard deviations above the mean of the last 128; 0: never."""

    max_bad_steps: int = 10
    """Bad steps that skip and rollback may leave out between two checkpoints; one more stops the run."""

    def __post_init__(self) -> None:
        if not self.norm_deviations >= 0:
            raise ConfigError(f"resilience.norm_deviations = {self.norm_deviations}: must be 0 or more.")
        if self.max_bad_steps < 1:
            raise ConfigError(f"resilience.max_bad_steps = {self.max_bad_steps}: must be 1 or more.")


MicroBatchLoss = tuple[tuple[int, ...], Tensor]
"""The global rows of a micro-batch, as far as they are known, and its loss."""


class BadStepError(RuntimeError):
    """The run cannot go on; the message says which steps and rows were bad."""


class RollBack(Exception):  # noqa: N818
    """The run is to go back to its newest checkpoint, and to leave ``rows`` out from there on."""

    def __init__(self, rows: list[tuple[int, int]]) -> None:
        super().__init__(f"without the rows {format_rows(rows)}")
        self.rows = rows


@dataclass(frozen=True)
class StepOutcome:
    """A step whose end the host has not seen yet.

    Attributes:
        number: steps taken when it was over, from 1.
        rows: the first and the last global row that it trained on.
        bad: 0 or 1, on the device.
        norm: its gradient norm, on the device.
        losses: this rank's micro-batches: their rows, and their losses on the device.
    """

    number: int
    rows: tuple[int, int]
    bad: Tensor
    norm: Tensor
    losses: list[MicroBatchLoss]


class BadStepDetector:
    """Judges steps on the device, and tells the host about them later.

    Args:
        config: the section [resilience].
        optimizer: what must not see a bad gradient.
        device: where norms live.
        first: whether this rank speaks for all; the others tell only of losses of their own.

    Raises:
        ConfigError: skip, with an optimizer that cannot leave out a step without the host waiting for the device.
    """

    def __init__(
        self, config: ResilienceConfig, optimizer: torch.optim.Optimizer, device: torch.device, first: bool = True
    ) -> None:
        self.config = config
        self.first = first
        self.optimizer = optimizer
        # torch's fused optimizers read ``found_inf`` on the device: at 1 they change neither weights nor state.
        self._fused = all(group.get("fused") for group in optimizer.param_groups)
        if config.on_bad_step == "skip" and device.type != "cpu" and not self._fused:
            raise ConfigError(
                "resilience.on_bad_step = 'skip' on a GPU needs optimizer.implementation = 'fused': other "
                "implementations decide on the host, which would wait for the GPU at every step."
            )
        self.norms = torch.full((HISTORY,), torch.nan, dtype=torch.float64, device=device)
        self._places = torch.arange(HISTORY, device=device)
        self.count = torch.zeros((), dtype=torch.int64, device=device)
        self.bad_steps = 0
        """Bad steps of the run so far."""
        self._since_saved = 0
        self._unseen: list[StepOutcome] = []

    def check(self, norm: Tensor) -> Tensor:
        """Returns 1 on the device where a step with this gradient norm is bad, else 0; never waits.

        The norm of gradients that hold a NaN is NaN, and backward makes all of them NaN when the loss is not finite
        (see ``seed``), so the norm knows everything, alike on every rank.
        """
        norm = norm.detach().to(torch.float64)
        bad = ~norm.isfinite()
        if self.config.norm_deviations:
            known = ~self.norms.isnan()
            number = known.sum()
            mean = self.norms.nansum() / number
            squares = torch.where(known, (self.norms - mean).square(), 0.0).sum()
            far = norm > mean + self.config.norm_deviations * (squares / number).sqrt()
            bad = bad | (far & (number >= MIN_HISTORY))
            # A good norm takes the place of the oldest; a bad one takes none. No index: that would wait.
            here = (self._places == self.count % HISTORY) & ~bad
            self.norms = torch.where(here, norm, self.norms)
            self.count = self.count + ~bad
        return bad.to(torch.float32)

    def update(self, step: int, rows: tuple[int, int], norm: Tensor, losses: list[MicroBatchLoss]) -> None:
        """Lets the optimizer move the weights, unless the step is bad.

        Args:
            step: steps taken when this one is over.
            rows: the first and the last of its global rows.
            norm: the norm of all gradients before they were scaled down.
            losses: this rank's micro-batches.
        """
        bad = self.check(norm)
        if self._fused:
            self.optimizer.found_inf = bad  # type: ignore[attr-defined]
            self.optimizer.step()
        elif bad.device.type != "cpu" or not bad:  # stop and rollback throw away what a GPU does here
            self.optimizer.step()
        self._unseen.append(StepOutcome(step, rows, bad, norm.detach(), losses))

    def settle(self) -> None:
        """Looks at all steps since the last look; waits for the device. Every rank comes to the same end.

        Raises:
            BadStepError: there was a bad step, and the policy is to stop, or there were too many.
            RollBack: there was one, and the policy is to go back.
        """
        steps, self._unseen = self._unseen, []
        if not steps:
            return
        found = torch.stack([step.bad for step in steps]).tolist()
        bad = [step for step, is_bad in zip(steps, found, strict=True) if is_bad]
        if not bad:
            return
        self.bad_steps += len(bad)
        self._since_saved += len(bad)
        for step in bad:
            self._tell(step)
        rows = [step.rows for step in bad]
        if self.config.on_bad_step == "stop":
            raise BadStepError(
                f"step {bad[0].number} was bad: rows {format_rows(rows)} (resilience.on_bad_step = 'stop')"
            )
        if self._since_saved > self.config.max_bad_steps:
            raise BadStepError(
                f"{self._since_saved} bad steps between two checkpoints (resilience.max_bad_steps = "
                f"{self.config.max_bad_steps}), the last at the rows {format_rows(rows)}"
            )
        if self.config.on_bad_step == "rollback":
            raise RollBack(rows)

    def _tell(self, step: StepOutcome) -> None:
        if self.first:
            rows, norm = format_rows([step.rows]), step.norm.item()
            logger.warning(
                "bad step %d: gradient norm %g, rows %s (%d so far)", step.number, norm, rows, self.bad_steps
            )
        for mine, loss in step.losses:
            if not loss.isfinite():
                rows = ", ".join(map(str, mine)) or "unknown"
                logger.warning("bad step %d: the loss is %g on the rows %s", step.number, loss.item(), rows)

    def saved(self) -> None:
        """Begins to count bad steps anew: a checkpoint has been saved."""
        self._since_saved = 0

    def state(self) -> dict[str, Any]:
        """Returns what a run needs to judge on as if it had never stopped."""
        count = int(self.count)
        norms = self.norms.tolist()[: min(count, HISTORY)]
        return {"norms": norms, "count": count, "bad_steps": self.bad_steps}

    def load(self, state: dict[str, Any]) -> None:
        """Takes over what ``state`` returned."""
        self.norms.fill_(torch.nan)
        self.norms[: len(state["norms"])] = torch.tensor(state["norms"], dtype=torch.float64)
        self.count.fill_(state["count"])
        self.bad_steps = max(self.bad_steps, state["bad_steps"])  # going back is no way to forget
        self._unseen = []


def backward_seed(loss: Tensor) -> Tensor:
    """Returns the gradient to begin backward with: 1, or NaN where the loss is not finite.

    So a bad loss reaches every gradient and, through the sums over ranks, every rank; no exchange of its own is needed.
    """
    return 1 + 0 * loss.detach()


def format_rows(rows: Sequence[tuple[int, int]]) -> str:
    """Returns ranges of rows as text."""
    return ", ".join(f"{first} to {last}" for first, last in rows)
