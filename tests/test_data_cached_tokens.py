import json
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest

from torchladder.data import sources
from torchladder.data.disk_cache import build_once, cache_path
from torchladder.data.formats.indexed import IndexedTokens
from torchladder.data.prepare.cached_tokens import tokenize_cached
from torchladder.data.text import text_files
from torchladder.data.tokenizer import ByteTokenizer, Tokenizer
from torchladder.registry import ConfigError


class Shifted(Tokenizer):
    """Bytes from 10 on, with a bos, and whatever vocabulary a test asks for."""

    bos, eos = 1, 2

    def __init__(self, vocab_size=300, shift=10):
        self.vocab_size, self.shift, self.fingerprint = vocab_size, shift, f"shifted {shift}"

    def encode(self, text):
        return [byte + self.shift for byte in text.encode()]

    def decode(self, ids):
        return bytes(token - self.shift for token in ids if token >= self.shift).decode()


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(100):
        (folder / f"{i:03}.txt").write_text(f"document {i} é\n" * (1 + i % 3))
    return folder


def documents(prefix):
    read = IndexedTokens(prefix)
    return [read[i].tolist() for i in range(len(read))]


def test_documents_are_encoded_and_split(folder, tmp_path):
    source = text_files.text(str(folder))
    out = tokenize_cached(source, Shifted(), tmp_path / "cache", validation_fraction=0.2, bos=True)
    expected = {True: [], False: []}
    for document in source.documents():
        ids = [1, *Shifted().encode(document.text), 2]
        expected[sources.held_out(document.identity, 0.2)].append(ids)
    assert documents(out / "train") == expected[False]
    assert documents(out / "validation") == expected[True]
    assert len(expected[True]) > 5
    plain = tokenize_cached(source, Shifted(), tmp_path / "cache", validation_fraction=0.0)
    assert documents(plain / "train")[0] == [*Shifted().encode("document 0 é\n"), 2]
    assert documents(plain / "validation") == []


def test_the_cache_is_reused_until_something_matters(folder, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    first = tokenize_cached(text_files.text(str(folder)), ByteTokenizer(), cache)

    def reads(source, tokenizer, **settings):
        seen = []
        original = tokenizer.encode_batch
        monkeypatch.setattr(tokenizer, "encode_batch", lambda *a: seen.append(1) or original(*a), raising=False)
        return tokenize_cached(source, tokenizer, cache, **settings), bool(seen)

    assert reads(text_files.text(str(folder)), ByteTokenizer()) == (first, False)
    os.utime(folder / "000.txt", ns=(1, 1))
    assert reads(text_files.text(str(folder)), ByteTokenizer()) == (first, False)
    os.rename(folder, folder.with_name("moved"))
    assert reads(text_files.text(f"{folder.with_name('moved')}"), ByteTokenizer()) == (first, False)
    os.rename(folder.with_name("moved"), folder)

    made = {first}
    for source, tokenizer, settings in [
        (text_files.text(str(folder)), Shifted(), {}),
        (text_files.text(str(folder)), Shifted(shift=11), {}),
        (text_files.text(str(folder)), Shifted(), {"bos": True}),
        (text_files.text(str(folder)), ByteTokenizer(), {"validation_fraction": 0.1}),
        (text_files.text(f"{folder}/*[1-9].txt"), ByteTokenizer(), {}),
    ]:
        out, read = reads(source, tokenizer, **settings)
        assert read
        made.add(out)
    (folder / "000.txt").write_text("changed")
    made.add(reads(text_files.text(str(folder)), ByteTokenizer())[0])
    assert len(made) == 7


@pytest.mark.parametrize(("shift", "vocab_size", "token"), [(10, 200, 205), (-33, 300, -1)])
def test_a_token_outside_the_vocabulary_is_an_error_and_leaves_nothing(folder, tmp_path, shift, vocab_size, token):
    with pytest.raises(ConfigError, match=rf"000\.txt: the tokenizer returns token {token}, .* has {vocab_size}"):
        tokenize_cached(text_files.text(str(folder)), Shifted(vocab_size, shift), tmp_path / "cache")
    assert [path for path in (tmp_path / "cache" / "tokens").iterdir() if path.suffix != ".lock"] == []


def test_invalid_settings(folder, tmp_path):
    source = text_files.text(str(folder))
    with pytest.raises(ConfigError, match="no bos token"):
        tokenize_cached(source, ByteTokenizer(), tmp_path, bos=True)
    for fraction in (-0.1, 1.0):
        with pytest.raises(ConfigError, match="0 or more and below 1"):
            tokenize_cached(source, ByteTokenizer(), tmp_path, validation_fraction=fraction)


def test_a_large_vocabulary_is_stored_in_four_bytes(folder, tmp_path):
    source = text_files.text(str(folder))
    large, small = (tokenize_cached(source, Shifted(size), tmp_path / f"{size}") for size in (70_000, 300))
    assert IndexedTokens(large / "train").dtype == np.int32
    assert IndexedTokens(small / "train").dtype == np.uint16


def test_progress_is_plain_lines_where_there_is_no_terminal(folder, tmp_path, capfd):
    tokenize_cached(text_files.text(str(folder)), ByteTokenizer(), tmp_path)
    line = capfd.readouterr().err
    assert "100 documents" in line
    assert "tokens/s" in line
    assert "\x1b" not in line


def test_the_folder_says_what_it_is(folder, tmp_path):
    out = tokenize_cached(text_files.text(str(folder)), ByteTokenizer(), tmp_path, validation_fraction=0.5)
    written = json.loads((out / "settings.json").read_text())
    assert written["tokenizer"] == "bytes"
    assert written["validation_fraction"] == 0.5


def _race(target, log, start):
    start.wait()

    def build(path):
        with open(log, "a") as file:
            file.write("built\n")
        time.sleep(0.2)
        path.mkdir()
        (path / "content").write_text("whole")

    assert (build_once(Path(target), build) / "content").read_text() == "whole"


def test_of_many_processes_one_builds(tmp_path):
    context = multiprocessing.get_context("fork")
    start = context.Event()
    target, log = tmp_path / "deep" / "target", tmp_path / "log"
    racers = [context.Process(target=_race, args=(target, log, start)) for _ in range(6)]
    for racer in racers:
        racer.start()
    start.set()
    for racer in racers:
        racer.join()
    assert [racer.exitcode for racer in racers] == [0] * 6
    assert log.read_text() == "built\n"


def test_a_build_that_fails_or_was_killed_leaves_no_result(tmp_path):
    target = tmp_path / "target"
    (tmp_path / "target.partial").mkdir()
    (tmp_path / "target.partial" / "half").write_text("left by a killed process")

    def fail(path):
        path.mkdir()
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        build_once(target, fail)
    assert not target.exists()
    assert not (tmp_path / "target.partial").exists()
    build_once(target, lambda path: path.mkdir())
    assert list(target.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cache folder .*file.* cannot be written"):
        build_once(tmp_path / "file" / "target", lambda path: None)


def test_the_default_cache_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_path() == tmp_path / "torchladder"
    assert cache_path("/elsewhere") == Path("/elsewhere")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_path() == Path.home() / ".cache" / "torchladder"
