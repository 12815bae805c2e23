"""Runs tasks in this process, in worker processes of this machine, or on a Ray cluster.

An executor is called with a function and a list of tasks. It sends the function to each worker once and yields the
function's results as tasks finish, in any order.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import resource_tracker
from typing import Any, Protocol, TypeVar

from torchladder.data.extras import import_extra
from torchladder.registry import ConfigError, Registry, require

Task = TypeVar("Task")
Result = TypeVar("Result")


class Executor(Protocol):
    """Maps a function over tasks; results come in the order in which tasks finish."""

    def __call__(self, function: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[Result]: ...


registry: Registry[Executor] = Registry("executor")


def available_cpus() -> int:
    """Returns the number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@registry.register("local")
@dataclass(frozen=True)
class LocalExecutor:
    """Worker processes of this machine.

    They fork from a server process that has only imported the library: they start fast, and inherit neither threads
    nor open files from the caller.

    Args:
        workers: number of processes; 1 runs in the calling process, None uses every available CPU.
    """

    workers: int | None = None

    def __post_init__(self) -> None:
        require(self.workers is None or self.workers > 0, f"--workers {self.workers}: must be 1 or more.")

    def __call__(self, function: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[Result]:
        workers = min(self.workers or available_cpus(), len(tasks))
        if workers < 2:  # not worth a process, which takes seconds to start
            yield from map(function, tasks)
            return
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([name for name in sys.modules if name.startswith("torchladder.")])
        pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_init_worker, initargs=(function,))
        # Ctrl-C reaches every process of a terminal. Here it waits until all workers have started; the server and the
        # workers inherit the blocked signal, so that it waits until a worker has been initialized.
        resource_tracker.ensure_running()  # its start would unblock the signal
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            futures = [pool.submit(_run_task, task) for task in tasks]
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool:
            raise ConfigError(
                "a worker process was killed, often because memory ran out: try fewer --workers. "
                "Finished parts are kept; run the same command again to continue."
            ) from None
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            pool.shutdown(cancel_futures=True)


_worker_function: Any = None
"""In a worker process: the function that its tasks call."""


def _init_worker(function: Callable[[Any], Any]) -> None:
    """Sets the worker's function, restores Ctrl-C, and makes the worker exit together with its parent."""
    global _worker_function
    _worker_function = function
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    parent = multiprocessing.parent_process()
    assert parent is not None

    def exit_with_parent() -> None:
        parent.join()  # returns even after SIGKILL
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()


def _run_task(task: Any) -> Any:
    return _worker_function(task)


@registry.register("ray")
@dataclass(frozen=True)
class RayExecutor:
    """A Ray cluster: the one that RAY_ADDRESS names or that runs on this machine, else a new local one.

    Inputs and outputs must lie under the same path on every node.

    Args:
        workers: number of actors, one CPU each; None uses every CPU of the cluster.
    """

    workers: int | None = None

    def __post_init__(self) -> None:
        import_extra("ray", "ray", "--executor ray")
        require(self.workers is None or self.workers > 0, f"--workers {self.workers}: must be 1 or more.")

    def __call__(self, function: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[Result]:
        if not tasks:
            return
        ray = import_extra("ray", "ray", "--executor ray")
        started_here = not ray.is_initialized()
        if started_here:
            ray.init(log_to_driver=False, logging_level=logging.WARNING)
        workers = min(self.workers or int(ray.cluster_resources().get("CPU", 1)), len(tasks))
        # Ray restarts an actor that was lost with its node, and retries its task.
        actor_class = ray.remote(num_cpus=1, max_restarts=-1, max_task_retries=3)(_RayWorker)
        actors = [actor_class.remote(function) for _ in range(workers)]
        try:
            pool = ray.util.ActorPool(actors)
            yield from pool.map_unordered(lambda actor, task: actor.run_task.remote(task), tasks)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except ray.exceptions.RayActorError as error:
            raise ConfigError(f"a Ray worker failed; run the same command again to continue. {error}") from error
        finally:
            for actor in actors:
                ray.kill(actor)
            if started_here:
                ray.shutdown()


@dataclass(frozen=True)
class _RayWorker:
    function: Callable[[Any], Any]

    def run_task(self, task: Any) -> Any:
        return self.function(task)
