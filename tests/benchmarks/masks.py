"""The analytic BlockMask against FlexAttention's create_block_mask, eager and compiled: time and peak memory.

python -m tests.benchmarks.masks [lengths ...]
"""

import multiprocessing
import resource
import sys

import torch
from torch.nn.attention.flex_attention import create_block_mask

from tests.benchmarks.timing import seconds, table
from torchladder import mask

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GIB = 2**30


def start_of(length):
    """Documents of about 1000 tokens, in chunks of 2049."""
    first = torch.rand(1, length, generator=torch.Generator().manual_seed(0)) < 1e-3
    first[:, 0] = True
    index = torch.arange(length, dtype=torch.int32)[None]
    positions = index - torch.where(first, index, 0).cummax(1).values
    return mask.compose(mask.document(positions, 2049), mask.chunk(positions, 2049)).to(DEVICE)


def make(name, start):
    """Returns the BlockMask, made in one of three ways."""
    if name == "analytic":
        return mask.block_mask(start)

    def allowed(b, h, q, k):
        return (start[b, q] <= k) & (k <= q)

    length = start.shape[1]
    return create_block_mask(allowed, 1, None, length, length, device=DEVICE, _compile=name == "compiled")


def memory():
    """Returns the peak memory of this process, in bytes."""
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(name, length, results):
    """Times one way in a separate process, to measure its peak memory."""
    torch.set_num_threads(1)
    start = start_of(length)
    if name == "compiled":
        make(name, start_of(256))  # exclude compilation
    before, turns = memory(), 1 if name == "eager" or length > 2**16 else 5
    time = seconds({name: lambda: make(name, start)}, turns, warm=name != "eager")[name]
    results.put((time, memory() - before))


def main(lengths):
    spawn = multiprocessing.get_context("spawn")
    rows = []
    for length in lengths:
        found = {}
        for name in ("analytic", "compiled", "eager"):
            # Eager materializes several masks with one byte per pair, and integers.
            if name == "eager" and 12 * length**2 > available():
                continue
            results = spawn.Queue()
            process = spawn.Process(target=measure, args=(name, length, results))
            process.start()
            found[name] = results.get(timeout=600)
            process.join()
        base = found["analytic"][0]
        rows += [
            [f"{length:,}", name, f"{time * 1e3:.2f}", f"{time / base:,.0f}", f"{peak / GIB:.2f}"]
            for name, (time, peak) in found.items()
        ]
    print(f"BlockMask of documents in chunks of 2049 on {DEVICE}, one row")
    table(["tokens", "way", "ms", "of analytic", "peak GiB"], rows)


def available():
    if DEVICE == "cuda":
        return torch.cuda.mem_get_info()[0]
    with open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


if __name__ == "__main__":
    main([int(length) for length in sys.argv[1:]] or [8192, 32768, 131072])
