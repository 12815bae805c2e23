"""Writing one checkpoint: aside, checked, synced, named; at once or in a thread while training goes on."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint._state_dict_stager import StateDictStager
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from torchladder.checkpoint import checksums, step_folders
from torchladder.checkpoint.checkpoint_config import CheckpointConfig
from torchladder.checkpoint.group import CheckpointGroup, SaveError
from torchladder.checkpoint.state import State
from torchladder.registry import ConfigError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PendingSave:
    """One checkpoint to be written.

    Attributes:
        path: the folder that it becomes.
        step: steps behind the run.
        files: small files, name → content.
    """

    path: Path
    step: int
    files: Mapping[str, bytes]


class Saver:
    """Writes checkpoints, one at a time, on all ranks together.

    Args:
        config: the section [checkpoint].
        group: the ranks.
        device: where the state lives.

    Raises:
        ConfigError: pinned memory is asked for where there is no CUDA.
    """

    def __init__(self, config: CheckpointConfig, group: CheckpointGroup, device: torch.device) -> None:
        self.config = config
        self.group = group
        self._copying: Future[State] | None = None
        self._writing: Future[None] | None = None
        pinned = config.async_mode == "async_with_pinned_mem"
        if pinned and device.type != "cuda":
            raise ConfigError(
                f"checkpoint.async_mode = 'async_with_pinned_mem' copies from a GPU, and this run is on {device.type}: "
                "set async or disabled."
            )
        if config.async_mode != "disabled":
            self._stager = _Stager(
                StagingOptions(
                    use_pinned_memory=pinned,
                    use_shared_memory=False,
                    use_async_staging=pinned,
                    use_non_blocking_copy=pinned,
                )
            )
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")

    @property
    def busy(self) -> bool:
        """Whether something has been started whose ``result`` nobody has asked for."""
        return self._writing is not None

    @property
    def settled(self) -> bool:
        """Whether nothing is being written any more; never waits."""
        return self._writing is None or self._writing.done()

    def start(self, job: PendingSave, state: State) -> None:
        """Copies the state aside and writes it in a thread."""
        staged = self._stager.stage(state)
        self._copying = staged if isinstance(staged, Future) else None
        self._writing = self._thread.submit(self._when_copied, job, staged)

    def wait_for_copy(self) -> None:
        """Waits until the weights may change again."""
        if self._copying is not None:
            self._copying.result()
            self._copying = None

    def result(self) -> None:
        """Waits for what is being written.

        Raises:
            SaveError: it could not be written.
        """
        if self._writing is not None:
            writing, self._writing = self._writing, None
            self.wait_for_copy()
            writing.result()

    def close(self) -> None:
        """Waits until nothing is being written; says nothing of how it ended."""
        if self._writing is not None:
            wait([self._writing])

    def write(self, job: PendingSave, state: State) -> None:
        """Writes a checkpoint; when this returns it is complete, and the ones before that are not kept are gone.

        Raises:
            SaveError: on every rank; what there was before is as it was.
        """
        partial = step_folders.partial_of(job.path)
        try:
            self.group.run_on_rank0(lambda: step_folders.begin(job.path))
            parts = self.group.run_all(lambda: self._write_tensors(partial, state))
            sums = {name: digest for part in parts for name, digest in part.items()}
            self.group.run_on_rank0(lambda: self._complete(job, sums))
        except SaveError:
            if self.group.rank == 0:
                step_folders.discard(partial)
            raise
        if self.group.rank == 0:
            logger.info("saved %s", job.path)
            step_folders.prune(job.path.parent, job.step, self.config.keep_latest_k, self.config.keep_every)

    def _when_copied(self, job: PendingSave, staged: Any) -> None:
        self.write(job, staged.result() if isinstance(staged, Future) else staged)

    def _write_tensors(self, partial: Path, state: State) -> dict[str, str]:
        """Writes this rank's share and reads it back; returns its sums."""
        writer = checksums.ChecksumWriter(partial)
        dcp.save(state, storage_writer=writer, process_group=self.group.process_group)
        checksums.verify(partial, writer.sums)
        return writer.sums

    def _complete(self, job: PendingSave, sums: dict[str, str]) -> None:
        partial = step_folders.partial_of(job.path)
        for name, content in job.files.items():
            step_folders.write(partial / name, content)
            sums[name] = checksums.sha256(partial / name)
        step_folders.write(partial / checksums.SUMS, checksums.to_text(sums).encode())
        step_folders.commit(job.path)


class _Stager(DefaultStager):
    """Copies into the same memory each time: pinned memory is dear to make, and the last save is over by then."""

    def __init__(self, options: StagingOptions) -> None:
        super().__init__(options)
        self._state_dict_stager = _Copier(options.use_pinned_memory, options.use_shared_memory)


class _Copier(StateDictStager):
    def close(self) -> None:
        """Keeps its memory: PyTorch 2.11 closes it after each copy, and it could not copy again."""
