"""Checkpoints in other storages than the local file system: fsspec's, and one that a plugin registers."""

import sys
from contextlib import contextmanager

import pytest
from runs import DEBUG, losses, run
from test_checkpoint import Thing, accept, equal, run_of, saved

from torchladder import checkpoint, commands, train
from torchladder.checkpoint import CheckpointConfig, SaveError, checksums, storage
from torchladder.checkpoint.storage import get_storage
from torchladder.registry import ConfigError

PLUGIN = '''
import io
import tempfile
from contextlib import contextmanager
from pathlib import Path

from torchladder.checkpoint import storage

FILES = {}  # URL -> content
BROKEN = []  # messages of errors to raise, the next one last


@storage.register("shelf")
class ShelfStorage(storage.CheckpointStorage):
    """Keeps files in a dictionary, and raises errors of its own kind."""

    @contextmanager
    def create_stream(self, path, mode):
        if mode == "rb":
            yield io.BytesIO(FILES[path])
            return
        if BROKEN:
            raise LookupError(BROKEN[-1])
        with tempfile.NamedTemporaryFile() as file, open(file.name, "wb") as stream:
            yield stream
            stream.close()
            FILES[path] = Path(file.name).read_bytes()

    def exists(self, path):
        return path in FILES

    def mkdir(self, path):
        pass

    def rename(self, path, new_path):
        FILES[new_path] = FILES.pop(path)

    def rm_file(self, path):
        del FILES[path]

    def rm_tree(self, path):
        for name in [name for name in FILES if name.startswith(f"{path}/")]:
            del FILES[name]

    def list_names(self, folder):
        return list({name.removeprefix(f"{folder}/").split("/")[0] for name in FILES if name.startswith(f"{folder}/")})
'''


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """The plugin's module, imported as job.plugins would."""
    folder = tmp_path_factory.mktemp("plugin")
    (folder / "shelf_storage.py").write_text(PLUGIN)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield __import__("shelf_storage")


@pytest.fixture(params=["file", "memory", "shelf"])
def url(request, tmp_path, shelf):
    yield f"{request.param}://{tmp_path}/run"
    for kind in ("memory", "shelf"):
        get_storage(f"{kind}://{tmp_path}").rm_tree(f"{kind}://{tmp_path}")


def test_the_scheme_chooses_the_storage(tmp_path, shelf):
    kinds = {f"{tmp_path}/run": storage.FileSystemStorage, "run": storage.FileSystemStorage}
    kinds |= {"memory://run": storage.FsspecStorage, "shelf://run": shelf.ShelfStorage}
    assert {path: type(get_storage(path)) for path in kinds} == kinds


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_what_is_saved_is_loaded_bit_for_bit(url, mode):
    thing = Thing()
    checkpointer = thing.checkpointer(url, async_mode=mode)
    checkpointer.save(run_of(2))
    bits = thing.bits()
    thing.step()  # while it is being written
    checkpointer.save(run_of(10))
    checkpointer.wait()
    assert get_storage(url).steps(url) == checkpoint.complete_steps(url) == [2, 10]
    assert checkpoint.find_corruption(f"{url}/step-2") is None
    other = Thing(seed=1)
    assert other.checkpointer(url).load(accept).row == 40
    assert equal(other.bits(), thing.bits())
    assert other.checkpointer(url, load_step=2).load(accept).row == 8
    assert equal(other.bits(), bits)
    new = Thing(seed=2)
    settings = {"initial_load_path": f"{url}/step-2/", "initial_load_model_only": False}
    assert new.checkpointer(f"{url}/new", **settings).load(accept).step == 2
    assert equal(new.bits(), bits)


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "config.toml", "run.json", "SHA256SUMS"])
@pytest.mark.parametrize("damage", ["missing", "cut", "flipped"])
def test_a_damaged_newest_one_is_skipped(url, caplog, name, damage):
    saved(url, 4, 9, 10)
    files, file = get_storage(url), f"{url}/step-10/{name}"
    content = bytearray(files.read(file))
    if damage == "missing":
        files.rm_file(file)
    else:
        content[len(content) // 2] ^= 1
        files.write(file, bytes(content) if damage == "flipped" else bytes(content)[: len(content) // 2])
    assert Thing().checkpointer(url).load(accept).step == 9
    if (name, damage) != ("SHA256SUMS", "missing"):  # then it is no checkpoint, as after a save that was killed
        assert "step-10" in caplog.text
        assert "damaged" in caplog.text
        with pytest.raises(ConfigError, match="step-10 is damaged"):
            Thing().checkpointer(url, load_step=10).load(accept)


def test_old_ones_are_deleted(url):
    saved(url, 1, 2, 3, 4, 5, 6, keep_latest_k=2, keep_every=3)
    assert checkpoint.complete_steps(url) == [3, 5, 6]
    assert sorted(get_storage(url).list_names(url)) == ["step-3", "step-5", "step-6"]


def test_a_step_is_written_again(url):
    saved(url, 2, 4, 6)
    thing = Thing(seed=3)
    thing.checkpointer(url).save(run_of(4))
    assert checkpoint.complete_steps(url) == [2, 4, 6]
    other = Thing(seed=1)
    assert other.checkpointer(url, load_step=4).load(accept).step == 4
    assert equal(other.bits(), thing.bits())


@pytest.mark.parametrize("where", range(2, 6))
def test_what_a_killed_save_leaves_is_no_checkpoint(url, monkeypatch, where):
    """A save is killed at its n-th write, after the tensors; test_torture.py kills real processes anywhere."""
    saved(url, 1)

    class Killed(BaseException):
        """Not caught by anything, like SIGKILL."""

    kind, writes = type(get_storage(url)), []
    create_stream = kind.create_stream

    @contextmanager
    def killed(self, path, mode):
        writes.append(mode == "wb")
        if sum(writes) > where and mode == "wb":
            raise Killed
        with create_stream(self, path, mode) as stream:
            yield stream

    with monkeypatch.context() as patch:
        patch.setattr(kind, "create_stream", killed)
        thing = Thing()
        if where < 5:  # after the tensors and .metadata: at run.json, config.toml, SHA256SUMS
            with pytest.raises(Killed):
                thing.checkpointer(url).save(run_of(2))
        else:
            thing.checkpointer(url).save(run_of(2))
    complete = [1] if where < 5 else [1, 2]
    assert checkpoint.complete_steps(url) == complete
    assert Thing().checkpointer(url).load(accept).step == complete[-1]
    Thing().checkpointer(url).save(run_of(3))
    assert sorted(get_storage(url).list_names(url)) == [f"step-{step}" for step in (*complete, 3)]


def test_a_first_save_that_was_killed_does_not_stop_the_next_start(url):
    get_storage(url).write(f"{url}/step-1/__0_0.distcp", b"half")
    assert Thing().checkpointer(url).load(accept) is None


def test_any_error_of_a_storage_is_reported_and_the_save_tried_again(tmp_path, shelf, caplog):
    url = f"shelf://{tmp_path}/run"
    checkpointer = Thing().checkpointer(url, max_failures=2, async_mode="async")
    shelf.BROKEN.append("the shelf is full")
    checkpointer.save(run_of(1))
    checkpointer.wait()
    assert "LookupError: the shelf is full" in caplog.text
    assert checkpointer.overdue
    checkpointer.save(run_of(2))
    with pytest.raises(SaveError, match=r"2 saves in a row failed .*the shelf is full"):
        checkpointer.wait()
    shelf.BROKEN.clear()
    checkpointer.save(run_of(3), blocking=True)
    assert checkpoint.complete_steps(url) == [3]


def test_what_the_storage_did_not_keep_is_found_before_anything_is_deleted(tmp_path, monkeypatch, caplog):
    url = f"memory://{tmp_path}/run"
    saved(url, 1, 2, keep_latest_k=2)
    write = checksums.ChecksumStream.write
    monkeypatch.setattr(checksums.ChecksumStream, "write", lambda self, data: write(self, data) and self.seek(0))
    Thing().checkpointer(url, keep_latest_k=2).save(run_of(3))
    assert "is not saved" in caplog.text
    assert checkpoint.complete_steps(url) == [1, 2]


def test_a_run_resumes_bit_for_bit(url, tmp_path, shelf):
    short = ["--training.steps", "5", "--validation.no_enable", "--training.seq_len", "64"]
    run(tmp_path / "whole", *short)
    plugin = ["--job.plugins", "shelf_storage"]
    saving = ["--checkpoint.enable", "--checkpoint.folder", f"{url}/", "--checkpoint.interval", "1"]
    folder = tmp_path / "parts"
    run(folder, *short, *plugin, *saving, "--checkpoint.async_mode", "async", "--job.exit_interval", "2", code=75)
    assert checkpoint.complete_steps(url) == [1, 2]
    run(folder, *short, *plugin, *saving)
    assert losses(folder) == losses(tmp_path / "whole")
    assert checkpoint.complete_steps(url) == [1, 2, 3, 4, 5]
    assert not (folder / "checkpoint").exists()
    assert get_storage(url).read(f"{url}/step-5/config.toml") == (folder / "config.toml").read_bytes()


@pytest.mark.parametrize(
    ("folder", "words"),
    [
        ("nowhere://run", r"cannot open nowhere://run with fsspec: Protocol not known"),
        ("s3://bucket/run", r"pip install s3fs"),
    ],
)
def test_a_url_that_nothing_opens(tmp_path, monkeypatch, capfd, folder, words):
    monkeypatch.setitem(sys.modules, "s3fs", None)  # also where it is installed
    with pytest.raises(ConfigError, match=words):
        Thing().checkpointer(folder)
    assert (
        train.main([*DEBUG, "--job.dump_folder", str(tmp_path), "--checkpoint.enable", "--checkpoint.folder", folder])
        == 2
    )
    assert folder in capfd.readouterr().err


def test_a_hugging_face_folder_is_not_written_beside_a_url():
    with pytest.raises(ConfigError, match=r"last_save_in_hf .* needs a local checkpoint\.folder"):
        CheckpointConfig(enable=True, folder="s3://bucket/run", last_save_in_hf=True)


@pytest.mark.parametrize(
    "argv",
    [
        ["generate", "--checkpoint", "s3://bucket/run/step-5", "--prompt", "a"],
        ["evaluate", "s3://bucket/run", "--files", "README.md"],
        ["convert", "to-hf", "s3://bucket/run/step-5", "--output", "{tmp}/out"],
    ],
)
def test_other_commands_say_that_they_read_local_folders(tmp_path, monkeypatch, capfd, argv):
    monkeypatch.setattr(sys, "argv", ["torchladder", *(word.format(tmp=tmp_path) for word in argv)])
    assert commands.main() == 2
    assert "is a URL: only training reads checkpoints from a URL" in capfd.readouterr().err
