"""Runs of the debug config, for the tests that train."""

import json
import os
import subprocess
import sys
from pathlib import Path

from torchladder import train

ROOT = Path(__file__).parents[1]
DEBUG = ["--job.config_file", str(ROOT / "train_configs" / "debug.toml")]


def run(folder: Path, *argv: str, code: int = 0) -> list[dict]:
    """Trains in this process; returns the lines of its metrics."""
    assert train.main([*DEBUG, "--job.dump_folder", str(folder), *argv]) == code
    return lines(folder)


def start(
    folder: Path, *argv: str, ranks: int = 1, launcher: tuple[str, ...] = (), script: bool = False,
    new_session: bool = False, **environment: str,
):  # fmt: skip
    """Starts a training in processes of its own."""
    command = [sys.executable, "-m", "torchladder.train"]
    if ranks > 1 or launcher:
        several = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        command = [sys.executable, *several, *launcher, "-m", "torchladder.train"]
    if script:
        command = [str(ROOT / "run_train.sh")]
    return subprocess.Popen(
        [*command, *DEBUG, "--job.dump_folder", str(folder), *argv],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, start_new_session=new_session,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in lines(folder) if "loss" in line}


def validations(folder: Path) -> dict[tuple[int, int], float]:
    return {
        (line["step"], line["window"]): line["validation_loss"] for line in lines(folder) if "validation_loss" in line
    }
