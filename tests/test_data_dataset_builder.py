import gzip
import json
import multiprocessing
import multiprocessing.forkserver
import os
import random
import signal
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pytest

from torchladder.data.formats.indexed import IndexedTokens
from torchladder.data.prepare import dataset_builder, executor, merging, metadata, tasks
from torchladder.data.prepare.document_encoder import DocumentEncoder
from torchladder.data.prepare.executor import LocalExecutor
from torchladder.data.prepare.tasks import PrepareConfig
from torchladder.data.sources import held_out
from torchladder.data.text.text_files import text
from torchladder.data.tokenizer import ByteTokenizer
from torchladder.registry import ConfigError

SUFFIXES = ("bin", "idx", "json")


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    rng = random.Random(0)
    for number in range(3):
        lines = [json.dumps({"text": f"{number} {i} " + "x" * rng.randrange(200)}) + "\n" for i in range(100)]
        (folder / f"{number}.jsonl").write_text("".join(lines))
    (folder / "packed.jsonl.gz").write_bytes(gzip.compress((folder / "0.jsonl").read_bytes()))
    for number in range(20):
        (folder / f"n{number}.txt").write_text(f"note {number} é")
    return folder


@pytest.fixture
def prepare(folder, tmp_path):
    def prepare(output="out", workers=1, **settings):
        settings = {
            "inputs": [str(folder)],
            "encoder": DocumentEncoder(ByteTokenizer()),
            "part_bytes": 2000,
            **settings,
        }
        return dataset_builder.prepare_dataset(
            PrepareConfig(output=str(tmp_path / output), tokenizer="bytes", **settings), LocalExecutor(workers)
        )

    return prepare


def expected(folder):
    found = []
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".txt":
            found.append(path.read_text())
        else:
            raw = path.read_bytes()
            lines = gzip.decompress(raw) if path.suffix == ".gz" else raw
            found += [json.loads(line)["text"] for line in lines.splitlines()]
    return [[*text.encode(), 256] for text in found]


def documents(prefix):
    pair = IndexedTokens(prefix)
    return [pair[i].tolist() for i in range(len(pair))]


def content(prefix):
    return [Path(f"{prefix}.{suffix}").read_bytes() for suffix in SUFFIXES]


def test_documents_are_in_order_and_counted(prepare, folder, tmp_path):
    about = prepare()
    assert documents(tmp_path / "out") == expected(folder)
    assert (about.documents, about.tokens) == (420, IndexedTokens(tmp_path / "out").num_tokens)
    assert about == metadata.read_metadata(tmp_path / "out")
    assert metadata.find_corrupt_file(tmp_path / "out", about.checksums) is None
    assert about.tokenizer == {"name": "bytes", "fingerprint": "bytes", "vocab_size": 257, "bos": None, "eos": 256}
    assert [source["path"] for source in about.sources] == sorted(map(str, folder.iterdir()))
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out.bin", "out.idx", "out.json"]


def test_the_output_is_the_same_for_any_workers_and_parts(prepare, tmp_path):
    prepare("one")
    prepare("two", workers=2, part_bytes=700)
    prepare("three", part_bytes=None)
    assert content(tmp_path / "one") == content(tmp_path / "two") == content(tmp_path / "three")


def test_ends_are_a_setting(prepare, tmp_path):
    class Begun(ByteTokenizer):
        bos, vocab_size, fingerprint = 257, 258, "begun"

    prepare("bare", encoder=DocumentEncoder(ByteTokenizer(), eos=False))
    prepare("both", encoder=DocumentEncoder(Begun(), bos=True))
    assert [[257, *ids, 256] for ids in documents(tmp_path / "bare")] == documents(tmp_path / "both")
    assert metadata.read_metadata(tmp_path / "bare").tokenizer["eos"] is None
    with pytest.raises(ConfigError, match="no bos token"):
        DocumentEncoder(ByteTokenizer(), bos=True)


@pytest.mark.parametrize("count", [1, 3, 20])
def test_shards_merge_to_the_whole(prepare, tmp_path, count):
    prepare("whole")
    names = []
    for number in range(count):
        prepare("part", shard=(number, count))
        names.append(str(tmp_path / f"part-{number:05}-of-{count:05}"))
    merging.merge_datasets(str(tmp_path / "merged"), names[::-1])
    assert content(tmp_path / "merged") == content(tmp_path / "whole")
    if count > 1:
        with pytest.raises(ConfigError, match=rf"{count - 1} of {count} shards; missing: 1/{count}"):
            merging.merge_datasets(str(tmp_path / "some"), [names[0], *names[2:]])
        prepare("other", shard=(0, count), text_key="title", inputs=[str(tmp_path / "texts" / "*.txt")])
        with pytest.raises(ConfigError, match="is not a shard of the same preparation"):
            merging.merge_datasets(str(tmp_path / "some"), [str(tmp_path / f"other-00000-of-{count:05}"), *names[1:]])


class Fails:
    """Does tasks until the count is reached."""

    def __init__(self, count):
        self.count = count
        self.done = 0

    def __call__(self, work, tasks):
        for task in tasks:
            if self.done == self.count:
                raise InterruptedError
            self.done += 1
            yield work(task)


@pytest.mark.parametrize("part_bytes", [300, 100_000])
def test_the_documents_held_out_are_those_of_a_source_of_text(prepare, folder, tmp_path, part_bytes):
    settings = {"validation_fraction": 0.2, "part_bytes": part_bytes}
    kept, held = (prepare(split=split, **settings) for split in ("train", "validation"))
    documents = list(text(str(folder)).documents())
    chosen = [document.text for document in documents if held_out(document.identity, 0.2)]
    assert held.documents == len(chosen) == len(documents) - kept.documents > 20
    tokens = IndexedTokens(tmp_path / "out-validation")
    assert [ByteTokenizer().decode(ids[:-1]) for ids in map(tokens.__getitem__, range(len(chosen)))] == chosen


def test_nothing_held_out_is_an_error(prepare, folder, tmp_path):
    config = PrepareConfig(
        inputs=[str(folder / "n1.txt")], output=str(tmp_path / "one"), encoder=DocumentEncoder(ByteTokenizer()),
        validation_fraction=0.001,
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"--validation-fraction 0.001 holds out no document"):
        dataset_builder.prepare_held_out(config, LocalExecutor(1))
    with pytest.raises(ConfigError, match=r"--validation-fraction 1\.0: must be 0 or more and below 1"):
        PrepareConfig(inputs=["x"], output="y", encoder=config.encoder, validation_fraction=1.0)
    prepare(validation_fraction=0.2)
    with pytest.raises(ConfigError, match=r"other settings \(validation_fraction\)"):
        prepare()
    prepare(split="validation", validation_fraction=0.2)
    with pytest.raises(ConfigError, match="held out for validation"):
        merging.merge_datasets(str(tmp_path / "all"), [str(tmp_path / "out"), str(tmp_path / "out-validation")])


def test_what_is_done_is_not_done_again(prepare, folder, tmp_path, capfd):
    prepare("whole")
    settings = {
        "inputs": [str(folder)],
        "encoder": DocumentEncoder(ByteTokenizer()),
        "tokenizer": "bytes",
        "part_bytes": 2000,
    }
    preparation = PrepareConfig(output=str(tmp_path / "out"), **settings)
    total = len(tasks.split_into_tasks(preparation, tasks.expand_inputs(preparation.inputs)))
    assert total > 14
    for count in (0, 5, 7):
        with pytest.raises(InterruptedError):
            dataset_builder.prepare_dataset(preparation, Fails(count))
        assert not (tmp_path / "out.bin").exists()
        assert not (tmp_path / "out.json").exists()
    rest = Fails(10**6)
    dataset_builder.prepare_dataset(preparation, rest)
    assert rest.done == total - 12
    assert f"continuing: 12 of {total} parts exist" in capfd.readouterr().err
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    again = Fails(0)
    dataset_builder.prepare_dataset(preparation, again)
    assert again.done == 0
    assert not (tmp_path / "out.parts").exists()


def test_a_changed_file_is_done_again_and_others_are_not(prepare, folder, tmp_path):
    settings = {
        "inputs": [str(folder)],
        "encoder": DocumentEncoder(ByteTokenizer()),
        "tokenizer": "bytes",
        "part_bytes": 2000,
    }
    preparation = PrepareConfig(output=str(tmp_path / "out"), **settings)
    with pytest.raises(InterruptedError):
        dataset_builder.prepare_dataset(preparation, Fails(10))
    (folder / "0.jsonl").write_text(json.dumps({"text": "new"}) + "\n")
    rest = Fails(10**6)
    dataset_builder.prepare_dataset(preparation, rest)
    assert documents(tmp_path / "out") == expected(folder)


def test_after_an_error_skipping_continues(prepare, folder, tmp_path, capfd):
    with open(folder / "2.jsonl", "a") as file:
        file.write("{broken\n" + json.dumps({"text": ""}) + "\n")
    with pytest.raises(ConfigError, match=r"2\.jsonl:101: not JSON"):
        prepare()
    kept = len(list((tmp_path / "out.parts").glob("*.json")))
    assert kept > 5
    about = prepare(on_error="skip")
    said = capfd.readouterr().err
    assert f"continuing: {kept} of" in said
    assert "skip: 1 documents: invalid JSON (first: " in said
    assert about.skipped == {"invalid JSON": 1, "empty": 1}
    assert about.documents == 420


def test_an_error_in_a_worker_is_the_error(prepare, folder):
    (folder / "1.jsonl").write_text("{broken\n")
    with pytest.raises(ConfigError, match=r"1\.jsonl:1: not JSON"):
        prepare(workers=2)


def test_an_output_with_other_settings_is_not_replaced_unasked(prepare, folder, tmp_path):
    prepare()
    before = content(tmp_path / "out")
    prepare(on_error="skip")  # nothing was to be skipped
    for settings in ({"encoder": DocumentEncoder(ByteTokenizer(), eos=False)}, {"inputs": [str(folder / "*.txt")]}):
        with pytest.raises(ConfigError, match=r"was prepared with other settings \((tokenizer|sources)\); --overwrite"):
            prepare(**settings)
    later = time.time() + 5
    os.utime(folder / "n3.txt", (later, later))
    with pytest.raises(ConfigError, match=r"n3\.txt is newer\); --overwrite"):
        prepare()
    assert content(tmp_path / "out") == before
    prepare(overwrite=True, encoder=DocumentEncoder(ByteTokenizer(), eos=False))
    assert content(tmp_path / "out") != before
    (tmp_path / "out.json").unlink()
    with pytest.raises(ConfigError, match=r"out\.bin already exists and has no metadata"):
        prepare()


def test_one_process_at_a_time(prepare, tmp_path):
    with (
        dataset_builder._lock_parts(str(tmp_path / "out")),
        pytest.raises(ConfigError, match="another process is preparing"),
    ):
        prepare()


def test_a_damaged_part_is_made_again(prepare, folder, tmp_path):
    settings = {
        "inputs": [str(folder)],
        "encoder": DocumentEncoder(ByteTokenizer()),
        "tokenizer": "bytes",
        "part_bytes": 2000,
    }
    preparation = PrepareConfig(output=str(tmp_path / "out"), **settings)
    with pytest.raises(InterruptedError):
        dataset_builder.prepare_dataset(preparation, Fails(10))
    victim = next((tmp_path / "out.parts").glob("*.bin"))
    victim.write_bytes(victim.read_bytes()[:-1] + b"\x07")
    with pytest.raises(ConfigError, match="missing or damaged; run the same command again to make it again"):
        prepare()
    prepare()
    assert documents(tmp_path / "out") == expected(folder)


def test_a_file_that_changes_while_it_is_read_is_an_error(prepare, folder, tmp_path):
    def change_first(work, tasks):
        (folder / "0.jsonl").write_text('{"text": "other"}\n')
        return map(work, tasks)

    preparation = PrepareConfig(
        inputs=[str(folder)], output=str(tmp_path / "out"), encoder=DocumentEncoder(ByteTokenizer())
    )
    with pytest.raises(ConfigError, match=r"0\.jsonl changed while it was being read"):
        dataset_builder.prepare_dataset(preparation, change_first)


def test_invalid_inputs(prepare, folder):
    with pytest.raises(ConfigError, match="no file matches"):
        prepare(inputs=["none"])
    with pytest.raises(ConfigError, match="there is no input"):
        prepare(inputs=[])
    with pytest.raises(ConfigError, match=r"shard is 4/4; N shards are numbered 0/N to N-1/N"):
        prepare(shard=(4, 4))
    with pytest.raises(ConfigError, match="--part-bytes 0: must be 1 or more"):
        prepare(part_bytes=0)
    with pytest.raises(ConfigError, match="--workers 0: must be 1 or more"):
        prepare(workers=0)


def test_a_token_outside_the_vocabulary_names_the_line(prepare):
    class Small(ByteTokenizer):
        vocab_size, fingerprint = 115, "small"

    with pytest.raises(ConfigError, match=r"0\.jsonl:1: the tokenizer returns token 120, but its vocabulary has 115"):
        prepare(encoder=DocumentEncoder(Small(), eos=False))


class Slow(ByteTokenizer):
    def encode_batch(self, texts, threads=1):
        time.sleep(0.02)
        return super().encode_batch(texts, threads)


def test_killed_at_any_moment_it_continues(prepare, tmp_path):
    prepare("whole")
    fork = multiprocessing.get_context("fork")
    rng, kept, done = random.Random(time.time_ns()), [0], False
    while not done:
        process = fork.Process(target=prepare, kwargs={"encoder": DocumentEncoder(Slow()), "part_bytes": 1500})
        process.start()
        process.join(rng.random() * 0.5)
        done = process.exitcode is not None
        process.kill()
        process.join()
        # Whole or not at all: the metadata comes last.
        assert (tmp_path / "out.json").exists() or process.exitcode == -signal.SIGKILL
        kept.append(len(list((tmp_path / "out.parts").glob("*.json"))))
        assert done or kept[-1] >= kept[-2] or (tmp_path / "out.json").exists()
    prepare()
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert max(kept) > 0


@pytest.mark.parametrize("stop", ["idx unlinked", "bin there", "json missing"])
def test_killed_while_it_merges_it_continues(prepare, folder, tmp_path, monkeypatch, stop):
    prepare("whole")

    class Killed(BaseException):
        pass

    def die(*_):
        raise Killed

    if stop == "json missing":
        real = metadata.write_metadata
        monkeypatch.setattr(
            metadata, "write_metadata", lambda prefix, about: die() if prefix == out else real(prefix, about)
        )
    else:
        real_replace = os.replace
        left = {"idx unlinked": 0, "bin there": 1}[stop]
        moved = []

        def replace(a, b):
            if str(b) in (f"{out}.bin", f"{out}.idx"):
                if len(moved) == left:
                    die()
                moved.append(b)
            real_replace(a, b)

        monkeypatch.setattr(os, "replace", replace)
    out = str(tmp_path / "out")
    with pytest.raises(Killed):
        prepare()
    monkeypatch.undo()
    assert not (tmp_path / "out.json").exists()
    prepare()
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def _pid(task):
    return os.getpid()


def _sleep(task):
    time.sleep(task)
    return os.getpid()


def _die(task):
    os.kill(os.getpid(), signal.SIGKILL)


def _caller(pids):
    multiprocessing.forkserver._forkserver.__init__()  # that of the test's own process serves only its own children
    for pid in LocalExecutor(2)(_sleep, [0.0, 0.0, 60.0, 60.0]):
        pids.put(pid)


def test_workers_end_with_their_caller():
    context = multiprocessing.get_context("fork")
    pids = context.Queue()
    caller = context.Process(target=_caller, args=(pids,))
    caller.start()
    workers = {pids.get(timeout=60) for _ in range(2)}
    caller.kill()
    caller.join()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


def test_a_killed_worker_is_reported():
    with pytest.raises(ConfigError, match="a worker process was killed") as error:
        list(LocalExecutor(2)(_die, [1, 2]))
    assert not isinstance(error.value.__cause__, BrokenProcessPool)


def test_workers_are_processes():
    assert list(LocalExecutor(1)(_pid, [1])) == [os.getpid()]
    assert os.getpid() not in set(LocalExecutor(2)(_pid, [1, 2, 3]))
    assert list(LocalExecutor(2)(_pid, [])) == []
    assert executor.available_cpus() >= 1


def test_batches_of_long_and_short_documents():
    tokens, lengths, counts = DocumentEncoder(ByteTokenizer())(["", "ab", "c"], str)
    assert (counts.text_bytes, counts.text_tokens, counts.unknown_fraction) == (3, 3, 0)
    assert tokens.tolist() == [256, 97, 98, 256, 99, 256]
    assert lengths.tolist() == [1, 3, 2]
    assert np.asarray(DocumentEncoder(ByteTokenizer(), eos=False)([], str)[0]).tolist() == []
