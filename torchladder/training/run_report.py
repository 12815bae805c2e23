"""What a run says beside its plan: that the CPUs are busy; at its end where its results are, and the next command."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

import torch

from torchladder import checkpoint
from torchladder.config import Config

logger = logging.getLogger(__name__)

RESULTS = ("ladder.png", "metrics.jsonl", "samples.txt")
"""Files of a run that people look at, in its folder."""


def warn_of_busy_cpus(device: torch.device) -> None:
    """Warns of several threads on a CPU that other programs keep busy: each operation waits for its slowest thread."""
    cpus, threads, (load, *_) = os.cpu_count() or 1, torch.get_num_threads(), os.getloadavg()
    active = os.environ.get("OMP_WAIT_POLICY", "active").lower() == "active"  # waiting threads keep their CPU
    if device.type == "cpu" and threads > 1 and load > cpus and active:
        busy = f"load {load:.0f} on {cpus} CPUs"
        logger.warning(
            "this machine is busy (%s): set OMP_WAIT_POLICY=passive, or %d threads hinder others", busy, threads
        )


def log_end(config: Config, finished: bool, seconds: float, totals: Mapping[str, float]) -> None:
    """Logs what a run has left behind.

    Args:
        finished: whether it took all its steps; otherwise it was interrupted.
        seconds: since the process began.
        totals: of the run; energy and CO2 are logged if it measured them.
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
    if config.metrics.energy_country and "energy_kwh" in totals:
        energy = totals["energy_kwh"], totals["co2_kg"]
        logger.info("energy      %.4g kWh, %.4g kg of CO2 equivalents (estimated)", *energy)
    if newest and config.tokenizer.name != "none":
        logger.info('next        %s generate --checkpoint %s --prompt "..."', _command(), folder)
    elif newest:
        logger.info("next        %s evaluate %s --files ...", _command(), folder)


def _command() -> str:
    """Returns how a shell finds the command torchladder of this environment, which need not be active."""
    here = Path(sys.executable).parent / "torchladder"
    if not here.exists() or shutil.which("torchladder") == str(here):
        return "torchladder"
    return os.path.relpath(here) if here.is_relative_to(Path.cwd()) else str(here)
