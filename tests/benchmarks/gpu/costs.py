"""What a run pays beside the model: building masks, compiling, saving checkpoints."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.benchmarks.gpu.stepping import CUDA, DEVICE, Shape, clock, seconds_per_step, trainer, wait
from tests.benchmarks.timing import seconds, table
from torchladder import mask
from torchladder.schedule import FULL_ATTENTION

SHAPE = Shape("1b", 8192, 4) if CUDA else Shape("debug", 512, 2)
SAVED = Shape("120m", 8192, 8) if CUDA else SHAPE  # 1.6 GB: the disk is not what is measured
MASKS = ("document", "chunk")
KERNEL = "flex" if CUDA else "sdpa"


def run() -> dict[str, Any]:
    """Prints and returns each cost."""
    found: dict[str, float] = {}
    for cost in (masks, checkpoints, compilation):
        if clock.allows(f"costs of {cost.__name__}"):
            found |= cost()
    table(["cost", "figure"], [[name.replace("_", " "), f"{value:.4g}"] for name, value in found.items()])
    return found


def masks() -> dict[str, float]:
    """Times what one step spends on its mask, as a share of the step."""
    with trainer(SHAPE, masks=MASKS, kernel=KERNEL) as run:
        step = seconds_per_step(run)
        positions = next(run.loader).positions

        def build() -> None:
            start = mask.from_names(MASKS, positions, SHAPE.seq_len // 2)
            run.passes.kernels[FULL_ATTENTION].prepare(start, DEVICE)
            mask.pairs(start)

        building = seconds({"mask": build})["mask"]
    return {"step_seconds": step, "mask_seconds": building, "mask_share_of_step": building / step}


def compilation() -> dict[str, float]:
    """Times the first step in fresh processes: with an empty cache of compiled code, and again with a full one."""
    with tempfile.TemporaryDirectory() as cache:
        cold, warm = (_first_step(cache) for _ in range(2))
    return {"first_step_seconds_cold": cold, "first_step_seconds_warm": warm}


def checkpoints() -> dict[str, float]:
    """Times how long training stands still for a checkpoint, saved at once and in the background."""
    found = {}
    for mode in ("disabled", "async"):
        settings = ("--checkpoint.enable", "--checkpoint.async_mode", mode, "--checkpoint.keep_latest_k", "2")
        with trainer(SAVED, *settings, masks=MASKS, kernel=KERNEL) as run:
            for _ in range(2):  # the first save sets up its plan and its memory
                run.train_step()
                wait()
                begin = time.perf_counter()
                run.fault_tolerance.save(run.state())
                wait()
                found[f"checkpoint_stall_seconds_{mode}"] = time.perf_counter() - begin
                run.checkpointer.wait()
    return found


def first_step() -> float:
    """Returns the time of the first step of this process."""
    with trainer(SHAPE, masks=MASKS, kernel=KERNEL) as run:
        begin = time.perf_counter()
        run.train_step()
        wait()
        return time.perf_counter() - begin


def _first_step(cache: str) -> float:
    code = "from tests.benchmarks.gpu import costs; print(costs.first_step())"
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": str(Path(cache, "triton"))}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return float(done.stdout.split()[-1])
