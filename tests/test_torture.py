"""A run that is killed again and again, in saves above all, ends as one that never was.

The long form, 100 kills (about 20 minutes on one core):

    python tests/test_torture.py 100 [file://]
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from runs import DEBUG, ROOT, lines, losses, validations

RUN = [
    *("--training.steps", "{steps}", "--training.local_batch_size", "2", "--training.global_batch_size", "4"),
    *("--training.seq_len", "64", "--validation.freq", "7", "--validation.steps", "1"),
    *("--metrics.no_enable_tensorboard", "--samples.prompts", "import ", "--samples.freq", "5"),
    *("--samples.max_new_tokens", "2", "--phases", "{{ from_fraction = 0.5, window = 32 }}"),
    *("--checkpoint.enable", "--checkpoint.interval", "1", "--checkpoint.keep_latest_k", "2"),
]


def start(folder: Path, steps: int, mode: str, scheme: str) -> subprocess.Popen:
    argv = [word.format(steps=steps) for word in RUN]
    argv += ["--checkpoint.folder", f"{scheme}{folder}/checkpoint"]
    command = [sys.executable, "-m", "torchladder.train", *DEBUG, "--job.dump_folder", str(folder), *argv]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [*command, "--checkpoint.async_mode", mode],
        env=environment, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def kill_in_a_save(job: subprocess.Popen, folder: Path, chance: random.Random, above: int) -> bool:
    """Kills a run within a random save after a step; returns whether it had ended before."""
    saves, after = folder / "checkpoint", above + chance.randint(1, 4)
    while job.poll() is None:
        steps = [int(path.name.split("-")[1].split(".")[0]) for path in saves.glob("step-*")] if saves.is_dir() else []
        if steps and max(steps) >= after:
            time.sleep(chance.random() * 0.05)  # a step takes about this long, and most of it is the save
            job.send_signal(signal.SIGKILL)
            job.wait()
            return False
        time.sleep(0.001)
    return True


def torture(folder: Path, kills: int, steps: int, scheme: str = "", seed: int = 0) -> int:
    """Compares a run that is killed with one that is not; returns the kills that were in the midst of a save."""
    chance = random.Random(seed)
    assert start(folder / "whole", steps, "disabled", scheme).wait() == 0
    expected = losses(folder / "whole")
    assert sorted(expected) == list(range(1, steps + 1))
    hurt, above, torn = folder / "hurt", 0, 0
    for number in range(kills):
        job = start(hurt, steps, chance.choice(["async", "disabled"]), scheme)
        over = kill_in_a_save(job, hurt, chance, above)
        saves = list((hurt / "checkpoint").iterdir())
        names = [path.name for path in saves]
        torn += any(path.suffix or not (path / "SHA256SUMS").exists() for path in saves)
        above = max((int(name.split("-")[1].split(".")[0]) for name in names), default=0)
        print(f"kill {number + 1}: at step {above}, on disk {sorted(names)}", flush=True)
        assert not over, "all steps were taken before the last kill: ask for more steps"
    assert start(hurt, steps, "async", scheme).wait() == 0
    assert losses(hurt) == expected
    assert validations(hurt) == validations(folder / "whole")
    once = [[(line["step"], "loss" in line) for line in lines(place)] for place in (hurt, folder / "whole")]
    assert once[0] == once[1]
    assert (hurt / "samples.txt").read_text() == (folder / "whole" / "samples.txt").read_text()
    return torn


@pytest.mark.parametrize("scheme", ["", "file://"], ids=["filesystem", "fsspec"])
def test_a_run_that_is_killed_in_its_saves_ends_as_one_that_is_not(tmp_path, scheme):
    torture(tmp_path, kills=2, steps=12, scheme=scheme)


if __name__ == "__main__":
    place = Path(tempfile.mkdtemp())
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    midst = torture(place, count, 5 * count + 10, *sys.argv[2:])
    print(f"{count} kills, {midst} of them in the midst of a save; the losses are those of the uninterrupted run")
    shutil.rmtree(place)
