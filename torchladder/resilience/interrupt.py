"""Ending a run early: signals and a time limit.

Signals are blocked and stay pending. The trainer looks for them before each step, validation batch and sampled token,
in an all-reduce with the other ranks, so all of them stop at the same step and save. Work that only this process waits
for (building the model, reading data) is interrupted at once: nothing is lost.

Slurm, systemd and terminals signal every process of a run at once. Processes that are started in between, such as the
compilers of torch.compile, inherit the blocked signals, so the step that waits for them does not fail.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)

FINISHED, FAILED, REQUEUE = 0, 1, 75
"""Exit codes. 75 is EX_TEMPFAIL of sysexits.h: nothing is wrong, start the run again."""


class Interrupted(Exception):  # noqa: N818
    """The run must stop here and save; the message is the reason."""


class Interrupt:
    """Records why this process should end.

    Args:
        max_minutes: time limit from now on; 0 for none.

    Attributes:
        reason: a signal or the time limit; empty while there is none.
    """

    def __init__(self, max_minutes: float = 0.0) -> None:
        self.max_minutes = max_minutes
        self.reason = ""
        self._deadline = time.monotonic() + 60 * max_minutes if max_minutes else float("inf")
        self._interruptible = False
        self._pid = os.getpid()
        self._previous: dict[signal.Signals, Any] = {}
        self._previous_mask: set[int] = set()

    def __enter__(self) -> Interrupt:
        self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        self._previous_mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        return self

    def __exit__(self, *error: object) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._previous_mask)  # pending signals still come to our handler
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @property
    def requested(self) -> bool:
        """Whether this process should end."""
        if pending := signal.sigpending().intersection(SIGNALS):
            self.reason = self.reason or signal.Signals(min(pending)).name
        if not self.reason and time.monotonic() >= self._deadline:
            self.reason = f"time limit reached (job.max_minutes = {self.max_minutes:g})"
        return bool(self.reason)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Raises ``Interrupted`` in the body on a signal, or at once if this process should end already."""
        try:
            self._interruptible = True
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            if self.requested:
                raise Interrupted(self.reason)
            yield
        finally:
            self._interruptible = False
            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return  # a data loader worker: its parent decides
        self.reason = self.reason or signal.Signals(number).name
        if self._interruptible:
            self._interruptible = False
            raise Interrupted(self.reason)
