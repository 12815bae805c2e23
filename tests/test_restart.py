"""A rank that hangs: named, started again by torchrun, and gone on with bit for bit."""

import os

from runs import lines, losses, start

TROUBLE = """
import os, sys, time
from dataclasses import dataclass
from torchladder import curriculum

@curriculum.register("trouble")
@dataclass(frozen=True)
class Trouble:
    trouble: bool = True

    def __call__(self, step: int) -> int:
        asked_by = sys._getframe(2).f_code.co_name  # not by the plan, which looks ahead
        first = os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        if self.trouble and first and asked_by == "train_step" and step == 5:
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
    accept = ["--checkpoint.accept_changes", "curriculum.trouble"]
    hard = start(
        tmp_path / "a", *argv, ranks=2, launcher=("--max-restarts", "1", "--shutdown-timeout", "1"), PYTHONPATH=path
    )
    said = hard.communicate()[0]
    assert hard.returncode == 0, said[-4000:]
    assert "no answer from rank 1" in said
    easy = start(tmp_path / "b", *argv, "--curriculum.no_trouble", *accept, ranks=2, PYTHONPATH=path)
    assert "step:  8" in easy.communicate()[0]
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert [line["step"] for line in lines(tmp_path / "a")] == list(range(1, 9))
