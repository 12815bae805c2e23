"""How the benchmarks measure: everything that is compared runs in turns in one process, and the best turn counts."""

import time
from collections.abc import Callable, Mapping

import torch


def seconds(work: Mapping[str, Callable[[], object]], turns: int = 5) -> dict[str, float]:
    """Returns the shortest time of each piece of work, after one turn that does not count."""
    best = dict.fromkeys(work, float("inf"))
    for turn in range(turns + 1):
        for name, run in work.items():
            begin = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:
                best[name] = min(best[name], time.perf_counter() - begin)
    return best


def table(head: list[str], rows: list[list[str]]) -> None:
    """Prints a table, the first column to the left and the others to the right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    for row in [head, ["-" * width for width in widths], *rows]:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        print("  ".join(cells))
    print()
