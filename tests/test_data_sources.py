"""Sources of plugins: their own keys in the file, on the command line and in --help, and the rows that they yield."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from torchladder import config, data
from torchladder.data import SourceConfig, sources
from torchladder.data.formats.indexed import IndexedWriter
from torchladder.data.tokenizer import ByteTokenizer
from torchladder.data.unlabeled_tokens import PADDING, mark_unlabeled, split_labels
from torchladder.registry import ConfigError

PLUGIN = '''
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from torchladder.data import sources


@sources.register_text("verses")
@dataclass(frozen=True)
class Verses:
    """Verses out of nothing."""

    refrain: str
    """What every verse repeats."""
    verses: int = 3
    """How many verses there are."""
    tags: tuple[str, ...] = ()
    """Words after each verse."""

    name = "verses"

    def documents(self):
        for number in range(self.verses):
            yield sources.Document(str(number), " ".join((self.refrain, str(number), *self.tags)), 1)

    def size(self):
        return self.verses

    def stamp(self):
        return self.fingerprint()

    def fingerprint(self):
        return f"{self.refrain}-{self.verses}-{len(self.tags)}"


class Shard:
    def __init__(self, flat):
        self.flat, self.offsets, self.lengths = flat, np.array([0]), np.array([len(flat)])
        self.fingerprint = flat.tobytes().hex()


@sources.register_tokens("numbers", suffixes=(".numbers",))
def numbers(files: list[Path], eos: int | None, scale: int = 1, offset: float | None = None):
    """Numbers in a text file.

    Args:
        scale: Factor of every token.
        offset: Unused.
    """
    return [Shard(np.array([*(int(word) * scale for word in file.read_text().split()), eos])) for file in files]
'''


@pytest.fixture
def run(tmp_path):
    """Loads a config whose only source is a given table."""
    (tmp_path / "plugin_of_sources.py").write_text(PLUGIN)
    (tmp_path / "a.numbers").write_text("1 2 3 4 5 6 7 8 9")

    def run(table: str, *argv: str) -> config.Config:
        file = tmp_path / "run.toml"
        file.write_text(
            '[job]\nplugins = ["plugin_of_sources"]\n[tokenizer]\nname = "bytes"\n'
            f'[data]\nshuffle = false\nvalidation_fraction = 0.0\ncache_folder = "{tmp_path}/cache"\n'
            f"sources = [{table}]\n"
        )
        return config.load(["--job.config_file", str(file), *argv])

    return run


def rows(loaded: config.Config, seq_len: int = 8) -> list[int]:
    loader = data.registry.build(
        loaded.data, seq_len=seq_len, split="train", tokenizer=ByteTokenizer(), dp_rank=0, dp_degree=1,
        local_batch_size=1, global_batch_size=1, steps=None,
    )  # fmt: skip
    return next(loader).tokens[0].tolist()


KINDS = {
    "text": '{ name = "verses", refrain = "la", verses = 5, tags = ["x", "y"] }',
    "tokens": '{ path = "PATH/a.numbers", scale = 2 }',
}


@pytest.fixture(params=KINDS)
def table(request, tmp_path):
    return KINDS[request.param].replace("PATH", str(tmp_path))


def test_a_source_of_a_plugin_has_its_own_keys(run, tmp_path):
    (verses,) = run(KINDS["text"]).data.sources
    assert (verses.refrain, verses.verses, verses.tags, verses.weight) == ("la", 5, ("x", "y"), 1.0)
    assert (verses.kind, verses.is_tokens, verses.title) == ("verses", False, "verses")
    (numbers,) = run(KINDS["tokens"].replace("PATH", str(tmp_path))).data.sources
    assert (numbers.scale, numbers.offset, numbers.kind, numbers.is_tokens) == (2, None, "numbers", True)
    assert [file.name for file in numbers.files()] == ["a.numbers"]


def test_the_keys_come_from_the_command_line_too(run, table):
    from_file = run(table).data.sources
    assert run('{ name = "python-stdlib" }', "--data.sources", table).data.sources == from_file
    loaded = run('{ name = "python-stdlib" }', "--data.validation_sources", table, table)
    assert loaded.data.validation_sources == from_file * 2


def test_resolved_settings_keep_the_keys(run, table, tmp_path):
    first = run(table)
    (tmp_path / "resolved.toml").write_text(first.to_toml())
    second = config.load(["--job.config_file", str(tmp_path / "resolved.toml")])
    assert second.data.sources == first.data.sources
    assert second.to_toml() == first.to_toml()


def test_rows_are_read_from_the_sources(run, tmp_path):
    assert rows(run(KINDS["text"])) == list(b"la 0 x y")
    assert rows(run(KINDS["tokens"].replace("PATH", str(tmp_path)))) == [2, 4, 6, 8, 10, 12, 14, 16]
    # A folder is searched for the suffixes of the source that is named.
    assert rows(run(f'{{ name = "numbers", path = "{tmp_path}" }}'))[:3] == [1, 2, 3]


WRONG = [
    ('{ name = "verses", refrain = "la", verse = 1 }', ["'verse'", "Did you mean 'verses'", "refrain", "weight"]),
    ('{ name = "verses", refrain = "la", text_key = "a" }', ["unknown key 'text_key' in source 'verses'"]),
    ('{ name = "verses", refrain = "la", verses = "3" }', ["verses", "integer"]),
    ('{ name = "verses", refrain = "la", verses = 1.5 }', ["verses", "integer"]),
    ('{ name = "verses", refrain = "la", weight = "1" }', ["weight", "number"]),
    ('{ name = "verses" }', ["refrain", "required"]),
    ('{ name = "verse", refrain = "la" }', ["unknown data source 'verse'", "Did you mean 'verses'", "numbers"]),
    ('{ path = "a.numbers", scal = 2 }', ["unknown key 'scal' in source 'numbers'", "Did you mean 'scale'"]),
    ('{ path = "a.numbers", scale = "2" }', ["scale", "integer"]),
    ('{ path = "a.numbers", eos = 3 }', ["unknown key 'eos' in source 'numbers'"]),
    ('{ name = "python-stdlib", path = "x" }', ["unknown key 'path' in source 'python-stdlib'"]),
    ('{ path = "x.bin", text_key = "body" }', ["unknown key 'text_key' in source 'indexed'"]),
    ('{ path = "a.txt", on_error = "skp" }', ["on_error", "'skip'"]),
    ('{ path = ["a.txt", 3] }', ["path", "string"]),
    ("{ path = 3 }", ["path", "string"]),
    ("{ name = 3 }", ["unknown data source '3'"]),
    ('{ pth = "a.txt" }', ["'pth'", "Did you mean 'path'"]),
    ("{}", ["needs a path"]),
    ("3", ["must be a table"]),
]


@pytest.mark.parametrize(("table", "words"), WRONG)
def test_a_wrong_table_is_one_error(run, table, words):
    with pytest.raises(ConfigError, match=r"run\.toml: data\.sources") as error:
        run(table)
    assert all(word in str(error.value) for word in words), str(error.value)
    with pytest.raises(ConfigError, match=r"--data\.sources") as error:
        run('{ name = "python-stdlib" }', "--data.sources", table)
    assert all(part in str(error.value) for word in words for part in word.split()), str(error.value)


def test_help_shows_the_keys_of_every_source(run, table, capsys):
    with pytest.raises(SystemExit) as end:
        run(table, "--help")
    assert not end.value.code
    shown = capsys.readouterr().out
    for line in (
        "Keys of verses:",
        "refrain: What every verse repeats.",
        "Keys of numbers:",
        "scale: Factor of every token.",
        "Keys of text:",
        "text_key: Key of the text",
        "label: What reports",
        "Keys as in sources.",
    ):
        assert line in shown


@pytest.mark.parametrize("name", ["text", "indexed"])
@pytest.mark.parametrize("register", [sources.register_text, sources.register_tokens])
def test_two_sources_of_one_name_are_refused(register, name):
    with pytest.raises(ConfigError, match=f"'{name}' is registered twice"):
        register(name)(lambda: None)
    assert sources.token_formats["indexed"].suffixes == (".bin", ".idx")


def test_parameters_with_reserved_names_are_refused(monkeypatch):
    monkeypatch.setattr(sources.registry, "_components", dict(sources.registry._components))
    sources.register_text("heavy")(lambda weight: None)
    sources.register_text("cached")(lambda cache: None)
    for name, key in (("heavy", "weight"), ("cached", "cache")):
        with pytest.raises(ConfigError, match=f"{name}': the parameter name '{key}' is reserved"):
            SourceConfig(name=name)


def test_entries_are_values():
    entry = SourceConfig(path="a.txt", text_key="body", label="notes")
    assert hash(entry) == hash(SourceConfig(path="a.txt", text_key="body", label="notes"))
    assert isinstance(entry, SourceConfig)
    assert dataclasses.replace(entry, text_key="text").text_key == "text"
    assert (entry.title, SourceConfig(path=["a.txt", "b.txt"]).title) == ("notes", "a.txt b.txt")
    with pytest.raises(dataclasses.FrozenInstanceError):
        entry.weight = 2.0


def test_excluded_files_and_missing_ones(tmp_path):
    for name in "ab":
        with IndexedWriter(tmp_path / name, np.dtype(np.uint16)) as writer:
            writer.add([1])
    entry = SourceConfig(path=str(tmp_path / "*.bin"))
    assert [file.name for file in entry.files(["b"])] == ["a.bin"]
    with pytest.raises(ConfigError, match="no file matches"):
        SourceConfig(path=str(tmp_path / "none.bin")).check()
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": "a"}) + "\n")
    assert SourceConfig(path=str(tmp_path / "x.jsonl")).check(["b"]) == set()


def test_tokens_without_a_label_are_stored_below_zero():
    stored = np.where([True, False, True, False, True], mark_unlabeled(np.array([5, 7, 0, 9, 3])), [5, 7, 0, 9, 3])
    assert stored.tolist() == [~5, 7, ~0, 9, ~3]
    assert mark_unlabeled(stored).tolist() == [~5, ~7, ~0, ~9, ~3]
    for dtype in (np.int32, np.int64):
        content = torch.from_numpy(stored.astype(dtype)[None])
        tokens, labels = split_labels(content)
        assert (tokens.tolist(), labels.tolist()) == ([[5, 7, 0, 9]], [[7, -100, 9, -100]])
        assert (tokens.dtype, labels.dtype, content.tolist()) == (torch.int64, torch.int64, [stored.tolist()])
    assert mark_unlabeled(np.array(0)) == PADDING
