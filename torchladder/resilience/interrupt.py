"""Ending a run early: signals and a time limit, noticed at once, acted on where all ranks can agree.

A signal only leaves a note. The trainer asks for it before each step, validation batch and token of a sample, in an
exchange with the other ranks, so all of them stop at the same place and save. Where a process does nothing but wait
for itself (building, data), the wait is broken off: nothing would be lost.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)

FINISHED, FAILED, REQUEUE = 0, 1, 75
"""Exit codes. 75 is EX_TEMPFAIL of sysexits.h: nothing is wrong, start the run again."""


class Interrupted(Exception):  # noqa: N818
    """The run is to end here, in good order; the message says why."""


class Interrupt:
    """Notes why this process is to end.

    Args:
        max_minutes: minutes from now after which it is to end, 0 for no limit.
    """

    def __init__(self, max_minutes: float = 0.0) -> None:
        self.max_minutes = max_minutes
        self.reason = ""
        self._until = time.monotonic() + 60 * max_minutes if max_minutes else float("inf")
        self._waiting = False
        self._process = os.getpid()
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupt:
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def wanted(self) -> bool:
        """Whether this process has been asked to end."""
        if not self.reason and time.monotonic() >= self._until:
            self.reason = f"job.max_minutes = {self.max_minutes:g} are over"
        return bool(self.reason)

    @contextmanager
    def breaks(self) -> Iterator[None]:
        """Lets a signal break off what is done inside.

        Raises:
            Interrupted: there is or was one.
        """
        try:
            self._waiting = True
            if self.wanted:
                raise Interrupted(self.reason)
            yield
        finally:
            self._waiting = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a worker of the data loader: its parent decides
        self.reason = self.reason or signal.Signals(number).name
        if self._waiting:
            self._waiting = False
            raise Interrupted(self.reason)
