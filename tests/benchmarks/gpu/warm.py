"""Fills the caches of compiled code in parallel, so that the other parts measure and do not compile.

All blocks of a model are one graph, so models of two layers compile what the whole ones need.
"""

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tests.benchmarks.gpu.speed import Run, runs
from tests.benchmarks.gpu.stepping import CUDA, Shape, trainer
from tests.benchmarks.timing import table

PROCESSES = 6 if CUDA else 1


def run() -> dict[str, Any]:
    """Prints and returns the seconds that each trainer's first step took."""
    chosen = _distinct()
    with ThreadPoolExecutor(PROCESSES) as pool:
        seconds = list(pool.map(_first_step, range(len(chosen))))
    rows = [
        [f"{one.shape}, {one.kernel}, {'+'.join(one.masks)}", f"{took:.1f}"]
        for one, took in zip(chosen, seconds, strict=True)
    ]
    table(["compiled in parallel", "s"], rows)
    return {"seconds": seconds}


def _distinct() -> list[Run]:
    """Returns the runs of ``speed`` and those that only other parts have."""
    others = [Run(Shape("1b", 8192, 4), kernel, ("causal",)) for kernel in ("fold", "flex")] if CUDA else []
    return [*runs(), *others]


def _first_step(index: int) -> float:
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", __name__, str(index)], capture_output=True, text=True)
    if done.returncode:
        print(f"{_distinct()[index]}: {done.stderr.splitlines()[-1]}")
    return time.perf_counter() - begin


if __name__ == "__main__":
    one = _distinct()[int(sys.argv[1])]
    with trainer(one.shape, *one.settings, "--model.n_layers", "2", masks=one.masks, kernel=one.kernel) as made:
        made.train_step()
