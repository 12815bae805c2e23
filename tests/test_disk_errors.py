"""Full and read-only disks: one line with the path and the space, exit code 2, and runs that end as they should."""

import errno
import io
import logging
import os
import re
import resource
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from runs import DEBUG, run

from torchladder import checkpoint, commands, train
from torchladder.checkpoint.checksums import ChecksumStream
from torchladder.data import disk_cache
from torchladder.disk_errors import describe_disk_error, find_disk_error, naming_path, tolerating
from torchladder.metrics.console import ConsoleHandler
from torchladder.metrics.outputs import JsonlOutput, TensorBoardOutput
from torchladder.registry import ConfigError
from torchladder.resilience.interrupt import SIGNALS, Interrupted


@contextmanager
def limited(num_bytes):
    """Limits the size of files: what is written beyond fails, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def fail(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class FullStream(io.RawIOBase):
    def writable(self):
        return True

    write = fail


def error_of(work):
    with pytest.raises(Exception) as caught:  # noqa: PT011 - of any library
        work()
    return caught.value


def test_a_disk_error_is_found_behind_the_errors_of_libraries():
    lost = error_of(lambda: torch.save(torch.zeros(1 << 20), FullStream()))
    assert find_disk_error(lost).errno == errno.ENOSPC
    printed = RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert find_disk_error(printed).errno == errno.ENOSPC
    for other in (ValueError("no"), BrokenPipeError(errno.EPIPE, "Broken pipe"), FileNotFoundError(errno.ENOENT, "no")):
        assert find_disk_error(other) is None


def test_an_error_with_its_own_message_stays_what_it_is(tmp_path):
    def work(kind):
        with naming_path(tmp_path):
            try:
                fail()
            except OSError as error:
                raise kind("another message") from error

    for kind in (ConfigError, Interrupted, KeyboardInterrupt):
        with pytest.raises(kind, match="another message"):
            work(kind)


def test_the_description_names_the_path_and_the_space_at_the_time_of_the_error(tmp_path):
    file = tmp_path / "tokens.bin"

    def write():
        with naming_path(tmp_path), naming_path(file):
            file.write_bytes(b"12345")
            fail()

    error = error_of(write)
    file.unlink()
    assert re.fullmatch(rf"{file}: the disk is full \([\d,]+ bytes free, 5 bytes written\)", describe_disk_error(error))
    with pytest.raises(ValueError, match="another"), naming_path(file):
        raise ValueError("another")


def test_what_a_run_can_do_without_is_warned_of_once(tmp_path, caplog):
    warned = set()
    for _ in range(3):
        with tolerating(tmp_path / "plot.png", warned):
            fail()
    assert caplog.text.count("plot.png: the disk is full") == 1
    with pytest.raises(BrokenPipeError), tolerating(tmp_path / "plot.png"):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of one step, its export, and texts."""
    folder = tmp_path_factory.mktemp("disk")
    saving = ["--checkpoint.enable", "--checkpoint.last_save_in_hf", "--validation.no_enable"]
    run(folder / "run", "--training.steps", "1", *saving)
    (folder / "texts").mkdir()
    for name in ("a", "b"):
        (folder / "texts" / f"{name}.txt").write_text("".join(f"{number} words\n" for number in range(2000)))
    return folder


COMMANDS = {
    "prepare": "prepare --input {0}/texts --output {1}/out --tokenizer bytes --workers 1",
    "prepare in processes": "prepare --input {0}/texts --output {1}/out --tokenizer bytes --workers 2",
    "tokenizer train": "tokenizer train --input {0}/texts --output {1}/out --vocab-size 300",
    "to-hf": "convert to-hf {0}/run/checkpoint/step-1 --output {1}/out",
    "from-hf": "convert from-hf {0}/run/checkpoint/step-1-hf --output {1}/out",
}


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("trouble", ["full", "a file for a folder"])
def test_a_command_says_in_one_line_where_it_cannot_write(folder, tmp_path, monkeypatch, capfd, name, trouble):
    place = tmp_path / "there"
    if trouble != "full":
        place.touch()
    monkeypatch.setattr(sys, "argv", ["torchladder", *COMMANDS[name].format(folder, place).split()])
    with limited(1000 if trouble == "full" else resource.RLIM_INFINITY):
        assert commands.main() == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("torchladder: ")]
    assert str(place) in line
    if trouble == "full":
        # PyTorch's zip writer does not say which limit it was.
        assert re.search(r"(larger than the limit on file sizes|the disk is full) .*\([\d,]+ bytes free", line)
        assert not list(place.glob("out.bin"))
        assert not (place / "out").exists()
        assert not (place / "out.partial").exists()


def test_a_token_cache_on_a_full_disk_is_named(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("words " * 1000)
    source = f"{{ name = 'text', path = '{tmp_path}/text.txt' }}"
    argv = [*DEBUG, "--job.dump_folder", str(tmp_path / "run"), "--data.cache_folder", str(tmp_path / "cache")]
    with limited(1000):
        assert train.main([*argv, "--data.sources", source]) == 2
    assert re.search(
        r"torchladder: \S+/cache/tokens/\S+train.bin.partial: larger than the limit", capsys.readouterr().err
    )


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_folder_that_cannot_be_written_ends_a_run_before_it_starts(tmp_path, monkeypatch, capsys, number):
    mkdir = Path.mkdir

    def refuse(path, *args, **kwargs):
        if path == tmp_path / "run":
            raise OSError(number, os.strerror(number), str(path))
        mkdir(path, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert train.main([*DEBUG, "--job.dump_folder", str(tmp_path / "run")]) == 2
    reason = "the file system is read-only" if number == errno.EROFS else "permission denied"
    assert re.search(rf"torchladder: {tmp_path}/run: {reason}\n", capsys.readouterr().err)


def test_a_file_in_the_place_of_the_dump_folder(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert train.main([*DEBUG, "--job.dump_folder", str(tmp_path / "file" / "run")]) == 2
    assert "is a file." in capsys.readouterr().err


def test_a_run_whose_disk_fills_up_ends_as_it_would_and_keeps_its_checkpoint(tmp_path, monkeypatch, caplog):
    argv = ["--training.steps", "6", "--checkpoint.enable", "--checkpoint.interval", "2", "--validation.no_enable"]
    argv += ["--samples.prompts", "import ", "--samples.freq", "3", "--samples.max_new_tokens", "1"]
    run(tmp_path, *argv, "--job.exit_interval", "2", code=75)
    with monkeypatch.context() as patch:
        patch.setattr(ChecksumStream, "write", fail)
        for output in (JsonlOutput, TensorBoardOutput):
            patch.setattr(output, "write", fail)
            patch.setattr(output, "close", fail)
        patch.setattr("torchladder.plots.plot_run", fail)
        run(tmp_path, *argv, "--checkpoint.max_failures", "1", code=1)
        assert checkpoint.complete_steps(tmp_path / "checkpoint") == [2]
        run(tmp_path, *argv, "--checkpoint.load_only", code=0)
    for name in ("metrics.jsonl", "tb", "ladder.png", "__0_0.distcp"):
        assert f"{name}: the disk is full" in caplog.text
    assert caplog.text.count("metrics.jsonl: the disk is full") == 2  # once a run
    run(tmp_path, *argv)
    assert checkpoint.complete_steps(tmp_path / "checkpoint")[-1] == 6


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_log_on_a_full_disk_does_not_change_the_exit_code(monkeypatch):
    before = {number: signal.getsignal(number) for number in SIGNALS}
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        record = logging.LogRecord("torchladder", logging.INFO, __file__, 1, "x" * 100_000, None, None)
        ConsoleHandler(rank=0).emit(record)
        full.write("still in Python's buffer")
        with pytest.raises(SystemExit) as ending:
            train.exit_process(75)
        full.flush()  # as Python does at the end
    assert ending.value.code == 75
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_cache_without_space_leaves_nothing(tmp_path):
    with pytest.raises(OSError, match="No space"):
        disk_cache.build_once(tmp_path / "target", fail)
    assert [path.name for path in tmp_path.iterdir()] == ["target.lock"]
