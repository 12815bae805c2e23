import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchladder.data import sources
from torchladder.data.text import text_files
from torchladder.registry import ConfigError


def texts(source):
    return {document.identity: document.text for document in source.documents()}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "a.txt").write_bytes("one\r\n\ttwo é".encode())
    (tmp_path / "b" / "c.py").write_text("print(1)\n")
    (tmp_path / "b" / "d.md").write_text("# head\n")
    (tmp_path / "b" / "picture.png").write_bytes(b"\x89")
    lines = [{"text": "first", "note": "n1"}, {"text": "line\nbreak", "note": "n2"}]
    (tmp_path / "e.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    return tmp_path


def test_a_folder_is_read_to_the_bottom(folder):
    assert texts(text_files.text(str(folder))) == {
        "a.txt": "one\r\n\ttwo é",
        "b/c.py": "print(1)\n",
        "b/d.md": "# head\n",
        "e.jsonl:1": "first",
        "e.jsonl:2": "line\nbreak",
    }


def test_globs_lists_and_files(folder, monkeypatch):
    assert set(texts(text_files.text(f"{folder}/**/*.py"))) == {"b/c.py"}
    assert set(texts(text_files.text([f"{folder}/b", f"{folder}/a.txt"]))) == {"c.py", "d.md", "a.txt"}
    assert set(texts(text_files.text(f"{folder}/*"))) == {"a.txt", "b/c.py", "b/d.md", "e.jsonl:1", "e.jsonl:2"}
    monkeypatch.chdir(folder)
    assert set(texts(text_files.text("b/*.md"))) == {"d.md"}
    assert set(texts(text_files.text("a.txt"))) == {"a.txt"}


def test_the_key_of_the_text_is_a_setting(folder):
    assert list(texts(text_files.text(f"{folder}/e.jsonl", text_key="note")).values()) == ["n1", "n2"]


def test_identities_do_not_depend_on_the_place(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "moved"
    before, fingerprint = texts(text_files.text(str(folder))), text_files.text(str(folder)).fingerprint()
    os.rename(folder, elsewhere)
    assert texts(text_files.text(str(elsewhere))) == before
    assert text_files.text(str(elsewhere)).fingerprint() == fingerprint


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("none/*.txt", r"no file matches 'none/\*.txt'"),
        ("missing.txt", "no file matches 'missing.txt'"),
        (
            "b/picture.png",
            r"'b/picture.png' matches no text file. Known: .jsonl, .json, .txt, .md, .py, .pa",
        ),
        ("b/*.png", r"'b/\*.png' matches no text file"),
        ("", "needs a path"),
        ([], "needs a path"),
    ],
)
def test_paths_that_name_nothing(folder, monkeypatch, path, message):
    monkeypatch.chdir(folder)
    with pytest.raises(ConfigError, match=message):
        text_files.text(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", r"x\.jsonl:2: not JSON"),
        ("[1, 2]", r"x\.jsonl:2: holds a list"),
        ('{"texts": "a"}', r"x\.jsonl:2: text_key: unknown key 'text'. Did you mean 'texts'\? Known: texts"),
        ('{"text": 5}', r"x\.jsonl:2: 'text' holds a int, not a string"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    (tmp_path / "x.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(ConfigError, match=message):
        list(text_files.text(str(tmp_path)).documents())


def test_what_cannot_be_read_is_an_error_or_counted(tmp_path, caplog):
    (tmp_path / "x.txt").write_bytes(b"\xef\xbb\xbfa\xffb\xc3")
    (tmp_path / "y.jsonl").write_bytes(b'{"text": "c\\ud800d"}\n{"text": "fine"}\n')
    with pytest.raises(ConfigError, match=r"x\.txt: not UTF-8"):
        texts(text_files.text(str(tmp_path)))
    assert list(texts(text_files.text(str(tmp_path), on_error="skip")).values()) == ["fine"]
    assert "2 documents: not UTF-8 (first: " in caplog.text
    assert list(texts(text_files.text(str(tmp_path), on_error="repair")).values()) == ["ab", "cd", "fine"]


def test_sizes_add_up(folder):
    source = text_files.text([f"{folder}/a.txt", f"{folder}/b"])
    assert sum(document.size for document in source.documents()) == source.size() > 0


def test_the_stamp_sees_changes_and_the_fingerprint_only_content(folder):
    source = text_files.text(str(folder))
    stamp, fingerprint = source.stamp(), source.fingerprint()
    os.utime(folder / "a.txt", ns=(1, 1))
    assert source.stamp() != stamp
    assert source.fingerprint() == fingerprint
    (folder / "a.txt").write_bytes(b"other")
    assert source.fingerprint() != fingerprint
    assert text_files.text(str(folder), text_key="note").fingerprint() != source.fingerprint()
    assert text_files.text(str(folder), on_error="skip").fingerprint() != source.fingerprint()


@given(st.sets(st.text(max_size=12), max_size=50), st.floats(0, 1), st.floats(0, 1))
def test_a_larger_fraction_only_adds(identities, a, b):
    small, large = sorted((a, b))
    held = {identity for identity in identities if sources.held_out(identity, small)}
    assert held <= {identity for identity in identities if sources.held_out(identity, large)}
    assert not any(sources.held_out(identity, 0) for identity in identities)
    assert all(sources.held_out(identity, 1) for identity in identities)


def test_the_fraction_is_met():
    held = sum(sources.held_out(f"file{i}.py", 0.1) for i in range(20000))
    assert abs(held / 20000 - 0.1) < 0.01


def test_the_split_never_changes():
    # By value: a change here would move documents between training and validation of existing runs.
    assert [i for i in range(60) if sources.held_out(str(i), 0.1)] == [3, 9, 16, 21, 38, 46]
