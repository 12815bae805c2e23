"""Cost of a checkpoint: how long a save blocks training, and its bytes per second against torch.save.

python -m tests.benchmarks.checkpoint [million parameters, 120]
"""

import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from tests.benchmarks.timing import table
from torchladder.checkpoint import CheckpointConfig, Checkpointer, RunState


def main() -> None:
    millions = int(sys.argv[1]) if len(sys.argv) > 1 else 120
    folder = Path(tempfile.mkdtemp())
    model = nn.Sequential(*(nn.Linear(1000, 1000, bias=False) for _ in range(millions)))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.01)
    optimizer.step()
    size = 12 * millions / 1000  # GB: weight and two moments in float32
    took: dict[str, list[float]] = {"torch.save": [], "disabled": [], "async": [], "load": []}
    savers = {
        mode: Checkpointer(
            CheckpointConfig(enable=True, async_mode=mode, keep_latest_k=2), str(folder / mode), model, optimizer
        )
        for mode in ("disabled", "async")
    }
    for turn in range(1, 4):
        begin = time.perf_counter()
        with (folder / "raw.pt").open("wb") as file:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
        took["torch.save"].append(time.perf_counter() - begin)
        for mode, saver in savers.items():
            begin = time.perf_counter()
            saver.save(RunState(step=turn, row=0))
            took[mode].append(time.perf_counter() - begin)
            saver.wait()
    begin = time.perf_counter()
    savers["disabled"].load(lambda state, path: None)
    took["load"].append(time.perf_counter() - begin)
    best = {name: min(seconds) for name, seconds in took.items()}
    names = {
        "torch.save": "torch.save, without fsync and verification",
        "disabled": "save with fsync and verification, blocking",
        "async": "the same in a thread: time that it blocks",
        "load": "load, after verifying every file",
    }
    print(f"{millions} million parameters and AdamW's state, {size:.2f} GB; best of 3\n")
    rows = [[names[name], f"{seconds:.2f}", f"{size / seconds:.2f}"] for name, seconds in best.items()]
    table(["", "seconds", "GB/s"], rows)
    print(f"async / disabled: {best['async'] / best['disabled']:.3f}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
