"""The ranks that save and load together: a failure on one rank is an error on all, so that no rank waits for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from torchladder.disk_errors import describe_disk_error, find_disk_error

T = TypeVar("T")


class SaveError(RuntimeError):
    """A checkpoint could not be saved; the message says on which rank and why."""


class CheckpointGroup:
    """All ranks, in a separate gloo group: saving in a thread does not interfere with the collectives of training."""

    def __init__(self) -> None:
        self.process_group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self.rank = dist.get_rank() if self.process_group is not None else 0
        self.size = dist.get_world_size() if self.process_group is not None else 1

    def all_gather(self, value: T) -> list[T]:
        """Returns every rank's value, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.process_group)
        return values

    def broadcast(self, value: T) -> T:
        """Returns rank 0's value on every rank."""
        return self.all_gather(value)[0]

    def run_on_all_ranks(self, work: Callable[[], T]) -> list[T]:
        """Calls ``work`` on every rank and returns every rank's result.

        Raises:
            SaveError: on every rank, if ``work`` failed on any.
        """
        result: T | None = None
        error = ""
        try:
            result = work()
        except CheckpointException as failure:  # of DCP, which raises it on every rank
            rank, (cause, _) = next(iter(failure.failures.items()))
            error = f"rank {rank}: {_describe(cause)}"
        except Exception as failure:
            error = f"rank {self.rank}: {_describe(failure)}"
        results = self.all_gather((result, error))
        errors = dict.fromkeys(error for _, error in results if error)
        if errors:
            raise SaveError("; ".join(errors))
        return [result for result, _ in results]  # type: ignore[misc]

    def run_on_rank0(self, work: Callable[[], object]) -> None:
        """Calls ``work`` on rank 0 while the others wait.

        Raises:
            SaveError: on every rank, if ``work`` failed.
        """
        self.run_on_all_ranks(lambda: work() if self.rank == 0 else None)


def _describe(error: BaseException) -> str:
    disk_error = find_disk_error(error)
    return describe_disk_error(disk_error) if disk_error else f"{type(error).__name__}: {error}"
