"""A rank that hangs: named, started again by torchrun, and gone on with bit for bit."""

import os
import re

from runs import lines, start

TROUBLE = """
import os, sys, time
from dataclasses import dataclass
from torchladder import curriculum

@curriculum.register("trouble")
@dataclass(frozen=True)
class Trouble:
    ranks: str = "1"

    def __call__(self, step: int) -> int:
        asked_by = sys._getframe(2).f_code.co_name  # not by the plan, which looks ahead
        first = os.environ["RANK"] == self.ranks and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        if first and asked_by == "train_step" and step == 5:
            time.sleep(600)
        return 16
"""
"""A curriculum with which rank 1 hangs before its sixth step, in the first attempt."""


def test_torchrun_starts_again_from_the_newest_checkpoint_and_names_who_was_missing(tmp_path):
    (tmp_path / "trouble.py").write_text(TROUBLE)
    argv = [
        *("--job.plugins", "trouble", "--curriculum.name", "trouble", "--training.steps", "8"),
        *("--training.local_batch_size", "2", "--training.seq_len", "64", "--validation.no_enable"),
        *("--checkpoint.enable", "--checkpoint.interval", "2", "--checkpoint.async_mode", "async"),
        *("--comm.train_timeout_seconds", "4", "--metrics.no_enable_tensorboard"),
    ]
    path = f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
    again = ("--max-restarts", "1", "--shutdown-timeout", "1")
    job = start(tmp_path / "run", *argv, ranks=2, launcher=again, PYTHONPATH=path)
    said = job.communicate()[0]
    assert job.returncode == 0, said[-4000:]
    assert "no answer from rank 1" in said
    assert "step-4" in said
    fifth = re.findall(r"step:  5  loss: (\S+)  grad_norm: (\S+)", said)  # of both attempts
    assert len(fifth) == 2
    assert fifth[0] == fifth[1]
    assert [line["step"] for line in lines(tmp_path / "run")] == list(range(1, 9))  # each step once
