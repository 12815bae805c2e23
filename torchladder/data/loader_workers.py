"""Worker processes of the data loader: they ignore the signals that are meant for the run, and may die.

Slurm, systemd and terminals signal every process of a run at once, its workers included. The run saves and exits; its
workers must live until then, and one that dies anyway must not interrupt whatever the run is doing.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def ignore_run_signals(worker: int) -> None:
    """Lets a worker (``worker_init_fn``) ignore the signals that end a run, except SIGTERM from its parent."""
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # macOS: no way to know who sent a signal
        return
    parent = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def exit_when_terminated() -> None:
        # multiprocessing terminates its daemons at exit and waits for them.
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=exit_when_terminated, daemon=True).start()


def start_workers(loader: Iterable[T]) -> Iterator[T]:
    """Returns ``iter(loader)`` without PyTorch's SIGCHLD handler.

    The handler raises in the main thread as soon as a worker dies, in the middle of a step or of a save. Without it the
    death is noticed, within seconds, by the next read that waits for the worker.
    """
    if threading.current_thread() is not threading.main_thread():  # PyTorch sets no handler either
        return iter(loader)
    previous = signal.getsignal(signal.SIGCHLD)
    try:
        return iter(loader)
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL if previous is None else previous)


def is_worker_death(error: RuntimeError) -> bool:
    """Whether a read failed because a worker has died; PyTorch has no exception type for it."""
    return "DataLoader worker" in str(error) and "exited unexpectedly" in str(error)
