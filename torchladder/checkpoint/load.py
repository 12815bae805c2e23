"""Choosing the checkpoint to continue from: the newest one whose every file is what was saved."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torchladder.checkpoint import checksums, folders
from torchladder.checkpoint.team import Team
from torchladder.registry import ConfigError

logger = logging.getLogger(__name__)

Check = Callable[[dict[str, Any]], None]
"""Raises ConfigError where the ``run.json`` of a checkpoint is of another run."""


def newest(folder: Path, load_step: int, check: Check, team: Team) -> Path | None:
    """Returns the newest intact checkpoint, or the one of ``load_step``; None where there are none at all.

    A damaged or incomplete one is reported, and the one before is taken.

    Raises:
        ConfigError: the one that the settings name, or every one, is damaged, or it is of another run.
    """
    found = team.broadcast(folders.named(folder))
    if load_step != -1 and load_step not in found:
        known = ", ".join(map(str, found)) or "none"
        raise ConfigError(f"checkpoint.load_step = {load_step}: {folder} has the steps {known}.")
    for step in [load_step] if load_step != -1 else reversed(found):
        path = folders.path_of(folder, step)
        wrong = problem(path, check, team)
        if wrong is None:
            return path
        if team.rank == 0:
            logger.warning("checkpoint: %s is damaged and passed over: %s", path, wrong)
    if not found:
        return None
    raise ConfigError(
        f"{folders.path_of(folder, load_step) if load_step != -1 else f'every checkpoint in {folder}'} is damaged. "
        "Name another with checkpoint.load_step, or begin anew in another checkpoint.folder."
    )


def problem(path: Path, check: Check, team: Team) -> str | None:
    """Returns what is wrong with a checkpoint, on every rank alike, None where it is intact.

    Each rank reads its share of the files; what takes long comes after the question whether it is of this run.

    Raises:
        ConfigError: ``check`` refuses it.
    """
    try:
        sums = checksums.read(path)
        missing = [name for name in (folders.METADATA, folders.RUN) if name not in sums]
        missing += [name for name in sums if not (path / name).is_file()]
        wrong = f"{missing[0]} is missing" if missing else checksums.problem(path, folders.RUN, sums[folders.RUN])
    except (OSError, ValueError) as error:
        wrong = f"{checksums.SUMS}: {getattr(error, 'strerror', None) or error}"
    wrong = next(filter(None, team.gather(wrong)), None)
    if wrong is not None:
        return wrong
    check(folders.read_run(path))
    mine = sorted(sums)[team.rank :: team.size]
    problems = (checksums.problem(path, name, sums[name]) for name in mine)
    return next(filter(None, team.gather(next(filter(None, problems), None))), None)


def restarted() -> bool:
    """Whether torchrun or Slurm started this run again: then load_step has been followed already."""
    return any(os.environ.get(key, "0") != "0" for key in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))
