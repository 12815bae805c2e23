"""Signals and time limits, at whatever moment they come: saved, coded, and gone on with bit for bit."""

import os
import re
import signal
import subprocess
import threading
import time

import pytest
from runs import lines, losses, run, start, validations

from torchladder import checkpoint, metrics, train
from torchladder.checkpoint import step_folders
from torchladder.data.row_loader import RowLoader
from torchladder.resilience.interrupt import SIGNALS, Interrupt, Interrupted
from torchladder.training import model_passes, samples, trainer

STEPS = 6
RUN = [
    *("--training.steps", str(STEPS), "--validation.freq", "3", "--checkpoint.enable", "--checkpoint.interval", "2"),
    *("--training.local_batch_size", "2", "--training.global_batch_size", "4", "--training.seq_len", "64"),
    *("--samples.prompts", "import ", "def ", "--samples.freq", "3", "--samples.max_new_tokens", "4"),
    *("--phases", "{ from_step = 4, window = 16 }", "--lr_scheduler.warmup_steps", "2"),
    *("--metrics.disable_progress_bar", "--checkpoint.async_mode", "async"),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run(folder, *RUN)
    return folder


def kill_in(monkeypatch, owner, name, call, number=signal.SIGTERM):
    """Sends this process a signal inside a function, the ``call``-th time that it is called."""
    function, calls = getattr(owner, name), []

    def wrapped(*args, **kwargs):
        calls.append(name)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapped)


MOMENTS = {
    "first rows": (trainer.FaultTolerance, "read", 1, 0),
    "first step": (model_passes.ModelPasses, "forward_backward", 1, 1),
    "step": (model_passes.ModelPasses, "forward_backward", 6, 3),
    "first validation": (trainer.Trainer, "_validate", 1, 0),
    "validation": (trainer.Trainer, "_validate", 2, 3),
    "last validation": (trainer.Trainer, "_validate", 3, 6),
    "samples": (samples, "generate", 2, 3),
    "last samples": (samples, "generate", 3, 6),
    "save": (checkpoint.Checkpointer, "save", 1, 2),
    "checksums of a save": (step_folders, "verify_written", 1, None),
    "report": (metrics.MetricsProcessor, "log", 5, 5),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_ends_a_run_at_any_moment_and_nothing_is_lost(whole, tmp_path, monkeypatch, moment):
    owner, name, call, step = MOMENTS[moment]
    with monkeypatch.context() as patch:
        kill_in(patch, owner, name, call)
        run(tmp_path, *RUN, code=75)
    saves = checkpoint.complete_steps(tmp_path / "checkpoint")
    assert step is None or saves[-1] == step
    run(tmp_path, *RUN)
    assert losses(tmp_path) == losses(whole)
    assert validations(tmp_path) == validations(whole)
    once = [[(line["step"], "loss" in line) for line in lines(folder)] for folder in (tmp_path, whole)]
    assert once[0] == once[1]
    assert (tmp_path / "samples.txt").read_text() == (whole / "samples.txt").read_text()
    assert (tmp_path / "ladder.png").is_file()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
def test_every_signal_counts_and_handlers_are_given_back(tmp_path, monkeypatch, number):
    before = signal.getsignal(number)
    kill_in(monkeypatch, model_passes.ModelPasses, "forward_backward", 1, number)
    run(tmp_path, *RUN, code=75)
    assert checkpoint.complete_steps(tmp_path / "checkpoint") == [1]
    assert signal.getsignal(number) == before


def test_a_wait_for_data_is_broken_off(whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        following = RowLoader.__next__
        calls = []

        def stuck(loader):
            calls.append(1)
            if len(calls) == 6:  # the second micro-batch of the third step
                threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
                time.sleep(60)
            return following(loader)

        patch.setattr(RowLoader, "__next__", stuck)
        begun = time.monotonic()
        run(tmp_path, *RUN, "--validation.no_enable", code=75)
        assert time.monotonic() - begun < 50
    assert checkpoint.complete_steps(tmp_path / "checkpoint") == [2]
    run(tmp_path, *RUN)
    assert losses(tmp_path) == losses(whole)


def test_a_signal_while_the_run_is_being_built(tmp_path, monkeypatch):
    kill_in(monkeypatch, model_passes.ModelPasses, "build_model", 1)
    assert train.main(["--job.dump_folder", str(tmp_path), "--job.config_file", str(tmp_path / "none")]) == 2
    with pytest.raises(FileNotFoundError):
        run(tmp_path, *RUN, code=75)  # nothing to read: no step was taken


def test_minutes_and_steps_end_a_run_too(whole, tmp_path):
    run(tmp_path, *RUN, "--job.exit_interval", "4", code=75)
    assert checkpoint.complete_steps(tmp_path / "checkpoint")[-1] == 4
    run(tmp_path, *RUN, "--job.max_minutes", "1e-9", code=75)
    assert checkpoint.complete_steps(tmp_path / "checkpoint")[-1] == 4
    run(tmp_path, *RUN, "--job.exit_interval", "4")
    assert losses(tmp_path) == losses(whole)
    stamp = (tmp_path / "ladder.png").stat().st_mtime_ns
    run(tmp_path, *RUN)  # an extra job of a chain
    assert (tmp_path / "ladder.png").stat().st_mtime_ns == stamp


def test_two_ranks_stop_together_when_one_is_asked_and_torchrun_sees_no_failure(tmp_path):
    long = [
        "--training.steps",
        "100000",
        "--checkpoint.enable",
        "--validation.no_enable",
        "--metrics.no_enable_tensorboard",
    ]
    code = tmp_path / "code"
    job = start(tmp_path, *RUN, *long, ranks=2, TORCHLADDER_EXIT_FILE=str(code))
    ranks: list[str] = []
    assert job.stdout is not None
    for line in job.stdout:
        if "step:  3" in line or "step: 3 " in line:
            ranks = [pid for pid in os.listdir("/proc") if pid.isdigit() and _parent(pid) == job.pid]
            os.kill(int(ranks[-1]), signal.SIGUSR1)
            break
    said = job.stdout.read()
    assert job.wait() == 0, said
    assert len(ranks) == 2
    assert "ending after step" in said
    assert code.read_text() == "75"
    assert checkpoint.complete_steps(tmp_path / "checkpoint")[-1] >= 3


def _parent(pid: str) -> int:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return int(file.read().rsplit(")", 1)[1].split()[1])
    except OSError:
        return -1


def test_signals_and_the_time_limit_are_recorded():
    with Interrupt(max_minutes=1000) as interrupt:
        assert not interrupt.requested
        os.kill(os.getpid(), signal.SIGUSR2)
        assert interrupt.requested
        assert interrupt.reason == "SIGUSR2"
        with pytest.raises(Interrupted), interrupt.interruptible():
            raise AssertionError("the signal came before")
    assert Interrupt(max_minutes=1e-12).requested


def test_processes_that_are_started_in_a_step_outlive_the_signal():
    """As the compilers of torch.compile do, which the step waits for."""
    with Interrupt() as interrupt:
        compiler = subprocess.Popen(["sleep", "0.2"])
        compiler.send_signal(signal.SIGTERM)
        assert compiler.wait() == 0
        with interrupt.interruptible():
            reader = subprocess.Popen(["sleep", "60"])
        reader.send_signal(signal.SIGTERM)
        assert reader.wait() == -signal.SIGTERM
        os.kill(os.getpid(), signal.SIGUSR1)  # still pending at the end
    assert not signal.sigpending()
    assert not set(SIGNALS) & signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_a_second_signal_does_not_change_the_exit_code(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHLADDER_EXIT_FILE", str(tmp_path / "code"))
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        with pytest.raises(SystemExit) as ending:
            train.exit_process(75)
        for number in SIGNALS:
            os.kill(os.getpid(), number)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert ending.value.code == 75
    assert (tmp_path / "code").read_text() == "75"


def test_time_slices_shorter_than_the_interval_between_saves_lose_nothing(whole, tmp_path):
    argv = [*RUN, "--checkpoint.interval", "1000"]
    for step in (1, 2, 3, 4, 5):
        run(tmp_path, *argv, "--job.exit_interval", "1", code=75)
        assert checkpoint.complete_steps(tmp_path / "checkpoint") == list(range(1, step + 1))
    run(tmp_path, *argv, "--job.exit_interval", "1")
    assert losses(tmp_path) == losses(whole)
    assert validations(tmp_path) == validations(whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_all_processes_of_a_run_saves_and_ends_with_75(tmp_path, number):
    """As Slurm and systemd send it: the data loader's workers get it, too."""
    argv = [*RUN, "--training.steps", "100000", "--data.num_workers", "2", "--checkpoint.keep_latest_k", "0"]
    job = start(tmp_path, *argv, new_session=True)
    assert job.stdout is not None
    for line in job.stdout:
        if "step:  4" in line or "step: 4 " in line:
            os.killpg(job.pid, number)
            break
    said = job.stdout.read()
    assert job.wait(60) == 75, said
    step = int(re.search(r"ending after step (\d+)", said)[1])
    assert checkpoint.complete_steps(tmp_path / "checkpoint")[-1] == step >= 4
