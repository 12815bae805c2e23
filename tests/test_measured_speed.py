"""``torchladder plan --measure``: real steps of the run, its hours by FLOPs, and nothing left behind."""

import json

import pytest
import torch.distributed as dist
from runs import DEBUG

from torchladder.commands import plan as command
from torchladder.registry import ConfigError
from torchladder.training.trainer import Trainer


def test_a_few_last_steps_are_timed_and_nothing_is_written(tmp_path, monkeypatch, capsys):
    windows, folder = [], tmp_path / "run"
    step = Trainer.train_step

    def train_step(trainer):
        step(trainer)
        windows.append(trainer.plan.schedule.window(trainer.step - 1))

    monkeypatch.setattr(Trainer, "train_step", train_step)
    settings = ["--job.dump_folder", str(folder), "--training.seq_len", "64", "--training.steps", "5"]
    settings += ["--checkpoint.enable", "--data.cache_folder", str(tmp_path / "cache")]
    assert command.run([*DEBUG, *settings, "--measure", "--gpu-hour-price", "3600", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    measured = told["measured"]
    assert windows == [64] * 5  # the first warms up
    assert (measured["steps"], measured["window"], measured["device"]) == (4, 64, "cpu")
    assert measured["tokens_per_second"] == pytest.approx(4 * 64 / measured["seconds_per_step"])
    assert told["hours"] == pytest.approx(told["flops"] / measured["flops_per_second"] / 3600)
    assert told["cost"] == pytest.approx(3600 * told["hours"])
    assert not folder.exists()
    assert not dist.is_initialized()
    assert command.run([*DEBUG, *settings, "--measure"]) == 0
    shown = capsys.readouterr().out
    assert "tokens/s on 1 rank (cpu): 4 steps of " in shown
    assert "\ntime " in shown


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--world-size", "4", "--training.global_batch_size", "16"], "--measure times one rank on this machine"),
        (["--tokens-per-second", "10"], "--measure and --tokens-per-second are two sources of one number"),
        (["--training.steps", "1", "--lr_scheduler.warmup_steps", "0"], "--measure needs a run of at least 2 steps"),
    ],
)
def test_what_cannot_be_measured_is_refused(argv, message):
    with pytest.raises(ConfigError, match=message):
        command.run([*DEBUG, "--measure", *argv])
