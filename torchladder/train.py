"""``python -m torchladder.train``: reads the settings, joins the ranks, plans and trains."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

from torchladder import checkpoint
from torchladder import config as settings
from torchladder.distributed import ranks as processes
from torchladder.metrics import init_logger
from torchladder.registry import ConfigError
from torchladder.resilience import bad_steps, interrupt, missing_ranks
from torchladder.training import run_plan as plans
from torchladder.training.trainer import Trainer

logger = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> int:
    """Runs one training; returns the exit code: 0 finished, 75 interrupted, 1 failed, 2 bad settings."""
    try:
        config = settings.load(sys.argv[1:] if argv is None else argv)
        with interrupt.Interrupt(config.job.max_minutes) as interruption:
            return run(config, interruption)
    except ConfigError as error:
        processes.record_error(error)
        return settings.print_config_error(error)


def run(config: settings.Config, interruption: interrupt.Interrupt) -> int:
    """Trains, unless the run has finished already; returns the exit code."""
    try:
        with interruption.interruptible():
            plan = plans.make_plan(config, int(os.environ.get("WORLD_SIZE", "1")))
            if config.debug.deterministic:
                os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
                torch.use_deterministic_algorithms(True, warn_only=config.debug.deterministic_warn_only)
            ranks = processes.init_distributed(config.comm, Path(config.job.dump_folder))
            init_logger(ranks.rank)
            trainer = Trainer(plan, ranks, interruption)
        return interrupt.FINISHED if trainer.train() else interrupt.REQUEUE
    except interrupt.Interrupted as reason:
        logger.warning("ending before the first step: %s", reason)
        return interrupt.REQUEUE
    except (checkpoint.SaveError, bad_steps.BadStepError) as error:
        logger.error("%s", error)
        return interrupt.FAILED
    except RuntimeError as error:
        if dist.is_initialized() and missing_ranks.is_rank_failure(error):
            _report_missing_ranks()
        raise
    finally:
        processes.destroy_distributed()


def _report_missing_ranks() -> None:
    """Logs the ranks that a failed collective was waiting for."""
    try:
        missing = missing_ranks.find_missing_ranks(dist.get_rank(), dist.get_world_size())
    except RuntimeError:
        logger.error("a collective failed and the store is unreachable: the machine of rank 0 may be down")
        return
    if missing:
        names = ", ".join(map(str, missing))
        logger.error("no answer from rank %s: dead, hung, or ended by an error of its own", names)


def process_code(code: int) -> int:
    """Returns the exit code of this process.

    torchrun takes every code but 0 for a failure and restarts the run. So under torchrun an interrupted run exits with
    0, and leaves its 75 in the file that TORCHLADDER_EXIT_FILE names, for whoever started torchrun.
    """
    file = os.environ.get("TORCHLADDER_EXIT_FILE")
    if file and os.environ.get("LOCAL_RANK", "0") == "0":
        Path(file).write_text(str(code))
    return 0 if code == interrupt.REQUEUE and "TORCHELASTIC_RUN_ID" in os.environ else code


def end(code: int) -> NoReturn:
    """Exits this process.

    Under torchrun without Python's shutdown: threads of libraries abort it now and then, and torchrun would take a rank
    that has finished for one that has failed.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    end(process_code(record(main)() or 0))
