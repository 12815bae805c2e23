"""A whole ladder in a minute: the time it saves, against the time that its saved attention takes at full context."""

import time
from typing import Any

from tests.benchmarks.gpu.speed import split
from tests.benchmarks.gpu.stepping import CUDA, Shape, at, trainer, wait
from tests.benchmarks.timing import table
from torchladder import curriculum

SHAPES = [(Shape("1b", 8192, 4), 50), (Shape("1b", 32768, 1), 50)] if CUDA else [(Shape("debug", 512, 2), 25)]
KERNELS = ("fold", "flex") if CUDA else ("fold",)
RAMP, FIRST, MULTIPLE = 0.64, 128, 128
"""SkyLadder's share of the run; windows in multiples of a block."""


def run() -> dict[str, Any]:
    """Prints and returns saving and efficiency of each ladder.

    Efficiency is the share of time saved, over attention's share of time at full context times the share of attention
    that the ladder removes: 1 where time follows the pairs.
    """
    results = []
    for shape, steps in SHAPES:
        for kernel in KERNELS:
            results.append(_climb(shape, steps, kernel))
    rows = [
        [
            f"{r['shape']}, {r['kernel']}",
            *(f"{r[k]:.1%}" for k in ("attention_removed", "attention_of_time", "saved")),
            f"{r['efficiency']:.2f}",
        ]
        for r in results
    ]
    table(["linear ladder", "attention removed", "attention of time", "time saved", "efficiency"], rows)
    return {"results": results}


def _climb(shape: Shape, steps: int, kernel: str) -> dict[str, Any]:
    full = shape.seq_len
    window = curriculum.Linear(
        steps=steps, seq_len=full, initial_window=min(FIRST, full), multiple_of=min(MULTIPLE, full), ramp=RAMP
    )
    ladder = [window(step) for step in range(steps)]
    removed = 1 - sum(w / full for w in ladder) / steps  # a chunk of w costs w / 2 keys a query
    with trainer(shape, kernel=kernel) as run:
        for w in (full, ladder[0], full):
            at(run, w).train_step()  # compile, and build what a kernel builds per shape
        share = split(at(run, full))["attention"]
        # In turns, so that a slow moment of the machine falls on both.
        taken = {"ladder": 0.0, "full": 0.0}
        for step in range(steps):
            for name, w in (("ladder", ladder[step]), ("full", full)):
                wait()
                begin = time.perf_counter()
                at(run, w).train_step()
                wait()
                taken[name] += time.perf_counter() - begin
    saved = 1 - taken["ladder"] / taken["full"]
    return {
        "shape": str(shape),
        "kernel": kernel,
        "steps": steps,
        "attention_removed": removed,
        "attention_of_time": share,
        "saved": saved,
        "efficiency": saved / (share * removed),
    }
