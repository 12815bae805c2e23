"""Two hundred windows with documents through compiled kernels: number of graphs and recompiles, time.

python -m tests.benchmarks.recompiles
"""

import time

import torch
from torch._dynamo.utils import counters

from tests.benchmarks.timing import table
from torchladder import mask
from torchladder.models import attention

LENGTH, WINDOWS = 2048, 200
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def climb(name, masks, training):
    """Computes attention under each window of a linear curriculum.

    Returns graphs, recompiles, seconds of the first call, mean seconds of the later ones.
    """
    torch._dynamo.reset()
    counters.clear()
    kernel = attention.build_kernel(name, masks, DEVICE, training=training)
    compiled = torch.compile(kernel.attention)
    q, k, v = (torch.randn(1, 4, LENGTH, 32, device=DEVICE, requires_grad=training) for _ in range(3))
    positions = torch.arange(LENGTH, dtype=torch.int32)[None].clone()
    times = []
    for step in range(WINDOWS):
        begin = time.perf_counter()
        cut = 1 + 7 * step  # documents move too
        row = torch.where(positions < cut, positions, positions - cut)
        window = 32 + (LENGTH - 32) * step // (WINDOWS - 1)
        start = mask.from_names(masks, row, window)
        out = compiled(q, k, v, kernel.prepare(start, DEVICE))
        if training:
            out.sum().backward()
        times.append(time.perf_counter() - begin)
    recompiles = counters["frames"]["ok"] - 1
    return counters["stats"]["unique_graphs"], recompiles, times[0], sum(times[1:]) / len(times[1:])


def main():
    ladders = [
        ("flex", ["document", "chunk"], DEVICE.type == "cuda"),
        ("sdpa", ["document", "chunk"], True),
        ("fold", ["chunk"], True),
    ]
    rows = []
    for name, masks, training in ladders:
        graphs, recompiles, first, later = climb(name, masks, training)
        passes = "forward, backward" if training else "forward"
        rows.append([name, "+".join(masks), passes, f"{graphs}", f"{recompiles}", f"{first:.1f}", f"{later * 1e3:.1f}"])
    print(f"{WINDOWS} windows from 32 to {LENGTH} on {DEVICE.type}, torch.compile")
    table(["kernel", "masks", "passes", "graphs", "recompiles", "first s", "later ms"], rows)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
