"""Four machines, as four torchrun agents on this one; what is shown when one rank fails."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from torchladder import train

ROOT = Path(__file__).parents[1]
DEBUG = ["--job.config_file", str(ROOT / "train_configs" / "debug.toml"), "--validation.no_enable"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def losses(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def agents(count, *argv):
    """Starts so many torchrun agents of one rank each, which meet on loopback; returns their output and exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(count), "--nproc_per_node", "1"]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", endpoint, "--rdzv_id", "test", "-m", "torchladder.train"]
    running = [
        subprocess.Popen([*command, *argv], stderr=subprocess.PIPE, text=True, cwd=ROOT, env=ENVIRONMENT)
        for _ in range(count)
    ]
    return [(agent.communicate(timeout=200)[1], agent.returncode) for agent in running]


def test_four_nodes_give_one_ranks_losses(tmp_path):
    short = ["--training.steps", "5", "--lr_scheduler.warmup_steps", "2"]
    assert train.main([*DEBUG, *short, "--job.dump_folder", str(tmp_path / "one")]) == 0
    found = agents(4, *DEBUG, *short, "--training.local_batch_size", "1", "--job.dump_folder", str(tmp_path / "four"))
    assert [code for _, code in found] == [0] * 4, found[0][0][-2000:]
    one, four = losses(tmp_path / "one"), losses(tmp_path / "four")
    assert len(one) == 5
    assert four[0] == pytest.approx(one[0], rel=1e-6)
    assert four == pytest.approx(one, rel=1e-4)


def test_the_first_error_of_a_rank_is_shown_at_the_end(tmp_path):
    # Every rank finds out by itself, after they have met.
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         "--local-ranks-filter", "1", "-m", "torchladder.train", *DEBUG, "--training.local_batch_size", "2",
         "--float8.enable", "--job.dump_folder", str(tmp_path)],
        capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT,
    )  # fmt: skip
    assert result.returncode != 0
    assert "ConfigError: float8.enable: cpu does not support float8" in result.stderr.split("Root Cause")[1]
