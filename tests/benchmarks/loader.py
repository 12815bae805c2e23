"""The data loader: tokens per second by packing and workers, opening ten million documents, seeking, a run's wait.

python -m tests.benchmarks.loader [--documents 10000000]
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from tests.benchmarks.timing import table
from torchladder import config as settings
from torchladder import data
from torchladder.data import SourceConfig
from torchladder.data.formats.indexed import CODES, HEADER, MAGIC, IndexedWriter
from torchladder.distributed.ranks import destroy_distributed, init_distributed
from torchladder.training.run_plan import make_plan
from torchladder.training.trainer import Trainer

SEQ_LEN, LOCAL, SOURCES = 8192, 8, 10
FAR = 10_000_000
DEFAULTS = {key: parameter.default for key, parameter in data.registry.parameters("rows").items()}


def write(folder: Path, name: str, documents: int, mean: int, seed: int) -> SourceConfig:
    """Writes a source of documents with log-normal lengths, like web text."""
    rng = np.random.default_rng(seed)
    lengths = np.maximum(rng.lognormal(np.log(mean) - 0.5, 1.0, documents).astype(int), 1)
    tokens = rng.integers(0, 50_000, 1 << 20).astype(np.uint16)
    with IndexedWriter(folder / name, np.dtype(np.uint16)) as writer:
        for length in np.minimum(lengths, len(tokens)).tolist():
            writer.add(tokens[:length])
    return SourceConfig(path=f"{folder}/{name}.bin", weight=float(rng.integers(1, 10)))


def write_index(folder: Path, name: str, documents: int) -> None:
    """Writes an index of many documents over a sparse token file: large to open, quick to write."""
    lengths = np.random.default_rng(0).integers(20, 1000, documents, dtype=np.int32)
    ends = 2 * np.cumsum(lengths, dtype=np.int64)
    with open(folder / f"{name}.idx", "wb") as index:
        index.write(HEADER.pack(MAGIC, 1, CODES[np.dtype(np.uint16)], documents, documents + 1))
        for values in (lengths, ends - 2 * lengths, np.arange(documents + 1)):
            index.write(np.ascontiguousarray(values).data)
    with open(folder / f"{name}.bin", "wb") as tokens:
        tokens.truncate(int(ends[-1]))


def load(sources, cache, **changes):
    section = {**DEFAULTS, "sources": sources, "cache_folder": str(cache), **changes}
    runtime_args = dict(seq_len=SEQ_LEN, split="train", tokenizer=None, dp_rank=0, dp_degree=1)
    batches = dict(local_batch_size=LOCAL, global_batch_size=LOCAL, steps=None)
    return data.registry.build(SimpleNamespace(name="rows", **section), **runtime_args, **batches)


def rate(loader, batches=150, warm=20):
    """Returns tokens per second of wall-clock and of CPU time, over this process and its workers."""
    for _ in range(warm):
        next(loader)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(batches):
        next(loader)
    tokens = batches * LOCAL * SEQ_LEN
    return tokens / (time.perf_counter() - wall), tokens / (time.process_time() - cpu)


def throughput(folder):
    sources = [write(folder, f"source{i}", 5_000, 800, i) for i in range(SOURCES)]
    rows = []
    for packing in ("stream", "best_fit", "pad"):
        for workers in (0, 1):
            best = [0.0, 0.0]
            for _ in range(3):
                loader = load(sources, folder / "cache", packing=packing, num_workers=workers)
                best = [max(pair) for pair in zip(best, rate(loader), strict=True)]
            cpu = f"{best[1] / 1e6:.0f}" if workers == 0 else ""
            rows.append([packing, str(workers), f"{best[0] / 1e6:.0f}", cpu])
    flat = loader._source_mix.corpora[0].shards[0].flat
    begin, copied = time.process_time(), 0
    while time.process_time() - begin < 0.5:  # upper bound: only the three copies of a row
        row = flat[copied % 100_000 :][: SEQ_LEN + 1].astype(np.int64)
        _ = row[:-1].copy(), row[1:].copy()
        copied += SEQ_LEN
    rows.append(["bare copies", "0", "", f"{copied / (time.process_time() - begin) / 1e6:.0f}"])
    print(f"{SOURCES} sources, rows of {SEQ_LEN:,}, batches of {LOCAL}; best of 3")
    table(["packing", "workers", "M tokens/s", "M tokens/cpu s"], rows)


def opening(folder, documents):
    """Measures opening in a subprocess per packing, so that peak memory is separate."""
    write_index(folder, "many", documents)
    command = [sys.executable, "-m", "tests.benchmarks.loader", "--open", str(folder / "many.bin")]
    for packing in ("stream", "best_fit"):
        print(f"{documents:,} documents, {packing}", flush=True)
        subprocess.run([*command, "--packing", packing, "--cache", str(folder / "cache")], check=True)


def open_one(path, packing, cache):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rows = []

    def lap(what, work):
        wall, cpu = time.perf_counter(), time.process_time()
        found = work()
        peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        rows.append([what, f"{time.perf_counter() - wall:.2f}", f"{time.process_time() - cpu:.2f}", f"{peak:.0f}"])
        return found

    loader = lap("open", lambda: load([SourceConfig(path=path)], Path(cache), packing=packing))
    lap("first batch", lambda: next(loader))
    lap("open again", lambda: load([SourceConfig(path=path)], Path(cache), packing=packing))
    loader.seek(FAR)
    lap(f"first batch from row {FAR:,}", lambda: next(loader))
    lap("next batch", lambda: next(loader))
    table(["", "seconds", "cpu s", "peak MiB above start"], rows)


def waiting(config, steps=10):
    """Prints the fraction of step time that a run waits for rows, excluding the first step."""
    with tempfile.TemporaryDirectory() as folder:
        quiet = ["--validation.no_enable", "--metrics.log_freq", "1000", "--training.steps", "1000"]
        loaded = settings.load(["--job.config_file", config, "--job.dump_folder", folder, *quiet])
        trainer = Trainer(make_plan(loaded), init_distributed(loaded.comm, Path(loaded.job.dump_folder)))
        read, waited, taken = trainer.fault_tolerance.read, [], []
        trainer.fault_tolerance.read = lambda *arguments: lap(waited, read, *arguments)
        for _ in range(steps + 1):
            lap(taken, trainer.train_step)
        destroy_distributed()
    whole, wait = sum(taken[1:]), sum(waited[1:])
    table(
        ["", "ms/step", "ms waiting", "fraction"],
        [[config, f"{1e3 * whole / steps:.0f}", f"{1e3 * wait / steps:.2f}", f"{wait / whole:.2%}"]],
    )


def lap(times, work, *arguments):
    """Calls ``work`` and appends its seconds to ``times``."""
    begin = time.perf_counter()
    done = work(*arguments)
    times.append(time.perf_counter() - begin)
    return done


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--documents", type=int, default=10_000_000)
    parser.add_argument("--open", default="")
    parser.add_argument("--packing", default="stream")
    parser.add_argument("--cache", default="")
    args = parser.parse_args()
    if args.open:
        open_one(args.open, args.packing, args.cache)
        return
    with tempfile.TemporaryDirectory() as folder:
        opening(Path(folder), args.documents)
        throughput(Path(folder))
    waiting("train_configs/quickstart.toml")


if __name__ == "__main__":
    main()
