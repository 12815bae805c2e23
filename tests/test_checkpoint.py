"""Checkpoints: what is on disk, what survives damage and failing disks, and who may read them."""

import errno
import hashlib
import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runs import losses, run
from torch import nn

from torchladder import checkpoint
from torchladder.checkpoint import CheckpointConfig, Checkpointer, RunState, SaveError, checksums, step_folders, storage
from torchladder.registry import ConfigError


class Thing:
    """A model and its optimizer, a few steps old."""

    def __init__(self, seed: int = 0, steps: int = 1) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        for _ in range(steps):
            self.step()

    def step(self) -> None:
        self.model(torch.randn(4, 5)).square().sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def bits(self) -> list[torch.Tensor]:
        state = [value for one in self.optimizer.state.values() for value in one.values()]
        return [value.detach().clone() for value in (*self.model.parameters(), *state)]

    def checkpointer(self, folder: Path, **settings) -> Checkpointer:
        config = CheckpointConfig(enable=True, retry_minutes=0, **settings)
        return Checkpointer(config, str(folder), self.model, self.optimizer, {"config.toml": b"[job]\n"})


def run_of(step: int) -> RunState:
    return RunState(step=step, row=4 * step)


def accept(state: RunState, path: str) -> None:
    pass


def saved(folder: Path, *steps: int, **settings) -> Thing:
    thing = Thing()
    checkpointer = thing.checkpointer(folder, **settings)
    for step in steps:
        thing.step()
        checkpointer.save(run_of(step))
    checkpointer.wait()
    return thing


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_what_is_saved_is_loaded_bit_for_bit(tmp_path, mode):
    thing = Thing()
    checkpointer = thing.checkpointer(tmp_path, async_mode=mode)
    checkpointer.save(run_of(2))
    bits = thing.bits()
    thing.step()  # while it is being written
    checkpointer.save(run_of(3))
    checkpointer.wait()
    later = thing.bits()

    other = Thing(seed=1)
    assert other.checkpointer(tmp_path).load(accept).row == 12
    assert equal(other.bits(), later)
    assert other.checkpointer(tmp_path, load_step=2).load(accept).step == 2
    assert equal(other.bits(), bits)


def test_a_checkpoint_says_what_it_is(tmp_path):
    saved(tmp_path, 2)
    path = tmp_path / "step-2"
    assert sorted(os.listdir(path)) == [".metadata", "SHA256SUMS", "__0_0.distcp", "config.toml", "run.json"]
    assert json.loads((path / "run.json").read_text())["row"] == 8
    assert (path / "config.toml").read_text() == "[job]\n"
    for name, digest in step_folders.read_checksums(path).items():
        assert hashlib.sha256((path / name).read_bytes()).hexdigest() == digest
    if shutil.which("sha256sum"):
        assert subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=path).returncode == 0


FILES = [".metadata", "SHA256SUMS", "__0_0.distcp", "config.toml", "run.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "cut", "flipped", "empty"])
def test_a_damaged_newest_one_is_reported_and_the_one_before_is_used(tmp_path, caplog, name, damage):
    saved(tmp_path, 4, 9, 10)  # as strings, 9 would be the newest
    file = tmp_path / "step-10" / name
    content = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    elif damage == "flipped":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    else:
        file.write_bytes(content[: len(content) // 2] if damage == "cut" else b"")
    assert Thing().checkpointer(tmp_path).load(accept).step == 9
    assert "step-10" in caplog.text
    assert "damaged" in caplog.text
    with pytest.raises(ConfigError, match="step-10 is damaged"):
        Thing().checkpointer(tmp_path, load_step=10).load(accept)


def test_when_all_are_damaged_the_run_does_not_begin_anew(tmp_path):
    saved(tmp_path, 1, 2)
    for step in (1, 2):
        (tmp_path / f"step-{step}" / "__0_0.distcp").write_bytes(b"")
    with pytest.raises(ConfigError, match="every checkpoint"):
        Thing().checkpointer(tmp_path).load(accept)
    with pytest.raises(ConfigError, match="not an intact checkpoint"):
        Thing().checkpointer(tmp_path / "new", initial_load_path=str(tmp_path / "step-1")).load(accept)


@given(st.lists(st.integers(0, 60), min_size=1, max_size=12, unique=True), st.integers(2, 5), st.integers(0, 7))
def test_what_is_kept(tmp_path_factory, steps, keep, every):
    folder = tmp_path_factory.mktemp("kept")
    for step in sorted(steps):
        for name in (".metadata", "run.json", "SHA256SUMS"):
            (folder / f"step-{step}").mkdir(exist_ok=True)
            (folder / f"step-{step}" / name).touch()
    newest = sorted(steps)[-1]
    step_folders.prune(str(folder), newest, keep, every)
    expected = {step for step in steps if every and step % every == 0} | set(sorted(steps)[-keep:])
    assert set(checkpoint.complete_steps(folder)) == expected


def test_branching_off_keeps_what_is_later_until_it_is_written_again(tmp_path):
    saved(tmp_path, 2, 4, 6, 8)
    thing = Thing(seed=3)
    checkpointer = thing.checkpointer(tmp_path, keep_latest_k=2)
    checkpointer.save(run_of(4))
    assert checkpoint.complete_steps(tmp_path) == [2, 4, 6, 8]
    checkpointer.save(run_of(6))
    assert checkpoint.complete_steps(tmp_path) == [4, 6, 8]
    assert not list(tmp_path.glob("*.old"))


@pytest.fixture
def full_disk(monkeypatch):
    """Writes fail as long as the list has anything in it."""
    broken: list[int] = [errno.ENOSPC]
    write = checksums.ChecksumStream.write

    def fail(stream, data):
        if broken:
            raise OSError(broken[0], os.strerror(broken[0]))
        return write(stream, data)

    monkeypatch.setattr(checksums.ChecksumStream, "write", fail)
    return broken


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_a_full_disk_is_reported_and_tried_again(tmp_path, caplog, full_disk, mode):
    thing = Thing()
    checkpointer = thing.checkpointer(tmp_path, async_mode=mode, max_failures=3, interval=10)
    checkpointer.save(run_of(10))
    checkpointer.wait()
    size = sum(value.nbytes for value in thing.bits())
    assert "__0_0.distcp: the disk is full (" in caplog.text
    assert f" bytes written); a checkpoint takes {size:,} bytes" in caplog.text
    assert storage.get_storage(tmp_path).steps(str(tmp_path)) == []
    assert not list(tmp_path.iterdir())  # what was written of it must not fill the disk further
    assert checkpointer.overdue
    assert checkpointer.due(11, last=False, overdue=True)
    full_disk.clear()
    checkpointer.save(run_of(11))
    checkpointer.wait()
    assert checkpoint.complete_steps(tmp_path) == [11]
    assert not checkpointer.overdue


def test_only_max_failures_in_a_row_end_the_run(tmp_path, full_disk):
    checkpointer = Thing().checkpointer(tmp_path, max_failures=3)
    checkpointer.save(run_of(1))
    checkpointer.save(run_of(2))
    full_disk.clear()
    checkpointer.save(run_of(3))
    full_disk.append(errno.ESTALE)
    checkpointer.save(run_of(4))
    checkpointer.save(run_of(5))
    with pytest.raises(SaveError, match=r"3 saves in a row failed .*Stale file handle"):
        checkpointer.save(run_of(6))
    assert checkpoint.complete_steps(tmp_path) == [3]


def test_a_run_trains_on_while_nothing_can_be_saved(tmp_path, monkeypatch, caplog):
    short = ["--training.steps", "6", "--validation.no_enable", "--training.seq_len", "64"]
    run(tmp_path / "whole", *short)
    write, calls = checksums.ChecksumStream.write, []

    def fail(stream, data):
        calls.append(1)
        if len(calls) <= 2:
            raise OSError(28, "No space left on device")
        return write(stream, data)

    monkeypatch.setattr(checksums.ChecksumStream, "write", fail)
    saving = ["--checkpoint.enable", "--checkpoint.interval", "2", "--checkpoint.retry_minutes", "0"]
    run(tmp_path / "run", *short, *saving, "--checkpoint.async_mode", "async")
    assert caplog.text.count("is not saved") == 2
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert checkpoint.complete_steps(tmp_path / "run" / "checkpoint")[-1] == 6
    calls.clear()
    longer = ["--training.steps", "9", "--checkpoint.accept_changes", "training.steps"]
    run(tmp_path / "run", *short, *saving, *longer, "--checkpoint.max_failures", "1", code=1)
    assert "1 saves in a row failed" in caplog.text
    assert checkpoint.complete_steps(tmp_path / "run" / "checkpoint")[-1] == 6


def test_what_killed_saves_have_left_is_cleared_away(tmp_path):
    for name in ("step-3.partial", "step-5.old", "step-1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__0_0.distcp").write_bytes(b"half")
    saved(tmp_path, 4, 6, 7, keep_latest_k=2)
    assert sorted(os.listdir(tmp_path)) == ["step-6", "step-7"]


def test_a_file_in_the_place_of_the_folder_is_no_end(tmp_path, caplog):
    (tmp_path / "saves").write_text("")  # what a mount that is gone looks like, for a process that may do everything
    checkpointer = Thing().checkpointer(tmp_path / "saves")
    checkpointer.save(run_of(1))
    assert "is not saved" in caplog.text
    (tmp_path / "saves").unlink()
    checkpointer.save(run_of(2))
    assert checkpoint.complete_steps(tmp_path / "saves") == [2]


def test_what_the_disk_did_not_keep_is_found_before_anything_is_deleted(tmp_path, monkeypatch, caplog):
    checkpointer = Thing().checkpointer(tmp_path, keep_latest_k=2)
    checkpointer.save(run_of(1))
    checkpointer.save(run_of(2))
    files = storage.FileSystemStorage
    sha256 = files.sha256
    monkeypatch.setattr(files, "sha256", lambda self, path: "0" if path.endswith(".distcp") else sha256(self, path))
    checkpointer.save(run_of(3))
    assert "does not hold what was written" in caplog.text
    assert checkpoint.complete_steps(tmp_path) == [1, 2]


def test_minutes_ask_for_a_checkpoint(tmp_path):
    checkpointer = Thing().checkpointer(tmp_path, interval=1000, interval_minutes=1)
    assert not checkpointer.overdue
    checkpointer._last_attempt -= 60
    assert checkpointer.overdue
    checkpointer.save(run_of(3))
    assert not checkpointer.overdue
    assert not checkpointer.due(3, last=True)  # it is there


def test_what_is_excluded_is_excluded_once(tmp_path):
    saved(tmp_path / "a", 5)
    settings = {
        "initial_load_path": str(tmp_path / "a" / "step-5"),
        "initial_load_model_only": False,
        "exclude_from_loading": ["optimizer", "dataloader"],
    }
    thing = Thing(seed=2, steps=0)
    first = thing.checkpointer(tmp_path / "b", **settings)
    assert first.load(accept) == replace(run_of(5), row=0)
    assert not thing.optimizer.state
    thing.step()
    first.save(run_of(6))
    again = Thing(seed=4)
    assert again.checkpointer(tmp_path / "b", **settings).load(accept).row == 24
    assert equal(again.bits(), thing.bits())

    with pytest.raises(ConfigError, match="train_state"):
        Thing().checkpointer(tmp_path / "b", exclude_from_loading=["train_state"]).load(accept)


def test_a_restart_continues_from_the_newest(tmp_path, monkeypatch):
    saved(tmp_path, 2, 4)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert Thing().checkpointer(tmp_path, load_step=2).load(accept).step == 4


def test_finished_asks_the_newest(tmp_path):
    def finished(total_steps: int) -> bool:
        """Whether loading leaves a model of another seed as it is."""
        thing = Thing(seed=5)
        before, config = thing.bits(), CheckpointConfig(enable=True)
        state = Checkpointer(config, str(tmp_path), thing.model, thing.optimizer, None, total_steps).load(accept)
        return state is not None and equal(thing.bits(), before)

    assert not finished(4)
    saved(tmp_path, 2, 4)
    assert finished(4)
    assert not finished(5)
    Thing().checkpointer(tmp_path).save(replace(run_of(5), post_step_pending=True))
    assert not finished(5)
    Thing().checkpointer(tmp_path).save(run_of(5))
    assert finished(5)
    (tmp_path / "step-5" / "run.json").write_text("{")
    assert not finished(5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"interval": 0}, "interval = 0"),
        ({"interval_minutes": -1.0}, "interval_minutes"),
        ({"keep_latest_k": 1}, "keep_latest_k = 1"),
        ({"keep_every": -1}, "keep_every"),
        ({"max_failures": 0}, "max_failures"),
        ({"retry_minutes": float("nan")}, "retry_minutes"),
        ({"load_step": -2}, "load_step"),
        ({"exclude_from_loading": ["lr_scheduler"]}, "has no state"),
        ({"exclude_from_loading": ["optimiser"]}, "Did you mean 'optimizer'"),
        ({"create_seed_checkpoint": True}, "create_seed_checkpoint"),
    ],
)
def test_settings_that_cannot_be(settings, words):
    with pytest.raises(ConfigError, match=words):
        CheckpointConfig(**settings)


def test_pinned_memory_needs_a_gpu(tmp_path):
    with pytest.raises(ConfigError, match="this run is on cpu"):
        Thing().checkpointer(tmp_path, async_mode="async_with_pinned_mem")
