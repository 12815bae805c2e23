"""A run that is killed or signaled again and again, at random moments, loses nothing.

The long forms, with 100 kills (about 20 minutes on one core) and 100 signals (about half an hour):

    python tests/test_torture.py 100 [file://]
    python tests/test_torture.py 100 signals
"""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import runs
from runs import DEBUG, ROOT, lines, losses, validations

from torchladder import checkpoint

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


SIGNALED = [
    *("--training.steps", "1000000", "--training.seq_len", "64", "--training.global_batch_size", "8"),
    *("--data.num_workers", "1", "--metrics.log_freq", "3"),
    *("--checkpoint.enable", "--checkpoint.interval", "2", "--checkpoint.async_mode", "async"),
    *("--validation.freq", "4", "--validation.steps", "8", "--metrics.no_enable_tensorboard"),
]
MOMENTS = {"compiling": "data  ", "validation": "validate step:", "step": "step:", "async save": "saved "}
"""Name -> what a line of the log contains shortly before."""


@dataclass(frozen=True)
class Round:
    """One signal to a run.

    Attributes:
        number: the signal.
        to: every process of the run, as Slurm and systemd send it; its process group, as a terminal does; the process
            that was started; or its last rank.
        ranks: 1 or 2, started by run_train.sh.
        compile: with torch.compile and an empty cache.
        moment: one of ``MOMENTS``.
        delay: seconds from then on.
    """

    number: signal.Signals
    to: str
    ranks: int
    compile: bool
    moment: str
    delay: float

    @classmethod
    def draw(cls, chance: random.Random) -> "Round":
        compile = chance.random() < 0.3
        return cls(
            number=chance.choice([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2]),
            to=chance.choice(["all", "group", "started", "rank"]),
            ranks=chance.choice([1, 2]),
            compile=compile,
            moment="compiling" if compile else chance.choice(list(MOMENTS)),
            delay=chance.random() * (20 if compile else 0.3),
        )


def signal_once(folder: Path, round: Round, before: int) -> int:
    """Signals a run that resumes after step ``before``; returns the step that it has saved."""
    argv, cache = SIGNALED, folder / "compiled"
    if round.compile:
        shutil.rmtree(cache, ignore_errors=True)
        argv = [*argv, "--compile.enable"]
    environment = {"PYTHON": sys.executable, "NGPU": str(round.ranks), "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    job = runs.start(folder, *argv, script=True, new_session=True, **environment)
    hangs = threading.Timer(240, _kill, (job,))
    hangs.start()
    try:
        log = []
        for line in job.stdout:
            log.append(line)
            if MOMENTS[round.moment] in line:
                break
        time.sleep(round.delay)
        _send(round, job.pid)
        said = "".join(log) + job.stdout.read()
        job.wait()
    finally:
        hangs.cancel()
        _kill(job)
    assert job.returncode == 75, said
    assert not before or f"resume      after step {before:,}\n" in said, said
    ending = re.search(r"ending after step (\d+) of", said)
    assert ending or "ending before the first step" in said, said
    step = int(ending[1]) if ending else before
    if ending:
        assert checkpoint.complete_steps(folder / "checkpoint")[-1] == step, said
        assert checkpoint.find_corruption(folder / "checkpoint" / f"step-{step}") is None
    return step


def _send(round: Round, started: int) -> None:
    if round.to == "group":
        os.killpg(started, round.number)
        return
    rank = _children(_children(started)[0])[-1] if round.ranks > 1 else started
    for pid in {"all": [started, *_descendants(started)], "started": [started], "rank": [rank]}[round.to]:
        with suppress(ProcessLookupError):
            os.kill(pid, round.number)


def _kill(job: subprocess.Popen) -> None:
    for pid in [*_descendants(job.pid), job.pid] if job.poll() is None else []:
        os.kill(pid, signal.SIGKILL)


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _descendants(pid: int) -> list[int]:
    return [found for child in _children(pid) for found in (child, *_descendants(child))]


def signal_again_and_again(folder: Path, rounds: Iterable[Round]) -> None:
    """Signals a run again and again: it must save the step that it has reached, and resume from it the next time."""
    step = 0
    for round in rounds:
        step = signal_once(folder, round, step)
        print(f"saved step {step}: {round}", flush=True)
    steps = [line["step"] for line in lines(folder) if "loss" in line]
    assert steps == sorted(set(steps))


ONE_OF_TWO_RANKS = [
    Round(signal.SIGTERM, "rank", ranks=2, compile=True, moment="compiling", delay=10),
    Round(signal.SIGUSR1, "rank", ranks=2, compile=False, moment="validation", delay=0.05),
    Round(signal.SIGINT, "rank", ranks=2, compile=False, moment="async save", delay=0.0),
]
ALL_PROCESSES = [
    Round(signal.SIGTERM, "all", ranks=1, compile=True, moment="compiling", delay=12),
    Round(signal.SIGUSR2, "started", ranks=2, compile=False, moment="validation", delay=0.1),
    Round(signal.SIGTERM, "group", ranks=2, compile=False, moment="step", delay=0.1),
]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("rounds", [ONE_OF_TWO_RANKS, ALL_PROCESSES], ids=["one of two ranks", "all processes"])
def test_a_run_that_is_signaled_saves_and_resumes_where_it_was(tmp_path, rounds):
    signal_again_and_again(tmp_path, rounds)


@pytest.mark.timeout(900)
def test_a_run_that_is_signaled_at_random_moments_saves_and_resumes_where_it_was(tmp_path):
    chance = random.Random(0)
    rounds = int(os.environ.get("TORCHLADDER_SIGNAL_ROUNDS", "1"))
    signal_again_and_again(tmp_path, (Round.draw(chance) for _ in range(rounds)))


if __name__ == "__main__":
    place = Path(tempfile.mkdtemp())
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    if sys.argv[2:] == ["signals"]:
        chance = random.Random()
        signal_again_and_again(place, (Round.draw(chance) for _ in range(count)))
        sys.exit(0)
    midst = torture(place, count, 5 * count + 10, *sys.argv[2:])
    print(f"{count} kills, {midst} of them in the midst of a save; the losses are those of the uninterrupted run")
    shutil.rmtree(place)
