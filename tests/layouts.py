"""Several ranks on this machine, for tests: any function on each of them, or trainings of the debug config."""

import json
import multiprocessing
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch._dynamo.utils import counters

from torchladder import config
from torchladder.distributed.ranks import Ranks
from torchladder.training import run_plan as plans
from torchladder.training.trainer import Trainer

DEBUG = Path(__file__).parents[1] / "train_configs" / "debug.toml"
CONFIG = ["--job.config_file", str(DEBUG)]
ALWAYS = [*CONFIG, "--validation.no_enable", "--metrics.no_enable_tensorboard"]


def launch(function, ranks, *arguments):
    """Calls ``function(ranks, *arguments)`` on so many ranks, forked off one process that has imported torch."""
    multiprocessing.set_forkserver_preload(["torchladder.training.trainer"])
    with tempfile.TemporaryDirectory() as folder:
        every = (ranks, f"file://{folder}/store", function, arguments)
        processes.start_processes(_main, every, nprocs=ranks, start_method="forkserver")


def _main(rank, ranks, store, function, arguments):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
    function(Ranks(rank, ranks, torch.device("cpu")), *arguments)
    dist.barrier()
    dist.destroy_process_group()


def train(ranks, folder, layouts):
    """Trains once for each name → settings, all in the one process group."""
    for name, argv in layouts.items():
        settings = config.load([*ALWAYS, "--job.dump_folder", f"{folder}/{name}", *argv])
        torch._dynamo.reset()
        counters.clear()
        Trainer(plans.make_plan(settings, ranks.world_size), ranks).train()
        if ranks.is_rank0:
            (Path(folder) / name / "graphs").write_text(str(counters["stats"]["unique_graphs"]))


def lines(folder):
    """Returns what a training reported."""
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def losses(folder, key="loss"):
    """Returns step → loss of a training."""
    return {line["step"]: line[key] for line in lines(folder) if "loss" in line}
