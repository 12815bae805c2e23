"""``python -m torchladder.train``: loads the settings, plans the run, initializes the ranks and trains."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

from torchladder import checkpoint
from torchladder.config import Config, as_config_error, load, print_config_error
from torchladder.disk_errors import naming_path
from torchladder.distributed.ranks import LAUNCHED, destroy_distributed, init_distributed, record_error
from torchladder.metrics import init_logger
from torchladder.registry import ConfigError
from torchladder.resilience import bad_steps, interrupt, missing_ranks
from torchladder.training.run_plan import make_plan
from torchladder.training.run_report import log_end, warn_of_busy_cpus
from torchladder.training.start_checks import check_start
from torchladder.training.trainer import Trainer

logger = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> int:
    """Runs training; returns the exit code: 0 finished, 75 interrupted, 1 failed, 2 invalid settings."""
    try:
        return run(load(sys.argv[1:] if argv is None else argv))
    except (ConfigError, OSError) as error:
        record_error(as_config_error(error))
        return 2 if LAUNCHED in os.environ else print_config_error(error)  # the launcher prints one for all ranks


def run(config: Config) -> int:
    """Trains in this process, unless the run has finished already; returns the exit code, as ``main`` does.

    A signal or ``job.max_minutes`` ends the run early.

    Raises:
        ConfigError: settings that do not fit together, or input that is missing.
    """
    with interrupt.Interrupt(config.job.max_minutes) as interruption:
        return _run(config, interruption)


def _run(config: Config, interruption: interrupt.Interrupt) -> int:
    begin = time.monotonic()
    try:
        with interruption.interruptible(), naming_path(config.job.dump_folder):
            plan = make_plan(config, int(os.environ.get("WORLD_SIZE", "1")))
            check_start(config)
            if config.debug.deterministic:
                os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
                torch.use_deterministic_algorithms(True, warn_only=config.debug.deterministic_warn_only)
            ranks = init_distributed(config.comm, Path(config.job.dump_folder))
            init_logger(ranks.rank)
            if ranks.is_rank0:
                warn_of_busy_cpus(ranks.device)
            trainer = Trainer(plan, ranks, interruption)
        finished = trainer.train()
        if ranks.is_rank0:
            log_end(config, finished, time.monotonic() - begin, trainer.metrics.totals)
        return interrupt.FINISHED if finished else interrupt.REQUEUE
    except interrupt.Interrupted as reason:
        logger.warning("ending before the first step: %s", reason)
        return interrupt.REQUEUE
    except (checkpoint.SaveError, bad_steps.BadStepError) as error:
        logger.error("%s", error)
        return interrupt.FAILED
    except RuntimeError as error:
        if dist.is_initialized() and missing_ranks.is_rank_failure(error):
            missing_ranks.log_missing_ranks(dist.get_rank(), dist.get_world_size())
        raise
    finally:
        destroy_distributed()


def exit_process(code: int) -> NoReturn:
    """Exits this process, and writes the exit code to the file that TORCHLADDER_EXIT_FILE names, if it is set.

    torchrun treats every code but 0 as a failure and restarts the run. So an interrupted run exits with 0 under
    torchrun, and whoever started torchrun reads its 75 from the file. Python's shutdown is skipped there: threads of
    libraries sometimes abort in it, and torchrun would treat the finished rank as failed.
    """
    for number in interrupt.SIGNALS:  # torchrun passes a signal on that the rank may have got already
        signal.signal(number, signal.SIG_IGN)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # of a log on a full disk, which Python would turn into another exit code
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    file = os.environ.get("TORCHLADDER_EXIT_FILE")
    if file and os.environ.get("LOCAL_RANK", "0") == "0":
        Path(file).write_text(str(code))
    if "TORCHELASTIC_RUN_ID" in os.environ:
        logging.shutdown()
        os._exit(0 if code == interrupt.REQUEUE else code)
    sys.exit(code)


if __name__ == "__main__":
    exit_process(record(main)() or 0)
