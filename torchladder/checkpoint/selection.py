"""Choosing the checkpoint to continue from: the newest one whose every file is what was saved."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

from torchladder.checkpoint import checksums, step_folders
from torchladder.checkpoint.group import CheckpointGroup
from torchladder.checkpoint.run_state import RUN_STATE_FILE, RunState
from torchladder.registry import ConfigError

logger = logging.getLogger(__name__)

Check = Callable[[RunState], None]
"""Raises ConfigError where the ``run.json`` of a checkpoint is of another run."""


def newest_intact(folder: Path, load_step: int, check: Check, group: CheckpointGroup) -> Path | None:
    """Returns the newest intact checkpoint, or the one of ``load_step``; None where there are none at all.

    A damaged or incomplete one is reported, and the one before is taken.

    Raises:
        ConfigError: the one that the settings name, or every one, is damaged, or it is of another run.
    """
    found = group.broadcast(step_folders.named(folder))
    if load_step != -1 and load_step not in found:
        known = ", ".join(map(str, found)) or "none"
        raise ConfigError(f"checkpoint.load_step = {load_step}: {folder} has the steps {known}.")
    for step in [load_step] if load_step != -1 else reversed(found):
        path = step_folders.path_of(folder, step)
        wrong = find_error(path, check, group)
        if wrong is None:
            return path
        if group.rank == 0:
            logger.warning("checkpoint: %s is damaged and passed over: %s", path, wrong)
    if not found:
        return None
    damaged = step_folders.path_of(folder, load_step) if load_step != -1 else f"every checkpoint in {folder}"
    raise ConfigError(
        f"{damaged} is damaged. Name another with checkpoint.load_step, or begin anew in another checkpoint.folder."
    )


def find_error(path: Path, check: Check, group: CheckpointGroup) -> str | None:
    """Returns what is wrong with a checkpoint, on every rank alike, None where it is intact.

    Each rank reads its share of the files; what takes long comes after the question whether it is of this run.

    Raises:
        ConfigError: ``check`` refuses it.
    """
    try:
        sums = checksums.read(path)
        missing = [name for name in (step_folders.METADATA, RUN_STATE_FILE) if name not in sums]
        missing += [name for name in sums if not (path / name).is_file()]
        wrong = (
            f"{missing[0]} is missing" if missing else checksums.file_error(path, RUN_STATE_FILE, sums[RUN_STATE_FILE])
        )
    except (OSError, ValueError) as error:
        wrong = f"{checksums.SUMS}: {getattr(error, 'strerror', None) or error}"
    wrong = next(filter(None, group.gather(wrong)), None)
    if wrong is not None:
        return wrong
    check(RunState.read(path))
    mine = sorted(sums)[group.rank :: group.size]
    problems = (checksums.file_error(path, name, sums[name]) for name in mine)
    return next(filter(None, group.gather(next(filter(None, problems), None))), None)


def restarted() -> bool:
    """Whether torchrun or Slurm started this run again: then load_step has been followed already."""
    return any(os.environ.get(key, "0") != "0" for key in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))
