"""A whole ladder in a minute: the time it saves, against the time that its saved attention takes at full context."""

from typing import Any

from tests.benchmarks.gpu.speed import split
from tests.benchmarks.gpu.stepping import CUDA, Shape, at, clock, seconds_of, trainer
from tests.benchmarks.timing import table
from torchladder import curriculum

SHAPES = [(Shape("1b", 8192, 4), 24), (Shape("1b", 32768, 1), 16)] if CUDA else [(Shape("debug", 512, 2), 25)]
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
            if clock.allows(f"ladder of {shape}, {kernel}"):
                results.append(_climb(shape, steps, kernel))
    rows = [
        [
            f"{r['shape']}, {r['kernel']}",
            *(f"{r[k]:.1%}" for k in ("attention_removed", "attention_of_time", "saved")),
            f"{r['efficiency']:.2f}",
            f"{r['new_window_seconds']:.2f}",
        ]
        for r in results
    ]
    head = ["linear ladder", "attention removed", "attention of time", "time saved", "efficiency", "s per new window"]
    table(head, rows)
    return {"results": results}


def _climb(shape: Shape, steps: int, kernel: str) -> dict[str, Any]:
    full = shape.seq_len
    window = curriculum.Linear(
        steps=steps, seq_len=full, initial_window=min(FIRST, full), multiple_of=min(MULTIPLE, full), ramp=RAMP
    )
    ladder = [window(step) for step in range(steps)]
    removed = 1 - sum(w / full for w in ladder) / steps  # a chunk of w costs w / 2 keys a query
    with trainer(shape, kernel=kernel) as run:
        at(run, full).train_step()  # compile
        # A run stays with a window for many steps: what a kernel builds for each is not of this comparison.
        first = {w: seconds_of(at(run, w), 1) for w in {full: 0, **dict.fromkeys(ladder)}}
        share = split(at(run, full))["attention"]
        # In turns, so that a slow moment of the machine falls on both.
        taken = {"ladder": 0.0, "full": 0.0}
        later = dict.fromkeys(first, float("inf"))
        for step in range(steps):
            for name, w in (("ladder", ladder[step]), ("full", full)):
                seconds = seconds_of(at(run, w), 1)
                taken[name] += seconds
                later[w] = min(later[w], seconds)
    saved = 1 - taken["ladder"] / taken["full"]
    return {
        "shape": str(shape),
        "kernel": kernel,
        "steps": steps,
        "attention_removed": removed,
        "attention_of_time": share,
        "saved": saved,
        "efficiency": saved / (share * removed),
        "new_window_seconds": sum(first[w] - later[w] for w in first) / len(first),
    }
