"""Which files a path, folder or glob names: each real file once, and what is passed over is said."""

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchladder.data import SourceConfig
from torchladder.data.file_patterns import match_files
from torchladder.data.formats.indexed import IndexedWriter
from torchladder.data.prepare.tasks import expand_inputs
from torchladder.data.source_config import warn_of_shared_files
from torchladder.data.text import text_files
from torchladder.inference.evaluation.eval_files import expand_paths
from torchladder.registry import ConfigError


def names(*patterns, suffix=".txt"):
    return list(match_files(patterns, lambda file: file.suffix == suffix, "file").values())


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Visible, hidden and linked files of several kinds, and a link that forms a loop."""
    monkeypatch.chdir(tmp_path)
    for name in ("d/b.txt", "d/in/c.txt", "d/.ipynb_checkpoints/b-checkpoint.txt", "d/.b.txt", "out/e.txt", "d/p.PDF"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(name)
    os.symlink("../d", "d/loop")
    os.symlink("../../out", "d/in/linked")
    os.symlink("b.txt", "d/same.txt")
    os.symlink("nowhere", "d/gone.txt")
    return tmp_path


READERS = {
    "text": lambda patterns: [path for _, path in text_files.text(patterns).files],
    "prepare": expand_inputs,
    "evaluate": expand_paths,
    "tokens": lambda patterns: SourceConfig(name="indexed", path=patterns).files(),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("patterns", [["d"], ["d/*.*", "d/a.*"], ["d/**/a.*", "d"], ["d", "d/link"], ["d/*", "d/sub"]])
def test_every_reader_names_each_file_once(tmp_path, monkeypatch, reader, patterns):
    monkeypatch.chdir(tmp_path)
    Path("d/sub").mkdir(parents=True)
    for name in ("d/a", "d/sub/b"):
        with IndexedWriter(name, np.dtype(np.int32)) as writer:
            writer.add([1])
        Path(f"{name}.json").write_text("{}")  # metadata of the dataset, no text
        Path(f"{name}.txt").write_text("text")
    os.symlink("sub", "d/link")
    os.symlink("..", "d/sub/loop")
    found = READERS[reader](patterns)
    suffixes = {"tokens": {".bin", ".idx"}, "evaluate": {".bin", ".txt"}}.get(reader, {".txt"})
    expected = {(stem, suffix) for stem in "ab" for suffix in suffixes if stem == "a" or patterns != ["d/*.*", "d/a.*"]}
    assert sorted((file.stem, file.suffix) for file in found) == sorted(expected)


def test_a_folder_is_read_through_links_and_without_what_is_hidden(folder, caplog):
    assert names("d") == ["b.txt", "in/c.txt", "in/linked/e.txt"]
    assert "d: 3 files are read; passed over: 1 .pdf, 1 broken links, 2 hidden, 1 named again" in caplog.text
    caplog.clear()
    names("d")
    assert not caplog.text  # said once
    assert names("d/.b.txt") == [".b.txt"]  # named by itself
    assert names("d/.ipynb_checkpoints") == ["b-checkpoint.txt"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("d/**/*.txt", ["b.txt", "in/c.txt", "in/linked/e.txt"]),
        ("d/**", ["b.txt", "in/c.txt", "in/linked/e.txt"]),
        ("**/c.txt", ["d/in/c.txt"]),
        ("d/**/linked/*", ["in/linked/e.txt"]),
        ("*/*.txt", ["d/b.txt", "out/e.txt"]),
    ],
)
def test_a_loop_of_links_lists_no_file_twice(folder, pattern, expected):
    assert names(pattern) == expected
    assert len(names(f"{folder}/{pattern}")) == len(expected)


def test_many_loops_end(folder):
    for i in range(12):
        os.symlink(".", f"d/in/loop{i}")
    assert names("d/**/*.txt") == ["b.txt", "in/c.txt", "in/linked/e.txt"]


def test_a_link_that_is_added_renames_no_document(folder):
    """The name decides whether a document is held out for validation."""
    os.symlink("in", "d/a")
    assert names("d") == ["b.txt", "in/c.txt", "in/linked/e.txt"]


@given(st.lists(st.sampled_from(["d", "d/*", "d/a*", "d/**/*.txt", "d/x", "d/x/*", "d/l", "d/a.txt"]), min_size=1))
@settings(max_examples=40)
def test_any_list_names_each_real_file_once(tmp_path_factory, patterns):
    root = tmp_path_factory.mktemp("any")
    for name in ("d/a.txt", "d/x/a.txt", "d/x/y/b.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("")
    os.symlink("x", root / "d" / "l")
    files = match_files([f"{root}/{one}" for one in patterns], lambda file: True, "file")
    real = [file.resolve() for file in files]
    alone = [file.resolve() for one in patterns for file in match_files([f"{root}/{one}"], lambda file: True, "file")]
    assert real == list(dict.fromkeys(alone))


def test_a_folder_that_cannot_be_read_is_an_error(folder, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ConfigError, match="d cannot be read: Permission denied"):
        names("d")


def test_suffixes_in_any_case_are_text(tmp_path):
    for name in ("A.JSONL", "b.Txt", "c.jsonl.GZ", "d.json", "e.json.zstd", "f.jsonl.xz"):
        (tmp_path / name).write_bytes(b"")
    assert [file.name for file in expand_inputs([str(tmp_path)])] == sorted(os.listdir(tmp_path))


def test_two_sources_of_the_same_file_are_told(folder, caplog):
    one, two, other = (SourceConfig(path=path, label=path) for path in ("d/b.txt", "d", "out"))
    warn_of_shared_files([one], [])
    warn_of_shared_files([SourceConfig(name="python-stdlib"), one], [])
    assert "both read" not in caplog.text
    warn_of_shared_files([one, two], [])
    assert f"the sources d/b.txt and d both read {folder}/d/b.txt: its share of the rows is that of both" in caplog.text
    warn_of_shared_files([two], [SourceConfig(path="d", label="d")])
    assert "b.txt and 2 other files: validation reads what the run trains on" in caplog.text
    caplog.clear()
    warn_of_shared_files([one], [other])
    assert not [record for record in caplog.records if "both read" in record.message]
