"""Fills the caches of compiled code in parallel, so that the other parts measure and do not compile.

All blocks of a model are one graph, so models of two layers compile what the whole ones need.
"""

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tests.benchmarks.gpu import peer
from tests.benchmarks.gpu.speed import Run, runs
from tests.benchmarks.gpu.stepping import CUDA, clock, trainer
from tests.benchmarks.timing import table

PROCESSES = 10 if CUDA else 1
LAYERS = 2


def run() -> dict[str, Any]:
    """Prints and returns the seconds that each first step took, with the start of its process."""
    chosen = [index for index, one in enumerate(jobs()) if clock.allows(_describe(one))]
    with ThreadPoolExecutor(PROCESSES) as pool:
        seconds = list(pool.map(_first_step, chosen))
    table(
        ["compiled in parallel", "s"],
        [[_describe(jobs()[index]), f"{took:.1f}"] for index, took in zip(chosen, seconds, strict=True)],
    )
    return {"steps": {_describe(jobs()[index]): took for index, took in zip(chosen, seconds, strict=True)}}


def jobs() -> list[Run | peer.Contestant]:
    """Returns what ``speed`` and ``peer`` measure."""
    return [*runs(), *(peer.contestants() if peer.is_here() else [])]


def _describe(job: Run | peer.Contestant) -> str:
    return f"speed of {job}" if isinstance(job, Run) else str(job)


def _first_step(index: int) -> float:
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", __name__, str(index)], capture_output=True, text=True)
    if done.returncode:
        print(f"{_describe(jobs()[index])}: {done.stderr.splitlines()[-1]}")
    return time.perf_counter() - begin


def _take_step(job: Run | peer.Contestant) -> None:
    if isinstance(job, peer.Contestant):
        with job.step(LAYERS) as step:
            step()
        return
    few = ("--model.n_layers", str(LAYERS))
    with trainer(job.shape, *job.settings, *few, masks=job.masks, kernel=job.kernel) as made:
        made.train_step()


if __name__ == "__main__":
    _take_step(jobs()[int(sys.argv[1])])
