"""What a run says at its end: where its results are, and which command is next."""

from __future__ import annotations

import logging
from datetime import timedelta
from pathlib import Path

from torchladder import checkpoint
from torchladder.config import Config

logger = logging.getLogger(__name__)

RESULTS = ("ladder.png", "metrics.jsonl", "samples.txt")
"""Files of a run that people look at, in its folder."""


def log_end(config: Config, finished: bool, seconds: float) -> None:
    """Logs what a run has left behind.

    Args:
        finished: whether it took all its steps; otherwise it was interrupted.
        seconds: since the process began.
    """
    folder = Path(config.job.dump_folder)
    checkpoints = config.checkpoint.folder_in(folder)
    steps = checkpoint.complete_steps(checkpoints) if config.checkpoint.enable else []
    newest = f"{checkpoints}/step-{steps[-1]}" if steps else ""
    if not finished:
        saved = "nothing is saved: checkpoint.enable is off" if not config.checkpoint.enable else "nothing is saved yet"
        logger.info("%s", f"saved {newest}; the same command continues from it" if newest else saved)
        return
    left = [name for name in RESULTS if (folder / name).exists()]
    checkpoint_text = f", and {newest}" if newest else ""
    duration = timedelta(seconds=round(seconds))
    logger.info("finished    in %s: %s has %s%s", duration, folder, ", ".join(left), checkpoint_text)
    if newest and config.tokenizer.name != "none":
        logger.info('next        torchladder generate --checkpoint %s --prompt "..."', folder)
    elif newest:
        logger.info("next        torchladder evaluate %s --files ...", folder)
