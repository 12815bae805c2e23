"""``python -m torchladder.train``: settings, ranks, plan, run."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing.errors import record

from torchladder import config as settings
from torchladder import plan as plans
from torchladder.distributed import ranks as processes
from torchladder.metrics import init_logger
from torchladder.registry import ConfigError
from torchladder.trainer import Trainer


def main(argv: list[str] | None = None) -> int:
    """Runs one training; returns the exit code: 0 done, 2 for settings or inputs that cannot be."""
    try:
        config = settings.load(sys.argv[1:] if argv is None else argv)
        plan = plans.make(config, int(os.environ.get("WORLD_SIZE", "1")))
        if config.debug.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True, warn_only=config.debug.deterministic_warn_only)
        ranks = processes.join(config.comm, Path(config.job.dump_folder))
        try:
            init_logger(ranks.rank)
            Trainer(plan, ranks).train()
        finally:
            processes.leave()
    except ConfigError as error:
        processes.report(error)
        return settings.fail(error)
    return 0


if __name__ == "__main__":
    sys.exit(record(main)())
