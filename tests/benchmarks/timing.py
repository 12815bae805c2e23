"""Timing for the benchmarks: the candidates run alternately in one process, and the best time of each counts."""

import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

import torch

Name = TypeVar("Name", bound=Hashable)


def seconds(work: Mapping[Name, Callable[[], object]], turns: int = 5, warm: bool = True) -> dict[Name, float]:
    """Returns the shortest time of each candidate in seconds; ``warm`` adds a first turn that is not timed."""
    best = dict.fromkeys(work, float("inf"))
    for turn in range(turns + warm):
        for name, run in work.items():
            begin = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn or not warm:
                best[name] = min(best[name], time.perf_counter() - begin)
    return best


def table(head: list[str], rows: list[list[str]]) -> None:
    """Prints a table with the first column left-aligned and the others right-aligned."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    for row in [head, ["-" * width for width in widths], *rows]:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        print("  ".join(cells))
    print()
