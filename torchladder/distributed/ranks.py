"""The processes of a run: who am I, which device is mine, and sums over all of them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout, _world
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from torchladder.distributed import rendezvous
from torchladder.registry import ConfigError

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class CommConfig:
    """Communication between ranks."""

    init_timeout_seconds: int = 300
    """Seconds that ranks wait for each other at start-up, compilation and the first data included."""

    train_timeout_seconds: int = 300
    """Seconds after which a collective counts as hung once training runs."""

    trace_buf_size: int = 20000
    """Collectives that NCCL's flight recorder remembers on each rank and writes down if one hangs; 0: none."""

    save_traces_folder: str = "comm_traces"
    """Folder for what it writes, inside job.dump_folder."""

    save_traces_file_prefix: str = "rank_"
    """Beginning of its files' names; the rank follows."""

    def __post_init__(self) -> None:
        for key, least in (("init_timeout_seconds", 1), ("train_timeout_seconds", 1), ("trace_buf_size", 0)):
            if getattr(self, key) < least:
                raise ConfigError(f"comm.{key} = {getattr(self, key)}: must be {least} or more.")


@dataclass(frozen=True)
class Ranks:
    """This process among all processes of the run."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process speaks for the run: logs, pictures, files."""
        return self.rank == 0

    def sum(self, value: Number, copies: int = 1) -> Number:
        """Returns the sum of a number over all ranks, where ``copies`` of them each hold the same one."""
        total = self._reduce(value, dist.ReduceOp.SUM)
        return total if copies == 1 else type(value)(total / copies)

    def sums(self, *values: float) -> list[float]:
        """Returns the sums of several numbers over all ranks, in one exchange."""
        if self.size == 1:
            return [float(value) for value in values]
        box = torch.tensor(values, dtype=torch.float64)  # on the CPU, as in _reduce
        dist.all_reduce(box)
        found: list[float] = box.tolist()
        return found

    def max(self, value: Number) -> Number:
        """Returns the largest of a number over all ranks."""
        return self._reduce(value, dist.ReduceOp.MAX)

    def broadcast(self, value: Any) -> Any:
        """Returns rank 0's object on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def set_timeout(self, seconds: int) -> None:
        """Changes after how long a collective counts as hung, once all ranks are past the slow start."""
        if self.size > 1:
            self.barrier()
            for group in list(_world.pg_map):  # those of the mesh too
                _set_pg_timeout(timedelta(seconds=seconds), group)

    def barrier(self) -> None:
        """Waits until every rank is here."""
        if self.size > 1:
            dist.barrier()

    def _reduce(self, value: Number, op: dist.ReduceOp.RedOpType) -> Number:
        if self.size == 1:
            return value
        # On the CPU, through gloo: the accelerator is never waited for. float64 holds counts below 2**53 exactly.
        box = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(box, op=op)
        return type(value)(box.item())


def join(config: CommConfig, folder: Path) -> Ranks:
    """Joins the process group that torchrun set up, or makes one of this process alone.

    Args:
        config: timeouts, and what is written down when one is over.
        folder: the run's.

    Raises:
        ConfigError: torchrun started more processes than this machine has GPUs.
    """
    rank, size, local_rank = (int(os.environ.get(key, value)) for key, value in _SINGLE.items())
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"local rank {local_rank} has no GPU: this machine has {torch.cuda.device_count()}. "
                "Start as many processes as GPUs (NGPU)."
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        _record(config, folder)
    else:
        device = torch.device("cpu")
    timeout = timedelta(seconds=config.init_timeout_seconds)
    dist.init_process_group(
        backend="cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        timeout=timeout,
        store=_store(rank, size, timeout),
        rank=rank,
        world_size=size,
    )
    return Ranks(rank, size, device)


def _record(config: CommConfig, folder: Path) -> None:
    """Turns NCCL's flight recorder on, unless the environment has its own mind."""
    if config.trace_buf_size == 0:
        return
    traces = folder / config.save_traces_folder
    traces.mkdir(parents=True, exist_ok=True)
    settings = {
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_BUFFER_SIZE": str(config.trace_buf_size),
        "TORCH_FR_DUMP_TEMP_FILE": str(traces / config.save_traces_file_prefix),
    }
    for key, value in settings.items():
        os.environ.setdefault(key, value)


def report(error: Exception) -> None:
    """Hands torchrun an error of this rank, to show the first of all ranks' when they have stopped."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        get_error_handler().record_exception(error)


def _store(rank: int, size: int, timeout: timedelta) -> dist.Store:
    if "RANK" not in os.environ:  # without torchrun there is nobody to meet
        return dist.HashStore()
    store, _, _ = next(dist.rendezvous("env://", rank, size, timeout=timeout))
    return rendezvous.new_store(store, rank, size, timeout)


def leave() -> None:
    """Leaves the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


_SINGLE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
"""What torchrun sets in the environment, and what holds without it."""
