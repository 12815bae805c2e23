"""A rank that hangs or dies: named, started again by torchrun, and gone on with bit for bit."""

import os
import re
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist
from runs import lines, start

from torchladder.distributed import rendezvous

SOON = timedelta(seconds=20)


def test_every_attempt_has_a_store_of_its_own_whatever_the_last_one_left():
    store = dist.HashStore()
    with ThreadPoolExecutor(3) as ranks:
        for _ in range(3):
            stores = list(ranks.map(lambda rank: rendezvous.new_store(store, rank, 3, SOON), range(3)))
            assert not stores[1].check(["address"])
            stores[0].set("address", "of this attempt")
            assert stores[2].get("address") == b"of this attempt"
        store.set("asks/1", "of a rank that died before it had an answer")
        assert all(one.get("address") for one in ranks.map(lambda r: _with_address(store, r), range(3)))


def _with_address(store, rank):
    mine = rendezvous.new_store(store, rank, 3, SOON)
    mine.set("address", "here")
    return mine


def test_who_does_not_come_is_named():
    with pytest.raises(TimeoutError, match=r"ranks \[1, 2\] did not come"):
        rendezvous.new_store(dist.HashStore(), 0, 3, timedelta(seconds=0.2))


TROUBLE = """
import os, signal, time, traceback
from dataclasses import dataclass
from torchladder import curriculum

@curriculum.register("trouble")
@dataclass(frozen=True)
class Trouble:
    how: str = "hangs"

    def __call__(self, step: int) -> int:
        trains = any(frame.name == "train_step" for frame in traceback.extract_stack())  # the plan looks ahead
        first = os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        if first and trains and step == 5:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun need not wait until it may kill
            time.sleep(600) if self.how == "hangs" else os.kill(os.getpid(), signal.SIGKILL)
        return 16
"""
"""A curriculum with which rank 1 hangs or dies before its sixth step, in the first attempt."""


@pytest.mark.parametrize(
    ("how", "timeout", "named", "saved"),
    [
        ("hangs", 4, "no answer from rank 1", "step-4"),
        # Nothing waits for the timeout, nor for the save of step 4, which the death may cut off.
        ("dies", 3600, r"failed \(exitcode: -9\) local_rank: 1 ", r"step-[24]"),
    ],
    ids=["hangs", "dies"],
)
def test_torchrun_starts_again_from_the_newest_checkpoint_and_names_who_was_missing(
    tmp_path, how, timeout, named, saved
):
    (tmp_path / "trouble.py").write_text(TROUBLE)
    argv = [
        *("--job.plugins", "trouble", "--curriculum.name", "trouble", "--curriculum.how", how),
        *("--training.steps", "8", "--training.local_batch_size", "2", "--training.seq_len", "64"),
        *("--checkpoint.enable", "--checkpoint.interval", "2", "--checkpoint.async_mode", "async"),
        *("--comm.init_timeout_seconds", "3600", "--comm.train_timeout_seconds", str(timeout)),
        *("--validation.no_enable", "--metrics.no_enable_tensorboard"),
    ]
    path = f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
    job = start(tmp_path / "run", *argv, ranks=2, launcher=("--max-restarts", "1"), PYTHONPATH=path)
    said = job.communicate()[0]
    assert job.returncode == 0, said[-4000:]
    assert re.search(named, said)
    assert re.search(rf"loaded \S*/{saved}\n", said)
    fifth = re.findall(r"step:  5  loss: (\S+)  grad_norm: (\S+)", said)  # of both attempts
    assert len(fifth) == 2
    assert fifth[0] == fifth[1]
    assert [line["step"] for line in lines(tmp_path / "run")] == list(range(1, 9))  # each step once
