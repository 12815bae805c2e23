"""What the pages on data show: the commands, in order and as they stand there, and the settings."""

import glob
import gzip
import json
import re
import shlex
import sys

import numpy as np
import pytest

from tests.test_docs import ROOT
from tests.test_docs import commands as shown
from torchladder import commands, config, train
from torchladder.data.corpus import SourceLoader
from torchladder.data.formats.indexed import IndexedTokens

# What stands in for a corpus is small, and so is all that is made of it.
SMALL = {
    "8000": "400",
    '"small"': '"debug"',
    "0.01": "0.2",
    "steps = 200 ": "steps = 8 ",
    "warmup_steps = 20": "warmup_steps = 2",
}
SHORT = [
    *("--training.seq_len", "64", "--training.local_batch_size", "4", "--metrics.log_freq", "1"),
    *("--training.mixed_precision_param", "float32", "--samples.max_new_tokens", "4"),
]
PAGES = [ROOT / "docs" / name for name in ("data.md", "prepare.md", "mixing.md", "hub.md", "validation.md")]


def small(text):
    for long, short in SMALL.items():
        text = text.replace(long, short)
    return text


def blocks(page):
    return re.findall(r"```toml\n(.*?)```", page.read_text(), flags=re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two languages, one plain and one compressed."""
    folder = tmp_path_factory.mktemp("corpus")
    for language, words in (("en", "the quick brown fox jumps"), ("de", "der schnelle braune Fuchs springt über")):
        (folder / "data" / language).mkdir(parents=True)
        lines = [json.dumps({"text": f"{words} {i}. " * (i % 7 + 1)}) + "\n" for i in range(24)]
        name, content = f"{language}.jsonl", "".join(lines).encode()
        if language == "de":
            name, content = f"{name}.gz", gzip.compress(content)
        (folder / "data" / language / name).write_bytes(content)
    (run,) = (block for block in blocks(PAGES[0]) if block.startswith("# run.toml"))
    (folder / "run.toml").write_text(small(run))
    return folder


def test_the_commands_lead_from_folders_to_a_run(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    (folder / "data" / "en" / "more.jsonl").write_text("")
    for command in [command for page in PAGES[:2] for command in shown(page)]:
        words = shlex.split(small(command))
        if words[:2] == ["torchladder", "train"]:
            assert train.main([*words[2:], *SHORT]) == 0
            continue
        assert words[0] == "torchladder", command
        words = [name for word in words for name in (sorted(glob.glob(word)) if "*" in word else [word])]  # as a shell
        monkeypatch.setattr(sys, "argv", [*words, *(SHORT if words[1] == "plan" else [])])
        assert commands.main() == 0, command
    said = capsys.readouterr().out
    assert "0.00 to " in said  # epochs, as planned
    parts = [IndexedTokens(name).num_tokens for name in ("tokens/all", "tokens/en", "tokens/en-validation")]
    assert parts[0] == parts[1] + parts[2] > parts[1]
    steps = [json.loads(line) for line in (folder / "outputs" / "mine" / "metrics.jsonl").read_text().splitlines()]
    assert steps[-1]["step"] > 5


def test_the_plugin_reads_its_sources(tmp_path, monkeypatch):
    (plugin,) = re.findall(r"```python\n# my_sources.py\n(.*?)```", PAGES[0].read_text(), flags=re.DOTALL)
    (settings,) = (block for block in blocks(PAGES[0]) if "my_sources" in block)
    (tmp_path / "my_sources.py").write_text(plugin)
    (tmp_path / "run.toml").write_text(settings)
    for folder in ("letters", "tokens"):
        (tmp_path / folder).mkdir()
    (tmp_path / "letters" / "1897-01.txt").write_text("Dear reader")
    np.save(tmp_path / "tokens" / "a.npy", np.arange(600))
    monkeypatch.chdir(tmp_path)
    letters, tokens = config.load(["--job.config_file", "run.toml"]).data.sources
    assert [document.text for document in letters.text_source().documents()] == ["Dear reader"]
    found = SourceLoader(None, tmp_path, 0.0, bos=False).open(tokens, "train")
    assert found.lengths.tolist() == [512, 88]


@pytest.mark.parametrize("number", range(sum(len(blocks(page)) for page in PAGES)))
def test_the_settings_are_settings(number, tmp_path):
    text = [block for page in PAGES for block in blocks(page)][number]
    (tmp_path / "run.toml").write_text(text)
    (tmp_path / "my_sources.py").write_text(
        re.findall(r"```python\n(.*?)```", PAGES[0].read_text(), flags=re.DOTALL)[0]
    )
    loaded = config.load(["--job.config_file", str(tmp_path / "run.toml")])
    assert loaded.data.name in ("rows", "hub")
