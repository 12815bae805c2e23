"""Profiler traces and CUDA memory snapshots of a few steps, on a schedule."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from annotated_types import Ge
from torch.profiler import ProfilerActivity

from torchladder.registry import check_bounds, require

logger = logging.getLogger(__name__)

MAX_MEMORY_EVENTS = 100_000
"""Allocations and frees that a memory snapshot records."""


@dataclass(frozen=True, kw_only=True)
class ProfilingConfig:
    """The section ``[profiling]``: traces and memory snapshots.

    Raises:
        ConfigError: a value is out of range.
    """

    enable_profiling: bool = False
    """Trace a few steps every profile_freq steps; open a trace in Perfetto or chrome://tracing."""

    save_traces_folder: str = "profile_traces"
    """Folder of the traces, inside job.dump_folder."""

    profile_freq: Annotated[int, Ge(1)] = 10
    """Steps from one trace to the next, and from one memory snapshot to the next."""

    profiler_warmup: Annotated[int, Ge(0)] = 3
    """Warmup steps before a trace: they run under the profiler and are discarded."""

    profiler_active: Annotated[int, Ge(1)] = 1
    """Steps in a trace."""

    enable_memory_snapshot: bool = False
    """Record CUDA allocations; open a snapshot at pytorch.org/memory_viz."""

    save_memory_snapshot_folder: str = "memory_snapshot"
    """Folder of the memory snapshots, inside job.dump_folder."""

    def __post_init__(self) -> None:
        check_bounds(self, "profiling")
        require(
            self.profiler_warmup + self.profiler_active <= self.profile_freq,
            f"profiling.profile_freq = {self.profile_freq}: must be at least profiler_warmup + profiler_active = "
            f"{self.profiler_warmup} + {self.profiler_active}.",
        )


@contextmanager
def profile(config: ProfilingConfig, folder: Path, rank: int = 0, step: int = 0) -> Iterator[Callable[[], None]]:
    """Runs the enabled profilers; yields the function to call after each training step.

    Writes ``<traces>/iteration_N/rankR_trace.json`` and ``<snapshots>/iteration_N/rankR_memory_snapshot.pickle``, N the
    steps taken. When CUDA runs out of memory, the last snapshot goes to ``iteration_N_exit``.

    Args:
        config: the section ``[profiling]``.
        folder: the run's dump folder.
        rank: this process.
        step: steps already taken.

    Raises:
        ConfigError: memory snapshots are enabled without CUDA.
    """
    with ExitStack() as stack:
        profilers: list[Callable[[], None]] = []
        if config.enable_memory_snapshot:
            available = torch.cuda.is_available()
            require(available, "profiling.enable_memory_snapshot: snapshots record CUDA memory; there is no GPU.")
            profilers.append(stack.enter_context(_memory_snapshots(config, folder, rank, step)))
        if config.enable_profiling:
            profilers.append(stack.enter_context(_trace_profiler(config, folder, rank, step)).step)

        def step_profilers() -> None:
            for step_profiler in profilers:
                step_profiler()

        yield step_profilers


def _trace_profiler(config: ProfilingConfig, folder: Path, rank: int, step: int) -> torch.profiler.profile:
    def save(profiler: torch.profiler.profile) -> None:
        iteration = f"iteration_{step + profiler.step_num}"
        path = folder / config.save_traces_folder / iteration / f"rank{rank}_trace.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(path))
        logger.info("profiler trace: %s", path)

    wait = config.profile_freq - config.profiler_warmup - config.profiler_active
    return torch.profiler.profile(
        activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available(),
        schedule=torch.profiler.schedule(wait=wait, warmup=config.profiler_warmup, active=config.profiler_active),
        on_trace_ready=save,
        record_shapes=True,
    )


@contextmanager
def _memory_snapshots(config: ProfilingConfig, folder: Path, rank: int, step: int) -> Iterator[Callable[[], None]]:
    """Records CUDA's memory history; yields the function to call after each step."""

    def save(suffix: str = "") -> None:
        iteration = f"iteration_{step}{suffix}"
        path = folder / config.save_memory_snapshot_folder / iteration / f"rank{rank}_memory_snapshot.pickle"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pickle.dumps(torch.cuda.memory._snapshot()))
        logger.info("memory snapshot: %s", path)

    def after_step() -> None:
        nonlocal step
        step += 1
        if step % config.profile_freq == 0:
            save()

    torch.cuda.memory._record_memory_history(max_entries=MAX_MEMORY_EVENTS)
    try:
        yield after_step
    except torch.cuda.OutOfMemoryError:
        save("_exit")
        raise
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
