"""The folders of checkpoints: their names, which of them are complete, naming a new one, deleting old ones."""

from __future__ import annotations

import logging
import os
import re
import shutil
from pathlib import Path

from torchladder.checkpoint.checksums import SUMS
from torchladder.checkpoint.run_state import RUN_STATE_FILE, RunState

logger = logging.getLogger(__name__)

SETTINGS = "config.toml"
"""The file of a checkpoint with the settings of the run that saved it."""

METADATA = ".metadata"
"""DCP's own file: what tensors there are and where."""


def path_of(folder: Path, step: int) -> Path:
    """Returns where the checkpoint of a step is."""
    return folder / f"step-{step}"


def complete(path: Path) -> bool:
    """Whether a folder has what every checkpoint has; whether its files are intact is for ``checksums.problems``."""
    return all((path / name).is_file() for name in (METADATA, RUN_STATE_FILE, SUMS))


def named(folder: Path) -> list[int]:
    """Returns the steps of all folders that are called a checkpoint, in order, as integers."""
    matches = (re.fullmatch(r"step-(\d+)", path.name) for path in folder.glob("step-*"))
    return sorted(int(match[1]) for match in matches if match)


def steps(folder: Path) -> list[int]:
    """Returns the steps of the complete checkpoints in a folder, in order."""
    return [step for step in named(folder) if complete(path_of(folder, step))]


def finished(folder: Path, total: int) -> bool:
    """Whether the newest checkpoint is that of a run's last step, with nothing left to do after it."""
    found = steps(folder)
    if not found or found[-1] < total:
        return False
    try:
        return not RunState.read(path_of(folder, found[-1])).post_step_pending
    except (OSError, ValueError):
        return False


def partial_of(path: Path) -> Path:
    """Returns where a checkpoint is written before it has its name."""
    return path.with_name(f"{path.name}.partial")


def begin(path: Path) -> None:
    """Makes an empty folder to write a checkpoint into; what killed saves have left is deleted."""
    for left in (*path.parent.glob("step-*.partial"), *path.parent.glob("step-*.old")):
        shutil.rmtree(left, ignore_errors=True)
    partial_of(path).mkdir(parents=True)


def discard(partial: Path) -> None:
    """Removes what a failed save has written, which may be what fills the disk."""
    shutil.rmtree(partial, ignore_errors=True)


def commit(path: Path) -> None:
    """Gives a checkpoint whose files are on disk its name; an older one of that name is deleted afterwards."""
    old = path.with_name(f"{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    sync(partial_of(path))
    if path.exists():  # of a run that went on from an earlier step, or damaged
        path.rename(old)
    partial_of(path).rename(path)
    sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def write(path: Path, content: bytes) -> None:
    """Writes a small file, and its folder where it has one of its own, on disk when this returns."""
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    sync(path.parent)


def prune(folder: Path, step: int, keep: int, keep_every: int) -> None:
    """Deletes what is older than the newest ``keep`` checkpoints up to ``step``, but for each of ``keep_every`` steps.

    Later ones are of a run that this one branched off from, and stay until they are written again.
    """
    kept = [found for found in steps(folder) if found <= step][-keep:]
    for found in named(folder) if keep and kept else []:  # incomplete ones as well: of a deletion that was killed
        if found < kept[0] and (keep_every == 0 or found % keep_every):
            try:
                # Without its sums it no longer counts as complete, however far the deletion gets.
                (path_of(folder, found) / SUMS).unlink(missing_ok=True)
                shutil.rmtree(path_of(folder, found))
            except OSError as error:
                logger.warning("checkpoint: step-%d could not be deleted: %s", found, error)


def sync(path: Path) -> None:
    """Waits until a file or a folder's names are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
