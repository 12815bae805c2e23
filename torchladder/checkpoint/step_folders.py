"""Checkpoints ``step-N`` in a folder: writing, verifying, choosing and deleting them.

Every path is a local path or a URL (``checkpoint.storage``).
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.utils._pytree import tree_leaves

from torchladder.checkpoint.checksums import CHECKSUM_FILE, format_checksums, parse_checksums
from torchladder.checkpoint.group import CheckpointGroup, SaveError
from torchladder.checkpoint.model_state import StateDict
from torchladder.checkpoint.run_state import RUN_STATE_FILE, RunState
from torchladder.checkpoint.storage import CheckpointStorage, get_storage
from torchladder.disk_errors import DISK_FULL
from torchladder.registry import ConfigError

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.toml"
"""The file of a checkpoint with the settings of the run that saved it."""

METADATA_FILE = ".metadata"
"""DCP's own file: which tensors there are, and where."""

RunStateCheck = Callable[[RunState, str], None]
"""Raises ConfigError if the run state, at the path of its checkpoint, is that of another run."""


def is_complete(path: str | Path) -> bool:
    """Whether a folder has the files of a checkpoint; ``find_corruption`` tells whether they are intact."""
    storage = get_storage(path)
    return all(storage.exists(f"{path}/{name}") for name in (METADATA_FILE, RUN_STATE_FILE, CHECKSUM_FILE))


def complete_steps(folder: str | Path) -> list[int]:
    """Returns the steps of the complete checkpoints in a folder, in order."""
    return [step for step in get_storage(folder).steps(str(folder)) if is_complete(f"{folder}/step-{step}")]


def read_checksums(path: str | Path) -> dict[str, str]:
    """Returns file name -> SHA-256 of a checkpoint.

    Raises:
        OSError, ValueError: ``SHA256SUMS`` cannot be read or is not a list of checksums.
    """
    return parse_checksums(get_storage(path).read(f"{path}/{CHECKSUM_FILE}").decode())


def write_checksums(path: str | Path, checksums: Mapping[str, str] | None = None) -> None:
    """Writes ``SHA256SUMS``, of all files of the checkpoint unless their checksums are given."""
    storage = get_storage(path)
    if checksums is None:
        checksums = {name: storage.sha256(f"{path}/{name}") for name in storage.list_names(str(path))}
    storage.write(f"{path}/{CHECKSUM_FILE}", format_checksums(checksums).encode())


def find_corruption(path: str | Path, names: Sequence[str] = (), rank: int = 0, num_ranks: int = 1) -> str | None:
    """Returns what is wrong with the files of a checkpoint, None if they are intact.

    Args:
        path: the checkpoint.
        names: verify only those of these files that the checkpoint has; empty for all.
        rank: verify only the files of this rank, of ``num_ranks`` that share the work.
        num_ranks: how many ranks share the work.
    """
    storage = get_storage(path)
    try:
        checksums = read_checksums(path)
        files = {*checksums, METADATA_FILE, RUN_STATE_FILE}
        for file in sorted(files.intersection(names) if names else files)[rank::num_ranks]:
            if file not in checksums or not storage.exists(f"{path}/{file}"):
                return f"{file} is missing"
            if storage.sha256(f"{path}/{file}") != checksums[file]:
                return f"{file} is not what was saved (its checksum differs)"
    except Exception as error:  # whatever a storage raises, the other ranks wait for the answer
        return f"{type(error).__name__}: {error}"
    return None


def find_load_error(path: str, check: RunStateCheck | None, group: CheckpointGroup) -> str | None:
    """Returns what is wrong with a checkpoint, the same on every rank; None if it is intact.

    Each rank reads its share of the files, after ``check`` (None: only the weights are of interest), since reading all
    of them may take a long time.

    Raises:
        ConfigError: ``check`` rejects the checkpoint.
    """
    error = next(filter(None, group.all_gather(find_corruption(path, (RUN_STATE_FILE, CONFIG_FILE)))), None)
    if error is None:
        if check is not None:
            check(RunState.read(path), path)
        found = find_corruption(path, rank=group.rank, num_ranks=group.size)
        error = next(filter(None, group.all_gather(found)), None)
    return error


def find_newest_intact(folder: str, load_step: int, check: RunStateCheck, group: CheckpointGroup) -> str | None:
    """Returns the newest intact checkpoint, or that of ``load_step`` if it is not -1; None if there are none.

    A damaged checkpoint is reported, and the one before it is tried.

    Raises:
        ConfigError: the checkpoint of ``load_step`` does not exist or is damaged, all checkpoints are damaged, or
            ``check`` rejects one.
    """
    steps = group.broadcast(get_storage(folder).steps(folder))
    if load_step != -1 and load_step not in steps:
        known = f"the steps {', '.join(map(str, steps))}" if steps else "no checkpoints"
        raise ConfigError(f"checkpoint.load_step = {load_step}: {folder} has {known}.")
    for step in [load_step] if load_step != -1 else reversed(steps):
        path = f"{folder}/step-{step}"
        error = find_load_error(path, check, group)
        if error is None:
            return path
        if group.rank == 0:
            logger.warning("checkpoint: skipping %s, which is damaged: %s", path, error)
    if not steps:
        return None
    damaged = f"{folder}/step-{load_step}" if load_step != -1 else f"every checkpoint in {folder}"
    raise ConfigError(
        f"{damaged} is damaged. Choose another with checkpoint.load_step, or start over in another checkpoint.folder."
    )


def write_checkpoint(path: str, state: StateDict, files: Mapping[str, bytes], group: CheckpointGroup) -> None:
    """Writes a checkpoint on all ranks and reads every file back; it is complete when this returns.

    Args:
        path: where it is, ``<folder>/step-N``.
        state: of model and optimizer.
        files: small files, name -> content.
        group: the ranks.

    Raises:
        SaveError: on every rank; the checkpoint does not exist.
    """
    storage = get_storage(path)
    partial = storage.partial_path(path)
    try:
        group.run_on_rank0(lambda: storage.begin(path))
        per_rank = group.run_on_all_ranks(lambda: _write_tensors(storage, partial, state, group))
        checksums = {name: digest for part in per_rank for name, digest in part.items()}
        group.run_on_rank0(lambda: _write_files(storage, path, files, checksums))
    except SaveError as error:
        if group.rank == 0:
            with suppress(Exception):  # what is left may be what fills the disk
                storage.delete(partial)
        if DISK_FULL in str(error):
            num_bytes = sum(leaf.nbytes for leaf in tree_leaves(state) if isinstance(leaf, torch.Tensor))
            raise SaveError(f"{error}; a checkpoint takes {num_bytes:,} bytes") from error
        raise


def _write_tensors(
    storage: CheckpointStorage, partial: str, state: StateDict, group: CheckpointGroup
) -> dict[str, str]:
    """Writes the tensors of this rank; returns the checksums of its files."""
    writer = storage.writer(partial)
    dcp.save(state, storage_writer=writer, process_group=group.process_group)
    verify_written(storage, partial, writer.checksums)
    return writer.checksums


def _write_files(
    storage: CheckpointStorage, path: str, files: Mapping[str, bytes], checksums: Mapping[str, str]
) -> None:
    partial = storage.partial_path(path)
    for name, content in files.items():
        storage.write(f"{partial}/{name}", content)
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    verify_written(storage, partial, digests)
    write_checksums(partial, {**checksums, **digests})
    storage.commit(path)


def verify_written(storage: CheckpointStorage, folder: str, checksums: Mapping[str, str]) -> None:
    """Reads files back.

    Raises:
        OSError: a file cannot be read or does not hold what was written.
    """
    for name, digest in checksums.items():
        if storage.sha256(f"{folder}/{name}") != digest:
            raise OSError(f"{folder}/{name} does not hold what was written")


def prune(folder: str, step: int, keep: int, keep_every: int) -> None:
    """Deletes checkpoints older than the newest ``keep`` up to ``step``, except at multiples of ``keep_every``.

    Later ones are of the run that this one branched off from, and stay until they are overwritten.
    """
    storage = get_storage(folder)
    kept = [one for one in complete_steps(folder) if one <= step][-keep:]
    for old in storage.steps(folder) if keep and kept else []:  # also the remains of an interrupted deletion
        if old < kept[0] and (keep_every == 0 or old % keep_every):
            try:
                storage.delete(f"{folder}/step-{old}")
            except Exception as error:  # of any storage; training must not stop for it
                logger.warning("checkpoint: step-%d could not be deleted: %s", old, error)


def is_restart() -> bool:
    """Whether torchrun or Slurm has restarted this run; load_step no longer applies then."""
    return any(os.environ.get(key, "0") != "0" for key in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))
