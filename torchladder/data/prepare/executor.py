"""Where tasks are done: in this process, in processes of this machine, or on a Ray cluster.

An executor is called with the work, which is sent to each worker once, and the tasks; it yields what the work returns
for each task, as they finish.
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
from typing import Any, Protocol, TypeVar

from torchladder.data.extras import missing
from torchladder.registry import ConfigError, Registry

Task = TypeVar("Task")
Done = TypeVar("Done")


class Executor(Protocol):
    """Does tasks."""

    def __call__(self, work: Callable[[Task], Done], tasks: Sequence[Task]) -> Iterator[Done]: ...


registry: Registry[Executor] = Registry("executor")


@registry.register("local")
def local_executor(workers: int | None = None) -> Executor:
    """Processes of this machine.

    Args:
        workers: how many; every core that this process may use where nothing is said.
    """
    count = available_cpus() if workers is None else workers
    if count < 1:
        raise ConfigError(f"workers is {count}; it is 1 at least.")
    return _here if count == 1 else ProcessPool(count)


@registry.register("ray")
def ray_executor(workers: int | None = None) -> Executor:
    """A Ray cluster: the one that RAY_ADDRESS names or that runs here, or one made of this machine.

    Inputs and outputs lie where every node finds them under the same path.

    Args:
        workers: how many, one core each; every core of the cluster where nothing is said.
    """
    try:
        import ray as library
    except ImportError:
        raise missing("ray", "ray", "--executor ray") from None
    if workers is not None and workers < 1:
        raise ConfigError(f"workers is {workers}; it is 1 at least.")
    return RayPool(library, workers)


def available_cpus() -> int:
    """Returns how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _here(work: Callable[[Task], Done], tasks: Sequence[Task]) -> Iterator[Done]:
    return map(work, tasks)


class ProcessPool:
    """Processes of this machine.

    They are forked from a process that has only imported the library, so that they start fast and inherit neither
    threads nor open files of the caller.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers

    def __call__(self, work: Callable[[Task], Done], tasks: Sequence[Task]) -> Iterator[Done]:
        if len(tasks) < 2:  # not worth a process, which takes seconds to start
            yield from map(work, tasks)
            return
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([name for name in sys.modules if name.startswith("torchladder.")])
        pool = ProcessPoolExecutor(
            min(self.workers, len(tasks)), mp_context=context, initializer=_begin, initargs=(work,)
        )
        try:
            for future in as_completed([pool.submit(_do, task) for task in tasks]):
                yield future.result()
        except BrokenProcessPool:
            raise ConfigError(
                "a worker process was killed, often for want of memory: fewer --workers need less. "
                "What is finished is kept, and the same command continues."
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


_work: Any = None
"""In a worker process: what it was started to do."""


def _begin(work: Callable[[Any], Any]) -> None:
    """Prepares a worker process: its work, a quiet end on Ctrl-C, and an end when the caller ends."""
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_follow_caller, daemon=True).start()


def _follow_caller() -> None:
    """Ends this process when the caller has ended, even by a signal that leaves it no last word."""
    caller = multiprocessing.parent_process()
    if caller is not None:
        caller.join()
        os._exit(1)


def _do(task: Any) -> Any:
    return _work(task)


class RayPool:
    """A Ray cluster."""

    def __init__(self, library: Any, workers: int | None) -> None:
        self.ray = library
        self.workers = workers

    def __call__(self, work: Callable[[Task], Done], tasks: Sequence[Task]) -> Iterator[Done]:
        if not tasks:
            return
        ray = self.ray
        ours = not ray.is_initialized()
        if ours:
            ray.init(log_to_driver=False, logging_level=logging.WARNING)
        workers = min(self.workers or int(ray.cluster_resources().get("CPU", 1)), len(tasks))
        # A worker that is lost with its node comes up elsewhere and does its task again.
        kind = ray.remote(num_cpus=1, max_restarts=-1, max_task_retries=3)(_Worker)
        actors = [kind.remote(work) for _ in range(workers)]
        try:
            yield from self._done(actors, list(tasks))
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except ray.exceptions.RayActorError as error:
            raise ConfigError(f"a worker of the cluster failed; the same command continues. {error}") from error
        finally:
            for actor in actors:
                ray.kill(actor)
            if ours:
                ray.shutdown()

    def _done(self, actors: list[Any], tasks: list[Any]) -> Iterator[Any]:
        waiting = iter(tasks)
        busy = {actor.do.remote(task): actor for actor, task in zip(actors, waiting, strict=False)}
        while busy:
            [ready], _ = self.ray.wait(list(busy), num_returns=1)
            actor = busy.pop(ready)
            task = next(waiting, None)
            if task is not None:
                busy[actor.do.remote(task)] = actor
            yield self.ray.get(ready)


class _Worker:
    """Does tasks on a node of the cluster."""

    def __init__(self, work: Callable[[Any], Any]) -> None:
        self.work = work

    def do(self, task: Any) -> Any:
        return self.work(task)
