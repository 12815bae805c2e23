"""The process group: rank, device, and reductions over all ranks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Annotated, TypeVar

import torch
import torch.distributed as dist
from annotated_types import Ge
from torch.distributed.distributed_c10d import _set_pg_timeout, _world
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from torchladder.distributed import rendezvous
from torchladder.registry import check_bounds, require

Number = TypeVar("Number", int, float)

LAUNCHED = "TORCHLADDER_LAUNCHED"
"""Environment variable of the ranks that ``distributed.launch`` starts: it prints the settings that they refuse."""


@dataclass(frozen=True)
class CommConfig:
    """Collective communication: timeouts and NCCL's flight recorder."""

    init_timeout_seconds: Annotated[int, Ge(1)] = 300
    """Timeout of collectives until the first step is done, which includes compilation and loading data."""

    train_timeout_seconds: Annotated[int, Ge(1)] = 300
    """Timeout of collectives after the first step."""

    trace_buf_size: Annotated[int, Ge(0)] = 20000
    """Collectives that NCCL's flight recorder keeps per rank and dumps on a timeout; 0 disables it."""

    save_traces_folder: str = "comm_traces"
    """Folder for the dumps, inside job.dump_folder."""

    save_traces_file_prefix: str = "rank_"
    """File name prefix of the dumps, followed by the rank."""

    def __post_init__(self) -> None:
        check_bounds(self, "comm")


@dataclass(frozen=True)
class Ranks:
    """This rank, the number of ranks, and this rank's device."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_rank0(self) -> bool:
        """Whether this is rank 0, which writes logs and files."""
        return self.rank == 0

    def sum(self, value: Number, duplicates: int = 1) -> Number:
        """Returns the sum over all ranks; ``duplicates`` ranks each hold the same value, which counts once."""
        return type(value)(self.sums(value)[0] / duplicates)

    def sums(self, *values: float) -> list[float]:
        """Returns the sum of each value over all ranks, with one all-reduce."""
        return self._all_reduce(values, dist.ReduceOp.SUM)

    def max(self, value: Number) -> Number:
        return type(value)(self._all_reduce((value,), dist.ReduceOp.MAX)[0])

    def set_timeout(self, seconds: int) -> None:
        """Sets the timeout of all process groups, once every rank has called this."""
        if self.world_size > 1:
            self.barrier()
            for group in list(_world.pg_map):  # including the groups of the mesh
                _set_pg_timeout(timedelta(seconds=seconds), group)

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def _all_reduce(self, values: Sequence[float], op: dist.ReduceOp.RedOpType) -> list[float]:
        # On the CPU through gloo, so that nothing waits for the GPU. float64 is exact for counts below 2**53.
        buffer = torch.tensor(values, dtype=torch.float64)
        if self.world_size > 1:
            dist.all_reduce(buffer, op=op)
        reduced: list[float] = buffer.tolist()
        return reduced


def init_distributed(config: CommConfig, folder: Path) -> Ranks:
    """Initializes the process group from torchrun's environment; without torchrun, one of a single rank.

    ``folder`` is the run's dump folder.
    """
    defaults = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    rank, size, local_rank = (int(os.environ.get(key, value)) for key, value in defaults.items())
    if torch.cuda.is_available():
        gpus = torch.cuda.device_count()
        require(
            local_rank < gpus,
            f"local rank {local_rank} has no GPU: this machine has {gpus}. Start at most one process per GPU (NGPU).",
        )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        _enable_flight_recorder(config, folder)
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


def _enable_flight_recorder(config: CommConfig, folder: Path) -> None:
    """Sets the environment of NCCL's flight recorder, except variables that are already set."""
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


def record_error(error: Exception) -> None:
    """Records an error of this rank for torchrun, which shows the first error of all ranks at the end."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        get_error_handler().record_exception(error)


def _store(rank: int, size: int, timeout: timedelta) -> dist.Store:
    if "RANK" not in os.environ:  # without torchrun there is a single rank
        return dist.HashStore()
    store, _, _ = next(dist.rendezvous("env://", rank, size, timeout=timeout))
    return rendezvous.new_store(store, rank, size, timeout)


def destroy_distributed() -> None:
    """Destroys the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
