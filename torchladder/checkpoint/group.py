"""The ranks at work on one checkpoint: what one of them cannot do, all of them learn, and none waits for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

T = TypeVar("T")


class SaveError(RuntimeError):
    """A checkpoint could not be saved; the message says on which rank and why."""


class CheckpointGroup:
    """All ranks, over a group of their own on the CPU: a save in a thread never meets the collectives of training."""

    def __init__(self) -> None:
        self.process_group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self.rank = dist.get_rank() if self.process_group is not None else 0
        self.size = dist.get_world_size() if self.process_group is not None else 1

    def gather(self, value: T) -> list[T]:
        """Returns every rank's value, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.process_group)
        return values

    def broadcast(self, value: T) -> T:
        """Returns rank 0's value on every rank."""
        return self.gather(value)[0]

    def run_all(self, work: Callable[[], T]) -> list[T]:
        """Does something on every rank and returns what each of them made.

        Raises:
            SaveError: on every rank, when it failed on one.
        """
        made: T | None = None
        error = ""
        try:
            made = work()
        except CheckpointException as failure:  # of DCP, which has already told every rank
            rank, (cause, _) = next(iter(failure.failures.items()))
            error = f"rank {rank}: {type(cause).__name__}: {cause}"
        except Exception as failure:
            error = f"rank {self.rank}: {type(failure).__name__}: {failure}"
        results = self.gather((made, error))
        problems = dict.fromkeys(error for _, error in results if error)
        if problems:
            raise SaveError("; ".join(problems))
        return [made for made, _ in results]  # type: ignore[misc]

    def run_on_rank0(self, work: Callable[[], object]) -> None:
        """Does something on rank 0 while the others wait for it.

        Raises:
            SaveError: on every rank, when it failed.
        """
        self.run_all(lambda: work() if self.rank == 0 else None)
