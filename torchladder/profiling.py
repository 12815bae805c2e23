"""Profiler traces and memory snapshots on a schedule, for the few steps that one wants to look into."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch.profiler import ProfilerActivity

from torchladder.registry import ConfigError

logger = logging.getLogger(__name__)

MEMORY_EVENTS = 100_000
"""Allocations and frees that a snapshot looks back on."""


@dataclass(frozen=True, kw_only=True)
class ProfilingConfig:
    """Traces and memory snapshots.

    Raises:
        ConfigError: a setting that cannot be.
    """

    enable_profiling: bool = False
    """Trace a few steps every profile_freq steps; open a trace in Perfetto or chrome://tracing."""

    save_traces_folder: str = "profile_traces"
    """Folder of the traces, inside job.dump_folder."""

    profile_freq: int = 10
    """Steps from one trace to the next, and from one memory snapshot to the next."""

    profiler_warmup: int = 3
    """Steps before those of a trace that run under the profiler and are thrown away."""

    profiler_active: int = 1
    """Steps in a trace."""

    enable_memory_snapshot: bool = False
    """Record CUDA's allocations; open a snapshot at pytorch.org/memory_viz."""

    save_memory_snapshot_folder: str = "memory_snapshot"
    """Folder of the memory snapshots, inside job.dump_folder."""

    def __post_init__(self) -> None:
        for key, least in (("profile_freq", 1), ("profiler_warmup", 0), ("profiler_active", 1)):
            if getattr(self, key) < least:
                raise ConfigError(f"profiling.{key} = {getattr(self, key)}: must be {least} or more.")
        if self.profiler_warmup + self.profiler_active > self.profile_freq:
            raise ConfigError(
                f"profiling.profile_freq = {self.profile_freq}: must hold the {self.profiler_warmup} steps of "
                f"profiler_warmup and the {self.profiler_active} of profiler_active."
            )


class Profiler:
    """What the loop tells of: one call of ``step`` after each training step."""

    def __init__(self) -> None:
        self.parts: list[_Part] = []

    def step(self) -> None:
        for part in self.parts:
            part.step()


@contextmanager
def profile(config: ProfilingConfig, folder: Path, rank: int = 0, step: int = 0) -> Iterator[Profiler]:
    """Profiles the loop inside, where the settings ask for it.

    Writes ``<traces>/iteration_N/rankR_trace.json`` and ``<snapshots>/iteration_N/rankR_memory_snapshot.pickle``, N the
    steps taken when it was written; after running out of memory also ``iteration_N_exit``.

    Args:
        config: the section ``[profiling]``.
        folder: the run's dump folder.
        rank: this process.
        step: steps already taken.

    Raises:
        ConfigError: memory snapshots without CUDA.
    """
    with ExitStack() as stack:
        profiler = Profiler()
        if config.enable_memory_snapshot:
            if not torch.cuda.is_available():
                raise ConfigError(
                    "profiling.enable_memory_snapshot: snapshots are of CUDA memory; there is no GPU here."
                )
            snapshots = _Snapshots(config.profile_freq, folder / config.save_memory_snapshot_folder, rank, step)
            profiler.parts.append(stack.enter_context(_recorded(snapshots)))
        if config.enable_profiling:
            traces = folder / config.save_traces_folder
            profiler.parts.append(stack.enter_context(_tracer(config, traces, rank, step)))
        yield profiler


class _Part(Protocol):
    def step(self) -> None: ...


def _tracer(config: ProfilingConfig, folder: Path, rank: int, step: int) -> torch.profiler.profile:
    def save(profiler: torch.profiler.profile) -> None:
        path = folder / f"iteration_{step + profiler.step_num}" / f"rank{rank}_trace.json"
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


@dataclass
class _Snapshots:
    """Writes CUDA's memory history every so many steps."""

    freq: int
    folder: Path
    rank: int
    taken: int

    def step(self) -> None:
        self.taken += 1
        if self.taken % self.freq == 0:
            self.save()

    def save(self, suffix: str = "") -> None:
        path = self.folder / f"iteration_{self.taken}{suffix}" / f"rank{self.rank}_memory_snapshot.pickle"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pickle.dumps(torch.cuda.memory._snapshot()))
        logger.info("memory snapshot: %s", path)


@contextmanager
def _recorded(snapshots: _Snapshots) -> Iterator[_Snapshots]:
    torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)
    try:
        yield snapshots
    except torch.cuda.OutOfMemoryError:
        snapshots.save("_exit")
        raise
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
